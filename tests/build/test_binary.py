"""The compiled module: no instruction leaves the namespace of its ISA, and no second runtime is linked."""

import re
import shutil
import subprocess

import pytest

SYMBOL = re.compile(r"^[0-9a-f]+ <(.*)>:$")


def tool(name):
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@pytest.fixture(scope="module")
def instructions(cpu_module):
    """(function, instruction) for every instruction of the module."""
    command = [tool("objdump"), "-d", "-C", "--no-show-raw-insn", cpu_module]
    disassembly = subprocess.check_output(command, text=True)
    if "x86-64" not in disassembly[:200]:
        pytest.skip("not an x86-64 module")
    found, function = [], ""
    for line in disassembly.splitlines():
        if match := SYMBOL.match(line):
            function = match[1]
        elif "\t" in line:
            found.append((function, line.split("\t", 1)[1]))
    return found


def users(instructions, pattern):
    return {function for function, text in instructions if re.search(pattern, text)}


def outside(functions, *namespaces):
    return [f for f in functions if not any(f"embedfuse::{n}::" in f for n in namespaces)]


def test_every_instruction_set_is_compiled(instructions):
    wide = users(instructions, "%zmm")
    assert {f for f in wide if "avx512::linear_block" in f or "avx512::dot_tile" in f}
    assert {f for f in users(instructions, "vdpbf16ps") if "avx512_bf16::" in f}
    assert {f for f in wide if "avx512::add_row" in f or "avx512::pool" in f}
    assert {f for f in users(instructions, "%ymm") if "embedfuse::avx2::" in f}
    assert {f for f, _ in instructions if "embedfuse::baseline::" in f}


def test_avx512_stays_in_its_namespace(instructions):
    # Masks and registers 16 to 31 exist in AVX-512 alone.
    found = users(instructions, r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]")
    assert outside(found, "avx512", "avx512_bf16", "amx") == []


def test_avx_stays_in_its_namespaces(instructions):
    # Every AVX mnemonic starts with v, and so does nothing that a compiler emits otherwise.
    assert outside(users(instructions, r"%ymm|^v"), "amx", "avx512", "avx512_bf16", "avx2") == []


def test_tiles_stay_in_their_namespace(instructions):
    for product in ("tdpbf16ps", "tdpbusd"):
        assert users(instructions, f"^{product} "), f"no {product}"
    assert outside(users(instructions, "%tmm|^ldtilecfg|^tilerelease"), "amx") == []


def test_no_second_runtime_is_linked(cpu_module):
    dynamic = subprocess.check_output([tool("readelf"), "-d", cpu_module], text=True)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert [name for name in needed if name.startswith("libstdc++")]
    assert [n for n in needed if re.match("lib(gomp|omp|iomp|torch|c10|cudart|python)", n)] == []
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
