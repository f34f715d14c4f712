"""Op: schema, meaning, implementations and selection. The one place that knows torch.library."""

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embedfuse import config, native
from embedfuse.native import Unavailable

_library = torch.library.Library("embedfuse", "DEF")
OPS: dict[str, "Op"] = {}

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "embedfuse_backend", default=None
)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend inside the block; a backend that cannot run raises BackendError.

    name: "reference", "cpp", "triton" or "cuda". Goes before EMBEDFUSE_BACKEND.
    """
    if name not in config.BACKENDS:
        raise ValueError(f"name={name!r}: accepted are {', '.join(config.BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    return _forced.get() or config.read("EMBEDFUSE_BACKEND")


@dataclass(frozen=True)
class Cost:
    """What a call must move and compute at least. bytes: read + written once; flops: multiply + add = 2."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Implementation:
    backend: str
    load: Callable[[], Callable]  # raises Unavailable with the reason
    dtypes: tuple[torch.dtype, ...]

    def devices(self) -> tuple[str, ...]:
        if self.backend == "cpp":
            return ("cpu",)
        if self.backend == "triton" and triton_interprets():
            return ("cpu",)
        return ("cuda",)

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this cannot run a call on such tensors; None when it can."""
        if device not in self.devices():
            return f"runs on {self.devices()[0]} tensors, not on {device}"
        if dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"takes {names}, not {str(dtype).removeprefix('torch.')}"
        try:
            self.load()
        except Unavailable as error:
            return str(error)
        return None


def triton_interprets() -> bool:
    """Triton's own switch: kernels run on CPU tensors in numpy, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_function(path: str) -> Callable[[], Callable]:
    """Loader of a launcher "module:function" in embedfuse.triton_kernels."""
    module, function = path.split(":")

    @functools.cache
    def load() -> Callable:
        if not triton_interprets():
            native.require_gpu()
        try:
            return getattr(importlib.import_module(f"embedfuse.triton_kernels.{module}"), function)
        except ImportError as error:
            raise Unavailable(f"triton does not load: {error}") from error

    return load


class Op:
    """One operator of the library "embedfuse".

    Declared by its torch schema; `reference` gives the meaning in plain torch on any device, `fake`
    the shapes, `impl` the fast versions in order of preference, `samples` and `cost` feed the
    generic tests and benchmarks. The first argument is the tensor that decides device and dtype.
    """

    def __init__(self, schema: str):
        self.schema = schema
        self.name = schema.split("(")[0]
        self.implementations: list[Implementation] = []
        self._reference: Callable | None = None
        self._chosen: dict[tuple, Callable] = {}
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        # Not a cached_property: torch.compile cannot trace the lock of its first access.
        self.overload = getattr(torch.ops.embedfuse, self.name).default
        OPS[self.name] = self

    def __call__(self, *args):
        return self.overload(*args)

    def reference(self, fn: Callable) -> Callable:
        self._reference = fn
        return fn

    def fake(self, fn: Callable) -> Callable:
        torch.library.register_fake(f"embedfuse::{self.name}", fn, lib=_library)
        return fn

    def samples(self, fn: Callable) -> Callable:
        """fn(device, dtype, size) -> list of argument tuples; size is "test" or "bench"."""
        self.make_samples = fn
        return fn

    def cost(self, fn: Callable) -> Callable:
        """fn(*args) -> Cost."""
        self.count_cost = fn
        return fn

    def impl(
        self, backend: str, load: Callable[[], Callable], dtypes: tuple = tuple(native.DTYPES)
    ):
        self.implementations.append(Implementation(backend, load, dtypes))

    def select(self, device: str, dtype: torch.dtype) -> Callable:
        """The function that runs a call on such tensors now."""
        forced = forced_backend()
        key = (forced, device, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._choose(forced, device, dtype)
        return self._chosen[key]

    def accelerates(self, x: Tensor) -> bool:
        """Whether a call on such a tensor would run on something faster than the reference.

        A tower keeps torch's own layer where not, even if another backend was asked for. The C++
        kernels without vector registers lose to torch.
        """
        try:
            chosen = self.select(x.device.type, x.dtype)
        except BackendError:
            return False
        if chosen is self._reference:
            return False
        return not x.is_cpu or triton_interprets() or native.cpu().selected_isa() != "baseline"

    def refusal(self, backend: str, device: str, dtype: torch.dtype) -> str | None:
        """Why `backend` cannot run this op on such tensors; None when it can."""
        if backend == "reference":
            return None
        for implementation in self.implementations:
            if implementation.backend == backend:
                return implementation.refusal(device, dtype)
        return "this op has no such version"

    def _choose(self, forced: str | None, device: str, dtype: torch.dtype) -> Callable:
        if forced and (reason := self.refusal(forced, device, dtype)):
            raise BackendError(f"{self.name}: backend {forced!r} was asked for but {reason}")
        for implementation in self.implementations:
            if forced in (None, implementation.backend) and not implementation.refusal(
                device, dtype
            ):
                return implementation.load()
        return self._reference

    def _run(self, *args):
        first = args[0]
        return self.select(first.device.type, first.dtype)(*args)
