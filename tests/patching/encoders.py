"""Small encoders and classifiers of each family, with the true architecture and random weights."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

FAMILIES = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "xlm_roberta": (XLMRobertaConfig, XLMRobertaModel),
}
CLASSIFIERS = {
    "bert": BertForSequenceClassification,
    "roberta": RobertaForSequenceClassification,
    "xlm_roberta": XLMRobertaForSequenceClassification,
}
VOCABULARY, PLACES = 211, 70


def make_config(family: str, **changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": PLACES,
        "initializer_range": 0.2,  # large enough that a wrong position or mask shows
    }
    return FAMILIES[family][0](**{**sizes, **changes})


def make_model(family: str, *, pooler: bool = True, **changes):
    torch.manual_seed(0)
    return FAMILIES[family][1](make_config(family, **changes), add_pooling_layer=pooler).eval()


def make_classifier(family: str, **changes):
    """A reranker: one label, unless another number is given, and token types for pairs as BERT has them."""
    torch.manual_seed(0)
    config = make_config(family, **{"num_labels": 1, "type_vocab_size": 2, **changes})
    return CLASSIFIERS[family](config).eval()


def make_batch(model, lengths=(20, 3, 11, 1), side: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(5, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    if side == "left":
        mask = mask.flip(1)
    ids[~mask] = model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask.long()}


def states(model, batch, **kwargs) -> torch.Tensor:
    """last_hidden_state at the tokens."""
    with torch.no_grad():
        output = model(**batch, **kwargs)
    return output.last_hidden_state[batch["attention_mask"] != 0]


def exact_states(model, batch) -> torch.Tensor:
    """`states` of a model that is not patched, in fp64 except for the norms, which transformers has in fp32.

    Weights this large increase rounding errors: by how much fp32 may differ is measured, not set.
    """
    return states(copy.deepcopy(model).double(), batch)


def logits(model, batch, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits
