"""What can be known of the CUDA kernels without a GPU: machine code for each chip, and how they fail."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
FILES = sorted((CSRC / "cuda").glob("*.cu"))
# A block's shared memory that needs no leave from the launcher.
STATIC_SHARED_BYTES = 48 * 1024


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    paths = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(paths))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_compiles_without_spills_and_warnings(file, arch, tmp_path):
    if (nvcc := find_nvcc()) is None:
        pytest.skip("nvcc is neither on the PATH nor under CUDA_HOME or /usr/local/cuda")
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", f"-I{CSRC / 'include'}", f"-arch={arch}"]
    command += ["-Xptxas", "-v", "-cubin", file, "-o", tmp_path / "kernel.cubin"]
    result = subprocess.run(command, capture_output=True, text=True)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    assert "warning" not in log.lower(), log
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    shared = re.findall(r"(\d+) bytes smem", log)
    kernels = log.count("Compiling entry function")
    assert kernels > 0
    assert len(spilled) == 2 * kernels
    assert set(map(int, spilled)) == {0}, log
    assert all(int(size) <= STATIC_SHARED_BYTES for size in shared), log


def test_error_without_a_gpu():
    module = pytest.importorskip("embedfuse._cuda", reason="built without the CUDA kernels")
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    batch, length, hidden = 1, 1, 8
    with pytest.raises(RuntimeError, match=r"pool_normalize: .*(driver|device)"):
        module.pool_normalize(
            0, 0, hidden, hidden, 0, 0, 0, batch, length, hidden, 0, True, 0, 0, 0, 0
        )
