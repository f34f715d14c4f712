"""Models in the processes that their libraries start: the vectors of one process, on the fused path."""

import contextlib
import contextvars
import multiprocessing
import queue

import numpy as np
import pytest
import torch

import embedfuse
from embedfuse.patching.forward.packed_model import PackedModel
from tests.integrations.flag import DOCSTRINGS

fe = pytest.importorskip("FlagEmbedding")
st = pytest.importorskip("sentence_transformers")
pytest.importorskip("sentence_transformers.multi_vector_encoder")

TEXTS = [*DOCSTRINGS[:5], "", "Short."]
PAIRS = [(DOCSTRINGS[5], text) for text in TEXTS]


def sentence_transformer(folder):
    return st.SentenceTransformer(folder, device="cpu")


def cross_encoder(folder):
    return st.CrossEncoder(folder, device="cpu")


def multi_vector_encoder(folder):
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    modules = [
        Transformer(folder, max_seq_length=80),
        MultiVectorMask(),
        Normalize(module_input_name="token_embeddings"),
    ]
    return st.MultiVectorEncoder(modules=modules, device="cpu")


def m3(folder):
    return fe.BGEM3FlagModel(folder, use_fp16=False, devices="cpu")


def llm(folder):
    return fe.FlagLLMModel(folder, use_fp16=False, devices="cpu")


def reranker(folder):
    return fe.FlagReranker(folder, use_fp16=False, devices="cpu")


# name: (loader, folder, public call, its argument, pooling of its packed forwards)
KINDS = {
    "SentenceTransformer": (sentence_transformer, "m3_folder", "encode", TEXTS, "cls"),
    "CrossEncoder": (cross_encoder, "reranker_folder", "predict", PAIRS, "cls"),
    "MultiVectorEncoder": (multi_vector_encoder, "m3_folder", "encode_document", TEXTS, None),
    "BGEM3FlagModel": (m3, "m3_folder", "encode", TEXTS, "cls"),
    "scores of BGEM3FlagModel": (m3, "m3_folder", "compute_score", PAIRS, None),
    "FlagLLMModel": (llm, "e5_mistral_folder", "encode", TEXTS, "last"),
    "FlagReranker": (reranker, "reranker_folder", "compute_score", PAIRS, "cls"),
}


def flat(result) -> np.ndarray:
    """All numbers of what a call returns, in order."""
    if isinstance(result, dict):
        result = [result[key] for key in sorted(result) if result[key] is not None]
    if isinstance(result, list | tuple):
        return np.concatenate([flat(part) for part in result])
    return np.asarray(torch.as_tensor(result)).ravel()


def pooled(model, name: str, items) -> np.ndarray:
    """The call with a pool of one of the library's workers, which runs here when its result is needed."""
    tasks, results = queue.Queue(), queue.Queue()
    of_scores = name == "compute_score" and hasattr(model, "compute_score_multi_process")
    prefix = (
        "_compute_score" if of_scores else "_encode" if hasattr(model, "target_devices") else ""
    )
    worker = getattr(model, f"{prefix}_multi_process_worker")

    class Tasks:
        put = tasks.put

        def get(self):
            return tasks.get_nowait()  # no task left: queue.Empty, which ends the worker

    class Results:
        put = results.put

        def get(self, timeout=None):
            with contextlib.suppress(queue.Empty):
                # In a new context, as in a new process.
                contextvars.Context().run(worker, "cpu", model, Tasks(), self)
            return results.get_nowait()

    pool = {"input": Tasks(), "output": Results(), "processes": [None]}
    if prefix:  # FlagEmbedding
        return flat(getattr(model, f"{prefix[1:]}_multi_process")(items, pool))
    return flat(getattr(model, name)(items, pool=pool))


def in_a_process(jobs: list[tuple], answers) -> None:
    """Puts for each job its numbers, the report's original_calls and the poolings of packed forwards."""
    torch.set_num_threads(1)
    poolings = []
    run = PackedModel.run

    def spy(self, batch, pooling):
        poolings.append(pooling)
        return run(self, batch, pooling)

    PackedModel.run = spy
    for model, name, items in jobs:
        poolings.clear()
        found = pooled(model, name, items)
        answers.put((found, dict(embedfuse.report(model).original_calls), set(poolings)))


def test_the_fused_path_is_on_in_processes(request):
    jobs, expected = [], []
    for load, folder, name, items, _ in KINDS.values():
        model = load(request.getfixturevalue(folder))
        expected.append(flat(getattr(model, name)(items)))
        embedfuse.patch(model)
        jobs.append((model, name, items))
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=in_a_process, args=(jobs, answers), daemon=True)
    process.start()
    for (kind, (*_, pooling)), numbers in zip(KINDS.items(), expected, strict=True):
        found, original_calls, poolings = answers.get(timeout=120)
        np.testing.assert_allclose(found, numbers, rtol=0, atol=1e-4, err_msg=kind)
        assert not original_calls, kind
        assert poolings == {pooling}, kind
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "kind",
    [
        # tests/tools/test_pipelines.py has a pool that stays open.
        pytest.param("SentenceTransformer", marks=pytest.mark.slow),
        "CrossEncoder",
        pytest.param("MultiVectorEncoder", marks=pytest.mark.slow),
    ],
)
def test_the_librarys_pool(kind, request):
    load, folder, name, items, _ = KINDS[kind]
    model = load(request.getfixturevalue(folder))
    expected = flat(getattr(model, name)(items))
    embedfuse.patch(model)
    found = flat(getattr(model, name)(items, device=["cpu"]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
