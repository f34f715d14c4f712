"""The functions of benchmarks/peers/gpu.py in Triton's interpreter, in fp16.

test_gpu_peers.py runs them in another process, because a GPU is simulated here. bf16 is left out: the
interpreter multiplies its bit patterns.
"""

import contextlib
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from torch.nn.functional import normalize
from triton.runtime.autotuner import Autotuner

from benchmarks.gpu.checks import assert_close, check_loss, gradients, maxsim_products
from benchmarks.peers import gpu as gpu_peers
from benchmarks.peers import losses

HOPPER = SimpleNamespace(name="an H100", multi_processor_count=2, major=9, minor=0)


def first_config(tuner: Autotuner, *args, **kwargs):
    return tuner.fn.run(*args, **kwargs, **tuner.configs[0].all_kwargs())


@pytest.fixture(autouse=True, scope="module")
def gpu():
    """What the peers ask of a GPU. TORCHDYNAMO_DISABLE is set: torch's compiler would use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: HOPPER)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        patch.setattr(Autotuner, "run", first_config)
        # What the interpreter lacks: PTX, and libdevice.
        patch.setattr(tl, "inline_asm_elementwise", lambda asm, constraints, args, **_: args[0])
        with contextlib.suppress(ImportError):
            import cut_cross_entropy.tl_utils as cce

            patch.setattr(cce, "tl_log1p", lambda x: tl.log(1 + x))
        yield


def each(peers: dict, *without: str):
    cases = [pytest.param(peer, id=name) for name, peer in peers.items() if name not in without]
    return pytest.mark.parametrize("peer", cases)


def require(peer: gpu_peers.Peer) -> None:
    for package in peer.packages:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"not installed: {package}")


def texts(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return normalize(x, dim=-1).half()


@pytest.mark.parametrize("queries", [1, 2])
@each(gpu_peers.MAXSIM)
def test_maxsim(peer, queries):
    require(peer)
    q, d = texts(queries, 32, 64), texts(3, 40, 64)
    scores = peer.function(q, d)()
    torch.testing.assert_close(scores, maxsim_products(q.float(), d.float()), rtol=0, atol=1e-5)


@each(gpu_peers.MAXSIM)
def test_maxsim_wide(peer):
    require(peer)
    q, d = texts(1, 32, 1024), texts(3, 20, 1024)
    scores = peer.function(q, d)()
    torch.testing.assert_close(scores, maxsim_products(q.float(), d.float()), rtol=0, atol=1e-5)


@each(gpu_peers.MAXSIM)
def test_maxsim_gradients(peer):
    require(peer)
    q, d = (x.requires_grad_() for x in (texts(2, 32, 64), texts(3, 40, 64)))
    weights = torch.tensor([[1.0, 2.0, -1.0], [0.5, -3.0, 1.0]])
    found, wanted = (
        torch.autograd.grad((scores * weights).sum(), (q, d))
        for scores in (peer.function(q, d)(), maxsim_products(q.float(), d.float()))
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-3)


@each(gpu_peers.MAXSIM_INT8)
def test_maxsim_int8(peer):
    require(peer)
    q, d = texts(1, 32, 64), texts(3, 40, 64)
    assert_close(peer.function(q, d)(), maxsim_products(q.float(), d.float()), 0.01, "scores")


def check(loss, ours, rows: int, pool: int, dim: int) -> None:
    sides = losses.embeddings(rows, pool, dim, torch.float16)
    exact = [x.detach().float().requires_grad_() for x in sides]
    found, wanted = gradients(loss, *sides), gradients(ours, *exact)
    check_loss(found, wanted)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, 0.02, "loss or gradient")


# On Hopper Liger's scaled loss is not written in Triton; here it runs as on other GPUs, in torch.
@each(gpu_peers.INFO_NCE, "Liger, scaled")
def test_info_nce(peer):
    require(peer)
    check(peer.function, losses.stored, 64, 96, 256)


def test_liger_scaled(monkeypatch):
    pytest.importorskip("liger_kernel", reason="not installed: liger-kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    check(gpu_peers.liger_scaled, losses.stored, 64, 96, 256)


def test_memeff():
    require(gpu_peers.INFO_NCE_SQUARE["memeff"])
    check(gpu_peers.memeff, losses.stored, 64, 64, 256)


@each(gpu_peers.SIGLIP)
def test_siglip(peer):
    require(peer)
    check(peer.function, losses.siglip_stored, 64, 64, 128)
