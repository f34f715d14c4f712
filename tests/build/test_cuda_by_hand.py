"""Values worked out by hand and gradients of tests/ops, by the CUDA kernels on the host."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = {
    "test_lexical.py": ["test_token_weights"],
    "test_lexical_gradient.py": ["test_padded_scatter", "test_ties_and_zeros", "test_weights"],
    "test_pool_normalize.py": [
        *(
            "test_empty_sequences_are_zero",
            "test_hole_in_the_mask",
            "test_out_dtype",
            "test_values",
        ),
        *("test_nan_inside_the_mask_shows", "test_no_columns_and_no_sequences"),
        *("test_non_contiguous_inputs", "test_offsets_past_31_bits"),
        *("test_without_mask_every_row_is_a_token", "test_zero_and_tiny_vectors"),
    ],
    "test_sparse_scatter.py": [
        *("test_dense_scatter", "test_dicts_are_in_the_order_of_the_text", "test_scatter"),
        *("test_first_of_equal_weights_is_kept", "test_ids_of_every_width", "test_lexical_weights"),
        *("test_lexical_weights_are_not_rounded_to_16_bits", "test_nan_and_infinity_show"),
        *("test_more_excluded_ids_than_kernels_take", "test_nan_hidden_states_show"),
        *("test_nothing_to_keep", "test_padded_scatter_reads_no_padding"),
    ],
}


def test_by_hand(emulated_module):
    names = [f"tests/ops/{file}::{name}" for file, tests in TESTS.items() for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    result = subprocess.run(
        [*command, "-p", "tests.build.cuda_only", *names],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "EMULATED_CUDA": str(emulated_module),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", result.stdout)
    assert int(passed) >= 70, result.stdout
