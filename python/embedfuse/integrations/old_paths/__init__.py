"""Modules of embedfuse.integrations in 0.1 that have moved. They work until 0.3, with a DeprecationWarning."""
