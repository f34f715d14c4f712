"""The self-check where fp32 matrices are multiplied in TF32 or bf16: `torch.set_float32_matmul_precision`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import embedfuse
from embedfuse.patching import check
from tests.patching.encoders import make_model

ROUNDED = ("aten.addmm.default", "aten.mm.default", "embedfuse.linear.default")


@pytest.fixture(autouse=True)
def settings():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class Tf32(TorchDispatchMode):
    """Matrices are multiplied from 10 bits after the point, as tensor cores do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in ROUNDED:
            args = tree_map(self.rounded, args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x):
        if not (isinstance(x, torch.Tensor) and x.dtype is torch.float32 and x.dim() == 2):
            return x
        bits = x.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) >> 13 << 13).view(torch.float32)


def test_a_model_in_tf32_is_patched():
    model = make_model("xlm_roberta")
    model.encoder.layer.extend([copy.deepcopy(layer) for layer in list(model.encoder.layer) * 5])
    with Tf32(), pytest.raises(embedfuse.PatchError, match=r"accepted for torch.float32 is 1e-04"):
        embedfuse.patch(copy.deepcopy(model))
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    with Tf32():
        report = embedfuse.patch(model)
    assert report.deviations["last_hidden_state"] > 1e-4


@pytest.mark.parametrize(
    ("precision", "cpu", "cuda"),
    [("highest", "ieee", "ieee"), ("high", "tf32", "tf32"), ("medium", "bf16", "tf32")],
)
def test_what_torch_is_asked_for(precision, cpu, cuda):
    torch.set_float32_matmul_precision(precision)
    assert check.matmul_precision(torch.device("cpu")) == cpu
    assert check.matmul_precision(torch.device("cuda")) == cuda


@pytest.mark.parametrize(("precision", "bound"), [("highest", "1e-04"), ("medium", "1e-01")])
def test_bound(precision, bound):
    torch.set_float32_matmul_precision(precision)
    model, rows = nn.Linear(2, 2), torch.ones(3, 2)
    for factor, fits in ((1 + 0.5 * float(bound), True), (1 + 1.5 * float(bound), False)):
        if fits:
            check.deviations(model, {"logits": rows}, {"logits": rows * factor})
        else:
            with pytest.raises(
                embedfuse.PatchError, match=f"accepted for torch.float32 is {bound}"
            ):
                check.deviations(model, {"logits": rows}, {"logits": rows * factor})
