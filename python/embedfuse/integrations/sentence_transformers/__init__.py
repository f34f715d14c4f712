"""sentence-transformers: SentenceTransformer, CrossEncoder, MultiVectorEncoder, and its losses."""
