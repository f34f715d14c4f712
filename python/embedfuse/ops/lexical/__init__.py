"""Lexical (sparse) embeddings over a vocabulary of token ids."""
