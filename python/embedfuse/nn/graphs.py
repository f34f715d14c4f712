"""CUDA graphs of a packed forward: batches too small to hide what launching their kernels costs.

A graph is captured for a bucket of (tokens, sequences) and replayed on buffers of that size. The tokens
that a batch leaves free form one more sequence after its own, and sequences that it leaves free have
length zero: every token belongs to a sequence, so nothing is left unwritten, and attention never looks
from one sequence into another. What comes of them is never read.
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

from embedfuse.packing import Packed

# So many tokens take an H100 as long in 16 bits as reading the weights does (798 TFLOP/s at 3.0 TB/s), so
# fewer are no sooner done.
WEIGHT_BOUND_TOKENS = 256
# Up to there padding costs next to nothing; beyond, at most a third is padding. Past the last, kernels run
# longer than it takes to launch them.
TOKENS = (16, 32, 64, 128, 256, 384, 512, 768, 1024)
SEQUENCES = (1, 8, 64)
# Of the buffers that each graph has to itself. What passes between its kernels lies in a pool that the
# graphs of a model share, as large as the largest of them needs.
MAX_BYTES = 256 * 2**20

logger = logging.getLogger("embedfuse")
_capturing = threading.Lock()  # torch allows one capture at a time in a process


def bucket(tokens: int, sequences: int) -> tuple[int, int] | None:
    """The smallest (tokens, sequences) that has room for these; None where there is none."""
    if not (0 < tokens <= TOKENS[-1] and 0 < sequences <= SEQUENCES[-1]):
        return None
    return TOKENS[bisect_left(TOKENS, tokens)], SEQUENCES[bisect_left(SEQUENCES, sequences)]


def buckets(tokens: int, sequences: int) -> list[tuple[int, int]]:
    """All buckets up to the one that has room for these, the large ones first: later captures fit into
    the memory that they left."""
    most_tokens, most_sequences = bucket(tokens, sequences)
    return [
        (t, s)
        for t in reversed(TOKENS)
        for s in reversed(SEQUENCES)
        if t <= most_tokens and s <= most_sequences
    ]


class LengthsUnknown(RuntimeError):
    """The forward asked the host for lengths that only the GPU has."""


class Room(Packed):
    """Sequences whose lengths change from replay to replay: only cu_seqlens, on the device, tells them.

    tokens: of all sequences together, and the bound of each.
    """

    def __init__(self, tokens: int, cu_seqlens: Tensor):
        # Packed's own would set lengths.
        vars(self).update(cu_seqlens=cu_seqlens, shape=(1, tokens), index=None, starts_padded=False)

    @property
    def lengths(self):
        raise LengthsUnknown("attention reads the lengths of the texts on the host")

    @property
    def tokens(self) -> int:
        return self.shape[1]

    @property
    def max_seqlen(self) -> int:
        return self.shape[1]


class Batch(Protocol):
    """A batch that a graph may run. key: what its forward depends on besides weights and inputs."""

    key: tuple

    def buffers(self) -> tuple[Tensor, ...]:
        """Inputs of the bucket's size, for all batches of the key."""

    def fill(self, buffers: tuple[Tensor, ...]) -> None:
        """Write the inputs of this batch."""

    def forward(self, buffers: tuple[Tensor, ...]) -> Tensor:
        """The result, of the bucket's size; the host sees nothing of what the buffers hold."""

    def own(self, output: Tensor) -> Tensor:
        """The rows of a result that are this batch's."""


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
    """Captures forwards on one GPU, and keeps their replays from overlapping, because they share a pool."""

    device_type = "cuda"

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        # One for all, because what one capture frees in the pool serves captures on the same stream alone.
        # torch deals streams out again and again; few take those of high priority, and what a thread
        # launched into a stream under capture would be lost.
        self._side = torch.cuda.Stream(device, priority=-1)
        self._done = torch.cuda.Event()

    def capture(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """replay, and the output that it writes. Other threads may use the GPU meanwhile, except for
        waiting for the whole device (torch.cuda.synchronize)."""
        graph, side = torch.cuda.CUDAGraph(), self._side
        with _capturing, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            side.wait_stream(current)
            try:
                # torch.cuda.graph leaves its stream current where a capture fails to end; this one does not.
                with torch.cuda.stream(side):
                    forward()  # compiles and loads kernels, and raises before a capture has begun
                    # A graph keeps the address of cuBLAS' workspace, which torch shares by stream. Cleared
                    # before, it is allocated in the graph's own pool; cleared after, nobody else gets it.
                    torch._C._cuda_clearCublasWorkspaces()
                    how = {"pool": self._pool, "stream": side, "capture_error_mode": "thread_local"}
                    with torch.cuda.graph(graph, **how):
                        output = forward()
            finally:
                torch._C._cuda_clearCublasWorkspaces()
                current.wait_stream(side)  # a forward that raised may still read the buffers
        return graph.replay, output

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """What the current stream gets inside waits for what another stream got inside before."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def wait(self) -> None:
        """Until the last turn has run."""
        self._done.synchronize()


class Snapshot:
    """What graphs have baked in of these modules: classes, and where parameters and buffers lie.

    Values may change in place; replays read them. The memory is held, so that none of it can become
    that of other weights unnoticed. Of tensors that are not torch's own only the identity is known.
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
        self._held = [tensor.detach() for tensor in self._plain]
        self._places = self._look()

    def _look(self) -> tuple[list, ...]:
        reads = (Tensor.data_ptr, Tensor.size, Tensor.stride)
        return [t.dtype for t in self._plain], *(list(map(read, self._plain)) for read in reads)

    def holds(self, modules: list[nn.Module]) -> bool:
        return (
            modules is self.modules
            and list(map(type, modules)) == self._kinds
            and all(owner.get(name) is tensor for owner, name, tensor in self._slots)
            and self._look() == self._places
        )


class GraphCache:
    """The graphs of one model; those least lately used go first.

    A key is captured the second time it comes: a shape that comes once would only pay. Calls from
    several threads are safe.

    refusal: why there are no graphs until the modules change. One failed capture is enough: what fails
    one bucket fails the others, and torch may not give back what a failed capture took.
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
        batch: Batch,
        unfit: Callable[[Snapshot], str | None],
    ) -> Tensor | None:
        """The batch's result, by replay; None where its forward has to run.

        modules: all that the forward runs; another list is another model. unfit: why a model like the
        snapshot has no graphs, asked once for each.
        """
        with self._lock:
            if self._snapshot is None or not self._snapshot.holds(modules):
                self._empty(Snapshot(modules))
                self.refusal = unfit(self._snapshot)
            if self.refusal is not None:
                return None
            graph = self._graphs.get(batch.key)
            if graph is None:
                graph = self._capture(batch)
            if graph is None:
                return None
            self._graphs.move_to_end(batch.key)
            with self._device.turn():
                batch.fill(graph.buffers)
                graph.replay()
                return batch.own(graph.output).clone()

    def forget(self) -> None:
        """Give back all memory."""
        with self._lock:
            self._empty(None)

    def _empty(self, snapshot: Snapshot | None) -> None:
        if self._graphs:
            self._device.wait()  # a replay on another stream may still read the buffers
        self._graphs.clear()
        self._seen: set[tuple] = set()
        self._snapshot, self._device, self.refusal = snapshot, None, None

    def _capture(self, batch: Batch) -> Graph | None:
        if batch.key not in self._seen:
            self._seen.add(batch.key)
            return None
        # The buffers serve callers in inference mode and others, so they are no inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            try:
                buffers = batch.buffers()
                batch.fill(buffers)
                if self._device is None:
                    self._device = self.device_graphs(buffers[0].device)
                replay, output = self._device.capture(lambda: batch.forward(buffers))
            except Exception as error:  # whatever it is, the eager forward tells or serves
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
