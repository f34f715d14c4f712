"""sparse_scatter in CUDA C++ on the host: long texts, tokens behind the last text, launches and bytes."""

import functools
import multiprocessing
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embedfuse import ops, testing
from embedfuse.ops.lexical.dense import OP as DENSE
from embedfuse.ops.lexical.kept import OP as KEPT
from embedfuse.ops.lexical.sparse_scatter import kept_tokens
from embedfuse.registry import OPS, use_backend
from tests import lexical_checks as checks
from tests.build import emulated_cuda


class Torch(TorchDispatchMode):
    """What torch would launch on a GPU, and the bytes that it allocates."""

    def __init__(self):
        super().__init__()
        self.launched: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "embedfuse":
            with self:
                return OPS[function._opname].select("cpu", args[0].dtype)(*args)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        new = [t for t in tensors(out) if t.untyped_storage().data_ptr() not in given]
        self.bytes += sum(t.untyped_storage().nbytes() for t in new)
        if new and "empty" not in function._opname:
            self.launched.append(function._opname)
        return out


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# 2,048 tokens are the most that are sorted in shared memory at once.
@pytest.mark.parametrize("lengths", [[2048, 0, 2049], [1, 7000, 0]])
def test_long_texts(emulated, lengths):
    args = checks.long_sequences(lengths, "cpu")
    testing.assert_close_to_reference(KEPT, args, "cuda")
    checks.check_one_id(args, lengths)


@pytest.mark.parametrize("ends", [[0, 30, 30, 35], [0, 0], [0]])
def test_tokens_behind_the_last_text_give_nothing(emulated, ends):
    weights, ids, _, excluded = checks.long_sequences([40, 3], "cpu")
    cu_seqlens, end = torch.tensor(ends, dtype=torch.int32), ends[-1]
    within = weights[:end], ids[:end], cu_seqlens, excluded
    with testing.poisoned_empty():
        index, indptr, order = KEPT(weights, ids, cu_seqlens, excluded)
        dense = DENSE(weights, ids, cu_seqlens, excluded, 2000)
    with use_backend("reference"):
        wanted = KEPT(*within)
        assert torch.equal(dense, DENSE(*within, 2000))
    assert torch.equal(indptr, wanted[1])
    for found, part in ((index, wanted[0]), (order, wanted[2])):
        assert torch.equal(found[:end], part)
        assert found[end:].eq(-1).all()


def test_an_id_beyond_the_matrix_ends_the_process(emulated):
    """As a device's assertion does. Where no weight counts an id may be anything."""
    cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
    weights, ids = torch.tensor([1.0, -1.0, 2.0]), torch.tensor([3, -100, 8])
    got = ops.sparse_scatter(weights, ids, cu_seqlens=cu_seqlens, vocabulary=9)
    assert got.tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 2]]
    call = functools.partial(ops.sparse_scatter, weights, ids, cu_seqlens=cu_seqlens, vocabulary=8)
    process = multiprocessing.get_context("fork").Process(target=call)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGABRT


@pytest.fixture
def texts():
    """Four texts of 50 tokens in bf16, some of whose ids are special."""
    weights, ids, cu_seqlens, _ = checks.long_sequences([50] * 4, "cpu")
    return weights.bfloat16(), ids, {"cu_seqlens": cu_seqlens, "excluded": (0, 1, 2, 3)}


def test_a_matrix_is_zeroed_and_written_by_one_launch(emulated, texts):
    weights, ids, options = texts
    emulated_cuda.launches(emulated)
    with Torch() as by_torch:
        got = ops.sparse_scatter(weights, ids, **options, vocabulary=2000)
    assert by_torch.launched == ["new_zeros"]
    assert by_torch.bytes == got.nbytes == 2 * 4 * 2000
    assert emulated_cuda.launches(emulated) == [["dense_kernel<uint16_t>", "1", "256", "0"]]


def test_a_csr_takes_two_launches_and_two_gathers(emulated, texts):
    weights, ids, options = texts
    emulated_cuda.launches(emulated)
    with Torch() as by_torch:
        kept = kept_tokens(weights, ids, **options)
    assert by_torch.launched == []
    # index and order, indptr, scratch
    assert by_torch.bytes == 16 * 200 + 8 * 5 + (28 * 200 + 4 * 4)
    names = [["sequences_kernel", "4", "512", "0"], ["join_kernel", "5", "256", "0"]]
    assert emulated_cuda.launches(emulated) == names
    with Torch() as by_torch:
        kept.csr()
    # The number of entries is read on the host, where alone a GPU is waited for.
    assert by_torch.launched == ["index_select", "index_select", "clone"]
    assert emulated_cuda.launches(emulated) == []
