"""Modules of embedfuse.integrations that 0.1 had. They work until 0.3, with a DeprecationWarning."""
