"""sentence-transformers: patched SentenceTransformer, CrossEncoder and MultiVectorEncoder, and drop-ins.

    from embedfuse.integrations.sentence_transformers import losses  # for SentenceTransformerTrainer
    from embedfuse.integrations.sentence_transformers import scoring  # late interaction

`patch` finds the classes of patched models by itself.
"""

from embedfuse.deprecation import moved


def __getattr__(name: str):
    return moved(__name__, name, {"SentenceTransformer": "model", "transformers_model": "model"})
