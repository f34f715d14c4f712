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
# g++ 12 warns inside its own AVX-512 header.
CXX_FLAGS += " -Wno-uninitialized -Wno-maybe-uninitialized"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
SLOWEST = ("cpu/isa_avx512_bf16.cpp", "cpu/isa_avx512.cpp", "cpu/isa_avx2.cpp")
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
    if shutil.which(wanted.split()[0]) is None:
        raise BuildError(
            f"no C++ compiler: CXX={wanted!r} is not on the PATH. Install g++ or clang++, or set "
            "EMBEDFUSE_BUILD_CPP=0 to go without the CPU kernels"
        )
    return wanted


def find_cuda_home() -> Path | None:
    if home := os.environ.get("CUDA_HOME"):
        return Path(home) if (Path(home) / "bin" / "nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    homes = [*([Path(nvcc).resolve().parents[1]] if nvcc else []), Path("/usr/local/cuda")]
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    return next((home for home in homes if all((home / n).exists() for n in needed)), None)


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

    def build_extensions(self):
        cpu, cuda = self.extensions
        # Not build_temp: pip's editable install makes a new one each time, and ninja would start anew.
        self.work = ROOT / "build" / sys.implementation.cache_tag
        self.work.mkdir(parents=True, exist_ok=True)
        modules = [(cuda, self.cuda_statements(cuda)), (cpu, self.cpu_statements(cpu))]
        # Both modules in one queue, which keeps every core busy to the end.
        text = "\n".join(line for _, lines in modules for line in lines)
        (self.work / "build.ninja").write_text(text + "\n")
        built = not text or self.ninja("-k", "0")
        for ext, lines in modules:
            if not built and lines and not self.ninja(self.target(ext)):
                self.fail(ext, f"compiling {ext.name} failed; the compiler's messages stand above")

    def cpu_statements(self, ext) -> list[str]:
        if flag("EMBEDFUSE_BUILD_CPP") is False:
            return self.leave_out(ext, "left out by EMBEDFUSE_BUILD_CPP=0")
        cxx = find_cxx()
        self.build_info["cpp"] = f"built with {cxx}"
        return self.statements(ext, cxx)

    def cuda_statements(self, ext) -> list[str]:
        wanted = flag("EMBEDFUSE_BUILD_CUDA")
        if wanted is False:
            return self.leave_out(ext, "left out by EMBEDFUSE_BUILD_CUDA=0")
        home = find_cuda_home()
        if home is None:
            if wanted:
                raise BuildError("EMBEDFUSE_BUILD_CUDA=1, but no nvcc: set CUDA_HOME or the PATH")
            return self.leave_out(ext, "nvcc was not found")
        nvcc = home / "bin" / "nvcc"
        folders = [home / name for name in ("lib64", "targets/x86_64-linux/lib", "lib")]
        folder = next((f for f in folders if (f / "libcudart_static.a").exists()), folders[0])
        libs = f"-L{folder} -lcudart_static -ldl -lrt -lpthread"
        try:
            cxx, command = find_cxx(), f"{nvcc} {NVCC_FLAGS} {gencode_flags(nvcc)}"
        except (BuildError, subprocess.CalledProcessError) as error:
            return self.fail(ext, str(error))
        self.build_info["cuda"] = f"built with {nvcc}"
        return self.statements(ext, cxx, nvcc=command, libs=libs, includes=[home / "include"])

    def fail(self, ext, reason) -> list[str]:
        """_cuda is left out where EMBEDFUSE_BUILD_CUDA does not ask for it; all else raises."""
        if ext.name == "embedfuse._cpu" or flag("EMBEDFUSE_BUILD_CUDA"):
            raise BuildError(reason)
        return self.leave_out(ext, f"the build failed: {reason}")

    def leave_out(self, ext, reason) -> list[str]:
        ext.optional = True  # setuptools then accepts that there is no file
        self.build_info["cpp" if ext.name == "embedfuse._cpu" else "cuda"] = reason
        print(f"embedfuse: no {ext.name}: {reason}", file=sys.stderr)
        return []

    def target(self, ext) -> str:
        return str(Path(self.get_ext_fullpath(ext.name)).resolve())

    def statements(self, ext, cxx, *, nvcc="", libs="", includes=()) -> list[str]:
        """What ninja has to do for one module, in its language."""
        import pybind11

        python = pybind11.get_include(), sysconfig.get_path("include")
        folders = [CSRC / "include", CSRC, *python, *includes]
        options = " ".join("-I" + shlex.quote(str(f)) for f in folders).replace("$", "$$")
        options += " $optimize -MMD -MF $out.d -c $in -o $out"
        folder, inputs = self.work / ext.name, []
        lines = [
            f"rule {ext.name}.cxx\n  command = {cxx} {CXX_FLAGS} {options}\n  depfile = $out.d",
            f"rule {ext.name}.nvcc\n  command = {nvcc} {options}\n  depfile = $out.d",
            f"rule {ext.name}.link\n  command = {cxx} -shared $in -o $out {libs}",
        ]
        for source in map(Path, ext.sources):
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            inputs.append(escape(folder / f"{source.name}.o"))
            lines.append(f"build {inputs[-1]}: {ext.name}.{rule} {escape(ROOT / source)}")
            if source.parent.name == "bindings":  # pass numbers on; -O3 of pybind11 takes long
                lines.append("  optimize = -O1")
        link = f"build {escape(self.target(ext))}: {ext.name}.link {' '.join(inputs)}"
        return [*lines, link]

    def ninja(self, *arguments) -> bool:
        import ninja

        verbose = ["-v"] if self.verbose > 1 else []
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", self.work, *verbose, *arguments]
        return subprocess.run(command).returncode == 0


def escape(path) -> str:  # as ninja's build lines want it
    return re.sub(r"([$ :])", r"$\1", str(path))


def sources(*patterns: str) -> list[str]:
    """Files of csrc, in the order of the patterns: what takes longest to compile comes first."""
    found = [p for pattern in patterns for p in sorted(CSRC.glob(pattern))]
    return [str(p.relative_to(ROOT)) for p in dict.fromkeys(found)]


setup(
    package_dir={"": "python", "embedfuse.triton_kernels": "triton_kernels"},
    packages=[
        *(
            ".".join(init.parent.relative_to(ROOT / "python").parts)
            for init in sorted((ROOT / "python/embedfuse").rglob("__init__.py"))
        ),
        "embedfuse.triton_kernels",
    ],
    package_data={
        "embedfuse": ["_build.json", "py.typed"],
        "embedfuse.triton_kernels": ["configs/*.json"],
    },
    ext_modules=[
        Extension("embedfuse._cpu", sources(*SLOWEST, "cpu/*.cpp", "bindings/cpu_*.cpp")),
        Extension("embedfuse._cuda", sources("cuda/*.cu", "bindings/cuda_module.cpp")),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
