"""CUDA graphs of a packed forward, for batches so small that launching their kernels takes longest.

A graph is captured for a bucket of (tokens, sequences) and replayed on buffers of that size. The tokens
that a batch leaves unused form one more sequence after its own, and the sequences that it leaves unused have
length zero. So every token belongs to a sequence, every output is written, and attention never looks from
one sequence into another. The outputs of unused tokens are never read.
"""

import contextlib
import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from embedfuse import native
from embedfuse.packing import LengthsUnknown

# An H100 needs as long for the arithmetic of so many tokens in 16 bits as for reading the weights
# (798 TFLOP/s at 3.0 TB/s): fewer tokens are not faster.
WEIGHT_BOUND_TOKENS = 256
# Up to WEIGHT_BOUND_TOKENS padding costs almost nothing; above, at most a third is padding. Past the last,
# kernels run longer than it takes to launch them.
TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)
SEQUENCES = (1, 8, 64)
# Of the buffers that belong to one graph alone. Activations lie in a pool that the graphs of a model share,
# as large as the largest of them needs.
MAX_BYTES = 256 * 2**20

logger = logging.getLogger("embedfuse")
_capturing = threading.Lock()  # torch allows one capture at a time in a process


def bucket(tokens: int, sequences: int) -> tuple[int, int] | None:
    """The smallest bucket that these fit in; None where they fit in none."""
    if not (0 < tokens <= TOKENS[-1] and 0 < sequences <= SEQUENCES[-1]):
        return None
    return TOKENS[bisect_left(TOKENS, tokens)], SEQUENCES[bisect_left(SEQUENCES, sequences)]


def buckets(tokens: int, sequences: int) -> list[tuple[int, int]]:
    """All buckets up to the one that these fit in, large ones first: later captures reuse their memory."""
    most_tokens, most_sequences = bucket(tokens, sequences)
    return [
        (t, s)
        for t in reversed(TOKENS)
        for s in reversed(SEQUENCES)
        if t <= most_tokens and s <= most_sequences
    ]


class Replayable(Protocol):
    """A batch that a graph may run. key: what its forward depends on besides weights and inputs."""

    key: tuple

    def buffers(self) -> tuple[Tensor, ...]:
        """Inputs of the bucket's size, for all batches of the key."""

    def fill(self, buffers: tuple[Tensor, ...]) -> None:
        """Write the inputs of this batch."""

    def forward(self, buffers: tuple[Tensor, ...]) -> Tensor:
        """The output, of the bucket's size. It must not read the buffers' values on the host."""

    def cut(self, output: Tensor) -> Tensor:
        """The rows of an output that belong to this batch."""


@dataclass(frozen=True)
class Graph:
    """What replay() reads and what it writes."""

    buffers: tuple[Tensor, ...]
    output: Tensor
    replay: Callable[[], None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.buffers, self.output))


