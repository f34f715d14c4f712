"""Single ops, beside their peers."""
