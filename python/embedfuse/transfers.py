"""Between host and GPU without a wait: pinned memory to it, pinned memory and a stream of its own back.

No buffer is kept here. torch's allocators hand out a pinned block again only when the copies from or to it
are done, and a block of the GPU only when the streams that it was recorded on are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_ALIGNMENT = 16


def to_device(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of the host on `device`: on a GPU one copy for all, which the host does not wait for.

    There they are parts of one storage.
    """
    if device.type != "cuda":
        return tuple(t.to(device) for t in tensors)
    places, total = [], 0
    for t in tensors:
        places.append(total)
        total += -(-t.nbytes // _ALIGNMENT) * _ALIGNMENT
    staged = pinned((total,), torch.uint8)
    for part, t in zip(_parts(staged, places, tensors), tensors, strict=True):
        part.copy_(t)
    return _parts(staged.to(device, non_blocking=True), places, tensors)


def _parts(buffer: Tensor, places: list[int], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        buffer[place : place + t.nbytes].view(t.dtype).view(t.shape)
        for place, t in zip(places, like, strict=True)
    )


class ToHost:
    """Copies results of one device to the host while the device goes on.

    behind: how many batches to start before the results of the first are waited for.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.behind = 0 if self._stream is None else 1

    def __call__(self, *tensors: Tensor | None) -> Callable[[], tuple[Tensor | None, ...]]:
        """Starts the copies; what comes back waits for them, and for nothing else, and returns them.

        None stays None. What lies on the host already is returned as it is.
        """
        if self._stream is None:
            return lambda: tensors
        device = self._stream.device
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # The tensors are of inference mode, outside of which torch may refuse to mark them.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            copies = tuple(None if t is None else self._copy(t) for t in tensors)
        # blocking: the waiting thread sleeps, so that the one that tokenises has its core.
        done = torch.cuda.Event(blocking=True)
        done.record(self._stream)

        def wait() -> tuple[Tensor | None, ...]:
            done.synchronize()
            return copies

        return wait

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return copy


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
