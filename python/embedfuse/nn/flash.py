"""FlashAttention on packed sequences: FlashAttention-3 if it is installed, or the one in torch."""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embedfuse.native import Unavailable


@dataclass(frozen=True)
class Flash:
    """One implementation of FlashAttention: where it runs, and how it is called with our arguments.

    Attributes:
        name: for reports.
        load: returns the implementation's function; raises Unavailable with the reason.
        capability: lowest and highest compute capability of the GPU.
        run: calls that function with the arguments of nn.attention; returns (rows, heads, head_dim).
    """

    name: str
    load: Callable[[], Callable]
    capability: tuple[tuple[int, int], tuple[int, int]]
    run: Callable[..., Tensor]

    def __call__(self, *args) -> Tensor:
        return self.run(self.load(), *args)

    def refusal(self, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        """Why this cannot run on such tensors; None when it can."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"takes float16, bfloat16, not {str(dtype).removeprefix('torch.')}"
        if head_dim % 8 or head_dim > 256:
            return f"takes a head_dim that is a multiple of 8 up to 256, not {head_dim}"
        least, most = self.capability
        if not least <= capability <= most:
            chips = f"sm_{least[0]}{least[1]}" + ("" if least == most else " and later")
            return f"runs on {chips}, not on sm_{capability[0]}{capability[1]}"
        try:
            self.load()
        except Unavailable as error:
            return str(error)
        return None


@functools.cache
def load_flash_attention_3() -> Callable:
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name != "flash_attn_interface":
            raise Unavailable(f"flash_attn_interface does not load: {error}") from error
        raise Unavailable("flash_attn_interface is not installed") from error
    except (ImportError, OSError, AttributeError) as error:
        raise Unavailable(f"flash_attn_interface does not load: {error}") from error


def run_flash_attention_3(
    function, query, key, value, queries, packed, scale, causal, window
) -> Tensor:
    out = function(
        query,
        key,
        value,
        queries.cu_seqlens,
        packed.cu_seqlens,
        queries.max_seqlen,
        packed.max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=window_size(causal, window),
    )
    return out[0] if isinstance(out, tuple) else out  # until 2025 it returned the logsumexp as well


@functools.cache
def load_torch_varlen() -> Callable:
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as error:
        raise Unavailable(f"torch {torch.__version__} has none: {error}") from error
    if not accepts(function, "scale"):  # before torch 2.11
        raise Unavailable(f"that of torch {torch.__version__} does not take a scale")
    return function


@functools.cache
def accepts(function: Callable, argument: str) -> bool:
    return argument in inspect.signature(function).parameters


@functools.cache
def reads_groups(function: Callable, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a varlen_attn without enable_gqa (torch 2.11) computes grouped heads all the same.

    Its kernel does. Repeated keys and values would be a copy of both in every layer.
    """
    query = torch.eye(8, device=device, dtype=dtype).view(4, 2, 8)
    key = query[:, :1]
    ends = torch.tensor([0, 4], dtype=torch.int32, device="cpu").to(device)
    try:
        found, wanted = (
            function(query, x, x, ends, ends, 4, 4, scale=1.0, window_size=(-1, -1))
            for x in (key, key.repeat_interleave(2, 1))
        )
    except torch.OutOfMemoryError:
        raise  # says nothing about the function, and would be kept
    except (RuntimeError, ValueError):
        return False
    return torch.allclose(found, wanted)


def run_torch_varlen(function, query, key, value, queries, packed, scale, causal, window) -> Tensor:
    options, group_size = {}, query.shape[1] // key.shape[1]
    if group_size > 1 and accepts(function, "enable_gqa"):
        options["enable_gqa"] = True
    elif group_size > 1 and (
        torch.is_grad_enabled() or not reads_groups(function, query.device, query.dtype)
    ):
        key, value = (x.repeat_interleave(group_size, 1) for x in (key, value))
    return function(
        query,
        key,
        value,
        queries.cu_seqlens,
        packed.cu_seqlens,
        queries.max_seqlen,
        packed.max_seqlen,
        scale=scale,
        window_size=window_size(causal, window),
        **options,
    )


def window_size(causal: bool, window: int | None) -> tuple[int, int]:
    """(keys before, keys after) that a query row sees besides its own; -1 means all."""
    return (-1 if window is None else window - 1, 0) if causal else (-1, -1)


FLASH_ATTENTION_3 = Flash(
    "FlashAttention-3", load_flash_attention_3, ((9, 0), (9, 0)), run_flash_attention_3
)
TORCH_VARLEN = Flash(
    "torch.nn.attention.varlen", load_torch_varlen, ((8, 0), (99, 0)), run_torch_varlen
)
