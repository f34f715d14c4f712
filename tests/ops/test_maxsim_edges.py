"""maxsim where tiles and registers end: remainders of depth and rows, the last byte of memory, what stands
between the rows of a view; by every instruction set."""

import ctypes
import mmap

import pytest
import torch

from embedfuse import config, testing
from embedfuse.ops import quantize_int8
from embedfuse.ops.maxsim.op import OP
from embedfuse.registry import use_backend

NAN, INF = float("nan"), float("inf")
KINDS = ("bfloat16", "float32", "int8")


@pytest.fixture(params=config.CPU_ISAS)
def isa(request, use_isa):
    use_isa(request.param)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5


def document(kind, rows, depth):
    """The rows as they lie in memory, and their scale."""
    x = normal(rows, depth, seed=1)
    return (
        tuple(vars(quantize_int8(x)).values()) if kind == "int8" else (x.to(dtype_of(kind)), None)
    )


def dtype_of(kind):
    return torch.float32 if kind == "int8" else getattr(torch, kind)


def check(q, d, scale, spans=None, normalize=False):
    rows = len(q)
    spans = torch.tensor(spans or [[0, len(d)]])
    args = (q, torch.tensor([[0, rows]]), [d], spans, scale, None, None, normalize, rows)
    return testing.assert_close_to_reference(OP, args, "cpp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 30, 32, 33, 34, 64, 100, 128, 1028])
def test_remainders_of_depth(isa, kind, depth):
    d, scale = document(kind, 90, depth)
    for rows in (17, 100):
        q = normal(rows, depth).to(dtype_of(kind))
        check(q, d, scale, [[0, 70], [70, 71], [71, 90], [12, 12]], normalize=depth > 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 15, 32, 48, 49])
def test_remainders_of_rows(isa, kind, rows):
    q = normal(rows, 40).to(dtype_of(kind))
    d, scale = document(kind, 330, 40)
    ends = [1, 15, 16, 17, 31, 33, 47, 49, 63, 64, 65, 70, 127, 129, 193]
    check(q, d, scale, [[11, 11 + n] for n in ends])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [30, 64, 70])
def test_between_the_rows_of_a_view_nothing_is_read(isa, kind, depth):
    if kind == "int8":  # NaN is no byte; the whole is
        wide = torch.full((70, depth + 9), 127, dtype=torch.int8)
    else:
        wide = torch.full((70, depth + 9), NAN, dtype=dtype_of(kind))
    d, scale = document(kind, 70, depth)
    wide[:, 3 : 3 + depth] = d
    for rows in (5, 20, 40):
        q = normal(rows, depth).to(dtype_of(kind))
        got = check(q, wide[:, 3 : 3 + depth], scale)
        for view, whole in zip(got, check(q, d, scale), strict=True):
            assert torch.equal(view, whole)


@pytest.fixture
def at_the_end_of_memory():
    """Copies a tensor to where the next byte cannot be read."""
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []

    def copy(x, gap=0):
        """The rows lie `gap` elements apart, and behind the last one there is no gap."""
        stride = x.shape[1] + gap
        used = (stride * (len(x) - 1) + x.shape[1]) * x.element_size()
        size = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, size + mmap.PAGESIZE)
        guard = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + size
        protect = libc.mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert protect(guard, mmap.PAGESIZE, 0) == 0
        kept.append(pages)
        memory = torch.frombuffer(pages, dtype=torch.uint8, count=size)[size - used :].view(x.dtype)
        return memory.as_strided(x.shape, (stride, 1), memory.storage_offset()).copy_(x)

    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [2, 31, 34, 64, 100])
def test_nothing_is_read_behind_the_last_row(isa, at_the_end_of_memory, kind, depth):
    for rows in (1, 15, 16, 33, 65):
        d, scale = document(kind, rows, depth)
        q = at_the_end_of_memory(normal(20, depth).to(dtype_of(kind)))
        for gap in (0, 3):
            check(q, at_the_end_of_memory(d, gap), scale, normalize=gap > 0)


@pytest.mark.parametrize("depth", [31, 34, 64])
@pytest.mark.parametrize("rows", [3, 20, 40])
def test_no_row_spoils_another(isa, depth, rows):
    q, d = (normal(n, depth, seed=n).bfloat16() for n in (rows, 75))
    for value in (NAN, INF):
        for row, column in ((0, 0), (63, depth - 1), (74, depth - 2)):
            bad = d.clone()
            bad[row, column] = value
            spans = [[0, row], [row + 1, 75], [0, 75]]
            check(q, bad, None, spans)
    q[1, depth - 1] = NAN
    argmax = check(q, d, None)[1]
    assert argmax[0, 1] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 20, 40])
def test_the_first_of_equal_products_counts(isa, kind, rows):
    q = normal(rows, 48).to(dtype_of(kind))
    d, scale = document(kind, 21, 48)
    sides = q, torch.tensor([[0, rows]])
    wanted = check(q, d, scale)[1]
    scale = None if scale is None else scale.repeat(5)
    spans = torch.tensor([[0, 5 * 21]])
    with use_backend("cpp"):
        got = OP(*sides, [d.repeat(5, 1)], spans, scale, None, None, False, rows)[1]
    assert torch.equal(got, wanted)
