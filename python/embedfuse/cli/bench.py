"""embedfuse bench: times each op on this machine, per backend, and prints a table.

Calls are repeated on the same tensors, so small ones stay in the caches. Values are not compared.
"""

import argparse
from collections.abc import Iterator

import torch
from torch.utils.benchmark import Timer

import embedfuse.ops  # noqa: F401 - registers them
from embedfuse.registry import OPS, Op, use_backend

SECONDS = 0.5  # of repeated calls, per sample and backend
ROW = "{:<28}{:<11}{:>12}{:>13}  {}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )


def run(args: argparse.Namespace) -> int:
    if unknown := sorted(set(args.ops) - set(OPS)):
        raise SystemExit(f"OP: {', '.join(unknown)}; accepted are {', '.join(sorted(OPS))}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    dtype = getattr(torch, args.dtype)
    print(f"{args.dtype} on {device}, {torch.get_num_threads()} CPU threads")
    print(ROW.format("op", "backend", "median", "x reference", "sample"))
    for name in args.ops or sorted(OPS):
        for row in rows(OPS[name], device, dtype):
            print(row, flush=True)
    return 0


def rows(op: Op, device: str, dtype: torch.dtype) -> Iterator[str]:
    """For each sample the time of each backend of this device, or the reason why it cannot run."""
    backends = [i.backend for i in op.implementations if device in i.devices()]
    if not backends:
        yield ROW.format(op.name, "reference", "", "", f"the only backend on {device}")
        return
    for sample in op.make_samples(device, dtype, "bench"):
        reference = median_seconds(op, sample, "reference")
        yield ROW.format(op.name, "reference", milliseconds(reference), "", describe(op, sample))
        for backend in backends:
            if reason := op.refusal(backend, device, dtype):
                yield ROW.format("", backend, "", "", reason)
                continue
            seconds = median_seconds(op, sample, backend)
            yield ROW.format("", backend, milliseconds(seconds), f"{reference / seconds:.2f}", "")


def median_seconds(op: Op, sample: tuple, backend: str) -> float:
    with use_backend(backend):
        names = {"op": op, "sample": sample}
        timer = Timer("op(*sample)", globals=names, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=SECONDS).median


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def describe(op: Op, sample: tuple) -> str:
    """Shapes and settings: "hidden_states 64x512x1024, mean, normalize"."""
    parts = []
    # A sample may leave the last arguments at their defaults.
    for argument, value in zip(op.overload._schema.arguments, sample, strict=False):
        if isinstance(value, torch.Tensor):
            parts.append(f"{argument.name} {size(value)}")
        elif isinstance(value, list):
            parts.append(f"{argument.name} {' + '.join(map(size, value))}")
        elif value is True:
            parts.append(argument.name)
        elif isinstance(value, str):
            parts.append(value)
    return ", ".join(parts)


def size(value: torch.Tensor | int) -> str:
    """Shape of a tensor, "64x512"; a number as it is."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    return "x".join(map(str, value.shape)) or "scalar"
