"""Texts of different lengths that a patched model and its original are compared on."""

PROBE_TEXTS = ["One", "Two short words", "A somewhat longer text, so that padding is dropped."]
