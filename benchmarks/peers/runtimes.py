"""Models run by ONNX Runtime and OpenVINO, which are imported when they are asked for.

`pip install -r requirements-bench.txt` has both. Each runs a whole model as one graph, from token ids to
what its user reads, in fp32 on as many threads as torch has.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

NAMES = ("input_ids", "attention_mask")
OPSET = 17
Graph = Callable[[dict[str, np.ndarray]], np.ndarray]


class Whole(nn.Module):
    """Token ids and mask to normalised vectors, or to a reranker's scores where `pooling` is None."""

    def __init__(self, folder: Path, pooling: str | None, attention: str):
        super().__init__()
        library = AutoModelForSequenceClassification if pooling is None else AutoModel
        self.model = library.from_pretrained(folder, attn_implementation=attention)
        self.pooling = pooling
        self.eval()
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if self.pooling is None:
            return output.logits.sigmoid().flatten()
        states = output.last_hidden_state
        if self.pooling == "cls":
            vectors = states[:, 0]
        else:
            mask = attention_mask[:, :, None].float()
            vectors = (states * mask).sum(1) / mask.sum(1)
        # Not functional.normalize: with its clamp ONNX Runtime's shapes are unknown, and nothing fuses.
        return vectors / vectors.square().sum(1, keepdim=True).sqrt()


def onnx_runtime(folder: Path, pooling: str | None, example: dict[str, Tensor]) -> Graph:
    """Exported by torch.onnx and fused by ONNX Runtime's own optimizer for BERT.

    Raises:
        ImportError: A package is not installed.
        RuntimeError: The optimizer left attention in parts, so that the figures would not be its best.
    """
    import onnxruntime
    from onnxruntime.transformers import optimizer

    whole = Whole(folder, pooling, "eager")  # the attention that the optimizer recognises
    config, call = whole.model.config, tuple(example[name] for name in NAMES)
    axes = {name: {0: "queries", 1: "tokens"} for name in NAMES} | {"output": {0: "queries"}}
    names = {"input_names": list(NAMES), "output_names": ["output"], "dynamic_axes": axes}
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as written:
        path = f"{written}/model.onnx"
        # The exporter without dynamo: of the other's graph the optimizer fuses no attention.
        torch.onnx.export(whole, call, path, opset_version=OPSET, dynamo=False, **names)
        fused = optimizer.optimize_model(path, "bert", opt_level=0, **sizes)
        found = fused.get_fused_operator_statistics()["Attention"]
        if found != config.num_hidden_layers:
            raise RuntimeError(f"{found} of {config.num_hidden_layers} attentions were fused")
        fused.save_model_to_file(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda features: session.run(None, features)[0]


def openvino(folder: Path, pooling: str | None, example: dict[str, Tensor]) -> Graph:
    """Converted by OpenVINO from torch, and compiled for the latency of one call.

    Raises:
        ImportError: The package is not installed.
    """
    # openvino-telemetry would report each conversion to a server; without it OpenVINO uses a stub.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    whole = Whole(folder, pooling, "sdpa")
    converted = openvino.convert_model(whole, example_input=tuple(example[name] for name in NAMES))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.compile_model(converted, "CPU", settings)
    return lambda features: compiled([features[name] for name in NAMES])[0]


def tokenise(tokenizer) -> Callable[[list], dict[str, np.ndarray]]:
    """Texts or pairs to arrays, by the library under a transformers tokenizer: the fastest that there is."""
    fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    fast.no_truncation()
    pad = {"pad_id": tokenizer.pad_token_id, "pad_token": tokenizer.pad_token}
    fast.enable_padding(direction=tokenizer.padding_side, **pad)

    def run(texts: list) -> dict[str, np.ndarray]:
        found = fast.encode_batch(texts)
        ids, masks = [e.ids for e in found], [e.attention_mask for e in found]
        return {name: np.array(x) for name, x in zip(NAMES, (ids, masks), strict=True)}

    return run


PEERS = {"ONNX Runtime": onnx_runtime, "OpenVINO": openvino}
