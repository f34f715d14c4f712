"""The texts that whole models are timed on: how many, of how many tokens, by device."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embedfuse.cli.corpus import stdlib_docstrings


@dataclass(frozen=True)
class Workload:
    """Texts of mixed lengths: many short and few long ones, as in real text.

    Attributes:
        texts: Number of texts.
        tokens: Fewest and most tokens of a text.
    """

    texts: int
    tokens: tuple[int, int]

    def lengths(self) -> list[int]:
        low, high = self.tokens
        spread = torch.rand(self.texts, generator=torch.Generator().manual_seed(0)) ** 2.1
        return (low + (high - low) * spread).round().int().tolist()


INSTRUCTION = 27  # tokens
# Tokens of the longest text of every workload; BGE-M3 takes 8,192, E5-mistral 4,096.
LONGEST = 512
# On the CPU docstrings as they come, cut to LONGEST; on the GPU all of LONGEST.
BULK_TEXTS = {
    "cpu": {"BGE-M3": 512, "E5-mistral-7B": 64},
    "cuda": {"BGE-M3": 512, "E5-mistral-7B": 128, "BERT-base": 512},
}
MIXED = Workload(1024, (10, 500))
QUERY = Workload(1, (32, 32))
INSTRUCTED = Workload(64, (15, 15))  # after INSTRUCTION tokens that all texts share

# The two curves of the report.
LENGTHS = {"cpu": (16, 64, 256, 512), "cuda": (16, 64, 256, 512, 2048)}  # tokens of a text
BULK_TOKENS = {"cpu": 2048, "cuda": 262_144}  # of all texts together
BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 2, 4, 8, 16, 32, 64, 128)}  # queries
QUERY_TOKENS = 16


def token_ids(lengths: Sequence[int], padding: int, device: str, shared: int = 0) -> dict:
    """A batch of random ids, padded on the right; the first `shared` ids are the same in all rows."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 16000, (len(lengths), max(lengths)), generator=generator)
    ids[:, :shared] = ids[0, :shared]
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    ids[~mask] = padding
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def texts_of(tokenizer, lengths: Sequence[int]) -> list[str]:
    """Pieces of docstrings, each of exactly the given number of tokens, special tokens included."""
    special = len(tokenizer("")["input_ids"])
    corpus = " ".join(" ".join(text.split()) for text in stdlib_docstrings(4000))
    words = itertools.cycle(corpus.split())
    texts = []
    for length in lengths:
        while True:
            part = list(itertools.islice(words, max(length - special, 1)))
            if (text := cut(tokenizer, part, length)) is not None:
                break
        texts.append(text)
    return texts


def cut(tokenizer, words: list[str], length: int) -> str | None:
    """The first of `words` that make exactly `length` tokens; None where no number of words does."""
    low, high = 1, len(words)
    while low <= high:
        middle = (low + high) // 2
        text = " ".join(words[:middle])
        tokens = len(tokenizer(text)["input_ids"])
        if tokens == length:
            return text
        low, high = (middle + 1, high) if tokens < length else (low, middle - 1)
    return None
