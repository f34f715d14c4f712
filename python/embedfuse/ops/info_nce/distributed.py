"""Statistics against the columns of all ranks: what makes every contrastive loss here distributed.

Each rank has its rows and an equally large part of the columns; a row's target lies in the part of its rank.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from embedfuse.ops.info_nce.op import BACKWARD, FORWARD
from embedfuse.ops.info_nce.statistics import (
    NONE_EXCLUDED,
    Excluded,
    Statistics,
    needs_second_pass,
)
from embedfuse.ops.info_nce.strategy import Strategy

# What has to be the same on all ranks; a rank that raised sends _RAISED in place of each.
_FACTS = ("rows", "width", "dtype", "ids", "guide width", "guide dtype", "gradient", "backward")
_RAISED = -1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Ranks:
    """What AllGather and Ring share."""

    def __init__(self, group: "distributed.ProcessGroup | None" = None):
        self.group = group

    @property
    def size(self) -> int:
        """How many processes the group has."""
        return distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The number of this process in the group."""
        return distributed.get_rank(self.group)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks, end to end in the order of ranks; without gradient."""
        whole = part.new_empty(self.size, *part.shape)
        distributed.all_gather(list(whole), part.detach().contiguous(), group=self.group)
        return whole.flatten(0, 1)

    def report_error(self, device: torch.device) -> None:
        """Makes the other ranks raise in their next `check`, where they would wait for this one."""
        self._gather_facts([_RAISED] * len(_FACTS), device)

    def check(self, y: Tensor, excluded: Excluded, second_pass: bool = False) -> None:
        """Raises on all ranks where one raised or has another shape: they would wait for each other or mix
        up rows."""
        guide = excluded.guide_y
        here = (
            len(y),
            y.shape[1],
            DTYPES.index(y.dtype),
            int(excluded.y_keys is not None),
            0 if guide is None else guide.shape[1],
            0 if guide is None else DTYPES.index(guide.dtype),
            int(y.requires_grad and torch.is_grad_enabled()),
            int(second_pass),
        )
        facts = self._gather_facts(here, y.device)
        for rank, there in enumerate(facts):
            if there[0] == _RAISED:
                raise ValueError(f"across: rank {rank} raised, and says why")
        for rank, there in enumerate(facts):
            for name, a, b in zip(_FACTS, there, here, strict=True):
                if a != b:
                    a, b = (DTYPES[v] if name.endswith("dtype") else v for v in (a, b))
                    raise ValueError(
                        f"pool: {name} {a} on rank {rank}, {b} on rank {self.rank}; accepted is one "
                        "number of rows, width, dtype, kind of ops.Rows and need of a gradient on all ranks"
                    )

    def _gather_facts(self, here: Sequence[int], device: torch.device) -> list[list[int]]:
        return self.gather(torch.tensor([here], device=device)).tolist()


@contextlib.contextmanager
def errors_on_all_ranks(across: _Ranks | None, device: torch.device) -> Iterator[None]:
    """Around checks that one rank may fail alone: the other ranks then raise when they compute statistics."""
    try:
        yield
    except Exception:
        if across is not None and distributed.is_initialized():
            across.report_error(device)
        raise


class AllGather(_Ranks):
    """Negatives from all ranks, by gathering documents: memory O(documents of all ranks).

    The backward pass sums the gradient of each document over the ranks and gives it to the rank that the
    document is from.

    Args:
        group: a torch.distributed process group; None for all processes.
    """

    def statistics(
        self,
        strategy: Strategy,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        excluded: Excluded = NONE_EXCLUDED,
        **settings,
    ) -> Statistics:
        """Statistics of this rank's rows x against the columns y of all ranks, scored by `strategy`."""
        self.check(y, excluded)
        target = excluded.target
        if target is not None:
            target = torch.where(target < 0, target, target + self.rank * len(y))
        excluded = excluded._replace(
            target=target,
            y_keys=None if excluded.y_keys is None else self.gather(excluded.y_keys),
            guide_y=None if excluded.guide_y is None else self.gather(excluded.guide_y),
        )
        return strategy.pool_statistics(x, _Gathered.apply(y, self), scale, excluded, **settings)


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
    """Negatives from all ranks, whose documents pass from rank to rank: memory O(documents of one rank).

    Three parts exist at a time; in the backward pass also their fp32 gradients, which travel with the
    documents and end on the rank that the documents are from. The next part is received while this one is
    computed with.

    Args:
        group: a torch.distributed process group; None for all processes.
    """

    def statistics(
        self,
        strategy: Strategy,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        excluded: Excluded = NONE_EXCLUDED,
        **settings,
    ) -> Statistics:
        """As AllGather.statistics, of the strategy FullWidth."""
        self.check(y, excluded, needs_second_pass(x, y, scale, **settings))
        passes = (self._forward, self._backward)
        return strategy.pool_statistics(x, y, scale, excluded, passes=passes, **settings)

    def _forward(self, x, y, *inputs):
        """FORWARD over the y of all ranks."""
        sigmoid, merged = inputs[-2], None
        for block, inputs_of_block in self._blocks(y, inputs):
            part = FORWARD(x, block, *inputs_of_block)
            merged = part if merged is None else _merged(merged, part, sigmoid)
        return merged

    def _backward(self, x, y, *inputs):
        """BACKWARD over the y of all ranks: the gradient of this rank's x, and that of its y from all
        ranks."""
        for_y = inputs[-1]
        grad_x = receive = None
        for block, inputs_of_block in self._blocks(y, inputs):
            of_x, of_block = BACKWARD(x, block, *inputs_of_block)
            grad_x = of_x if grad_x is None else grad_x.add_(of_x)
            if for_y:
                of_block = of_block.to(torch.promote_types(y.dtype, torch.float32))
                if receive is not None:
                    of_block += receive()[0]
                receive = self._pass_on([of_block])
        return grad_x, y[:0] if receive is None else receive()[0].to(y.dtype)

    def _blocks(self, y: Tensor, inputs: tuple) -> Iterator[tuple[Tensor, tuple]]:
        """The y of each rank with the inputs of the ops that follow it, this rank's first."""
        scale, bias, target, limit, x_keys, y_keys, guide_x, guide_y, *rest = inputs
        parts = [part.contiguous() for part in (y, y_keys, guide_y) if part is not None]
        for step in range(self.size):
            receive = self._pass_on(parts) if step + 1 < self.size else None
            block, *others = parts
            keys = None if y_keys is None else others.pop(0)
            guide = None if guide_y is None else others.pop(0)
            yield block, (scale, bias, target, limit, x_keys, keys, guide_x, guide, *rest)
            target = None
            parts = receive() if receive else parts

    def _pass_on(self, parts: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Sends parts to the next rank; the function it returns waits for those of the rank before."""
        if self.size == 1:
            return lambda: parts
        incoming = [torch.empty_like(part) for part in parts]
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size

        def operation(call, part, peer):
            return distributed.P2POp(call, part, group=self.group, group_peer=peer)

        requests = distributed.batch_isend_irecv(
            [operation(distributed.isend, part, to) for part in parts]
            + [operation(distributed.irecv, part, source) for part in incoming]
        )

        def receive():
            for request in requests:
                request.wait()
            return incoming

        return receive


def _merged(a: tuple, b: tuple, sigmoid: bool) -> tuple:
    """Outputs of FORWARD over two parts of the columns, from those of each part."""
    count, total = a[2] + b[2], a[1] + b[1]
    if sigmoid:
        return a[0] + b[0], total, count, a[3] + b[3]
    statistic = torch.logaddexp(a[0], b[0])
    mean = a[3]
    if len(mean):
        base = statistic.masked_fill(statistic == -torch.inf, 0)  # of rows without columns
        mean = sum((part[0] - base).exp()[:, None] * part[3] for part in (a, b))
    return statistic, total, count, mean
