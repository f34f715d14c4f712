"""Ops and their backends: what each op means, what runs it, and which backend is chosen."""

import contextlib
import contextvars
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from embedfuse import config, native
from embedfuse.native import Unavailable

_C: Any = torch._C
_library = torch.library.Library("embedfuse", "DEF")
OPS: dict[str, "Op"] = {}
"""Every op, by name."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "embedfuse_backend", default=None
)


class BackendError(RuntimeError):
    """A backend was requested by name and cannot run a call. The message has the reason."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on one backend, for the duration of a `with` block.

    Takes precedence over the environment variable EMBEDFUSE_BACKEND. Applies to the current thread only.

    Args:
        name: "reference" (plain torch), "cpp", "triton" or "cuda".

    Raises:
        ValueError: An unknown name.
        BackendError: From an op inside the block that the backend cannot run.
    """
    if name not in config.BACKENDS:
        raise ValueError(f"name={name!r}: accepted are {', '.join(config.BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend that use_backend or EMBEDFUSE_BACKEND requests; None: chosen automatically."""
    return _forced.get() or config.read("EMBEDFUSE_BACKEND")


def nothing_looks() -> bool:
    """Whether no gradient, mode, transform or compiler of torch wants to see the ops that run."""
    if torch.compiler.is_compiling():  # first: it traces no line below
        return False
    return not (
        torch.is_grad_enabled()
        or _C._get_tracing_state()
        or _C._len_torch_dispatch_stack()
        or _C._is_torch_function_mode_enabled()
        or _C._functorch.peek_interpreter_stack() is not None
    )


def profiles() -> bool:
    """Whether a profiler of torch runs."""
    return _C._autograd._profiler_enabled()


_PLAIN = (Tensor, nn.Parameter)


def _is_plain(argument: object) -> bool:
    """Whether torch would hand this argument of an op as it is to the function that runs it."""
    if isinstance(argument, Tensor):
        lazy = argument.is_neg() or argument._is_zerotensor()  # the dispatcher writes them out
        stored = _C._has_storage(argument) and not argument.is_meta
        return type(argument) in _PLAIN and stored and not lazy
    return not isinstance(argument, (list, tuple)) or all(map(_is_plain, argument))


@dataclass(frozen=True)
class Cost:
    """The least that a call must move and compute.

    Attributes:
        bytes: inputs read once plus outputs written once.
        flops: a multiplication and an addition count 2.
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Implementation:
    """A version of an op for one backend.

    Attributes:
        backend: "cpp", "triton" or "cuda".
        load: returns the function that runs the op; raises Unavailable with the reason.
        dtypes: of the op's first argument that it accepts.
    """

    backend: str
    load: Callable[[], Callable]
    dtypes: tuple[torch.dtype, ...]

    def devices(self) -> tuple[str, ...]:
        """The types of device whose tensors it accepts: "cpu" or "cuda"."""
        if self.backend == "cpp":
            return ("cpu",)
        if self.backend == "triton" and triton_interprets():
            return ("cpu",)
        return ("cuda",)

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this cannot run a call on such tensors; None if it can."""
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
    """Whether TRITON_INTERPRET makes Triton run kernels on CPU tensors in numpy, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_function(path: str) -> Callable[[], Callable]:
    """A loader of the launcher "module:function" in embedfuse.triton_kernels."""
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
    """An operator of the torch library "embedfuse", with one implementation per backend.

    Its first argument, a tensor, decides the device and dtype by which a backend is chosen. The decorators
    `reference`, `fake`, `samples` and `cost` complete it; `impl` adds a backend.

    Args:
        schema: of torch.library, such as "silu_mul(Tensor gate, Tensor up) -> Tensor".
        meaning: what it computes, in one line.
        differentiable: whether the public function that calls it has a gradient.

    Attributes:
        name: as in torch.ops.embedfuse.
        implementations: besides the reference, in order of preference.
    """

    _reference: Callable

    def __init__(self, schema: str, meaning: str = "", *, differentiable: bool = False):
        self.schema, self.meaning, self.differentiable = schema, meaning, differentiable
        self.name = schema.split("(")[0]
        self.implementations: list[Implementation] = []
        self._chosen: dict[tuple, Callable] = {}
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        # Not a cached_property: torch.compile cannot trace its lock.
        self.overload = getattr(torch.ops.embedfuse, self.name).default
        OPS[self.name] = self

    def __call__(self, *args):
        # The dispatcher takes as long as a small kernel.
        unseen = nothing_looks() and not profiles()
        if unseen and all(map(_is_plain, args)):
            return self._run(*args)
        return self.overload(*args)

    def reference(self, fn: Callable) -> Callable:
        """Set the definition of the op in plain torch, for any device."""
        self._reference = fn
        return fn

    def fake(self, fn: Callable) -> Callable:
        """Set the function that gives the shapes of the outputs, for torch.compile."""
        torch.library.register_fake(f"embedfuse::{self.name}", fn, lib=_library)
        return fn

    def samples(self, fn: Callable) -> Callable:
        """Set fn(device, dtype, size) -> list of argument tuples; size is "test" or "bench"."""
        self.make_samples = fn
        return fn

    def cost(self, fn: Callable) -> Callable:
        """Set fn(*args) -> Cost."""
        self.count_cost = fn
        return fn

    def impl(
        self, backend: str, load: Callable[[], Callable], dtypes: tuple = tuple(native.DTYPES)
    ):
        """Add an implementation; the ones added first are preferred.

        Args:
            backend: "cpp", "triton" or "cuda".
            load: returns the function that runs the op; raises Unavailable with the reason.
            dtypes: of the op's first argument that it accepts.
        """
        self.implementations.append(Implementation(backend, load, dtypes))

    def select(self, device: str, dtype: torch.dtype) -> Callable:
        """The function that runs a call.

        Args:
            device: type of the first argument's device, "cpu" or "cuda".
            dtype: of the first argument.

        Returns:
            The implementation of the requested backend, or else of the first that can run.

        Raises:
            BackendError: The requested backend cannot run it.
        """
        forced = forced_backend()
        key = (forced, device, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._choose(forced, device, dtype)
        return self._chosen[key]

    def accelerates(self, x: Tensor) -> bool:
        """Whether a call on such a tensor runs on something faster than torch.

        If not, a tower calls torch's layer. The C++ kernels for "baseline" are slower than torch.
        """
        try:
            chosen = self.select(x.device.type, x.dtype)
        except BackendError:
            return False
        if chosen is self._reference:
            return False
        return not x.is_cpu or triton_interprets() or native.cpu().selected_isa() != "baseline"

    def refusal(self, backend: str, device: str, dtype: torch.dtype) -> str | None:
        """Why a backend cannot run this op.

        Args:
            backend: "reference", "cpp", "triton" or "cuda".
            device: type of the first argument's device, "cpu" or "cuda".
            dtype: of the first argument.

        Returns:
            The reason; None if it can.
        """
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
