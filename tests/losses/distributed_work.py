"""What test_distributed.py runs, on every rank and in one process with the whole batch."""

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from embedfuse import losses, ops

ROWS, HARD, WIDTH = 5, 2, 8  # of each rank
FORMS = {"gather": ops.AllGather, "ring": ops.Ring}


def parameter(value):
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


# name: (loss, the ops.Rows fields that go with its sides)
LOSSES = {
    "InfoNCE": (lambda **k: losses.InfoNCE(parameter(0.1), **k), ("ids", "guide")),
    "InfoNCE, all settings": (
        lambda **k: losses.InfoNCE(
            parameter(0.1),
            false_negatives=ops.FalseNegatives(margin=0.3),
            hardness=2.0,
            hard_hardness=5.0,
            label_smoothing=0.1,
            **k,
        ),
        ("ids",),
    ),
    "SymmetricInfoNCE": (losses.SymmetricInfoNCE, ("ids",)),
    "DebiasedInfoNCE": (lambda **k: losses.DebiasedInfoNCE(parameter(0.5), **k), ("ids",)),
    "GTELoss": (lambda **k: losses.GTELoss(parameter(0.1), **k), ()),
    "Qwen3Loss": (lambda **k: losses.Qwen3Loss(parameter(0.1), **k), ("ids",)),
    "GISTLoss": (lambda **k: losses.GISTLoss(parameter(0.1), **k), ("ids", "guide")),
    "SigLIPLoss": (losses.SigLIPLoss, ("ids",)),
    "MatryoshkaLoss": (
        lambda **k: losses.MatryoshkaLoss(losses.InfoNCE(parameter(0.1), **k), [8, 5]),
        ("ids",),
    ),
}


def batch(ranks, size, seed=0):
    """(sides, ids, guides) of these ranks of `size`."""
    generator = torch.Generator().manual_seed(seed)
    rows = slice(ranks[0] * ROWS, (ranks[-1] + 1) * ROWS)
    leads = (size * ROWS,), (size * ROWS,), (size * ROWS, HARD)

    def draw(width):
        return [torch.randn(*lead, width, generator=generator).double() for lead in leads]

    sides, guides = draw(WIDTH), draw(3)
    sides[1] += sides[0]
    guides[1] += guides[0]
    ids = [None, *(torch.randint(0, 2 * ROWS, lead, generator=generator) for lead in leads[1:])]
    return [[part if part is None else part[rows] for part in x] for x in (sides, ids, guides)]


def evaluate(name, ranks, size, across=None, dtype=torch.float64):
    """Loss, gradients of queries, documents, hard negatives and of each parameter."""
    make, fields = LOSSES[name]
    loss = make() if across is None else make(across=across)
    inputs, ids, guides = batch(ranks, size)
    inputs = [side.to(dtype).requires_grad_() for side in inputs]
    sides = [
        ops.Rows(
            side,
            ids[i] if "ids" in fields else None,
            guides[i].to(dtype) if "guide" in fields else None,
        )
        for i, side in enumerate(inputs)
    ]
    value = loss(*sides)
    value.backward()
    return [value.detach(), *(x.grad for x in (*inputs, *loss.parameters()))]


def with_queue(ranks, size, across=None):
    """Losses of three steps with a queue that the second fills."""
    queue = losses.NegativeQueue(2 * size * ROWS - 3, WIDTH, dtype=torch.float64, ids=True)
    loss = losses.InfoNCE(0.1, queue=queue, across=across)
    values = []
    for step in range(3):
        (q, d, _), (_, ids, _), _ = batch(ranks, size, seed=step)
        values.append(loss(q, ops.Rows(d, ids)))
    return torch.stack(values)


class Towers(nn.Module):
    """Query and document tower with the loss and its temperature."""

    def __init__(self, across=None):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.towers = nn.ModuleList(nn.Linear(WIDTH, 6).double() for _ in range(2))
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))
        self.loss = losses.InfoNCE(parameter(0.2), across=across)

    def forward(self, q, d):
        return self.loss(self.towers[0](q), self.towers[1](d))


def train(ranks, size, across=None):
    """Parameters after two steps, under DistributedDataParallel where there are ranks."""
    model = Towers(across)
    wrapped = model if across is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        q, d, _ = batch(ranks, size, seed=step)[0]
        wrapped(q, d).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def frozen_documents(ranks, size, across=None):
    (q, d, _), (_, ids, _), _ = batch(ranks, size)
    q.requires_grad_()
    losses.InfoNCE(0.1, across=across)(q, ops.Rows(d, ids)).backward()
    return q.grad


def unequal(rank, across):
    """The error of a rank where rank 1 has a row less."""
    x = torch.ones(ROWS - (rank == 1), WIDTH)
    try:
        losses.InfoNCE(across=across)(x, x)
    except ValueError as error:
        return str(error)


def uneven_gradients(rank, across):
    """The error of a rank where the documents of rank 1 want no gradient."""
    q, d = (torch.randn(ROWS, WIDTH).requires_grad_() for _ in range(2))
    try:
        losses.InfoNCE(across=across)(q, d.detach() if rank == 1 else d)
    except ValueError as error:
        return str(error)


def uneven_queries(rank, across):
    """The error of a rank where documents are frozen and the queries of rank 1 too."""
    q, d = (torch.randn(ROWS, WIDTH) for _ in range(2))
    try:
        loss = losses.InfoNCE(label_smoothing=0.1, across=across)
        loss(q.requires_grad_(rank != 1), d)
    except ValueError as error:
        return str(error)


def alone(rank, across):
    """The errors of a rank for arguments that are wrong on rank 1 alone, and then a loss."""
    x = torch.ones(ROWS, WIDTH)
    labels = torch.full((ROWS,), ROWS if rank == 1 else 0)
    guided, errors = ops.Rows(x, guide=x), []
    for call in (
        lambda: losses.InfoNCE(across=across)(x, x[: ROWS - (rank == 1)]),
        lambda: losses.SigLIPLoss(across=across)(x, x.double() if rank == 1 else x),
        lambda: ops.info_nce(x, x, labels, across=across),
        lambda: losses.GTELoss(across=across)(x, ops.Rows(x, labels) if rank == 1 else x),
        lambda: losses.GISTLoss(across=across)(guided, x if rank == 1 else guided),
    ):
        try:
            errors.append(call())
        except ValueError as error:
            errors.append(str(error))
    return [*errors, losses.InfoNCE(1.0, across=across)(x, x)]


def work(rank, size):
    found = {}
    for form, make in FORMS.items():
        across = make()
        found[form] = {
            "losses": {name: evaluate(name, [rank], size, across) for name in LOSSES},
            "fp32": evaluate("InfoNCE", [rank], size, across, torch.float32),
            "again": evaluate("InfoNCE", [rank], size, across, torch.float32),
            "bf16": evaluate("InfoNCE", [rank], size, across, torch.bfloat16),
            "queue": with_queue([rank], size, across),
            "trained": train([rank], size, across),
            "frozen": frozen_documents([rank], size, across),
            "unequal": unequal(rank, across),
            "uneven gradients": uneven_gradients(rank, across),
            "uneven queries": uneven_queries(rank, across),
            "alone": alone(rank, across),
        }
    half = distributed.new_group([0, 1])
    if rank < 2:
        found["group"] = evaluate("InfoNCE", [rank], 2, ops.Ring(half))
    return found
