"""Small checkpoints of each family: its architecture, its kind of tokenizer, its files."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from embedfuse.cli.corpus import stdlib_docstrings

VOCABULARY = 600
ARCHITECTURES = {
    "bert": (BertConfig, BertModel, {"max_position_embeddings": 512}),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, {"max_position_embeddings": 514}),
    "mistral": (MistralConfig, MistralModel, {"num_key_value_heads": 2, "sliding_window": None}),
    "llama": (LlamaConfig, LlamaModel, {"num_key_value_heads": 2}),
    "qwen2": (Qwen2Config, Qwen2Model, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3Model, {"num_key_value_heads": 2, "head_dim": 16}),
}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 600,
    "initializer_range": 0.2,  # large enough that one token more or less changes the vector
}
TEXTS = ["", "x", "A short text.", *(t for t in stdlib_docstrings(40) if 100 < len(t) < 900)][:14]
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def make(folder: Path, kind: str, **changes) -> Path:
    """A checkpoint of this architecture; the tokenizer of a decoder adds no token at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    config, model, own = ARCHITECTURES[kind]
    torch.manual_seed(0)
    model(config(**{**SIZES, **own, **changes})).eval().save_pretrained(folder)
    if kind in ("bert", "xlm-roberta"):
        write_encoder_tokenizer(folder)
    elif kind in ("mistral", "llama"):
        write_llama_tokenizer(folder)
    else:
        write_qwen_tokenizer(folder)
    return folder


def _train(model, pre_tokenizer, special: list[str], trainer) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainer(vocab_size=VOCABULARY - 8, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(stdlib_docstrings(200), trainer)
    return tokenizer


def _template(single: str, pair: str, **ids: int):
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))


def write_encoder_tokenizer(folder: Path) -> None:
    special = ["<unk>", "<s>", "</s>"]
    model = models.WordPiece(unk_token="<unk>")
    tokenizer = _train(model, pre_tokenizers.Whitespace(), special, trainers.WordPieceTrainer)
    tokenizer.normalizer = normalizers.NFKC()
    ids = {"<s>": 1, "</s>": 2}
    tokenizer.post_processor = _template("<s> $A </s>", "<s> $A </s> $B </s>", **ids)
    _write(folder, tokenizer, {**_NAMES, "tokenizer_class": "PreTrainedTokenizerFast"})


def write_llama_tokenizer(folder: Path, template: str = "<s> $A", **config) -> None:
    """Files like E5-mistral's: the config wants an end token, which only the template could add."""
    special = ["<unk>", "<s>", "</s>", "<|eot_id|>", "<|end_of_text|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>"]
    split = pre_tokenizers.Metaspace(split=False)
    # Words are learnt apart, as sentencepiece does; the published file then reads without splitting.
    model = models.BPE(unk_token="<unk>", fuse_unk=True)
    tokenizer = _train(model, pre_tokenizers.Metaspace(), special, trainers.BpeTrainer)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace()
    pair = f"{template} {template.replace('$A', '$B:1')}"
    tokenizer.post_processor = _template(template, pair, **{"<s>": 1, "</s>": 2})
    _write(folder, tokenizer, {**_NAMES, "tokenizer_class": "LlamaTokenizer", **config})


def write_qwen_tokenizer(folder: Path, end: str = "") -> None:
    """Files like Qwen3-Embedding's: eos_token is not the token that its texts end in."""
    special = ["<|endoftext|>", "<|im_end|>"]
    tokenizer = _train(models.BPE(), pre_tokenizers.ByteLevel(), special, trainers.BpeTrainer)
    tokenizer.decoder = decoders.ByteLevel()
    steps = [processors.ByteLevel(trim_offsets=False)]
    if end:
        ids = {"<|endoftext|>": 0, "<|im_end|>": 1}
        steps.append(_template(f"$A {end}", f"$A {end} $B {end}", **ids))
    tokenizer.post_processor = processors.Sequence(steps)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write(folder, tokenizer, {**names, "tokenizer_class": "Qwen2Tokenizer"})


def _write(folder: Path, tokenizer: Tokenizer, config: dict) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_max_length": 600, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_sentence_transformers(folder: Path, pooling: str, prompts: dict | None = None, **text):
    """The files that sentence-transformers writes; text: those of sentence_bert_config.json."""
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    size = SIZES["hidden_size"]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"embedding_dimension": size, "pooling_mode": pooling},
        "sentence_bert_config.json": text,
        "config_sentence_transformers.json": {
            "prompts": prompts or {},
            "default_prompt_name": None,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


class Plain:
    """transformers alone, one text at a time, in fp64; cut, end token and pooling by hand."""

    def __init__(self, folder: Path, end: int | None = None, both_ways: bool = False):
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = AutoModel.from_pretrained(str(folder), dtype=torch.float64).eval()
        self.end, self.both_ways = end, both_ways

    def ids(self, text: str, max_length: int) -> list[int]:
        """Token ids, cut, then the end token."""
        room = max_length - (self.end is not None)
        ids = self.tokenizer(text, truncation=True, max_length=room)["input_ids"]
        return ids + [self.end] * (self.end is not None)

    @torch.no_grad()
    def states_of(self, ids: list[int]) -> Tensor:
        """(tokens, hidden)"""
        mask = None
        if self.both_ways:  # a mask that adds nothing, which replaces that of transformers
            mask = torch.zeros(1, 1, len(ids), len(ids), dtype=self.model.dtype)
        call = {"input_ids": torch.tensor([ids]), "attention_mask": mask}
        return self.model(**call).last_hidden_state[0]

    def states(self, text: str, max_length: int = 600) -> Tensor:
        return self.states_of(self.ids(text, max_length))

    def __call__(self, texts: list[str], pooling: str, max_length: int = 600) -> Tensor:
        """Normalised vectors."""
        pool = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "cls": lambda h: h[0]}[
            pooling
        ]
        return F.normalize(torch.stack([pool(self.states(t, max_length)) for t in texts]), dim=-1)
