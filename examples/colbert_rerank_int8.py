"""Rerank with a ColBERT model, its documents kept as int8: a quarter of the memory of fp32.

python examples/colbert_rerank_int8.py [MODEL]

MODEL is a hub name or a folder; the default is answerdotai/answerai-colbert-small-v1.
"""

import sys

from sentence_transformers import MultiVectorEncoder

import embedfuse
from embedfuse import ops

QUERY = "How do I read a file line by line?"
DOCUMENTS = [
    "Iterate over the file object: it yields one line at a time.",
    "os.remove(path) removes a file.",
    "A dictionary maps keys to values.",
]


def main(name: str = "answerdotai/answerai-colbert-small-v1") -> list[list[int]]:
    model = MultiVectorEncoder(name)
    embedfuse.patch(model)
    query = model.encode_query(QUERY)
    vectors = model.encode_document(DOCUMENTS)  # (tokens, dim) each
    kept = [ops.quantize_int8(x) for x in vectors]
    size = sum(x.nbytes for x in vectors), sum(x.values.nbytes + x.scale.nbytes for x in kept)
    print("{:,} bytes of vectors, {:,} as int8 with a scale for each token".format(*size))
    orders = []
    for documents in (vectors, kept):
        scores, order = ops.maxsim_rerank(query, documents)
        print([f"{score:.4f}: {DOCUMENTS[i]}" for score, i in zip(scores, order, strict=True)])
        orders.append(order.tolist())
    return orders


if __name__ == "__main__":
    main(*sys.argv[1:])
