"""Launches every kernel of a backend on its op's test samples, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize cuda

Prints the op before its kernels run: what the tool reports next is that op's. Results are not compared here;
tests/gpu does that.
"""

import argparse

import torch

import embedfuse.ops  # noqa: F401 - registers them
from embedfuse import testing
from embedfuse.registry import OPS, use_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("cuda", "triton"))
    backend = parser.parse_args().backend
    for op in OPS.values():
        if backend not in testing.backends(op, "cuda"):
            continue
        if reason := op.refusal(backend, "cuda", torch.float32):
            raise SystemExit(f"{op.name}: {reason}")
        for dtype in testing.DTYPES:
            print(f"{op.name} {dtype}", flush=True)
            with use_backend(backend):
                for args in op.make_samples("cuda", dtype, "test"):
                    testing.run(op, args)
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
