"""Tiles of maxsim's Triton version: slots of ragged queries, programs that walk, slices of the depth."""

import pytest
import torch

from embedfuse import testing
from embedfuse.ops.maxsim.op import OP
from embedfuse.registry import use_backend
from embedfuse.triton_kernels import maxsim

# Slots of 16 rows in tiles of 128: all fit; some rows past their slot; more than a tile of queries.
QUERIES = {
    "fit": [16, 3, 0, 9, 1],
    "longer than a slot": [2, 40, 0, 17, 5, 1],
    "two tiles": [11] * 9 + [16],
    "one": [32],
    "one, of three slots": [300],
}
DOCUMENTS = [70, 1, 0, 64, 65, 128, 7, 130]


def side(lengths, depth, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(int(ends[-1]), depth, generator=generator) / depth**0.5
    return x.to(dtype), torch.stack((ends[:-1], ends[1:]), 1)


def arguments(lengths, depth, dtype, **changes):
    (q, q_spans), (d, d_spans) = side(lengths, depth, dtype, 0), side(DOCUMENTS, depth, dtype, 1)
    names = "scale", "zero", "pairs", "normalize", "width"
    rest = dict(zip(names, (None, None, None, False, 0), strict=True)) | changes
    return q, q_spans, [d], d_spans, *(rest[name] for name in names)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("queries", QUERIES)
def test_slots(queries, everything):
    lengths = QUERIES[queries]
    zero = torch.arange(len(DOCUMENTS)) % 2 == 0
    width = max(lengths) + 3 if everything else 0
    args = arguments(lengths, 24, torch.float16, zero=zero, normalize=everything, width=width)
    testing.assert_close_to_reference(OP, args, "triton")


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("depth", [37, 128, 200, 256, 300, 512])
def test_depths(depth, int8):
    args = list(arguments([20, 4, 33], depth, torch.float16, width=33))
    if int8:
        args[2] = [(args[2][0] * 40 * depth**0.5).to(torch.int8)]
        args[4] = torch.linspace(-0.1, 0.1, len(args[2][0]))
    testing.assert_close_to_reference(OP, tuple(args), "triton")


@pytest.mark.parametrize("programs", [1, 3, 24])
def test_every_number_of_programs_gives_the_same_bits(monkeypatch, programs):
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(len(DOCUMENTS)))
    for changes in ({}, {"pairs": pairs.flip(0)}):
        args = arguments([20, 4, 30], 40, torch.float16, width=30, **changes)
        with use_backend("triton"), testing.poisoned_empty():
            wanted = OP(*args)
            monkeypatch.setattr(maxsim, "programs_of", lambda *_: programs)
            got = OP(*args)
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])
        monkeypatch.undo()


def test_fewer_programs_than_pairs():
    """On one processor, as the interpreter has."""
    cpu = torch.device("cpu")
    assert maxsim.programs_of(cpu, per_processor=3, tiles=1, count=1000) == 3
    assert maxsim.programs_of(cpu, per_processor=1, tiles=4, count=128) == 2
    assert maxsim.programs_of(cpu, per_processor=3, tiles=1, count=2) == 2
    assert maxsim.programs_of(cpu, per_processor=1, tiles=500, count=7) == 1


@pytest.mark.parametrize("place", [0, 63, 64, 100, 129])
def test_the_first_of_equal_products_and_of_nans(place):
    q = torch.ones(3, 8)
    d = torch.full((130, 8), -1.0)
    d[place:] = 1
    for value in (1, float("nan")):
        d[place] = d[-1] = value
        args = q, torch.tensor([[0, 3]]), [d], torch.tensor([[0, 130]])
        with use_backend("triton"):
            score, argmax = OP(*args, None, None, None, False, 3)
        assert argmax.tolist() == [[place] * 3]
        assert torch.equal(score.isnan(), torch.tensor([value != 1]))


def test_query_rows_are_read_once_where_they_fit():
    """The slot is a power of two that holds the average query; slots fill a tile of at most 128 rows."""
    for (rows, queries), wanted in {
        (1, 1): (16, 16),
        (32, 1): (32, 32),
        (32, 128): (32, 128),
        (17, 3): (32, 128),
        (1000, 9): (128, 128),
    }.items():
        config = maxsim.default_config(torch.bfloat16, 128, rows, queries, False, False)
        assert (config["SLOT"], config["B_Q"]) == wanted
