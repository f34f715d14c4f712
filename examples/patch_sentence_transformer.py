"""Patch a SentenceTransformer: the same calls and the same vectors, sooner.

python examples/patch_sentence_transformer.py [MODEL]

MODEL is a hub name or a folder; the default is sentence-transformers/all-MiniLM-L6-v2.
"""

import builtins
import sys
import time

import numpy as np
from sentence_transformers import SentenceTransformer

import embedfuse

TEXTS = [value.__doc__ for value in vars(builtins).values() if value.__doc__][:64]


def main(name: str = "sentence-transformers/all-MiniLM-L6-v2") -> tuple[np.ndarray, np.ndarray]:
    model = SentenceTransformer(name)
    before, seconds = encode(model)
    with embedfuse.patched(model) as report:  # unpatched at the end of the block
        after, patched_seconds = encode(model)
    print(report)
    print(f"{len(TEXTS)} texts: {seconds:.2f} s before, {patched_seconds:.2f} s patched")
    print(f"largest difference of an entry: {abs(before - after).max():.1e}")
    return before, after


def encode(model: SentenceTransformer) -> tuple[np.ndarray, float]:
    model.encode(TEXTS[:2])  # the first call of a process is slower
    start = time.perf_counter()
    return model.encode(TEXTS), time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
