"""What each Triton kernel uses of a chip, found by compiling it with each config; needs no GPU.

python -m benchmarks aot --out benchmarks/results/aot.json    # and aot.md
"""

import sys
import time
from pathlib import Path

from benchmarks.harness.files import write_json
from benchmarks.harness.tables import table_row
from benchmarks.kernels.occupancy import CHIPS, resident_blocks

HEAD = """\
Compiled by Triton {triton} and not run, by `python -m benchmarks aot`. Per chip: registers of a thread · KiB
of shared memory · bytes spilled · computed percent of a multiprocessor's warps that fit at once. Calls of one
row differ in what is masked, aligned or left out; the row shows the most that any of them takes. A config
that was tuned for one chip has entries for that chip only.
"""


def add_arguments(parser) -> None:
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; the table goes to the same name with .md"
    )


def run(args) -> int:
    try:
        import triton
    except ImportError as error:
        print(f"python -m benchmarks aot: triton does not load: {error}", file=sys.stderr)
        return 1
    rows = compiled_rows(args.chip, args.kernel)
    document = {"triton": triton.__version__, "chips": args.chip, "rows": rows}
    text = table(document)
    if args.out is not None:
        write_json(args.out, document, "rows")
        args.out.with_suffix(".md").write_text(text)
    print(text, end="")
    return 0


def compiled_rows(chips: list[str], kernels: list[str] | None) -> list[dict]:
    """A row per kernel, dtype and config, with what it uses of each chip."""
    from benchmarks.kernels.machine_code import kernel_modules, kernels_of, launches

    modules = {}
    for module in kernel_modules():
        for kernel in kernels_of(module):
            modules[kernel.removesuffix("_kernel")] = module
    if unknown := set(kernels or ()) - set(modules):
        raise SystemExit(f"--kernel {', '.join(unknown)}: accepted are {', '.join(modules)}")
    rows = {}
    for name in kernels or modules:
        start = time.monotonic()
        for chip in chips:
            for launch in launches(modules[name], chip):
                if launch.name() == name:
                    add_launch(rows, launch, chip)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return list(rows.values())


def add_launch(rows: dict, launch, chip: str) -> None:
    """Compile the launch; its row keeps the most that any launch uses of this chip."""
    from benchmarks.kernels.machine_code import resources

    first = {"kernel": launch.name(), "dtype": launch.dtype(), "config": launch.config()}
    row = rows.setdefault(str(first), first)
    compiled = launch.compile(chip)
    used, before = resources(compiled), row.get(chip, {})
    most = {key: max(value, before.get(key, 0)) for key, value in used.items()}
    row["warps"] = compiled.metadata.num_warps
    row[chip] = {**most, **occupancy(chip, most["registers"], most["shared"], row["warps"])}


def occupancy(chip: str, registers: int, shared: int, warps: int) -> dict[str, int]:
    blocks = resident_blocks(CHIPS[chip], registers, shared, warps)
    return {"blocks": blocks, "occupancy": round(100 * blocks * warps / CHIPS[chip].warps)}


def table(document: dict) -> str:
    chips = document["chips"]
    lines = [HEAD.format(**document)]
    lines.append(table_row(["kernel", "dtype", "config", "warps", *chips]))
    lines.append(table_row(["---"] * 3 + ["---:"] * (1 + len(chips))))
    for row in document["rows"]:
        config = ", ".join(f"{key} {value}" for key, value in row["config"].items())
        cells = [row["kernel"], row["dtype"], config, str(row["warps"])]
        lines.append(table_row([*cells, *(cell(row.get(chip)) for chip in chips)]))
    return "\n".join(lines) + "\n"


def cell(used: dict | None) -> str:
    if used is None:
        return ""
    shared = f"{used['shared'] / 1024:.3g}"
    return f"{used['registers']} · {shared} · {used['spilled']} · {used['occupancy']} %"
