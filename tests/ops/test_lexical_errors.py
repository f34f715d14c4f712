"""Errors of the lexical ops: each names the argument, what came and what is accepted."""

import pytest
import torch

from embedfuse.ops import Csr, lexical_scores, lexical_weights, sparse_scatter


def cu_seqlens(*values):
    return torch.tensor(values, dtype=torch.int32)


# Two rows, of two entries and of one.
CSR = Csr(torch.tensor([0, 2, 3]), torch.tensor([3, 5, 4]), torch.ones(3))
ONES, TWO_IDS = torch.ones(2), torch.tensor([4, 5])


@pytest.mark.parametrize(
    ("error", "text", "args", "options"),
    [
        (TypeError, "token_weights: torch.int64", (TWO_IDS, TWO_IDS), {}),
        (TypeError, "input_ids: torch.float32", (ONES, ONES), {}),
        (ValueError, r"token_weights: shape \(2,\)", (ONES, TWO_IDS), {"cu_seqlens": None}),
        (ValueError, r"token_weights: shape \(1, 2\)", (ONES[None], TWO_IDS[None]), {}),
        (ValueError, r"input_ids: shape \(1,\); accepted .* \(2,\)", (ONES, TWO_IDS[:1]), {}),
        (ValueError, "input_ids: on meta", (ONES, TWO_IDS.to("meta")), {}),
        (
            ValueError,
            "cu_seqlens: torch.int64",
            (ONES, TWO_IDS),
            {"cu_seqlens": torch.tensor([0, 2])},
        ),
        (ValueError, "cu_seqlens: must start", (ONES, TWO_IDS), {"cu_seqlens": cu_seqlens(0, 3)}),
        (
            ValueError,
            "cu_seqlens: must start",
            (ONES, TWO_IDS),
            {"cu_seqlens": cu_seqlens(0, 5, 2)},
        ),
        (ValueError, "attention_mask: not accepted", (ONES, TWO_IDS), {"attention_mask": ONES}),
        (
            ValueError,
            r"attention_mask: shape \(2,\); accepted .* \(1, 2\)",
            (ONES[None], TWO_IDS[None]),
            {"attention_mask": ONES, "cu_seqlens": None},
        ),
        (ValueError, "input_ids: an id is out of range", (ONES, torch.tensor([4, -1])), {}),
        (ValueError, "input_ids: an id is out of range", (ONES, torch.tensor([2**31, 1])), {}),
        (ValueError, "input_ids: 5; accepted are ids below", (ONES, TWO_IDS), {"vocabulary": 5}),
    ],
)
def test_scatter_errors_name_the_argument(backend, error, text, args, options):
    with pytest.raises(error, match=text):
        sparse_scatter(*args, **{"cu_seqlens": cu_seqlens(0, 2), **options})


@pytest.mark.parametrize(
    ("error", "text", "changed"),
    [
        (TypeError, "hidden_states: torch.int64", {"hidden_states": torch.ones(2, 3).long()}),
        (ValueError, r"hidden_states: shape \(1, 2, 3\)", {"hidden_states": torch.ones(1, 2, 3)}),
        (ValueError, r"weight: shape \(2,\); accepted is \(3,\)", {"weight": ONES}),
        (ValueError, r"bias: shape \(3,\)", {"bias": torch.ones(3)}),
        (TypeError, "weight: torch.bfloat16", {"weight": torch.ones(3).bfloat16()}),
        (ValueError, "bias: on meta", {"bias": torch.ones(1, device="meta")}),
        (ValueError, r"input_ids: shape \(1,\)", {"input_ids": TWO_IDS[:1]}),
        (ValueError, "cu_seqlens: must start", {"cu_seqlens": cu_seqlens(1, 2)}),
    ],
)
def test_weights_errors_name_the_argument(backend, error, text, changed):
    args = {"hidden_states": torch.ones(2, 3), "input_ids": TWO_IDS, "weight": torch.ones(3)}
    with pytest.raises(error, match=text):
        lexical_weights(**{**args, "cu_seqlens": cu_seqlens(0, 2), **changed})


def test_scores_errors_name_the_argument(backend):
    with pytest.raises(ValueError, match=r"documents: 1 rows; accepted .* 2"):
        lexical_scores(CSR, CSR[[0]], aligned=True)
    half = Csr(CSR.indptr, CSR.token_ids, CSR.weights.half())
    with pytest.raises(ValueError, match=r"documents: weights of dtype torch\.float16"):
        lexical_scores(CSR, half)
    with pytest.raises(ValueError, match="documents: weights of device meta"):
        lexical_scores(CSR, CSR.to("meta"))
    integers = Csr(CSR.indptr, CSR.token_ids, CSR.weights.long())
    with pytest.raises(ValueError, match=r"queries: weights of dtype torch\.int64"):
        lexical_scores(integers, integers)


@pytest.mark.parametrize("which", ["queries", "documents"])
@pytest.mark.parametrize(
    ("indptr", "ids"), [([0, 3], [1, 2]), ([0, 2, 1, 2], [1, 2]), ([0, 2], [-1, 2])]
)
def test_impossible_csr_errors(cpu_module, which, indptr, ids):
    bad = Csr(torch.tensor(indptr), torch.tensor(ids), torch.ones(2))
    with pytest.raises(ValueError, match=f"{which}: indptr must rise"):
        lexical_scores(**{"queries": CSR, "documents": CSR, which: bad})
