"""The tile unit's MaxSim on processors without one: the instructions as plain C++ (amx_emulated.h)."""

import re
import subprocess
from pathlib import Path

import pytest

from embedfuse import native
from embedfuse.cli import doctor

HERE = Path(__file__).parent
OPS = HERE.parents[0] / "ops"
FILES = ("test_maxsim_edges", "test_maxsim_int8", "test_maxsim", "test_registry_ops")
# Every test of the instruction set by name; what runs by the best one, without the suites of all ops.
WANTED = "maxsim and (amx or (cpp and not registry_ops and not avx and not baseline))"


@pytest.fixture(scope="module")
def isas():
    try:
        return native.cpu().supported_isas()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def compiler(tmp_path):
    """c++ with emulated tiles, which optimises less than setup.py asks: that takes a quarter of the time."""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec c++ "$@" -O1 -DEMBEDFUSE_EMULATE_AMX "-I{HERE}"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.slow
def test_maxsim_by_emulated_tiles(isas, compiler, build, run_with):
    if "avx512_bf16" not in isas:
        pytest.skip("the tiles' kernels also use AVX-512 with bf16 and VNNI")
    process, built = build(CXX=compiler)
    assert process.returncode == 0, process.stderr
    script = "from embedfuse import native; print(native.cpu().selected_isa())"
    assert run_with(built, "-c", script) == ["amx"]
    files = [str(OPS / f"{name}.py") for name in FILES]
    try:
        lines = run_with(
            built, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", WANTED
        )
    except subprocess.CalledProcessError as error:
        pytest.fail(error.output[-8000:])
    assert int(re.match(r"(\d+) passed, \d+ deselected in", lines[-1])[1]) > 150, lines[-1]


def test_tiles_are_offered_where_the_processor_has_them(isas):
    if "yes" not in (doctor.cpu()["amx_bf16"], doctor.cpu()["amx_int8"]):
        assert "amx" not in isas
        with pytest.raises(ValueError, match="no such instruction set on this processor: amx"):
            native.cpu().select_isa("amx")


PROGRAM = """
#include <cstdint>
#include <unistd.h>
#include <cstdio>
#include "embedfuse/dtype.h"
using namespace embedfuse;
#include "embedfuse/amx.h"

int main(int count, char**) {{
  {body}
}}
"""


@pytest.fixture
def run_tiles(tmp_path):
    """A program with the given body on emulated tiles: exit status, output, what it said of errors."""

    def run(body):
        source, program = tmp_path / "tiles.cpp", tmp_path / "tiles"
        source.write_text(PROGRAM.format(body=body))
        include = HERE.parents[1] / "csrc" / "include"
        flags = ["-std=c++17", "-DEMBEDFUSE_EMULATE_AMX", f"-I{HERE}", f"-I{include}"]
        subprocess.run(["c++", *flags, source, "-o", program], check=True)
        done = subprocess.run([program], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize(
    "body",
    [
        "tile_zero<0>();",
        "{ Tiles tiles; } tile_zero<0>();",
        "Tiles tiles, again;",
        "Tiles tiles; tile_dot_bf16<0, 1, 1>();",
    ],
)
def test_misuse_ends_the_emulation(run_tiles, body):
    status, _, error = run_tiles(body)
    assert status < 0
    assert error.startswith("emulated AMX: ")


def test_emulated_products_by_hand(run_tiles):
    # C[1][2] = 5 + 2 * 3 + 7 * -1 of bf16, and 200 * -3 + 1 * 100 of bytes; the other products are 0.
    status, output, _ = run_tiles("""
  Tiles tiles;
  alignas(64) uint8_t a[16][64] = {}, b[16][64] = {};
  alignas(64) float c[16][16] = {};
  c[1][2] = 5;
  const float values[4] = {2, 7, 3, -1};
  from_float(values[0], (bf16*)a[1] + 8), from_float(values[1], (bf16*)a[1] + 9);
  from_float(values[2], (bf16*)b[4] + 4), from_float(values[3], (bf16*)b[4] + 5);
  tile_load<0>(c, 64), tile_load<1>(a, 64), tile_load<2>(b, 64);
  tile_dot_bf16<0, 1, 2>();
  tile_store<0>(c, 64);
  std::printf("%g %g %g ", c[1][2], c[1][1], c[2][1]);
  alignas(64) uint8_t x[16][64] = {}, y[16][64] = {};
  alignas(64) int32_t z[16][16] = {};
  x[1][17] = 200, x[1][18] = 1, y[4][9] = uint8_t(-3), y[4][10] = 100;
  tile_zero<3>();
  tile_load<4>(x, 64), tile_load<5>(y, 64);
  tile_dot_bytes<3, 4, 5>();
  tile_store<3>(z, 64);
  std::printf("%d %d %d", z[1][2], z[1][1], z[2][1]);
""")
    assert (status, output) == (0, "4 0 0 -500 0 0")
