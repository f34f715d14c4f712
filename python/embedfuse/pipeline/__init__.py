"""Texts to embeddings: tokenise, batch by tokens, run the model, return results in the caller's order."""
