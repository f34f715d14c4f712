"""Single ops, compared with other libraries, and what Triton kernels compile to."""
