"""The example trains the real model on real text: it learns, resumes exactly, takes LoRA and processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import embedfuse
from embedfuse.cli.corpus import stdlib_pairs

example = pytest.importorskip("examples.train_contrastive")
SMALL = ["--device", "cpu", "--limit", "300", "--batch-size", "8", "--steps", "4"]


def train(output, *options):
    example.main(["--output", str(output), *options])
    return output / "checkpoint-4"


def weights(checkpoint, name="model"):
    return load_file(checkpoint / f"{name}.safetensors")


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take minutes for a step where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    return train(tmp_path_factory.mktemp("four"), *SMALL, "--save-every", "2")


def test_pairs():
    pairs = dict(stdlib_pairs())
    assert pairs["bisect.insort_right(a, x, lo=0, hi=None, *, key=None)"] == (
        "Insert item x in list a, and keep it sorted assuming a is sorted."
    )
    assert "threading.Thread.join(self, timeout=None)" in pairs
    assert len(set(pairs.values())) == len(pairs) > 3000
    training, held_out = example.split(pairs.items())
    assert not set(training) & set(held_out)
    assert 0.04 < len(held_out) / len(pairs) < 0.06


def test_short_run_improves_recall(tmp_path):
    options = ["--device", "cpu", "--limit", "1000", "--batch-size", "32", "--steps", "6"]
    results = example.main(["--output", str(tmp_path), *options])
    recall = results["recall@1"]
    assert 0.5 < recall["before"] < 0.8
    assert recall["after"] > recall["before"] + 0.05
    assert json.loads((tmp_path / "results.json").read_text()) == results
    # The checkpoint is an embedder: it finds as many.
    embedder = embedfuse.Embedder(str(tmp_path / "checkpoint-6"), device="cpu")
    held_out = example.split(stdlib_pairs()[:1000])[1]
    queries, documents = (embedder.encode(list(side)).dense for side in zip(*held_out, strict=True))
    found = ((queries @ documents.T).argmax(1) == np.arange(len(held_out))).mean()
    assert found == pytest.approx(recall["after"], abs=0.03)  # texts longer than the example's


def test_resume_continues_exactly(four_steps, tmp_path):
    half = four_steps.parent / "checkpoint-2"
    resumed = train(tmp_path, *SMALL, "--resume", str(half))
    assert_equal(weights(resumed), weights(four_steps))
    assert any(not torch.equal(w, weights(half)[name]) for name, w in weights(resumed).items())
    assert json.loads((resumed.parent / "results.json").read_text()) == json.loads(
        (four_steps.parent / "results.json").read_text()
    )


def test_lora_trains_adapters_alone_and_resumes(tmp_path):
    options = [*SMALL, "--lora", "4"]
    checkpoint = train(tmp_path / "four", *options, "--save-every", "2")
    found = weights(checkpoint, "adapter_model")
    assert len(found) == 6 * 3 * 2
    assert all("lora_" in name for name in found)
    assert all(w.abs().max() > 0 for name, w in found.items() if "lora_B" in name)
    state = torch.load(checkpoint / "training.pt", weights_only=True)
    assert len(state["optimizer"]["state"]) == len(found)
    assert not (checkpoint / "model.safetensors").exists()
    resume = str(tmp_path / "four" / "checkpoint-2")
    resumed = train(tmp_path / "resumed", *options, "--resume", resume)
    assert_equal(weights(resumed, "adapter_model"), found)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(four_steps, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = Path(example.__file__)
    subprocess.run(
        [*command, program, "--output", tmp_path, *SMALL],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    start, one, two = (
        weights(folder) for folder in (Path(example.MODEL), four_steps, tmp_path / "checkpoint-4")
    )
    moved = sum((one[name] - start[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    # Not nearer: Adam's first steps are signs of the gradient, which rounding decides where it is near zero.
    assert 0 < apart < 0.01 * moved
