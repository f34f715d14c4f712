"""The operators behind info_nce: statistics of each row's scores against a pool, and their gradient.

Formula: score c_ij = x_i . y_j, logit z_ij = scale c_ij + bias, of every row i of x with every row j of y. A
column counts for a row unless it is the row's target (its positive, or the row itself), its score is above
the row's `limit`, its key equals the row's, or its guide score guide_x_i . guide_y_j is above the row's
`guide_limit`.
Limits: the kernels take 16-bit and fp32 inputs; fp64 runs on the reference, which stores all logits.
"""

import torch

from embedfuse.ops.info_nce import tiles
from embedfuse.ops.info_nce.backends import cpp_kernels, on_tiles, triton_backward, triton_forward
from embedfuse.registry import Cost, Op

# target (rows,) int64: a column that does not count, or -1 for none. limit, guide_limit (rows,) fp32. x_keys
# (rows,), y_keys (columns,) int64. scale, bias: one fp32 element (fp64 for fp64 x).
_INPUTS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? target, Tensor? limit, Tensor? x_keys, "
    "Tensor? y_keys, Tensor? guide_x, Tensor? guide_y, Tensor? guide_limit, bool sigmoid"
)

# Of each row, over the columns that count:
#   statistic  log sum_j e^z_ij  | sigmoid: sum_j softplus(z_ij)      (rows,) fp32
#   total      sum_j z_ij        | sigmoid: sum_j sigmoid(z_ij)       (rows,) fp32
#   count      how many                                               (rows,) int64
#   mean       sum_j w_ij y_j, w_ij = e^(z_ij - statistic) | sigmoid(z_ij)   (rows, d) fp32
# The last is (0, d) unless `mean`.
FORWARD = Op(
    f"info_nce_forward({_INPUTS}, bool mean) -> (Tensor, Tensor, Tensor, Tensor)",
    "InfoNCE and sigmoid losses, without storing logits",
    differentiable=True,
)

# G_ij = g_statistic_i w_ij + g_total_i where j counts for i, g_target_i where j is the target, else 0.
# w as in FORWARD. Returns G y (rows, d) fp32, (0, d) unless for_x, and G^T x (columns, d) in y's dtype,
# (0, d) unless for_y.
BACKWARD = Op(
    f"info_nce_backward({_INPUTS}, Tensor statistic, Tensor g_statistic, Tensor g_total, Tensor g_target, "
    "bool for_x, bool for_y) -> (Tensor, Tensor)",
    "gradient of InfoNCE and sigmoid losses",
)


def _logits(
    x, y, scale, bias, target, limit, x_keys, y_keys, guide_x, guide_y, guide_limit, _=None
):
    """Logits (rows, columns), and which of them count."""
    scores = x.to(scale.dtype) @ y.T.to(scale.dtype)
    numbers = torch.arange(len(y), device=y.device)
    drop = (
        torch.zeros_like(scores, dtype=torch.bool) if target is None else target[:, None] == numbers
    )
    if limit is not None:
        drop = drop | (scores > limit[:, None])
    if x_keys is not None:
        drop = drop | (x_keys[:, None] == y_keys)
    if guide_x is not None:
        guide = guide_x.to(scale.dtype) @ guide_y.T.to(scale.dtype)
        drop = drop | (guide > guide_limit[:, None])
    return scores * scale + (0 if bias is None else bias), ~drop


def _weights(z, kept, statistic, sigmoid):
    # A row without columns has the statistic -inf.
    base = statistic.masked_fill(statistic == -torch.inf, 0)
    # No weight is above 1; of large logits the statistic's rounding would make it so.
    weights = z.sigmoid() if sigmoid else (z - base[:, None]).clamp_max(0).exp()
    return torch.where(kept, weights, 0)


@FORWARD.reference
def _(x, y, *inputs):
    sigmoid, mean = inputs[-2:]
    with torch.autocast(x.device.type, enabled=False):
        z, kept = _logits(x, y, *inputs[:-1])
        if sigmoid:
            statistic = torch.where(kept, torch.nn.functional.softplus(z), 0).sum(1)
        else:
            statistic = z.masked_fill(~kept, -torch.inf).logsumexp(1)
        weights = _weights(z, kept, statistic, sigmoid)
        total = weights.sum(1) if sigmoid else torch.where(kept, z, 0).sum(1)
        rows = (weights.to(x.dtype) @ y).to(z.dtype) if mean else z.new_empty(0, x.shape[1])
        return statistic, total, kept.sum(1), rows


@BACKWARD.reference
def _(x, y, *inputs):
    statistic, g_statistic, g_total, g_target, for_x, for_y = inputs[-6:]
    target, sigmoid = inputs[2], inputs[9]
    with torch.autocast(x.device.type, enabled=False):
        z, kept = _logits(x, y, *inputs[:10])
        weights = _weights(z, kept, statistic, sigmoid)
        grad = torch.where(kept, weights * g_statistic[:, None] + g_total[:, None], 0)
        if target is not None:
            numbers = torch.arange(len(y), device=y.device)
            grad = torch.where(target[:, None] == numbers, g_target[:, None], grad)
        low = grad.to(x.dtype)
        grad_x = (low @ y).to(grad.dtype) if for_x else grad.new_empty(0, x.shape[1])
        return grad_x, low.T @ x if for_y else y.new_empty(0, x.shape[1])


