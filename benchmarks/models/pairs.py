"""Models of true architecture with random weights, made on the device without a checkpoint.

Each comes twice: as transformers has it, for the peers, and patched.
"""

import contextlib
import copy
import functools
import importlib
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, BertConfig

import embedfuse
from benchmarks.harness.rehearsal import size
from benchmarks.models import checkpoints, workloads
from benchmarks.models.workloads import LONGEST
from embedfuse.patching import PatchError, check

DISTINCT = 64  # a text takes 20 ms to make


class ModelPair:
    """A model as transformers has it and a patched copy with the same weights.

    Prefixes are not reused: a batch that is timed again and again would be one known prefix.

    Args:
        name: A key of `MODELS`.
        device: Device of both models.
        dtype: Dtype of both models.

    Attributes:
        original: The model of transformers.
        patched: The patched copy.
        pooling: How vectors are pooled: "cls", "last" or "mean".
        patch_error: Set by who patched without the self-check's bound: what the check said.
    """

    patch_error = ""

    def __init__(self, name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16):
        self.name, self.device, self.dtype = name, device, dtype
        self._texts: dict[tuple[int, int], list[str]] = {}
        make_config, self.write_files, self.pooling = MODELS[name]
        torch.manual_seed(0)
        with torch.device(device):
            self.original = AutoModel.from_config(make_config(), dtype=dtype).eval()
        self.original.requires_grad_(False)
        self.patched = copy.deepcopy(self.original)
        embedfuse.patch(self.patched, reuse_prefixes="off")

    @property
    def padding(self) -> int:
        return self.original.config.pad_token_id or 0

    @functools.cached_property
    def folder(self) -> str:
        """Tokenizer and settings of a checkpoint, without weights."""
        folder = tempfile.mkdtemp(prefix="embedfuse-")
        self.write_files(Path(folder))
        self.original.config.save_pretrained(folder)
        return folder

    @functools.cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.folder)

    def texts(self, lengths: Sequence[int]) -> list[str]:
        """Texts of so many tokens; of the same length there are `DISTINCT` different ones."""
        given: dict[int, itertools.cycle] = {}
        for length, count in Counter(lengths).items():
            key = length, min(count, DISTINCT)
            if key not in self._texts:
                self._texts[key] = workloads.texts_of(self.tokenizer, [length] * key[1])
            given[length] = itertools.cycle(self._texts[key])
        return [next(given[length]) for length in lengths]

    @functools.cached_property
    def embedder(self) -> embedfuse.Embedder:
        dtype = str(self.dtype).removeprefix("torch.")
        options = {"device": self.device, "max_length": LONGEST, "reuse_prefixes": "off"}
        embedfuse.unpatch(self.patched)  # Embedder patches it again
        with loading(self.patched):
            return embedfuse.Embedder(self.folder, dtype=dtype, **options)

    @functools.cached_property
    def sentence_transformer(self):
        library = importlib.import_module("sentence_transformers")
        with loading(self.original):
            model = library.SentenceTransformer(self.folder, device=self.device)
        model.max_seq_length = LONGEST
        return model

    @torch.inference_mode()
    def embed(self, batch: dict) -> Tensor:
        """Vectors of the patched model, pooled and normalised."""
        return embedfuse.embed(self.patched, **batch, pooling=self.pooling)

    def embed_unpadded(self, batch: dict) -> Tensor:
        """The same for a batch without padding."""
        return self.embed({**batch, "attention_mask": None})

    def forward_of(self, peer: str) -> Callable[[dict], Tensor]:
        """batch -> vectors of a peer in `FORWARDS`, pooled and normalised.

        Raises:
            ImportError: The peer is not installed.
        """
        model = FORWARDS[peer](self.original)

        @torch.inference_mode()
        def run(batch: dict) -> Tensor:
            states = model(**batch).last_hidden_state
            return normalize(pooled(states, batch["attention_mask"], self.pooling).float())

        return run


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """As users of transformers write it; padding is on the right."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1]
    mask = mask[:, :, None].to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1)


@contextlib.contextmanager
def loading(model) -> Iterator[None]:
    """Inside the block every checkpoint loads as `model`."""
    with mock.patch.object(AutoModel, "from_pretrained", return_value=model):
        yield


def with_flash_attention(model):
    importlib.import_module("flash_attn")
    model = copy.deepcopy(model)
    model.set_attn_implementation("flash_attention_2")
    return model


FORWARDS = {
    "transformers": lambda model: model,
    "transformers, flash-attn": with_flash_attention,
    "transformers, torch.compile": lambda model: torch.compile(model, dynamic=False),
}
BERT_SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
}
BGE_SIZES = size(checkpoints.FULL, {**checkpoints.SMALL, "vocab_size": 16000})
E5_SIZES = size(checkpoints.E5_MISTRAL, {**checkpoints.E5_MISTRAL_SMALL, "vocab_size": 16000})
# Configuration, writer of tokenizer and settings, pooling.
MODELS = {
    "BGE-M3": (
        lambda: checkpoints.bge_m3_config(BGE_SIZES),
        lambda folder: checkpoints.write_bge_m3_files(folder, BGE_SIZES),
        "cls",
    ),
    "E5-mistral-7B": (
        lambda: checkpoints.e5_mistral_config(size(32, 3), E5_SIZES),
        lambda folder: checkpoints.write_e5_mistral_files(folder, E5_SIZES),
        "last",
    ),
    "BERT-base": (lambda: BertConfig(**size({}, BERT_SMALL)), None, "mean"),
}


def patched_pair(name: str, device: str, patch: pytest.MonkeyPatch) -> ModelPair:
    """The models; where `patch` refuses to patch, without its bound, and with its reason in `patch_error`."""
    try:
        return ModelPair(name, device)
    except PatchError as error:
        print(f"{name}: PatchError: {error}; timed without that bound", flush=True)
        patch.setitem(check.BOUNDS, torch.bfloat16, math.inf)
        models = ModelPair(name, device)
        models.patch_error = f"PatchError: {error}"
        return models
