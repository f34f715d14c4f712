"""BGE-M3's three outputs by their definition, on transformers' own padded forward."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from embedfuse.ops import Csr
from embedfuse.testing import assert_as_good


class Reference:
    def __init__(self, folder: str, dtype: torch.dtype):
        self.dtype = dtype
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
        self.heads = {
            name: {k: v.to(dtype) for k, v in torch.load(Path(folder, file)).items()}
            for name, file in (("sparse", "sparse_linear.pt"), ("multi", "colbert_linear.pt"))
        }

    @torch.no_grad()
    def states(self, texts: list[str], max_length: int = 8192) -> tuple[list[list[int]], list]:
        """Token ids and states (tokens, hidden) of each text."""
        cut = {"truncation": True, "max_length": max_length}
        batch = self.tokenizer(texts, padding=True, return_tensors="pt", **cut)
        states = self.model(**batch).last_hidden_state
        lengths = batch["attention_mask"].sum(1).tolist()
        ids = [row[:n] for row, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        return ids, [row[:n] for row, n in zip(states, lengths, strict=True)]

    def __call__(self, texts: list[str], max_length: int = 8192) -> dict[str, Tensor]:
        """dense (texts, hidden), sparse (texts, vocabulary), multi (tokens but the first, columns)."""
        ids, states = self.states(texts, max_length)
        sparse = torch.zeros(len(texts), self.model.config.vocab_size, dtype=self.dtype)
        for row, text_ids, h in zip(sparse, ids, states, strict=True):
            weights = F.linear(h, **self.heads["sparse"]).relu()[:, 0]
            row.scatter_reduce_(0, torch.tensor(text_ids), weights, "amax")
        sparse[:, :4] = 0  # <s>, <pad>, </s> and <unk> have no weight
        multi = [F.normalize(F.linear(h[1:], **self.heads["multi"]), dim=-1) for h in states]
        dense = F.normalize(torch.stack([h[0] for h in states]), dim=-1)
        return {"dense": dense, "sparse": sparse, "multi": torch.cat(multi)}


def tensors(embeddings, vocabulary: int) -> dict[str, Tensor]:
    """An Embedder's outputs in the reference's shapes; those that it was not asked for left out."""
    found = {}
    if embeddings.dense is not None:
        found["dense"] = torch.from_numpy(embeddings.dense)
    if embeddings.sparse is not None:
        assert isinstance(embeddings.sparse, Csr)
        found["sparse"] = embeddings.sparse.dense(vocabulary)
    if embeddings.multi is not None:
        found["multi"] = torch.cat([torch.from_numpy(x) for x in embeddings.multi])
    return found


def assert_close(got: dict[str, Tensor], own: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Every output is as good as that of transformers' own forward (embedfuse/testing.py)."""
    for name, value in got.items():
        # Arrays of a 16-bit model are fp32.
        assert_as_good(value.to(own[name].dtype), own[name], exact[name], name=name)