@FORWARD.fake
def _(x, y, scale, *inputs):
    rows, mean = x.shape[0], inputs[-1]
    return (
        scale.new_empty(rows),
        scale.new_empty(rows),
        scale.new_empty(rows, dtype=torch.int64),
        scale.new_empty(rows if mean else 0, x.shape[1]),
    )


@BACKWARD.fake
def _(x, y, scale, *inputs):
    for_x, for_y = inputs[-2:]
    return (
        scale.new_empty(x.shape[0] if for_x else 0, x.shape[1]),
        y.new_empty(y.shape[0] if for_y else 0, x.shape[1]),
    )


FORWARD.impl("cpp", on_tiles(tiles.forward, cpp_kernels))
BACKWARD.impl("cpp", on_tiles(tiles.backward, cpp_kernels))
FORWARD.impl("triton", triton_forward)
BACKWARD.impl("triton", triton_backward)


def make_inputs(device, dtype, shape, names, scale=20.0, bias=None, spread=1.0, seed=0):
    """Arguments up to `sigmoid`: unit vectors times `spread`, and the options in `names`."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns, depth = shape

    def side(count):
        x = torch.randn(count, depth, generator=generator)
        return (spread * torch.nn.functional.normalize(x, dim=1)).to(dtype)

    x, y, guide_x, guide_y = (side(count) for count in (rows, columns, rows, columns))
    target = torch.randint(-1, columns, (rows,), generator=generator)
    keys = torch.randint(0, max(columns // 3, 1), (rows + columns,), generator=generator)
    options = {
        "target": target,
        "limit": limit_between_scores(x, y),
        "x_keys": keys[:rows],
        "y_keys": keys[rows:],
        "guide_x": guide_x,
        "guide_y": guide_y,
        "guide_limit": limit_between_scores(guide_x, guide_y),
    }
    scale, bias = (None if v is None else torch.tensor(v) for v in (scale, bias))
    options = [value if name in names else None for name, value in options.items()]
    args = (x, y, scale, bias, *options)
    return tuple(a if a is None else a.to(device) for a in args)


def limit_between_scores(x, y):
    """Per row a score that no score is near: in the widest gap of the upper half."""
    scores = (x.double() @ y.double().T).sort(1).values[:, y.shape[0] // 2 :]
    if scores.shape[1] < 2:
        return torch.full((len(x),), 2.0)
    place = scores.diff(dim=1).argmax(1, keepdim=True)
    return (scores.gather(1, place) + scores.gather(1, place + 1))[:, 0].float() / 2


MASKS = ("target", "limit", "x_keys", "y_keys", "guide_x", "guide_y", "guide_limit")


def _cases(device, dtype, size):
    """(arguments up to `sigmoid`, sigmoid)"""
    if size == "bench":
        return [(make_inputs(device, dtype, (1024, 8192, 1024), ("target",), 50.0), False)]
    low = (device, dtype)
    return [
        (make_inputs(*low, (5, 7, 16), ("target",)), False),
        (make_inputs(*low, (33, 130, 40), MASKS), False),
        (make_inputs(*low, (20, 40, 24), MASKS, 8.0, -3.0), True),
        (make_inputs(*low, (3, 2100, 8), ("target", "limit"), 10.0), False),
        (make_inputs(*low, (1030, 17, 8), ("x_keys", "y_keys"), 5.0), False),
        (make_inputs(*low, (9, 50, 37), MASKS[4:], 1.0), False),
        (make_inputs(*low, (1, 1, 1), (), 1.0), False),
        (make_inputs(*low, (4, 1, 5), ("x_keys", "y_keys"), 1.0), False),
        (make_inputs(*low, (2, 66, 130), (), 10.0, -10.0), True),
    ]


@FORWARD.samples
def _(device, dtype, size):
    cases = _cases(device, dtype, size)
    return [(*args, sigmoid, i % 2 == 1) for i, (args, sigmoid) in enumerate(cases)]


@BACKWARD.samples
def _(device, dtype, size):
    samples = []
    for i, (args, sigmoid) in enumerate(_cases(device, dtype, size)):
        generator = torch.Generator().manual_seed(i)
        # The statistic in fp64: forward and backward share it, whatever computed it.
        wide = [a.double() if a is not None and a.is_floating_point() else a for a in args]
        statistic = FORWARD._reference(*wide, sigmoid, False)[0].float()
        grads = torch.randn(3, len(args[0]), generator=generator).to(device)
        samples.append((*args, sigmoid, statistic, *grads, i != 3, i != 4))
    return samples


@FORWARD.cost
def _(x, y, *args):
    return _cost(x, y, products=1 + args[-1])


@BACKWARD.cost
def _(x, y, *args):
    return _cost(x, y, products=1 + args[-2] + args[-1])


def _cost(x, y, products):
    rows, columns, depth = len(x), len(y), x.shape[1]
    read = (rows + columns) * depth * x.element_size()
    return Cost(bytes=products * read, flops=2 * products * rows * columns * depth)
