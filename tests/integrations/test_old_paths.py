"""Modules of 0.1 give the objects of the new paths, and one DeprecationWarning that names these."""

import importlib
import sys
import warnings
from unittest import mock

import pytest

import embedfuse
from embedfuse import compatibility

PACKAGE = "embedfuse.integrations"
# Old module -> library that it needs, new modules of its names.
MODULES = {
    "cross_encoder": (
        "sentence_transformers",
        {"sentence_transformers.cross_encoder": "CrossEncoder"},
    ),
    "flag_embedding_losses": (
        "FlagEmbedding",
        {"flag_embedding.losses": "BiEncoderOnlyEmbedderModel BiDecoderOnlyEmbedderModel"},
    ),
    "flag_holder": (
        "FlagEmbedding",
        {"flag_embedding.wrapper": "FlagWrapper LEFT_PADDING most_tokens stream"},
    ),
    "flag_llm": ("FlagEmbedding", {"flag_embedding.llm": "BaseLLMEmbedder"}),
    "flag_reranker": ("FlagEmbedding", {"flag_embedding.reranker": "BaseReranker"}),
    "multi_vector_encoder": (
        "sentence_transformers",
        {
            "sentence_transformers.scoring": "Embeddings maxsim maxsim_pairwise colbert_scores "
            "colbert_scores_pairwise colbert_kd_scores",
            "sentence_transformers.multi_vector": "MultiVectorEncoder",
        },
    ),
    "sentence_transformers_losses": (
        "sentence_transformers",
        {
            "sentence_transformers.losses": "MultipleNegativesRankingLoss "
            "CachedMultipleNegativesRankingLoss"
        },
    ),
}
# Names of modules that are packages now -> library, new module.
NAMES = {
    "flag_embedding.M3Embedder": ("FlagEmbedding", "flag_embedding.m3"),
    "pylate.ColBERT": ("pylate", "pylate.model"),
    "pylate.Embeddings": ("pylate", "pylate.scores"),
    "sentence_transformers.SentenceTransformer": (
        "sentence_transformers",
        "sentence_transformers.model",
    ),
    "sentence_transformers.transformers_model": (
        "sentence_transformers",
        "sentence_transformers.model",
    ),
}


@pytest.fixture
def forget(monkeypatch):
    """Makes an old module or name as if nobody had asked for it."""

    def forget(path: str) -> None:
        package, _, name = path.rpartition(".")
        monkeypatch.delitem(sys.modules, path, raising=False)
        monkeypatch.delitem(vars(importlib.import_module(package)), name, raising=False)

    return forget


def run(statement: str) -> tuple[dict, list]:
    """What an import statement binds, and the warnings of embedfuse."""
    names: dict = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(statement, "user.py", "exec"), names)
    return names, [w for w in caught if "embedfuse" in str(w.message)]


def assert_warned(caught: list, new: str) -> None:
    assert [w.category for w in caught] == [DeprecationWarning]
    assert f" to {new};" in str(caught[0].message)
    assert caught[0].filename == "user.py"


@pytest.mark.parametrize("statement", ["import {0}.{1} as old", "from {0} import {1} as old"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name, statement, forget):
    library, places = MODULES[name]
    pytest.importorskip(library)
    for module in places:  # whose libraries may warn
        importlib.import_module(f"{PACKAGE}.{module}")
    forget(f"{PACKAGE}.{name}")
    names, caught = run(statement.format(PACKAGE, name))
    assert_warned(caught, f"{PACKAGE}.{next(iter(places))}")
    for place, public in places.items():
        module = importlib.import_module(f"{PACKAGE}.{place}")
        for attribute in public.split():
            assert getattr(names["old"], attribute) is getattr(module, attribute)


def test_the_wrapper_by_its_old_name(forget):
    pytest.importorskip("FlagEmbedding")
    from embedfuse.integrations.flag_embedding.wrapper import FlagWrapper

    forget(f"{PACKAGE}.flag_holder")
    names, _ = run(f"from {PACKAGE}.flag_holder import FlagHolder")
    assert names["FlagHolder"] is FlagWrapper


@pytest.mark.parametrize(
    "statement", ["import {0} as p; old = p.{1}", "from {0} import {1} as old"]
)
@pytest.mark.parametrize("path", NAMES)
def test_name(path, statement, forget):
    library, place = NAMES[path]
    pytest.importorskip(library)
    module = importlib.import_module(f"{PACKAGE}.{place}")
    package, name = f"{PACKAGE}.{path}".rsplit(".", 1)
    forget(f"{package}.{name}")
    names, caught = run(statement.format(package, name))
    assert_warned(caught, f"{PACKAGE}.{place}.{name}")
    assert names["old"] is getattr(module, name)


def test_a_name_that_never_was():
    import embedfuse.integrations.sentence_transformers as package

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.fixture
def fresh(monkeypatch):
    """embedfuse.integrations as if it had not been imported."""
    monkeypatch.setattr(embedfuse, "integrations", None, raising=False)
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]
        yield


@pytest.mark.parametrize(
    ("library", "statement"),
    [
        ("torch", f"import {PACKAGE}.late_interaction"),
        ("sentence_transformers", f"from {PACKAGE}.sentence_transformers import losses, scoring"),
        ("FlagEmbedding", f"from {PACKAGE}.flag_embedding import losses"),
        ("pylate", f"from {PACKAGE}.pylate import ColBERTScores, colbert_scores, rerank"),
        ("peft", f"import {PACKAGE}.peft"),
    ],
)
def test_new_paths_give_no_warning(library, statement, request):
    pytest.importorskip(library)
    run(statement)  # what the library itself imports stays imported
    request.getfixturevalue("fresh")
    _, caught = run(statement)
    assert caught == []


@pytest.mark.parametrize(
    ("library", "path", "extra"),
    [
        ("FlagEmbedding", "flag_embedding.losses", "flag-embedding"),
        ("pylate", "pylate", "pylate"),
        ("sentence_transformers", "sentence_transformers.losses", "sentence-transformers"),
        ("sentence_transformers", "sentence_transformers.scoring", "sentence-transformers"),
        ("sentence_transformers", "multi_vector_encoder", "sentence-transformers"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(library, path, extra, fresh, monkeypatch):
    monkeypatch.setattr(compatibility, "version", lambda package: None)
    parts = [name for name in sys.modules if name.startswith(f"{library}.")]
    sys.modules.update(dict.fromkeys([library, *parts]))  # None: not to be found
    with pytest.raises(ImportError, match=rf": pip install 'embedfuse\[{extra}\]'$"):
        importlib.import_module(f"{PACKAGE}.{path}")
