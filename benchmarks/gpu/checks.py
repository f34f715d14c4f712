"""What the values of a kernel are compared with before it is timed; each check raises AssertionError."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_same_direction(found: Tensor, wanted: Tensor, least: float, what: str) -> None:
    """The cosine of both, as one vector each, is at least `least`."""
    a, b = (x.detach().float().flatten() for x in (found, wanted))
    cosine = torch.nn.functional.cosine_similarity(a, b, 0).item()
    if not cosine >= least:
        raise AssertionError(f"other values: {what}, cosine {cosine:.4f} below {least}")


def assert_close(found: Tensor, wanted: Tensor, share: float, what: str) -> None:
    """The largest difference is at most `share` of the largest value."""
    error = ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()
    if not error <= share:
        raise AssertionError(
            f"other values: {what}, error {error:.4f} of the largest, above {share}"
        )


def gradients(loss: Callable, *sides: Tensor) -> list[Tensor]:
    """The loss and its gradient to each side."""
    value = loss(*sides)
    return [value.detach(), *torch.autograd.grad(value, sides)]


def check_loss(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Loss and gradients as `gradients` returns them.

    The positives in the pool have the largest gradients, so the other documents are checked separately.
    """
    value, q, pool = zip(found, wanted, strict=True)
    assert_close(*value, 0.05, "loss")
    assert_same_direction(*q, 0.99, "gradient of the queries")
    rows = len(q[0])
    assert_same_direction(*(x[:rows] for x in pool), 0.99, "gradient of the positives")
    if len(pool[0]) > rows:
        assert_same_direction(*(x[rows:] for x in pool), 0.99, "gradient of the other documents")


def check_part(loss: Callable, reference: Callable, q: Tensor, pool: Tensor) -> None:
    """Loss and gradients of the first rows, few enough that torch can store their scores."""
    part = [x.detach()[:2048].clone().requires_grad_() for x in (q, pool)]
    for found, wanted in zip(gradients(loss, *part), gradients(reference, *part), strict=True):
        assert_close(found, wanted, 0.05, "loss or gradient")


def maxsim_products(q: Tensor, d: Tensor) -> Tensor:
    """(queries, documents) scores of MaxSim, with all similarities stored."""
    return torch.einsum("aid,bjd->abij", q, d).amax(3).float().sum(2)
