"""`embedfuse bench`: the programs of benchmarks/, which stand in a clone of the repository."""

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "harness.report": "stored results as Markdown tables and plots",
    "kernels.aot": "what each Triton kernel takes of a chip: registers, shared memory, occupancy; no GPU needed",
    "gpu.tune": "time the configs of the Triton kernels on this GPU, and store the best",
}


def add_arguments(parser) -> None:
    subparsers = parser.add_subparsers(required=True, metavar="what")
    for name, meaning in COMMANDS.items():
        subparser = subparsers.add_parser(name.split(".")[1], help=meaning, description=meaning)
        command = program(name)
        command.add_arguments(subparser)
        subparser.set_defaults(run_program=command.run)


def run(args) -> int:
    return args.run_program(args)


def program(name: str):
    """The module benchmarks/<name>.py of the clone that is the current folder or holds this package."""
    root = next((f for f in (Path.cwd(), Path(__file__).parents[3]) if is_clone(f)), None)
    if root is None:
        raise SystemExit(
            f"embedfuse bench: no benchmarks/ in {Path.cwd()}; it is not part of the installed package: "
            "clone the repository and run the command there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"benchmarks.{name}")


def is_clone(folder: Path) -> bool:
    return (folder / "benchmarks" / "harness").exists() and (folder / "triton_kernels").is_dir()
