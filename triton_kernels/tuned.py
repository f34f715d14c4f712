"""Configs of kernels (tiles, warps, stages) as they were tuned on a chip, from configs/<chip>.json.

`python -m benchmarks tune` writes those files; nothing is timed here. The entry of the nearest shape gives
the config; without one near, a kernel runs with its default, and the log says so once.
"""

import contextlib
import functools
import importlib
import inspect
import json
import logging
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from embedfuse.triton_kernels import launch

logger = logging.getLogger("embedfuse")

FOLDER = Path(__file__).parent / "configs"
# Sum of squared log2 ratios of sizes, beyond which an entry does not apply: one size four times as large, or
# four sizes twice as large. Not measured.
FARTHEST = 4.0
# fp16 has the configs that were tuned for bf16: same width, same instructions.
DTYPES = {torch.float32: "float32", torch.float16: "bfloat16", torch.bfloat16: "bfloat16"}
HEADER = ("chip", "device", "triton", "torch", "configs")
ENTRY = ("kernel", "dtype", "shape", "config", "us", "default_us")

TUNABLES: dict[str, "Tunable"] = {}
_choose: Callable | None = None


@dataclass(frozen=True, eq=False)
class Tunable:
    """A kernel and the configs (tiles, warps, stages) it may be launched with.

    default_config(dtype, **shape): the config where none was tuned.
    candidates(dtype, **shape): the configs that tuning tries; each gives right results for every call of that
    shape. A shape holds what the config may depend on: integers match the nearest entry, all else must be
    equal.
    """

    name: str
    default_config: Callable[..., dict]
    candidates: Callable[..., Iterable[dict]]

    def __post_init__(self):
        TUNABLES[self.name] = self

    def config(self, x: torch.Tensor, **shape) -> dict:
        """The config of a call whose main tensor is x. Round sizes that change from call to call to powers of
        two: the config of each shape is cached."""
        return self.config_on(x.device, x.dtype, **shape)

    def config_on(self, device: torch.device, dtype: torch.dtype, **shape) -> dict:
        return _config(self, device, dtype, tuple(shape.items()))

    def space(self, dtype: torch.dtype, shape: dict) -> list[dict]:
        """All configs for such a call, the default first."""
        default = self.default_config(dtype, **shape)
        others = self.candidates(dtype, **shape)
        return [default, *(config for config in others if config != default)]


@contextlib.contextmanager
def choosing(choose: Callable[[Tunable, torch.dtype, dict], dict]) -> Iterator[None]:
    """Inside the block choose(tunable, dtype, shape) gives every config: for tuning and for tables."""
    global _choose
    before, _choose = _choose, choose
    _forget()
    try:
        yield
    finally:
        _choose = before
        _forget()


def _forget() -> None:
    _config.cache_clear()
    launch.forget()


@functools.lru_cache(maxsize=4096)
def _config(tunable: Tunable, device: torch.device, dtype: torch.dtype, items: tuple) -> dict:
    shape = dict(items)
    if _choose is not None:
        return _choose(tunable, dtype, shape)
    if device.type != "cuda":  # meta tensors, and Triton's interpreter
        return tunable.default_config(dtype, **shape)
    chip = chip_of(device)
    config = nearest(tunable, entries_of(chip), dtype, shape)
    if config is None:
        _say_default(tunable.name, chip)
        return tunable.default_config(dtype, **shape)
    return config


@functools.cache
def chip_of(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def _say_default(kernel: str, chip: str) -> None:
    logger.info("%s: no config tuned for %s at such a shape, its default is used", kernel, chip)


def nearest(tunable: Tunable, entries: list[dict], dtype: torch.dtype, shape: dict) -> dict | None:
    """The config of the nearest entry that such a call may have."""
    allowed = [entry for entry in entries if allows(tunable, entry, dtype, shape)]
    entry = min(allowed, key=lambda entry: distance(entry["shape"], shape), default=None)
    if entry is None or distance(entry["shape"], shape) > FARTHEST:
        return None
    return entry["config"]


def allows(tunable: Tunable, entry: dict, dtype: torch.dtype, shape: dict) -> bool:
    """Whether the entry is for such calls, whatever their sizes, and this shape may have its config."""
    if (entry["kernel"], entry["dtype"]) != (tunable.name, DTYPES[dtype]):
        return False
    others = (key for key, value in shape.items() if type(value) is not int)
    if any(entry["shape"][key] != shape[key] for key in others):
        return False
    return entry["config"] in tunable.space(dtype, shape)


def distance(a: dict, b: dict) -> float:
    """Sum of squared log2 ratios of sizes; one is added to each size."""
    sizes = ((a[key], b[key]) for key in a if type(a[key]) is int)
    return sum(math.log2((one + 1) / (other + 1)) ** 2 for one, other in sizes)


@functools.cache
def entries_of(chip: str) -> list[dict]:
    path = FOLDER / f"{chip}.json"
    return load(path)["configs"] if path.exists() else []


def load(path: Path) -> dict:
    """A file of configs; ValueError, with the entry, where it does not fit the kernels as they are."""
    import_kernels()
    stored = json.loads(path.read_text())
    if sorted(stored) != sorted(HEADER) or stored["chip"] != path.stem:
        raise ValueError(f"{path}: has {sorted(stored)} for {stored.get('chip')!r}, not {HEADER}")
    for number, entry in enumerate(stored["configs"]):
        if problem := _problem(entry):
            raise ValueError(f"{path}: configs[{number}]: {problem}; tune again: {entry}")
    return stored


def _problem(entry: dict) -> str | None:
    if sorted(entry) != sorted(ENTRY):
        return f"has {sorted(entry)}, not {ENTRY}"
    if entry["kernel"] not in TUNABLES:
        return f"no kernel {entry['kernel']!r}, there are {', '.join(TUNABLES)}"
    if entry["dtype"] not in DTYPES.values():
        return f"dtype {entry['dtype']!r} is none of {sorted(set(DTYPES.values()))}"
    tunable, dtype = TUNABLES[entry["kernel"]], getattr(torch, entry["dtype"])
    _, *keys = inspect.signature(tunable.default_config).parameters
    if sorted(entry["shape"]) != sorted(keys):
        return f"a shape of this kernel has {keys}"
    if entry["config"] not in tunable.space(dtype, entry["shape"]):
        return "the config is not among the kernel's candidates"
    return None


def import_kernels() -> list:
    """The modules of this folder; with them TUNABLES is complete."""
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{__package__}.{name}") for name in names]
