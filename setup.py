"""Builds `embedfuse._cpu` and `embedfuse._cuda` with ninja. Needs no torch and looks at no GPU.

EMBEDFUSE_BUILD_CPP=0     leave the C++ module out (every op then runs on its plain torch reference)
EMBEDFUSE_BUILD_CUDA      unset: build if nvcc is found; 1: fail without it; 0: leave it out
EMBEDFUSE_CUDA_ARCHS      semicolon-separated compute capabilities, default "80;90;100" (+ PTX of the last)
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# -ffast-math and -march=native are absent on purpose: the first changes the whole process's
# floating-point mode, the second makes a wheel that crashes on another machine.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall"
CXX_FLAGS += (
    " -Wno-uninitialized -Wno-maybe-uninitialized"  # g++ 12 warns inside its own AVX-512 header
)
DEFAULT_ARCHS = "80;90;100"


class BuildError(RuntimeError):
    pass


def flag(name: str) -> bool | None:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name}={value!r}: accepted are 0, 1 and unset")
    return None if value == "" else value == "1"


def find_cxx() -> str:
    wanted = os.environ.get("CXX", "c++")
    found = shutil.which(wanted.split()[0])
    if found is None:
        raise BuildError(
            f"no C++ compiler: CXX={wanted!r} is not on the PATH. Install g++ or clang++, or set "
            "EMBEDFUSE_BUILD_CPP=0 to go without the CPU kernels"
        )
    return wanted


def find_cuda_home() -> Path | None:
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) if (Path(home) / "bin" / "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc:
        home = Path(nvcc).resolve().parent.parent
        if (home / "include" / "cuda_runtime.h").exists():
            return home
    default = Path("/usr/local/cuda")
    return default if (default / "bin" / "nvcc").exists() else None


def gencode_flags(nvcc: Path) -> str:
    """Machine code for every wanted architecture that this nvcc knows, PTX for the newest."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = {line.removeprefix("compute_") for line in listed.stdout.split()}
    wanted = os.environ.get("EMBEDFUSE_CUDA_ARCHS")
    archs = [arch for arch in (wanted or DEFAULT_ARCHS).split(";") if wanted or arch in known]
    if unknown := [arch for arch in archs if arch not in known]:
        raise BuildError(
            f"EMBEDFUSE_CUDA_ARCHS={wanted!r}: {nvcc} does not know {', '.join(unknown)}; "
            f"it knows {', '.join(sorted(known))}"
        )
    if not archs:
        raise BuildError(f"EMBEDFUSE_CUDA_ARCHS: {nvcc} knows none of them, only {sorted(known)}")
    flags = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


class NinjaBuild(build_ext):
    def run(self):
        self.build_info = {}
        super().run()
        package = ROOT / "python" if self.inplace else Path(self.build_lib)
        info = package / "embedfuse" / "_build.json"
        info.parent.mkdir(parents=True, exist_ok=True)
        info.write_text(json.dumps(self.build_info, indent=1) + "\n")

    def build_extension(self, ext):
        {"embedfuse._cpu": self.build_cpu, "embedfuse._cuda": self.build_cuda}[ext.name](ext)

    def leave_out(self, ext, backend, reason):
        ext.optional = True  # setuptools then accepts that there is no file
        self.build_info[backend] = reason
        print(f"embedfuse: no {ext.name}: {reason}", file=sys.stderr)

    def build_cpu(self, ext):
        if flag("EMBEDFUSE_BUILD_CPP") is False:
            return self.leave_out(ext, "cpp", "left out by EMBEDFUSE_BUILD_CPP=0")
        cxx = find_cxx()
        self.ninja(ext, cxx=cxx, nvcc="", nvcc_flags="", libs="")
        self.build_info["cpp"] = f"built with {cxx}"

    def build_cuda(self, ext):
        wanted = flag("EMBEDFUSE_BUILD_CUDA")
        home = find_cuda_home()
        if wanted is False or (wanted is None and home is None):
            reason = (
                "nvcc was not found" if wanted is None else "left out by EMBEDFUSE_BUILD_CUDA=0"
            )
            return self.leave_out(ext, "cuda", reason)
        if home is None:
            raise BuildError(
                "EMBEDFUSE_BUILD_CUDA=1, but no nvcc: set CUDA_HOME or extend the PATH"
            )
        nvcc = home / "bin" / "nvcc"
        libdir = next(
            (p for p in (home / "lib64", home / "targets/x86_64-linux/lib") if p.exists()), home
        )
        try:
            self.ninja(
                ext,
                cxx=find_cxx(),
                nvcc=nvcc,
                nvcc_flags=f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden {gencode_flags(nvcc)}",
                libs=f"-L{libdir} -lcudart_static -ldl -lrt -lpthread",
                includes=[home / "include"],
            )
        except (BuildError, subprocess.CalledProcessError) as error:
            if wanted:
                raise
            return self.leave_out(ext, "cuda", f"the build failed: {error}")
        self.build_info["cuda"] = f"built with {nvcc}"

    def ninja(self, ext, *, cxx, nvcc, nvcc_flags, libs, includes=()):
        import ninja
        import pybind11

        folders = [CSRC / "include", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
        folders += includes
        includes = " ".join("-I" + shlex.quote(str(f)) for f in folders).replace("$", "$$")
        # Not build_temp: pip's editable install makes a new one each time, and ninja would start anew.
        work = ROOT / "build" / sys.implementation.cache_tag / ext.name
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = {ROOT / source: work / (Path(source).name + ".o") for source in ext.sources}
        rules = f"""\
includes = {includes}
rule cxx
  command = {cxx} {CXX_FLAGS} $includes -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {nvcc} {nvcc_flags} $includes -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {cxx} -shared $in -o $out {libs}
"""
        edges = [
            f"build {escape(obj)}: {'nvcc' if src.suffix == '.cu' else 'cxx'} {escape(src)}"
            for src, obj in objects.items()
        ]
        edges.append(f"build {escape(target)}: link {' '.join(map(escape, objects.values()))}")
        (work / "build.ninja").write_text(rules + "\n".join(edges) + "\n")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", work, *(["-v"] if self.verbose > 1 else [])]
        if subprocess.run(command).returncode != 0:
            raise BuildError(f"compiling {ext.name} failed; the compiler's messages stand above")


def escape(path: Path) -> str:
    """A path as ninja's build lines want it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern))


setup(
    package_dir={"": "python", "embedfuse.triton_kernels": "triton_kernels"},
    packages=[
        *(
            ".".join(init.parent.relative_to(ROOT / "python").parts)
            for init in sorted((ROOT / "python/embedfuse").rglob("__init__.py"))
        ),
        "embedfuse.triton_kernels",
    ],
    package_data={"embedfuse": ["_build.json"], "embedfuse.triton_kernels": ["configs/*.json"]},
    ext_modules=[
        Extension("embedfuse._cpu", sources("cpu/*.cpp", "bindings/cpu_module.cpp")),
        Extension("embedfuse._cuda", sources("cuda/*.cu", "bindings/cuda_module.cpp")),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
