"""Copies between host and GPU that the host does not wait for, through pinned memory.

No buffers are kept here. torch's allocators reuse a pinned block only after the copies from or to it have
finished, and a block of GPU memory only after the streams that it was recorded on have.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_ALIGNMENT = 16


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Host tensors on `device`. For a GPU they travel in one copy, which the host does not wait for.

    The results on a GPU are views of one storage.
    """
    if device.type == "cpu":
        return tensors
    if device.type != "cuda":
        return tuple(t.to(device) for t in tensors)
    offsets, total = [], 0
    for t in tensors:
        offsets.append(total)
        total += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = pinned((total,), torch.uint8)
    for part, t in zip(_views(buffer, offsets, tensors), tensors, strict=True):
        part.copy_(t)
    return _views(buffer.to(device, non_blocking=True), offsets, tensors)


def _views(buffer: Tensor, offsets: list[int], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        buffer[offset : offset + t.nbytes].view(t.dtype).view(t.shape)
        for offset, t in zip(offsets, like, strict=True)
    )


class ToHost:
    """Copies results from a device to the host while the device continues.

    in_flight: how many batches to start before waiting for the results of the first.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.in_flight = 0 if self._stream is None else 1

    def __call__(self, *tensors: Tensor | None) -> Callable[[], tuple[Tensor | None, ...]]:
        """Start the copies and return a function that waits for them only, and returns them.

        None stays None. Tensors on the host are returned as they are.
        """
        stream = self._stream
        if stream is None:
            return lambda: tensors
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        # The tensors were made in inference mode; outside of it torch may refuse to mark them.
        with torch.inference_mode(), torch.cuda.stream(stream):
            copies = tuple(None if t is None else _copy(t, stream) for t in tensors)
        # blocking: the waiting thread sleeps, so that the tokenizer's thread can use its core.
        done = torch.cuda.Event(blocking=True)
        done.record(stream)

        def wait() -> tuple[Tensor | None, ...]:
            done.synchronize()
            return copies

        return wait


def _copy(tensor: Tensor, stream: torch.cuda.Stream) -> Tensor:
    copy = pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    return copy


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
