"""Which class patches which."""

import importlib

# Class of the original -> module that has the patched class of the same name.
RECIPES = {
    "transformers.models.bert.modeling_bert.BertModel": "embedfuse.patching.bert",
    "transformers.models.roberta.modeling_roberta.RobertaModel": "embedfuse.patching.roberta",
    "transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaModel": (
        "embedfuse.patching.xlm_roberta"
    ),
    "sentence_transformers.sentence_transformer.model.SentenceTransformer": (
        "embedfuse.integrations.sentence_transformers"
    ),
}


def recipe(original: type) -> type | None:
    """The class that patches objects of exactly this class; None when there is none."""
    path = f"{original.__module__}.{original.__qualname__}"
    if path not in RECIPES:
        return None
    return getattr(importlib.import_module(RECIPES[path]), original.__name__)


def recipe_of(model: object) -> type:
    """The class that patches this object. TypeError, naming the accepted kinds, when there is none."""
    original = getattr(type(model), "original", type(model))
    found = recipe(original)
    if found is None:
        kinds = ", ".join(path.rsplit(".", 1)[1] for path in RECIPES)
        kind = f"{original.__module__}.{original.__qualname__}"
        raise TypeError(f"model: {kind}; accepted are {kinds}")
    return found
