"""Packed towers: the layers of a model family on (tokens, hidden), without padding."""
