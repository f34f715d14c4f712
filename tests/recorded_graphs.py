"""The semantics of CUDA graphs on the CPU, for tests: ops are recorded with the memory that they used."""

import contextlib
import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Recorder(TorchDispatchMode):
    """Records every op with the memory of its arguments and results, without their values."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        held = tree_map_only(Tensor, Tensor.detach, (args, kwargs, out))
        self.ops.append((function, *held))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, out in self.ops:
                again = function(*args, **kwargs)
                if all(r.alias_info is None for r in function._schema.returns):
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor):
                            old.copy_(new)


class RecordedGraphs:
    """Replaces nn.graphs.CudaGraphs, and counts its instances."""

    device_type = "cpu"
    made: list["RecordedGraphs"] = []

    def __init__(self, device):
        self.device = device
        self.captures = self.replays = self.waits = 0
        self._running = threading.Lock()
        RecordedGraphs.made.append(self)

    def capture(self, forward):
        assert not torch.is_inference_mode_enabled()
        forward()
        recorder = Recorder()
        with recorder:
            output = forward()
        self.captures += 1
        output.fill_(torch.nan)  # a capture computes nothing

        def replay():
            assert self._running.locked()
            self.replays += 1
            recorder.replay()

        return replay, output

    @contextlib.contextmanager
    def one_at_a_time(self):
        assert self._running.acquire(blocking=False), "two replays at once"
        yield
        self._running.release()

    def wait(self):
        self.waits += 1
