"""Errors name the argument, what came and what is accepted."""

import pytest
import torch

from embedfuse.ops import maxsim, maxsim_packed, maxsim_rerank, quantize_int8
from embedfuse.ops.maxsim.op import OP

Q, D = torch.ones(2, 3, 4), torch.ones(5, 6, 4)
CU_Q, CU_D = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 6], [0, 5, 30]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": Q[0]}),
        ("d", {"d": D[..., :3]}),
        ("d", {"d": D.half()}),
        ("q", {"q": Q.long(), "d": D.long()}),
        ("d", {"d": D.to("meta")}),
        ("q_mask", {"q_mask": torch.ones(2, 4)}),
        ("d_mask", {"d_mask": torch.ones(6, 5)}),
        ("d_mask", {"d_mask": torch.ones(5, 6, device="meta")}),
        ("reduction", {"reduction": "max"}),
        ("padding", {"padding": "zero"}),
        ("q", {"q": []}),
        (r"q\[1\]", {"q": [Q[0], Q[0].half()]}),
        (r"d\[1\]", {"d": [D[0], D]}),
        (r"d\[1\]", {"d": [D[0], quantize_int8(D[0])]}),
        ("q", {"q": quantize_int8(Q)}),
        ("q", {"q": [quantize_int8(Q[0])]}),
        ("q_mask", {"q": [Q[0]], "q_mask": torch.ones(1, 3)}),
        ("d_mask", {"d": [D[0]], "d_mask": torch.ones(1, 6)}),
    ],
)
def test_padded_errors(name, changes):
    with pytest.raises(ValueError, match=rf"^{name}[:=]"):
        maxsim(**({"q": Q, "d": D} | changes))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": Q}),
        ("cu_q", {"cu_q": CU_Q.long()}),
        ("cu_d", {"cu_d": CU_D + 1}),
        ("cu_d", {"cu_d": CU_D[:0]}),
        ("cu_d", {"cu_d": CU_D.to("meta")}),
        ("pairs", {"pairs": torch.zeros(3, dtype=torch.int64)}),
        ("pairs", {"pairs": torch.zeros(3, 2)}),
        ("pairs", {"pairs": torch.tensor([[0, 2]])}),
        ("pairs", {"pairs": torch.tensor([[-1, 0]])}),
    ],
)
def test_packed_errors(name, changes):
    args = {"q": Q.view(6, 4), "cu_q": CU_Q, "d": D.view(30, 4), "cu_d": CU_D}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        maxsim_packed(**(args | changes))


def test_wrong_bounds_say_what_came(backend):
    wanted = "cu_d: must start at 0, .* number of tokens, 30; starts at 0, ends at 31"
    with pytest.raises(ValueError, match=wanted):
        maxsim_packed(Q.view(6, 4), CU_Q, D.view(30, 4), torch.tensor([0, 31]).int())
    with pytest.raises(ValueError, match="starts at 0, ends at 30, falls"):
        maxsim_packed(Q.view(6, 4), CU_Q, D.view(30, 4), torch.tensor([0, 9, 7, 30]).int())


def test_what_is_no_text():
    with pytest.raises(TypeError, match=r"^d: NoneType; accepted are tensors"):
        maxsim(Q, None)
    with pytest.raises(TypeError, match=r"^q: list; accepted are tensors"):
        maxsim_packed([Q[0]], CU_Q, D.view(30, 4), CU_D)


def test_rerank_errors():
    for name, args in {
        "top_k=0": (Q[0], D, 0),
        "query": (Q, D),
        r"documents\[1\]": (Q[0], [D[0], D]),
        r"documents\[0\]": (Q[0], [D[0].half()]),
        "documents": (Q[0], D.half()),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            maxsim_rerank(*args)


def test_the_kernel_guards_its_memory(cpu_module):
    q, d = Q.view(6, 4), D.view(30, 4)
    spans = torch.tensor([[0, 3]])
    for name, args in {
        "query_spans": (torch.tensor([[4, 7]]), spans, None, 3),
        "document_spans": (spans, torch.tensor([[-1, 7]]), None, 3),
        "pairs": (spans, spans, torch.tensor([[0, 1]]), 3),
        "width": (spans, spans, None, 2),
    }.items():
        q_spans, d_spans, pairs, width = args
        with pytest.raises(ValueError, match=f"^{name}: "):
            OP(q, q_spans, [d], d_spans, None, None, pairs, False, width)
    across = torch.tensor([[0, 10], [8, 12]])
    with pytest.raises(ValueError, match=r"^document_spans: a text lies in more"):
        OP(q, spans, [d[:10], d[10:]], across, None, None, None, False, 3)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q_mask", lambda: maxsim(Q, D, q_mask=[[1, 1, 0]] * 2)),
        ("d_mask", lambda: maxsim(Q, D, d_mask="right")),
        ("pairs", lambda: maxsim(Q, D, pairs=[[0, 1]])),
        (r"d\[1\]", lambda: maxsim(Q, [D[0], None])),
        ("cu_q", lambda: maxsim_packed(Q.flatten(0, 1), [0, 6], D.flatten(0, 1), CU_D)),
        ("pairs", lambda: maxsim_packed(Q.flatten(0, 1), CU_Q, D.flatten(0, 1), CU_D, [[0, 1]])),
        ("pairs", lambda: maxsim(Q, D, pairs=torch.tensor([[0, 5]]))),
    ],
)
def test_other_types_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
        call()


def test_pairs_of_padded_texts():
    """Those of the matrix, with masks of holes and lists."""
    generator = torch.Generator().manual_seed(0)
    q, d = torch.randn(3, 4, 8, generator=generator), torch.randn(5, 6, 8, generator=generator)
    masks = torch.rand(3, 4, generator=generator) > 0.3, torch.rand(5, 6, generator=generator) > 0.3
    pairs = torch.tensor([[2, 4], [0, 0], [2, 1]])
    every = maxsim(q, d, *masks)
    torch.testing.assert_close(maxsim(q, d, *masks, pairs=pairs), every[pairs[:, 0], pairs[:, 1]])
    every = maxsim(list(q), d, d_mask=masks[1], padding="zero_vector", reduction="mean")
    found = maxsim(
        list(q), d, d_mask=masks[1], padding="zero_vector", reduction="mean", pairs=pairs
    )
    torch.testing.assert_close(found, every[pairs[:, 0], pairs[:, 1]])
