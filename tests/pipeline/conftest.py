import pytest
import torch
from transformers import AutoTokenizer

from embedfuse import Embedder
from embedfuse.cli.corpus import stdlib_docstrings
from tests.pipeline.reference import Reference


@pytest.fixture(scope="session")
def m3_tokenizer(m3_folder):
    return AutoTokenizer.from_pretrained(m3_folder)


@pytest.fixture(scope="session")
def embedder(m3_folder):
    return Embedder(m3_folder, device="cpu")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Docstrings, and texts with what docstrings do not contain."""
    odd = [
        "",
        " ",
        "x",
        "日本語のテキスト",
        "emoji 🎉 and e\u0301",
        "word " * 300,
        "a\x00b",
        "<s> </s>",
    ]
    return [text for text in stdlib_docstrings(60) if len(text) < 1000][:40] + odd


@pytest.fixture(scope="session")
def plain(m3_folder):
    """The forward of transformers in fp32."""
    return Reference(m3_folder, torch.float32)


@pytest.fixture(scope="session")
def exact(m3_folder):
    return Reference(m3_folder, torch.float64)
