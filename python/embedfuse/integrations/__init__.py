"""One folder per library: how its models are patched, and drop-ins for its losses and scoring functions."""

# Modules of 0.1 are found in old_paths/, until 0.3.
__path__ += [f"{folder}/old_paths" for folder in __path__]
