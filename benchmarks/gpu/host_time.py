"""Host time of each op of a patched forward on a GPU, with all launches stubbed: needs no GPU.

Triton compiles its kernels for sm_90 and looks them up as on a GPU; what it would launch does nothing, and
neither do torch's products, GELU and selection of rows, whose own overhead is not counted. Attention is our
kernel.
"""

import argparse
import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MistralConfig, MistralModel, XLMRobertaConfig, XLMRobertaModel

import embedfuse
from benchmarks.kernels.stubbed import as_on_a_gpu
from embedfuse.nn.decoder import decode
from embedfuse.nn.programs import Programs
from embedfuse.packing import unpadded
from embedfuse.patching.forward.tokens import Batch, Tokens
from embedfuse.triton_kernels.launch import Launch

LENGTHS = (3, 5)
NARROW = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 100}


def towers() -> dict[str, tuple[Programs, Callable[[], Tensor]]]:
    """Name -> the programs of a patched model and a forward, from token ids or from embeddings."""
    encoder = XLMRobertaModel(XLMRobertaConfig(**NARROW, num_hidden_layers=24), False)
    decoder = MistralModel(MistralConfig(**NARROW, num_hidden_layers=4, num_key_value_heads=1))
    packed = unpadded(list(LENGTHS), torch.device("cpu"))
    layouts = []
    for model in (encoder, decoder):
        embedfuse.patch(model.eval())
        layouts.append(model.current_layout())
    batch = Batch(layouts[0], packed, Tokens(torch.arange(5, 5 + packed.tokens)))
    x, cos, sin = (torch.ones(packed.tokens, n) for n in (64, 32, 32))
    layers, programs = layouts[1].layers, layouts[1].programs

    def decoded() -> Tensor:
        return decode(layers, decoder.norm, x, cos, sin, packed, programs=programs)

    return {
        "BGE-M3, 24 layers": (layouts[0].programs, lambda: encoder.run_layers(batch, None)),
        "Mistral, 4 layers": (programs, decoded),
    }


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Inside the block the ops of torch that towers call compute nothing."""
    made: dict[tuple, Tensor] = {}

    def linear(x, weight, bias=None):
        shape = x.shape[0], weight.shape[0]
        return made.get(shape) if shape in made else made.setdefault(shape, x.new_empty(shape))

    def nothing(*args, out=None):
        return args[0] if out is None else out

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "linear", linear))
        stack.enter_context(mock.patch.object(torch.ops.aten, "gelu_", nothing))
        for name in ("addmm", "mm", "index_select"):
            stack.enter_context(mock.patch.object(torch, name, nothing))
        yield


def microseconds(call: Callable, repeats: int) -> float:
    """The least of five means."""
    means = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - start) / repeats)
    return 1e6 * min(means)


def measure(programs: Programs, forward: Callable, repeats: int) -> list[float]:
    """Microseconds of an op: op by op with Triton's look-up and with ours, and in a program."""
    by_ops = mock.patch.object(Programs, "for_call", return_value=None)
    by_look_up = mock.patch.object(Launch, "__call__", Launch.by_look_up)
    times = []
    importlib.import_module(
        "embedfuse.nn.device_calls"
    )  # before Triton would interpret its kernels
    with torch.inference_mode(), as_on_a_gpu(), without_torch():
        for patches in ((by_ops, by_look_up), (by_ops,), ()):
            with contextlib.ExitStack() as stack:
                for patch in patches:
                    stack.enter_context(patch)
                forward()
                times.append(microseconds(forward, repeats))
    *_, program = programs._recorded.values()  # the others ran in patch's check
    return [us / len(program.calls) for us in times]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="forwards that are averaged")


def run(args: argparse.Namespace) -> int:
    print("us of host time per op | Triton's look-up | ours | a program")
    for name, tower in towers().items():
        look_up, ours, program = measure(*tower, args.repeats)
        print(f"{name.ljust(22)} | {look_up:16.1f} | {ours:4.1f} | {program:9.1f}")
    return 0
