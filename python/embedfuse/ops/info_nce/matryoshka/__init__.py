"""InfoNCE at several widths of the embedding, from one pass over the scores of the widest."""
