"""The `embedfuse` command: a module per subcommand, with add_arguments(parser) and run(args) -> exit code."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import embedfuse
from embedfuse.cli.moved import MOVED, run_moved

COMMANDS = {
    "doctor": "what this machine has, and which backend runs which op, or why not",
    "demo": "time a real model on real text, unpatched and patched",
    "embed": "embed the texts of files",
    "bench": "time each op on this machine, per backend",
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"] and argv[1:2] and argv[1] in MOVED:
        return run_moved(argv[1:])
    parser = argparse.ArgumentParser(prog="embedfuse", description="Embedding models, made fast.")
    version = f"%(prog)s {embedfuse.__version__}"
    parser.add_argument("--version", action="version", version=version)
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, meaning in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=meaning, description=meaning)
        if name in argv[:1]:  # only this one is imported
            command = importlib.import_module(f"embedfuse.cli.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    return args.run(args)
