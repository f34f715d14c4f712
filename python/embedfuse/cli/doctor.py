"""embedfuse doctor: versions, processors, settings, and for each op and backend "yes" or why it cannot run.

Attention in patched models on a GPU has several implementations; the first "yes" is the one that runs.
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from embedfuse import compatibility, config, native, registry
from embedfuse.nn.attention import cuda_refusals

PACKAGES = (
    *("embedfuse", "torch", "triton", "numpy", "transformers", "sentence-transformers"),
    *("FlagEmbedding", "pylate", "peft"),
)
# As Linux writes them in /proc/cpuinfo.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))
    return 0


def collect() -> dict:
    return {
        "versions": versions(),
        "versions that go together": {str(p): p.status() for p in compatibility.PAIRS},
        "cpu": cpu(),
        "gpu": gpu(),
        "build": native.build_notes() or {"note": "this copy of embedfuse was not built"},
        "environment": {name: variable(name) for name in config.VARIABLES},
        "ops": {name: backends(op) for name, op in sorted(registry.OPS.items())},
        "attention on CUDA": {str(d).removeprefix("torch."): attention(d) for d in native.DTYPES},
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    found |= {name: compatibility.version(name) or "not installed" for name in PACKAGES}
    return found


def cpu() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = fields.get("flags", "").split()
    try:
        module = native.cpu()
        isas, isa = ", ".join(module.supported_isas()), module.selected_isa()
    except (native.Unavailable, ValueError) as error:
        isas = isa = str(error)
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        **{feature: "yes" if feature in flags else "no" for feature in CPU_FEATURES},
        "supported ISAs": isas,
        "ISA in use": isa,
        "torch threads": str(torch.get_num_threads()),
    }


def gpu() -> dict[str, str]:
    try:
        native.require_gpu()
    except native.Unavailable as reason:
        return {"none": str(reason)}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found[str(index)] = f"{device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB"
    return found


def variable(name: str) -> dict[str, str | None]:
    described = config.VARIABLES[name]
    facts = {"value": os.environ.get(name), "meaning": described.meaning}
    facts["accepted"] = ", ".join(described.accepted) if described.accepted else "any"
    facts["default"] = described.default
    try:
        config.read(name)
    except ValueError as error:
        facts["error"] = str(error)
    return facts


def backends(op: registry.Op) -> dict[str, str]:
    """What the op computes, and whether each backend runs it for fp32 tensors on the backend's device."""
    gpu_or_interpreter = "cpu" if registry.triton_interprets() else "cuda"
    devices = {"reference": "cpu", "cpp": "cpu", "triton": gpu_or_interpreter, "cuda": "cuda"}
    statuses = {backend: status(op, backend, devices[backend]) for backend in config.BACKENDS}
    return {"computes": op.meaning} | statuses


def status(op: registry.Op, backend: str, device: str) -> str:
    """ "yes", or why the backend cannot run the op."""
    try:
        return op.refusal(backend, device, torch.float32) or "yes"
    except ValueError as error:  # an environment variable with a value that is not accepted
        return str(error)


def attention(dtype: torch.dtype) -> dict[str, str]:
    """For a head_dim of 64 in inference, in order of preference: the first "yes" runs."""
    try:
        return {name: reason or "yes" for name, reason in cuda_refusals(dtype, 64).items()}
    except ValueError as error:
        return {"none": str(error)}


def as_text(facts: dict) -> str:
    names = ("versions", "versions that go together", "cpu", "gpu", "build")
    sections = [table(name, facts[name].items()) for name in names]
    settings = []
    for name, v in facts["environment"].items():
        value = "not set" if v["value"] is None else repr(v["value"])
        settings.append((name, value, f"{v['meaning']} ({v['accepted']}; default {v['default']})"))
        if "error" in v:
            settings.append(("", "", v["error"]))
    sections.append(table("environment", settings))
    sections.append(table("ops, in fp32", nested(facts["ops"])))
    title = "attention on CUDA, heads of 64 in inference: the first yes runs"
    sections.append(table(title, nested(facts["attention on CUDA"])))
    return "\n\n".join(sections)


def nested(facts: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    """Rows of a table that shows each outer key once."""
    return [
        (outer if i == 0 else "", inner, text)
        for outer, texts in facts.items()
        for i, (inner, text) in enumerate(texts.items())
    ]


def table(title: str, rows) -> str:
    rows = [tuple(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([title, *map(str.rstrip, lines)])
