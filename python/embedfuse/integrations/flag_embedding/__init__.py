"""FlagEmbedding: patched BGEM3FlagModel, FlagLLMModel and FlagReranker, and drop-in training models.

    from embedfuse.integrations.flag_embedding import losses

`patch` finds the classes of patched models by itself.
"""

from embedfuse.deprecation import moved


def __getattr__(name: str):
    return moved(__name__, name, {"M3Embedder": "m3"})
