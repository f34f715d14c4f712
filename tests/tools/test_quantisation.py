"""Quantised weights: they work where each row is rounded alone, and are refused where the batch counts."""

import pytest
import torch
from torch import nn

from tests.tools.rows import Row, cases, check, check_document
from tests.tools.twins import linears


def torch_ao(dtype):
    def act(model, folder):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype, inplace=True)

    return act


def torchao(config: str):
    def act(model, folder):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return act


def bitsandbytes(kind: str, **options):
    def act(model, folder):
        layers = pytest.importorskip("bitsandbytes").nn
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    shape = child.in_features, child.out_features, child.bias is not None
                    other = getattr(layers, kind)(*shape, **options)
                    other.load_state_dict(child.state_dict(), strict=False)
                    setattr(parent, name, other.to("cpu"))
        assert not linears(model)
        return model.requires_grad_(False)

    return act


_BY_BATCH = {"before": "refused", "after": "original", "train": False}

ROWS = [
    Row(
        "torch.ao: `quantize_dynamic`, int8",
        **_BY_BATCH,
        reason="torch.ao.nn.quantized.dynamic.modules.linear.Linear, which m",
        remark="refused by its name: its rounding depends on the whole batch, padding included",
        act=torch_ao(torch.qint8),
    ),
    Row("torch.ao: `quantize_dynamic`, float16", act=torch_ao(torch.float16), train=False),
    Row(
        "torchao: int8 dynamic activations",
        **_BY_BATCH,
        reason="Int8Tensor, which may mix rows or round by the batch",
        remark="refused by its name: padding changes its rounding, by 0.02 in the original too",
        act=torchao("Int8DynamicActivationInt8WeightConfig"),
    ),
    Row("torchao: int8 weights", act=torchao("Int8WeightOnlyConfig"), train=False),
    Row("torchao: intx weights", act=torchao("IntxWeightOnlyConfig"), train=False),
    Row("torchao: float8 weights", act=torchao("Float8WeightOnlyConfig"), train=False),
    Row("bitsandbytes: 8 bits", act=bitsandbytes("Linear8bitLt", has_fp16_weights=False)),
    Row("bitsandbytes: 4 bits", act=bitsandbytes("Linear4bit", quant_type="nf4")),
]


@cases(ROWS)
def test_quantised(row, when, family, tmp_path):
    check(row, when, family, tmp_path)


def test_document():
    check_document("Quantisation", ROWS)
