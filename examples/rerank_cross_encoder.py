"""Rerank passages with a patched CrossEncoder.

python examples/rerank_cross_encoder.py [MODEL]

MODEL is a hub name or a folder; the default is BAAI/bge-reranker-v2-m3.
"""

import sys

from sentence_transformers import CrossEncoder

import embedfuse

QUERY = "How do I read a file line by line?"
PASSAGES = [
    "Iterate over the file object: it yields one line at a time.",
    "os.remove(path) removes a file.",
    "A dictionary maps keys to values.",
    "file.readlines() returns a list of all lines, which takes memory for the whole file.",
]


def main(name: str = "BAAI/bge-reranker-v2-m3") -> list[dict]:
    model = CrossEncoder(name)
    print(embedfuse.patch(model))
    ranking = model.rank(QUERY, PASSAGES)  # best first
    for found in ranking:
        print(f"{found['score']:8.4f}  {PASSAGES[found['corpus_id']]}")
    return ranking


if __name__ == "__main__":
    main(*sys.argv[1:])
