"""Embedder with empty, very large, unusual and wrong input."""

import itertools
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from embedfuse import Embedder
from embedfuse.pipeline import pipeline
from embedfuse.pipeline.heads import load_heads

ALL = ("dense", "sparse", "multi")
COMBINATIONS = [c for n in (1, 2, 3) for c in itertools.combinations(ALL, n)]


@pytest.mark.parametrize("outputs", COMBINATIONS, ids="+".join)
def test_no_texts(embedder, outputs):
    found = embedder.encode([], outputs, array_dtype="float16")
    assert len(found) == 0
    assert {name for name in ALL if getattr(found, name) is not None} == set(outputs)
    if "dense" in outputs:
        assert (found.dense.shape, found.dense.dtype) == ((0, 64), np.float16)
    if "sparse" in outputs:
        assert found.sparse.dicts() == []
        assert found.sparse.dense(10).shape == (0, 10)
    if "multi" in outputs:
        assert found.multi == []
    assert list(embedder.iter_encode([], outputs)) == []


def test_an_empty_text(embedder):
    found = embedder.encode([""], ALL)
    assert np.linalg.norm(found.dense, axis=1) == pytest.approx([1])
    assert found.sparse.dicts() == [{}]
    assert found.multi[0].shape == (1, 64)  # </s>


def test_an_enormous_text_is_its_beginning(embedder):
    text = "all work and no play makes a dull text " * 20_000
    beginning = embedder.encode([text[: 8192 * 12]], ALL)
    found = embedder.encode([text, "short"], ALL)
    assert np.abs(found.dense[0] - beginning.dense[0]).max() < 2e-6
    assert len(found.multi[0]) == len(beginning.multi[0]) == 8191
    assert np.abs(found.multi[0] - beginning.multi[0]).max() < 2e-6
    assert found.sparse.dicts()[0].keys() == beginning.sparse.dicts()[0].keys()


def test_a_text_of_special_tokens_has_no_lexical_weights(embedder, plain):
    text = "<s> </s> <pad> <unk>"
    assert set(plain.states([text])[0][0]) == {0, 1, 2, 3}
    found = embedder.encode([text], ALL)
    assert found.sparse.dicts() == [{}]
    assert np.isfinite(found.dense).all()
    expected = plain([text])
    np.testing.assert_allclose(found.dense, expected["dense"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.multi[0], expected["multi"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", [0, 9])
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("half a pair \ud83d", ValueError, r"lone surrogate '\\ud83d' at 12; accepted is text"),
        (None, TypeError, "NoneType; accepted is str"),
        (7, TypeError, "int; accepted is str"),
        (b"bytes", TypeError, "bytes; accepted is str"),
        (float("nan"), TypeError, "float; accepted is str"),
        (["nested"], TypeError, "list; accepted is str"),
    ],
)
def test_what_is_no_text_is_named(embedder, monkeypatch, place, bad, error, message):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 4)
    texts = ["fine"] * 10
    texts[place] = bad
    with pytest.raises(error, match=rf"^texts\[{place}\]: {message}"):
        embedder.encode(texts, ALL)


@pytest.mark.parametrize("texts", ["one text", ""])
def test_a_bare_str(embedder, texts):
    with pytest.raises(TypeError, match="texts: a str; accepted is a list of str"):
        embedder.encode(texts)


@pytest.mark.parametrize(
    "outputs", ["dense", (), ("dense", "colbert"), ["Dense"], ("sparse", None)], ids=str
)
def test_unknown_outputs(embedder, outputs):
    for texts in (["a"], []):
        with pytest.raises(ValueError, match="accepted is a tuple of dense, sparse, multi"):
            embedder.encode(texts, outputs)


@pytest.mark.parametrize("name", ["bfloat16", "float64", "half", "", None])
def test_bad_array_dtype(embedder, name):
    with pytest.raises(ValueError, match=r"array_dtype=.*accepted are float32 and float16"):
        embedder.encode(["a"], array_dtype=name)


@pytest.mark.parametrize("dtype", ["float64", "int8", "auto", torch.float32])
def test_bad_dtype(m3_folder, dtype):
    with pytest.raises(ValueError, match=r"dtype=.*accepted are float32, bfloat16 and float16"):
        Embedder(m3_folder, dtype=dtype)


