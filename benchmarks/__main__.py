"""`python -m benchmarks`: a program per subcommand, with add_arguments(parser) and run(args) -> exit code."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "report": ("harness.report", "stored results as Markdown tables and plots"),
    "versions": ("models.versions", "this checkout compared with another one"),
    "checkpoints": ("models.checkpoints", "write checkpoints with random weights"),
    "aot": ("kernels.aot", "what each Triton kernel uses of a chip; needs no GPU"),
    "tune": ("gpu.tune", "time the configs of the Triton kernels on this GPU, and store the best"),
    "host": ("gpu.host_time", "host time of each op on a GPU, launches stubbed; needs no GPU"),
    "gpu": ("gpu.run", "tests, benchmarks, tuning and profiles on a GPU, in one run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, (module, meaning) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=meaning, description=meaning)
        if name in argv[:1]:  # the others are not imported
            program = importlib.import_module(f"benchmarks.{module}")
            program.add_arguments(subparser)
            subparser.set_defaults(run=program.run)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
