"""Copies, pickles, other processes and other ranks."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import DataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import embedfuse
from tests import ranks
from tests.tools.rows import Row, cases, check, check_document
from tests.tools.twins import assert_same, gradients, layers, linears, make_model, outcome, states


def pickled(model, folder):
    assert pickle.loads(pickle.dumps(type(model))) is type(model)
    return pickle.loads(pickle.dumps(model))


def cloudpickled(model, folder):
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(model))


def joblib_dumped(model, folder):
    joblib = pytest.importorskip("joblib")
    joblib.dump(model, folder / "model")
    return joblib.load(folder / "model")


def replica(model, folder):
    """As DataParallel makes them on GPUs: the same attributes, other modules."""
    twin = model._replicate_for_data_parallel()
    twin._modules = {name: copy.deepcopy(module) for name, module in model._modules.items()}
    return twin


_HOOK = "has a hook"
ROWS = [
    Row("`copy.deepcopy`", act=lambda m, _: copy.deepcopy(m)),
    Row("`pickle`, of model and class", act=pickled),
    Row("cloudpickle", act=cloudpickled),
    Row("joblib: `dump`, `load`", act=joblib_dumped),
    Row("`share_memory`", act=lambda m, _: m.share_memory()),
    Row("multiprocessing: spawn, fork", before="-"),
    Row("joblib: loky", before="-"),
    Row("`DataParallel`", act=lambda m, _: DataParallel(m)),
    Row("`DataParallel`: replicas", act=replica),
    Row("`DistributedDataParallel`", before="-"),
    Row(
        "FSDP2: `fully_shard(model)`",
        before="refused",
        reason="FSDP",
        remark="patch first, then shard: sharding changes the model's class",
    ),
    Row(
        "FSDP2: `fully_shard` of each layer",
        before="refused",
        after="original",
        reason=_HOOK,
        remark="before: as above; after: “… has a hook …”",
    ),
]


@cases(ROWS)
def test_copy(row, when, family, tmp_path):
    check(row, when, family, tmp_path)


def run_there(model) -> tuple[list, str]:
    torch.set_num_threads(1)
    with torch.no_grad():
        found = states(model)
    return found.tolist(), outcome(model)


@pytest.mark.parametrize("method", ["spawn", "fork", "loky"])
def test_another_process(method):
    model = make_model("bert")
    with torch.no_grad():
        expected = states(model)
    embedfuse.patch(model)
    if method == "loky":
        joblib = pytest.importorskip("joblib")
        [(found, ran)] = joblib.Parallel(2, backend="loky")([joblib.delayed(run_there)(model)])
    else:
        with multiprocessing.get_context(method).Pool(1) as pool:
            found, ran = pool.apply_async(run_there, (model,)).get(120)
    assert_close(torch.tensor(found), expected, rtol=0, atol=2e-5)
    assert ran == "works"


def shard_layers(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "FSDP2": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (2,))),
    "FSDP2 of layers": shard_layers,
}


def work(rank: int, size: int) -> dict[str, str]:
    outcomes = {}
    for family in ("bert", "mistral"):
        for name, wrap in WRAPPERS.items():
            original, model = make_model(family), make_model(family)
            embedfuse.patch(model)
            wrapped = wrap(model)
            with torch.no_grad():
                assert_close(states(wrapped), states(original), rtol=0, atol=5e-5)
            expected = gradients(original)
            found = {n.removeprefix("module."): g for n, g in gradients(wrapped).items()}
            assert found.keys() == expected.keys()
            for parameter, value in expected.items():
                gradient = getattr(found[parameter], "full_tensor", lambda g=found[parameter]: g)()
                assert_close(gradient, value, rtol=0, atol=1e-4 * max(1, value.abs().max().item()))
            outcomes[f"{name} {family}"] = outcome(wrapped)
            if name != "DDP":
                original = WRAPPERS[name](original)
                with pytest.raises(TypeError, match="FSDP"):
                    embedfuse.patch(original)
    return outcomes


def test_ranks(tmp_path):
    first, second = ranks.run(2, work, tmp_path)
    assert first == second
    for name, found in first.items():
        assert (_HOOK in found) if "layers" in name else found == "works", name


def test_different_twins_fail():
    """assert_same can fail."""
    other = make_model("bert")
    with torch.no_grad():
        linears(other)[0].weight.mul_(1.1)
    with pytest.raises(AssertionError):
        assert_same(make_model("bert"), other)


def test_document():
    check_document("Processes and ranks", ROWS)
