"""One file per family: the patched classes, and what a family does its own way."""
