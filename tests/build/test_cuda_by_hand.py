"""Values worked out by hand and gradients, as in tests/ops, by the CUDA kernels on the host."""

import pytest

from tests.ops.test_lexical import test_token_weights  # noqa: F401
from tests.ops.test_lexical_gradient import (  # noqa: F401
    test_padded_scatter,
    test_ties_and_zeros,
    test_weights,
)
from tests.ops.test_pool_normalize import (  # noqa: F401
    test_empty_sequences_are_zero,
    test_hole_in_the_mask,
    test_nan_inside_the_mask_shows,
    test_no_columns_and_no_sequences,
    test_non_contiguous_inputs,
    test_offsets_past_31_bits,
    test_out_dtype,
    test_values,
    test_without_mask_every_row_is_a_token,
    test_zero_and_tiny_vectors,
)
from tests.ops.test_sparse_scatter import (  # noqa: F401
    test_dense_scatter,
    test_dicts_are_in_the_order_of_the_text,
    test_first_of_equal_weights_is_kept,
    test_ids_of_every_width,
    test_lexical_weights,
    test_lexical_weights_are_not_rounded_to_16_bits,
    test_more_excluded_ids_than_kernels_take,
    test_nan_and_infinity_show,
    test_nan_hidden_states_show,
    test_nothing_to_keep,
    test_padded_scatter_reads_no_padding,
    test_scatter,
)


@pytest.fixture
def backend(emulated):
    """In place of the backends of tests/ops/conftest.py."""
    return "cuda"
