"""`make gpu-bundle`: bundle/ with the compiled modules, so that the machine with the GPU builds nothing.

    python3.12 -m benchmarks.gpu.bundle    # with setuptools, pybind11 and ninja; needs no torch

The modules link neither torch nor a driver, so that the Python's version and the chip alone must fit.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "embedfuse"
FOLDER = ROOT / "bundle"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULES = ("_cpu", "_cuda")
ARCHS = "90"
NOTE = "sources.json"  # beside the modules: a digest of what they are made from
LIMIT = 32 * 2**20  # bytes: they travel with the working tree


def main() -> int:
    made = FOLDER / "embedfuse"
    shutil.rmtree(
        made, ignore_errors=True
    )  # what else lies in bundle/ stays, such as an archive to retry
    build(ROOT, "--build-lib", str(FOLDER), EMBEDFUSE_BUILD_CPP="1")
    for name in MODULES:
        if reason := load_error(made, name):
            raise SystemExit(f"bundle: {name} does not load: {reason}")
    (made / NOTE).write_text(json.dumps({"sources": sources()}) + "\n")
    size = sum(path.stat().st_size for path in made.iterdir())
    if size > LIMIT:
        raise SystemExit(f"bundle: {size} bytes; at most {LIMIT} travel")
    print(f"{made}: {', '.join(sorted(p.name for p in made.iterdir()))}, {size / 1e6:.1f} MB")
    return 0


def build(root: Path, *options: str, **environment: str) -> None:
    """Build the modules of the tree at `root` with this Python."""
    command = [sys.executable, "setup.py", "-q", "build_ext", *options]
    settings = {"EMBEDFUSE_BUILD_CUDA": "1", "EMBEDFUSE_CUDA_ARCHS": ARCHS, **environment}
    subprocess.run(command, cwd=root, env={**os.environ, **settings}, check=True)


def source_files() -> list[Path]:
    return sorted([ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())])


def sources() -> str:
    """A digest of what the modules are made from."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def load_error(folder: Path, name: str) -> str | None:
    """Why the module in this folder does not load; None if it does. In a process of its own."""
    path = folder / (name + SUFFIX)
    if not path.exists():
        return f"there is no {path.name}"
    code = (
        "import sys, importlib.util as u; "
        f"s = u.spec_from_file_location('embedfuse.{name}', sys.argv[1]); "
        "s.loader.exec_module(u.module_from_spec(s))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    return (
        (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        if done.returncode
        else None
    )


if __name__ == "__main__":
    sys.exit(main())
