"""Modules of 0.1 that pickled patched models name. They work until 0.3, with a DeprecationWarning."""
