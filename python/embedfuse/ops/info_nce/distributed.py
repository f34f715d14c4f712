"""Statistics against the columns of all ranks: what makes every contrastive loss here distributed.

Each rank has its rows and an equally large part of the columns, of which a row's own is in its rank's part.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from embedfuse.ops.info_nce.op import BACKWARD, FORWARD
from embedfuse.ops.info_nce.statistics import NOTHING, Columns, Statistics, reads_again, statistics

# What has to be the same on all ranks; _RAISED stands for each on one that raised.
_FACTS = ("rows", "width", "dtype", "ids", "guide width", "guide dtype", "gradient", "backward")
_RAISED = -1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Ranks:
    """group: a torch.distributed process group, default all processes."""

    def __init__(self, group: "distributed.ProcessGroup | None" = None):
        self.group = group

    @property
    def size(self) -> int:
        return distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return distributed.get_rank(self.group)

    def gather(self, part: Tensor | None) -> Tensor | None:
        """The parts of all ranks, end to end in their order; without gradient."""
        if part is None:
            return None
        whole = part.new_empty(self.size, *part.shape)
        distributed.all_gather(list(whole), part.detach().contiguous(), group=self.group)
        return whole.flatten(0, 1)

    def tell_of_error(self, device: torch.device) -> None:
        """Has the other ranks raise in their next `check`, where they would wait for this one."""
        self._facts_of_all([_RAISED] * len(_FACTS), device)

    def check(self, y: Tensor, columns: Columns, goes_round_again: bool = False) -> None:
        """Raises on all ranks where one raised, or has another shape: they would wait for each other or mix
        up rows."""
        guide = columns.guide_y
        mine = (
            len(y),
            y.shape[1],
            DTYPES.index(y.dtype),
            int(columns.y_keys is not None),
            0 if guide is None else guide.shape[1],
            0 if guide is None else DTYPES.index(guide.dtype),
            int(y.requires_grad and torch.is_grad_enabled()),
            int(goes_round_again),
        )
        every = self._facts_of_all(mine, y.device)
        for rank, other in enumerate(every):
            if other[0] == _RAISED:
                raise ValueError(f"across: rank {rank} raised, and says why")
        for rank, other in enumerate(every):
            for name, value, its in zip(_FACTS, mine, other, strict=True):
                if its != value:
                    its, value = (DTYPES[v] if name.endswith("dtype") else v for v in (its, value))
                    raise ValueError(
                        f"pool: {name} {its} on rank {rank}, {value} on rank {self.rank}; accepted is one "
                        "number of rows, width, dtype, kind of ops.Rows and need of a gradient on all ranks"
                    )

    def _facts_of_all(self, mine: Sequence[int], device: torch.device) -> list[list[int]]:
        return self.gather(torch.tensor([mine], device=device)).tolist()


@contextlib.contextmanager
def agreed(across: _Ranks | None, device: torch.device) -> Iterator[None]:
    """Around checks before `statistics` that one rank may fail alone: the others then raise there."""
    try:
        yield
    except Exception:
        if across is not None and distributed.is_initialized():
            across.tell_of_error(device)
        raise


class AllGather(_Ranks):
    """Negatives from all ranks of `group`, by gathering documents: memory O(documents of all ranks).

    The backward pass sums each document's gradient over the ranks and gives it to the rank it is from.
    """

    def statistics(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        columns: Columns = NOTHING,
        of_columns: Callable = statistics,
        **settings,
    ) -> Statistics:
        """of_columns: what takes the statistics of the gathered columns."""
        self.check(y, columns)
        own = columns.own
        if own is not None:
            own = torch.where(own < 0, own, own + self.rank * len(y))
        columns = columns._replace(
            own=own, y_keys=self.gather(columns.y_keys), guide_y=self.gather(columns.guide_y)
        )
        return of_columns(x, _Gathered.apply(y, self), scale, columns, **settings)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, ranks):
        ctx.ranks = ranks
        return ranks.gather(part)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        parts = wide.unflatten(0, (ctx.ranks.size, len(wide) // ctx.ranks.size))
        out = torch.empty_like(parts[0])
        distributed.reduce_scatter(out, list(parts), group=ctx.ranks.group)
        return out.to(grad.dtype), None


class Ring(_Ranks):
    """Negatives from all ranks of `group`, whose documents go round from rank to rank: memory O(documents of
    one rank), three parts at a time; in the backward pass also their fp32 gradients, which travel with the
    documents and end where these are from.

    The next part is on its way while this one is computed with.
    """

    def statistics(
        self, x: Tensor, y: Tensor, scale: Tensor, columns: Columns = NOTHING, **settings
    ) -> Statistics:
        self.check(y, columns, reads_again(x, y, scale, **settings))
        return statistics(x, y, scale, columns, passes=(self._forward, self._backward), **settings)

    def _forward(self, x, y, *inputs):
        """FORWARD over all ranks' y."""
        sigmoid, found = inputs[-2], None
        for block, inputs_of_block in self._blocks(y, inputs):
            part = FORWARD(x, block, *inputs_of_block)
            found = part if found is None else _merged(found, part, sigmoid)
        return found

    def _backward(self, x, y, *inputs):
        """BACKWARD over all ranks' y: the gradient of this rank's x, and that of its y from all ranks."""
        for_y = inputs[-1]
        grad_x = arrive = None
        for block, inputs_of_block in self._blocks(y, inputs):
            of_x, of_block = BACKWARD(x, block, *inputs_of_block)
            grad_x = of_x if grad_x is None else grad_x.add_(of_x)
            if for_y:
                of_block = of_block.to(torch.promote_types(y.dtype, torch.float32))
                if arrive is not None:
                    of_block += arrive()[0]
                arrive = self._pass_on([of_block])
        return grad_x, arrive()[0].to(y.dtype) if for_y else y[:0]

    def _blocks(self, y: Tensor, inputs: tuple) -> Iterator[tuple[Tensor, tuple]]:
        """Each rank's y with the inputs that the ops take beside it, this rank's first."""
        scale, bias, own, limit, x_keys, y_keys, guide_x, guide_y, *rest = inputs
        parts = [part.contiguous() for part in (y, y_keys, guide_y) if part is not None]
        for step in range(self.size):
            arrive = self._pass_on(parts) if step + 1 < self.size else None
            block, *others = parts
            keys = None if y_keys is None else others.pop(0)
            guide = None if guide_y is None else others.pop(0)
            yield block, (scale, bias, own, limit, x_keys, keys, guide_x, guide, *rest)
            own = None
            parts = arrive() if arrive else parts

    def _pass_on(self, parts: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends to the next rank; what it returns waits for what the one before sends."""
        if self.size == 1:
            return lambda: parts
        coming = [torch.empty_like(part) for part in parts]
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size

        def operation(call, part, peer):
            return distributed.P2POp(call, part, group=self.group, group_peer=peer)

        requests = distributed.batch_isend_irecv(
            [operation(distributed.isend, part, to) for part in parts]
            + [operation(distributed.irecv, part, source) for part in coming]
        )

        def arrive():
            for request in requests:
                request.wait()
            return coming

        return arrive


def _merged(a: tuple, b: tuple, sigmoid: bool) -> tuple:
    """FORWARD's outputs for columns of two parts."""
    count, total = a[2] + b[2], a[1] + b[1]
    if sigmoid:
        return a[0] + b[0], total, count, a[3] + b[3]
    statistic = torch.logaddexp(a[0], b[0])
    mean = a[3]
    if len(mean):
        base = statistic.masked_fill(statistic == -torch.inf, 0)  # of rows without columns
        mean = sum((part[0] - base).exp()[:, None] * part[3] for part in (a, b))
    return statistic, total, count, mean