class CudaGraphs:
    """Captures forwards on one GPU. Replays must not overlap, because they share a memory pool.

    Attributes:
        failed: Why the process captures nothing any more: after a capture that ended by an error torch's
            allocators may go on as if it were running.
    """

    device_type = "cuda"
    failed: str | None = None

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One stream for all captures, because memory that a capture frees in the pool can be used again on
        # the same stream only. torch hands out the same streams repeatedly, and a launch of another thread
        # into a stream under capture would be lost; few ask for a stream of high priority.
        self._side = torch.cuda.Stream(device, priority=-1)
        self._done = torch.cuda.Event()

    def capture(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that replays the forward, and the output that it writes.

        Other threads may use the GPU meanwhile, but not wait for the whole device (torch.cuda.synchronize).

        Raises:
            RuntimeError: What the forward raises, and after a failed capture.
        """
        if CudaGraphs.failed is not None:
            raise RuntimeError(f"an earlier capture failed: {CudaGraphs.failed}")
        graph, side = torch.cuda.CUDAGraph(), self._side
        with _capturing, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            try:
                # After a failed capture torch.cuda.graph leaves its stream current; this context does not.
                with torch.cuda.stream(side):
                    forward()  # compiles and loads kernels, and raises before a capture has begun
                    # A graph keeps the address of cuBLAS' workspace, which torch shares by stream. Cleared
                    # before, it is allocated in the graph's pool; cleared after, no other code uses it.
                    torch._C._cuda_clearCublasWorkspaces()
                    how = {"pool": self._pool, "stream": side, "capture_error_mode": "thread_local"}
                    try:
                        with torch.cuda.graph(graph, **how):
                            output = forward()
                    except BaseException as error:
                        CudaGraphs.failed = f"{type(error).__name__}: {error}"
                        self._end_allocation()
                        raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
                current.wait_stream(side)  # a forward that raised may still read the buffers
        return graph.replay, output

    def _end_allocation(self) -> None:
        """What torch leaves out where the end of a capture raises: its pool would take all later memory."""
        with contextlib.suppress(RuntimeError):  # it was not left out
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Work launched inside waits for all work launched inside before, on any stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def wait(self) -> None:
        """Wait on the host for all work launched inside `one_at_a_time`."""
        self._done.synchronize()


class Snapshot:
    """What the graphs of these modules depend on: classes, and the addresses of parameters and buffers.

    Values may change in place; replays read them. The storages are kept alive, so that other weights cannot
    get the same address. Of tensor subclasses only the identity is compared.
    """

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self._kinds = list(map(type, modules))
        self._slots = [
            (owner, name, tensor)
            for module in modules
            for owner in (module._parameters, module._buffers)
            for name, tensor in owner.items()
        ]
        self.tensors = [tensor for _, _, tensor in self._slots if tensor is not None]
        self._plain = [t for t in self.tensors if type(t) in (Tensor, nn.Parameter)]
        self._storages = [tensor.detach() for tensor in self._plain]
        self._layouts = native.layouts()(self._plain)

    def matches(self, modules: list[nn.Module]) -> bool:
        return (
            modules is self.modules
            and list(map(type, modules)) == self._kinds
            and all(owner.get(name) is tensor for owner, name, tensor in self._slots)
            and native.layouts()(self._plain) == self._layouts
        )


class GraphCache:
    """The graphs of one model; the least recently used are dropped first.

    A key is captured the second time it comes, because one use does not pay for a capture. Calls from
    several threads are safe.

    Attributes:
        refusal: Why there are no graphs until the modules change. One failed capture is enough: what fails
            for one bucket fails for the others, and torch may not free what a failed capture allocated.
    """

    def __init__(self, device_graphs: type = CudaGraphs, max_bytes: int = MAX_BYTES):
        self.device_graphs, self.max_bytes = device_graphs, max_bytes
        self._graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._empty(None)

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self,
        modules: list[nn.Module],
        batch: Replayable,
        capture_refusal: Callable[[Snapshot], str | None],
    ) -> Tensor | None:
        """The batch's output by replay; None where its forward has to run.

        Args:
            modules: All that the forward runs; another list counts as another model.
            batch: What to run.
            capture_refusal: Says why modules like the snapshot cannot be captured; called once for each.
        """
        with self._lock:
            if self._snapshot is None or not self._snapshot.matches(modules):
                self._empty(Snapshot(modules))
                self.refusal = capture_refusal(self._snapshot)
            if self.refusal is not None:
                return None
            graph = self._graphs.get(batch.key)
            if graph is None:
                graph = self._capture(batch)
            if graph is None:
                return None
            self._graphs.move_to_end(batch.key)
            with self._device.one_at_a_time():
                batch.fill(graph.buffers)
                graph.replay()
                return batch.cut(graph.output).clone()

    def forget(self) -> None:
        """Drop all graphs and free their memory."""
        with self._lock:
            self._empty(None)

    def _empty(self, snapshot: Snapshot | None) -> None:
        if self._graphs:
            self._device.wait()  # a replay on another stream may still read the buffers
        self._graphs.clear()
        self._seen: set[tuple] = set()
        self._snapshot, self._device, self.refusal = snapshot, None, None

    def _capture(self, batch: Replayable) -> Graph | None:
        if batch.key not in self._seen:
            self._seen.add(batch.key)
            return None
        # No inference tensors, because callers outside of inference mode use the buffers too.
        with torch.inference_mode(False), torch.no_grad():
            try:
                buffers = batch.buffers()
                batch.fill(buffers)
                if self._device is None:
                    self._device = self.device_graphs(buffers[0].device)
                replay, output = self._device.capture(lambda: batch.forward(buffers))
            # Whatever it is: the eager forward runs instead, and raises what is the call's fault.
            except Exception as error:
                self._empty(self._snapshot)
                self.refusal = str(error)
                if not isinstance(error, LengthsUnknown):
                    self.refusal = f"a capture failed: {type(error).__name__}: {error}"
                    logger.warning("no CUDA graphs for this model: %s", self.refusal)
                return None
        graph = self._graphs[batch.key] = Graph(buffers, output, replay)
        while len(self) > 1 and sum(g.nbytes for g in self._graphs.values()) > self.max_bytes:
            self._device.wait()
            self._graphs.popitem(last=False)
        return graph
