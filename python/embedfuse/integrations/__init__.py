"""How each library wraps a model, and what of it runs on packed tokens."""
