"""What each family of embedding models was trained to get: pooling, prompts, lengths, the last token."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from embedfuse.ops.pool_normalize import POOLINGS

INSTRUCTION = "{instruction}"
_ATTENTIONS = ("own", "bidirectional")


@dataclass(frozen=True)
class Preset:
    """How a checkpoint wants its texts and gives its vectors. None: nothing is said.

    pooling: "cls", "last", "mean" or "weighted_mean", as in ops.pool_normalize. normalize: whether
        vectors get length 1.
    max_length: tokens of a text, special ones included.
    prompt: before every text of `encode`. query_prompt, document_prompt: before those of
        `encode_queries` and `encode_documents`; None: as `prompt`.
    instruction_prompt: before a query that comes with an instruction, which stands where it has
        "{instruction}". None: the family takes no instructions.
    end_token: the token that ends every text, also one that was cut. "" or None: as the tokenizer does.
    attention: "own", what the model's code and config say; or "bidirectional", of a decoder, as in `patch`.
    unsafe_dtypes: dtype -> why its vectors are wrong.
    lower_case: whether texts are lowercased first.
    wrap: what stands before the prompt and after the text; the text's trailing blanks go.
    eos_text: what ends a text with pooling "last", as text.
    text_max_length: tokens of a text without prompt and wrap; longer ones lose whole words.
    pools_prompt: False: only the tokens from the text on are pooled.

    Raises ValueError for a pooling, attention or instruction_prompt that does not exist.
    """

    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    prompt: str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    instruction_prompt: str | None = None
    end_token: str | None = None
    attention: str | None = None
    unsafe_dtypes: Mapping[str, str] | None = None
    lower_case: bool | None = None
    wrap: tuple[str, str] | None = None
    eos_text: str | None = None
    text_max_length: int | None = None
    pools_prompt: bool | None = None

    def __post_init__(self):
        for name, accepted in (("pooling", POOLINGS), ("attention", _ATTENTIONS)):
            value = getattr(self, name)
            if value is not None and value not in accepted:
                raise ValueError(f"{name}={value!r}: accepted are {', '.join(accepted)}")
        template = self.instruction_prompt
        if template is not None and INSTRUCTION not in template:
            raise ValueError(
                f"instruction_prompt={template!r}: accepted is text with {INSTRUCTION}"
            )

    def filled(self, other: "Preset") -> "Preset":
        """What this one says, and what `other` says where it says nothing."""
        unsaid = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(other, name) for name in unsaid})

    @property
    def wraps(self) -> bool:
        """Whether texts are read as LLM2Vec does (pipeline/llm2vec.py)."""
        return self.wrap is not None or self.pools_prompt is False

    def check_dtype(self, dtype: str) -> None:
        """ValueError for a dtype in which the vectors are wrong."""
        unsafe = self.unsafe_dtypes or {}
        if dtype in unsafe:
            safe = [name for name in ("float32", "bfloat16", "float16") if name not in unsafe]
            raise ValueError(
                f"dtype={dtype!r}: {unsafe[dtype]}; accepted are {' and '.join(safe)}, or a Preset "
                "with other unsafe_dtypes"
            )

    def prompt_of_query(self, instruction: str | None) -> str:
        """What stands before a query. ValueError for an instruction that the family does not take."""
        if instruction is None:
            return self.prompt if self.query_prompt is None else self.query_prompt
        if self.instruction_prompt is None:
            raise ValueError(
                f"instruction={instruction!r}: this checkpoint takes none; accepted is None, or a "
                "Preset with instruction_prompt"
            )
        if not instruction.strip():
            raise ValueError(
                f"instruction={instruction!r}: accepted is a sentence; encode() takes texts without"
            )
        return self.instruction_prompt.replace(INSTRUCTION, instruction)

    def prompt_of_document(self) -> str:
        return self.prompt if self.document_prompt is None else self.document_prompt


class Family(NamedTuple):
    """names: pattern of a whole repository or folder name, any case. model_types: of its config."""

    names: str
    model_types: tuple[str, ...]
    preset: Preset


# The task of which every model card's own example is made; FAQ of E5's cards: without one, queries lose.
_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_INSTRUCT = f"Instruct: {INSTRUCTION}\nQuery: "
_LLM2VEC = Preset(
    pooling="mean",
    normalize=False,
    max_length=512,
    query_prompt=f"{_SEARCH}: ",
    document_prompt="",
    instruction_prompt=f"{INSTRUCTION} ",
    attention="bidirectional",
    wrap=("", ""),
    eos_text=" </s>",
    text_max_length=400,
    pools_prompt=False,
)

# Sources: the model cards on huggingface.co of the repositories that `names` spells, and, where said,
# the issue that tells what goes wrong.
FAMILIES = {
    # arXiv 2212.03533 and 2402.05672; the cards' average_pool and their "query: " and "passage: ".
    "e5": Family(
        r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?",
        ("bert", "xlm-roberta"),
        Preset("mean", True, 512, query_prompt="query: ", document_prompt="passage: "),
    ),
    "multilingual-e5-instruct": Family(
        r"multilingual-e5-large-instruct",
        ("xlm-roberta",),
        Preset(
            "mean",
            True,
            512,
            query_prompt=_INSTRUCT.replace(INSTRUCTION, _SEARCH),
            document_prompt="",
            instruction_prompt=_INSTRUCT,
            unsafe_dtypes={
                "float16": "fp16 costs it 0.29 of 0.82 on an STS benchmark (vllm-project/vllm issue 15393)"
            },
        ),
    ),
    # arXiv 2401.00368. </s>: embeddings-benchmark/mteb pull request 5237.
    "e5-mistral": Family(
        r"e5-mistral-7b-instruct",
        ("mistral",),
        Preset(
            "last",
            True,
            4096,
            query_prompt=_INSTRUCT.replace(INSTRUCTION, _SEARCH),
            document_prompt="",
            instruction_prompt=_INSTRUCT,
            end_token="</s>",
            attention="own",
        ),
    ),
    # arXiv 2308.03281: the English ones of thenlper.
    "gte": Family(
        r"gte-(small|base|large)",
        ("bert",),
        Preset("mean", True, 512, query_prompt="", document_prompt=""),
    ),
    # Bidirectional: the card, and vllm-project/vllm pull request 18683 on the 1.5B one.
    "gte-qwen2": Family(
        r"gte-qwen2-(1\.5|7)b-instruct",
        ("qwen2",),
        Preset(
            "last",
            True,
            8192,
            query_prompt=_INSTRUCT.replace(INSTRUCTION, _SEARCH),
            document_prompt="",
            instruction_prompt=_INSTRUCT,
            end_token="<|endoftext|>",
            attention="bidirectional",
        ),
    ),
    # arXiv 2506.05176; no blank after "Query:". The token at the end is not the tokenizer's eos_token:
    # QwenLM/Qwen3-Embedding issue 54, ggml-org/llama.cpp pull request 14314.
    "qwen3-embedding": Family(
        r"qwen3-embedding-(0\.6|4|8)b",
        ("qwen3",),
        Preset(
            "last",
            True,
            8192,
            query_prompt=f"Instruct: {_SEARCH}\nQuery:",
            document_prompt="",
            instruction_prompt=f"Instruct: {INSTRUCTION}\nQuery:",
            end_token="<|endoftext|>",
            attention="own",
            unsafe_dtypes={
                "float16": "some texts overflow fp16 and give NaN (QwenLM/Qwen3-Embedding issue 164)"
            },
        ),
    ),
    # arXiv 2404.05961 and McGill-NLP/llm2vec, llm2vec/llm2vec.py: its defaults, and the wraps that
    # prepare_for_tokenization gives to these base models. Its encode() does not normalise.
    "llm2vec": Family(r"llm2vec-sheared-llama-.*", ("llama",), _LLM2VEC),
    "llm2vec-inst": Family(
        r"llm2vec-(mistral-7b-instruct-v2|llama-2-7b-chat-hf)-.*",
        ("mistral", "llama"),
        replace(_LLM2VEC, wrap=("[INST] ", " [/INST]")),
    ),
    "llm2vec-llama-3-instruct": Family(
        r"llm2vec-meta-llama-3-8b-instruct-.*",
        ("llama",),
        replace(
            _LLM2VEC,
            wrap=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            eos_text="",
        ),
    ),
}
PRESETS: Mapping[str, Preset] = {name: family.preset for name, family in FAMILIES.items()}


def find_preset(names: Iterable[str], model_type: str | None) -> Preset:
    """The table's entry for a checkpoint; an empty Preset where it has none.

    names: of the checkpoint and of what it was made from, folders or hub names.
    """
    for name in map(own_name, names):
        for family in FAMILIES.values():
            fits = model_type in (None, *family.model_types)
            if fits and re.fullmatch(family.names, name, re.IGNORECASE):
                return family.preset
    return Preset()


def own_name(model: str) -> str:
    """The repository's or folder's own name; also from the path of a snapshot in the hub's cache."""
    parts = [part for part in re.split(r"[/\\]", model) if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rsplit("--", 1)[-1]
    return parts[-1] if parts else ""
