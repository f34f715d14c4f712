"""Texts in, vectors out: tokenise, batch by tokens, run, and hand back in the caller's order."""
