"""Modules of 0.1 that pickled embeddings and losses name. They work until 0.3, with a DeprecationWarning."""
