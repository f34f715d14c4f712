"""Whole models, compared with their originals and with other libraries."""
