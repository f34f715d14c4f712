"""How a run gets its compiled modules, and goes on with a model whose self-check fails."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bundle, modules
from benchmarks.gpu.bundle import MODULES, SUFFIX
from benchmarks.models import pairs
from embedfuse.patching import PatchError, check

BUILT = bundle.PACKAGE
HERE = pytest.mark.skipif(
    any(not (BUILT / (name + SUFFIX)).exists() for name in MODULES),
    reason="a module is not built here",
)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An empty package; the folder of a bundle beside it."""
    folder = tmp_path / "package"
    folder.mkdir()
    (tmp_path / "bundle" / "embedfuse").mkdir(parents=True)
    monkeypatch.setattr(modules, "PACKAGE", folder)
    monkeypatch.setattr(modules, "LINK", folder / "triton_kernels")
    monkeypatch.setattr(modules, "FOLDER", tmp_path / "bundle")
    monkeypatch.setattr(modules, "build_cuda", lambda: "built")
    return folder


def carry(package: Path, sources: str) -> None:
    made = package.parent / "bundle" / "embedfuse"
    for name in (*(module + SUFFIX for module in MODULES), "_build.json"):
        shutil.copy(BUILT / name, made)
    (made / "sources.json").write_text(json.dumps({"sources": sources}))


@HERE
def test_modules_of_these_sources_are_taken(package):
    carry(package, bundle.sources())
    assert modules.put_in_place() == ["the modules of bundle/"]
    assert sorted(path.name for path in package.iterdir()) == sorted(
        ["_build.json", "sources.json", "triton_kernels", *(name + SUFFIX for name in MODULES)]
    )
    assert (package / "triton_kernels").readlink() == Path("../../triton_kernels")


@HERE
def test_modules_of_other_sources_are_not(package):
    carry(package, "0" * 64)
    left, _, built = modules.put_in_place()
    assert (left, built) == ("bundle/ is left: they were made from other sources", "built")


@HERE
@pytest.mark.parametrize(
    ("note", "age", "taken"),
    [(None, 100, True), (None, -(10**9), False), ("these", -(10**9), True), ("0", 100, False)],
    ids=["newer", "older", "of these sources", "of others"],
)
def test_modules_in_the_package_are_taken_if_they_are_of_these_sources(package, note, age, taken):
    """A kernel that was mended is not tested by its old module."""
    for name in MODULES:
        path = package / (name + SUFFIX)
        shutil.copy(BUILT / path.name, path)
        os.utime(path, (time.time() + age,) * 2)
    if note is not None:
        digest = bundle.sources() if note == "these" else note
        (package / "sources.json").write_text(json.dumps({"sources": digest}))
    last = modules.put_in_place()[-1]
    assert last == ("the modules of python/embedfuse" if taken else "built")


def test_without_any_they_are_built(package):
    left, _, built = modules.put_in_place()
    assert (left, built) == ("bundle/ is left: there are none", "built")


@HERE
def test_a_module_that_does_not_load_is_named(package):
    carry(package, bundle.sources())
    broken = package.parent / "bundle" / "embedfuse" / ("_cuda" + SUFFIX)
    broken.write_bytes(b"no module")
    line, _, built = modules.put_in_place()
    assert "ImportError" in line
    assert built == "built"


def test_the_build_meets_no_pyproject(monkeypatch, tmp_path):
    """setuptools before 77 raises for the licence in it."""
    seen = []

    def build(tree, *options, **environment):
        seen.extend([options, environment, (tree / "pyproject.toml").exists()])
        assert (tree / "csrc" / "cuda").is_dir()
        for name in ("_cuda" + SUFFIX, "_build.json"):
            (tree / "python" / "embedfuse" / name).write_text("made")

    monkeypatch.setattr(modules, "build", build)
    monkeypatch.setattr(modules, "PACKAGE", tmp_path)
    assert modules.build_cuda().startswith("built _cuda")
    assert seen == [("--inplace",), {"EMBEDFUSE_BUILD_CPP": "0"}, False]
    assert (tmp_path / ("_cuda" + SUFFIX)).read_text() == "made"


def test_a_model_whose_check_fails_is_timed_without_the_bound(monkeypatch, capsys):
    bounds = []

    class Pair:
        patch_error = ""

        def __init__(self, name, device):
            bounds.append(check.BOUNDS[torch.bfloat16])
            if bounds[-1] < 1:
                raise PatchError("last_hidden_state: deviates by 2.0e-01")

    monkeypatch.setattr(pairs, "ModelPair", Pair)
    with pytest.MonkeyPatch.context() as patch:
        pair = pairs.patched_pair("E5-mistral-7B", "cpu", patch)
        assert pair.patch_error == "PatchError: last_hidden_state: deviates by 2.0e-01"
    assert bounds == [0.12, math.inf]
    assert check.BOUNDS[torch.bfloat16] == 0.12
    assert "E5-mistral-7B: PatchError: last_hidden_state: deviates" in capsys.readouterr().out