@pytest.mark.parametrize("length", [0, 2, -5, 8193])
def test_bad_max_length(m3_folder, length):
    with pytest.raises(ValueError, match=f"max_length={length}: accepted is 3 to 8192"):
        Embedder(m3_folder, max_length=length)


@pytest.mark.parametrize("dimensions", ["64", True, 32.0, [8]])
def test_dimensions_that_are_no_number(dimensions):
    """Raised before the checkpoint is looked for."""
    message = f"dimensions={dimensions!r}: accepted is a whole number, or None for all"
    with pytest.raises(TypeError, match=re.escape(message)):
        Embedder("nowhere", dimensions=dimensions)


@pytest.mark.parametrize(
    "model",
    ["/no/such/folder", "./no", "../no", "~/no", "no/such/folder", "no/folder/", Path("/no")],
)
def test_a_folder_that_is_not_there(model):
    with pytest.raises(FileNotFoundError) as error:
        Embedder(model)
    assert (
        str(error.value) == f"model: there is no folder {model}; accepted are folders and hub names"
    )


@pytest.mark.parametrize(
    ("missing", "output"), [("sparse_linear.pt", "sparse"), ("colbert_linear.pt", "multi")]
)
def test_a_missing_head(m3_folder, embedder, tmp_path, missing, output):
    folder = shutil.copytree(m3_folder, tmp_path / "m3")
    (folder / missing).unlink()
    partial = Embedder(str(folder), device="cpu")
    for texts in (["a"], []):
        with pytest.raises(ValueError, match=f"{output!r} needs {missing}, which this model does"):
            partial.encode(texts, ("dense", output))
    with pytest.raises(ValueError, match=f"needs {missing}"):
        partial.compute_score([("a", "b")])
    rest = tuple(name for name in ALL if name != output)
    found, expected = (x.encode(["some text"], rest) for x in (partial, embedder))
    assert np.array_equal(found.dense, expected.dense)
    assert getattr(found, output) is None


def head(rows: int = 1, columns: int = 64, **more) -> dict:
    return {"weight": torch.zeros(rows, columns), "bias": torch.zeros(rows), **more}


@pytest.mark.parametrize(
    "state",
    [
        head(columns=32),
        head(extra=torch.zeros(1)),
        {"bias": torch.zeros(1)},
        {"weight": torch.zeros(64), "bias": torch.zeros(1)},
        {"weight": torch.zeros(()), "bias": torch.zeros(1)},
        head(bias=torch.zeros(3)),
        {"weight": [0.0] * 64},
        [torch.zeros(1, 64)],
        torch.zeros(1, 64),
        5,
        {},
    ],
    ids=lambda state: type(state).__name__,
)
@pytest.mark.parametrize("file", ["sparse_linear.pt", "colbert_linear.pt"])
def test_a_head_that_does_not_fit(tmp_path, state, file):
    torch.save(state, tmp_path / file)
    with pytest.raises(ValueError, match=rf"^{file}: .*; accepted is weight \((1|columns), 64\)"):
        load_heads(str(tmp_path), 64, "cpu", torch.float32)


def test_a_sparse_head_of_two_rows(tmp_path):
    torch.save(head(rows=2), tmp_path / "sparse_linear.pt")
    with pytest.raises(ValueError, match=r"'weight': \(2, 64\).*; accepted is weight \(1, 64\)"):
        load_heads(str(tmp_path), 64, "cpu", torch.float32)


def test_a_head_without_bias_and_of_fewer_columns(tmp_path):
    torch.save({"weight": torch.ones(16, 64)}, tmp_path / "colbert_linear.pt")
    heads = load_heads(str(tmp_path), 64, "cpu", torch.bfloat16)
    assert heads.sparse is None
    assert heads.multi(torch.ones(1, 64, dtype=torch.bfloat16)).tolist() == [[64.0] * 16]


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_pickled_code_is_not_run(tmp_path, legacy):
    target = tmp_path / "sparse_linear.pt"
    state = head(extra=Code(tmp_path / "ran"))
    if legacy:
        target.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, target)
    with pytest.raises(pickle.UnpicklingError):
        load_heads(str(tmp_path), 64, "cpu", torch.float32)
    assert not (tmp_path / "ran").exists()


def test_iter_encode_checks_its_arguments_when_it_is_called(embedder):
    with pytest.raises(ValueError, match="outputs="):
        embedder.iter_encode(["a"], ("dence",))
    with pytest.raises(TypeError, match="texts: a str"):
        embedder.iter_encode("a")
