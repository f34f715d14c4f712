"""What whole models are timed on: how many texts of how many tokens, by device, and such texts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embedfuse.cli.corpus import stdlib_docstrings


@dataclass(frozen=True)
class Workload:
    """texts: how many. tokens: of each, from and to; many short and few long ones, as in text."""

    texts: int
    tokens: tuple[int, int]

    def lengths(self) -> list[int]:
        low, high = self.tokens
        spread = torch.rand(self.texts, generator=torch.Generator().manual_seed(0)) ** 2.1
        return (low + (high - low) * spread).round().int().tolist()


INSTRUCTION = 27  # tokens
# The longest text of every workload here; BGE-M3 itself takes 8,192, E5-mistral 4,096.
LONGEST = 512
# On the CPU docstrings as they come, cut to LONGEST; on the GPU all of LONGEST.
BULK_TEXTS = {
    "cpu": {"BGE-M3": 512, "E5-mistral-7B": 64},
    "cuda": {"BGE-M3": 512, "E5-mistral-7B": 128, "BERT-base": 512},
}
MIXED = Workload(1024, (10, 500))
QUERY = Workload(1, (32, 32))
INSTRUCTED = Workload(64, (15, 15))  # behind INSTRUCTION tokens that all share

# The two curves of the report.
LENGTHS = {"cpu": (16, 64, 256, 512), "cuda": (16, 64, 256, 512, 2048)}  # tokens of a text
BULK_TOKENS = {"cpu": 2048, "cuda": 262_144}  # of all texts together
BATCHES = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (1, 2, 4, 8, 16, 32, 64, 128)}  # queries
QUERY_TOKENS = 16


def token_ids(lengths: Sequence[int], padding: int, device: str, shared: int = 0) -> dict:
    """A batch padded on the right: random ids, the first `shared` of all rows alike."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 16000, (len(lengths), max(lengths)), generator=generator)
    ids[:, :shared] = ids[0, :shared]
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    ids[~mask] = padding
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def texts_of(tokenizer, lengths: Sequence[int]) -> list[str]:
    """Pieces of docstrings, each of exactly so many tokens, special ones included."""
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
    """The first of these words that make so many tokens; None where none do."""
    low, high = 1, len(words)
    while low <= high:
        middle = (low + high) // 2
        text = " ".join(words[:middle])
        found = len(tokenizer(text)["input_ids"])
        if found == length:
            return text
        low, high = (middle + 1, high) if found < length else (low, middle - 1)
    return None
