"""Hybrid search with BGE-M3: dense, sparse and multi-vector scores from one pass over each text.

python examples/bge_m3_hybrid_search.py [MODEL]

MODEL is a hub name or a folder; the default is BAAI/bge-m3.
"""

import sys

import numpy as np

import embedfuse

QUERY = "What is BM25?"
DOCUMENTS = [
    "BM25 ranks documents by the words that they share with a query.",
    "A transformer computes attention between all tokens of a text.",
    "Late interaction compares each token of a query with each token of a document.",
]
WEIGHTS = {"dense": 0.4, "sparse": 0.2, "multi": 0.4}


def main(name: str = "BAAI/bge-m3") -> np.ndarray:
    model = embedfuse.Embedder(name)
    outputs = tuple(WEIGHTS)
    documents, query = model.encode(DOCUMENTS, outputs), model.encode([QUERY], outputs)
    scores = {
        "dense": (query.dense @ documents.dense.T)[0],
        "sparse": model.lexical_matching_score(query.sparse, documents.sparse)[0],
        "multi": embedfuse.ops.maxsim(query.multi, documents.multi, reduction="mean")[0].numpy(),
    }
    combined = sum(WEIGHTS[output] * scores[output] for output in outputs)
    for i in np.argsort(-combined):
        parts = ", ".join(f"{output} {scores[output][i]:.3f}" for output in outputs)
        print(f"{combined[i]:.3f} ({parts})  {DOCUMENTS[i]}")
    return combined


if __name__ == "__main__":
    main(*sys.argv[1:])
