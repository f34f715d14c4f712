"""Launches every kernel of a backend on the test samples of its op, to run under compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize cuda

Prints the name of the op before its kernels run, so that reports of the tool can be assigned to it. Results
are not compared here; tests/gpu compares them.
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
