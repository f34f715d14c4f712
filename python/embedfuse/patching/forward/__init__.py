"""The forward of a patched transformers model: packed_model.py has the way of a call through it."""
