"""How each family of embedding models was trained: pooling, prompts, lengths, the end token."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from embedfuse.ops.pool_normalize import POOLINGS

INSTRUCTION = "{instruction}"
_ATTENTIONS = ("own", "bidirectional")


@dataclass(frozen=True)
class Preset:
    """How a checkpoint expects its texts and computes its vectors. A field of None says nothing.

    Attributes:
        pooling: "cls", "last", "mean" or "weighted_mean", as in ops.pool_normalize.
        normalize: whether vectors get length 1.
        max_length: tokens of a text, special ones included.
        prompt: put before every text of `encode`.
        query_prompt: put before every text of `encode_queries`; None: `prompt`.
        document_prompt: put before every text of `encode_documents`; None: `prompt`.
        instruction_prompt: put before a query that comes with an instruction, which replaces
            "{instruction}" in it. None: the model takes no instructions.
        end_token: the token that ends every text, also a truncated one. "" or None: whatever the
            tokenizer does.
        attention: "own": as the model's code and config say; "bidirectional": for a decoder, as in
            `patch`.
        unsafe_dtypes: dtype -> why the vectors are wrong in it.
        lower_case: whether to lowercase texts first.
        wrap: (text before the prompt, text after the text). Spaces at the end of the text are removed.
        eos_text: written at the end of every text if the pooling is "last".
        text_max_length: tokens of a text without prompt and wrap; longer texts lose whole words.
        pools_prompt: False leaves the tokens before the text out of the pooling.

    Raises:
        ValueError: An unknown pooling or attention, or an instruction_prompt without "{instruction}".
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
        """Fill the fields that are None from another preset.

        Args:
            other: the preset to take them from.

        Returns:
            A new Preset.
        """
        missing = [f.name for f in fields(self) if getattr(self, f.name) is None]
        return replace(self, **{name: getattr(other, name) for name in missing})

    @property
    def wraps(self) -> bool:
        """Whether texts are tokenised and pooled as LLM2Vec does."""
        return self.wrap is not None or self.pools_prompt is False

    def check_dtype(self, dtype: str) -> None:
        """Check that vectors computed in a dtype are right.

        Args:
            dtype: "float32", "bfloat16" or "float16".

        Raises:
            ValueError: The dtype is in `unsafe_dtypes`.
        """
        unsafe = self.unsafe_dtypes or {}
        if dtype in unsafe:
            safe = [name for name in ("float32", "bfloat16", "float16") if name not in unsafe]
            raise ValueError(
                f"dtype={dtype!r}: {unsafe[dtype]}; accepted are {' and '.join(safe)}, or a Preset "
                "with other unsafe_dtypes"
            )

    def prompt_of_query(self, instruction: str | None) -> str | None:
        """The text to put before a query.

        Args:
            instruction: one sentence that describes the task; None: the preset's query_prompt.

        Returns:
            The prompt; None if the preset says nothing.

        Raises:
            ValueError: An instruction for a model that takes none, or an empty one.
        """
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

    def prompt_of_document(self) -> str | None:
        """The text to put before a passage; None if the preset says nothing."""
        return self.prompt if self.document_prompt is None else self.document_prompt


class Family(NamedTuple):
    """Checkpoints with one preset.

    Attributes:
        names: regular expression for the whole repository or folder name, in any case.
        model_types: `model_type` in their config.
        preset: how to use them.
    """

    names: str
    model_types: tuple[str, ...]
    preset: Preset


# The task in the example of every model card. FAQ of E5's cards: queries without a task lose quality.
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

# Sources: the model cards on huggingface.co of the repositories that `names` matches, and the issues cited.
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
"""The built-in presets, by family. `Embedder` finds the one for a checkpoint by its name."""


def find_preset(names: Iterable[str], model_type: str | None) -> Preset:
    """The entry of FAMILIES for a checkpoint; an empty Preset if there is none.

    names: folders or hub names of the checkpoint and of the models that it was made from.
    """
    for name in map(repository_name, names):
        for family in FAMILIES.values():
            fits = model_type in (None, *family.model_types)
            if fits and re.fullmatch(family.names, name, re.IGNORECASE):
                return family.preset
    return Preset()


def repository_name(model: str) -> str:
    """The last part of a folder or hub name; for a snapshot in the hub's cache, its repository's."""
    parts = [part for part in re.split(r"[/\\]", model) if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rsplit("--", 1)[-1]
    return parts[-1] if parts else ""
