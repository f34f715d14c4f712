"""Texts as LLM2Vec tokenises them: wrapped, cut by words, pooled without the tokens of the instruction.

As llm2vec/llm2vec.py does (McGill-NLP/llm2vec, arXiv 2404.05961): it counts the tokens of the text alone,
and pools that many tokens at the end of the sequence.
"""

import torch
from torch import Tensor

from embedfuse.packing import Packed, unpadded
from embedfuse.pipeline.presets import Preset
from embedfuse.pipeline.tokenize import TextTokenizer


class LLM2VecTokenizer:
    """Texts with prompt and wrap to token ids, and how many tokens at the end belong to the text.

    What the wrap puts after the text counts as part of it. A text of n > preset.text_max_length tokens
    keeps the first text_max_length / n of its words, repeated until it is short enough. Unlike LLM2Vec, a
    text that would lose its last word (one without spaces) is cut by tokens only, and a text without
    tokens pools the whole sequence; the vectors that LLM2Vec gives for these are meaningless.
    """

    def __init__(self, tokenize: TextTokenizer, preset: Preset):
        self._tokenize = tokenize
        self._before, after = preset.wrap or ("", "")
        self._after = after + ((preset.eos_text or "") if preset.pooling == "last" else "")
        self._limit = preset.text_max_length
        self._skips_prompt = not preset.pools_prompt and preset.pooling != "last"

    def __call__(
        self, texts: list[str], prompt: str, max_length: int
    ) -> tuple[list[list[int]], list[int] | None]:
        """Token ids, and how many tokens at the end of each are pooled; None for all."""
        if self._limit is not None:
            texts = [self._shortened(text, max_length) for text in texts]
        if self._after:
            texts = [text.rstrip() + self._after for text in texts]
        before = self._before + (f"{prompt.strip()} " if prompt.strip() else "")
        sequences = self._tokenize([before + text for text in texts], max_length)
        if not self._skips_prompt:
            return sequences, None
        text_tokens = map(len, self._tokenize(texts, max_length, special=False))
        all_tokens = map(len, sequences)
        return sequences, [min(n, m) or m for n, m in zip(text_tokens, all_tokens, strict=True)]

    def _shortened(self, text: str, max_length: int) -> str:
        while (tokens := self._count(text, max_length)) > self._limit:
            words = text.split()
            if not (kept := int(len(words) * (self._limit / tokens))):
                break
            text = " ".join(words[:kept])
        return text

    def _count(self, text: str, max_length: int) -> int:
        """Tokens of a text, at most max_length. Every word has at least one."""
        if len(text.split()) >= max_length:
            return max_length
        return len(self._tokenize([text], max_length, special=False)[0])


def last_tokens(states: Tensor, packed: Packed, counts: list[int]) -> tuple[Tensor, Packed]:
    """The last counts[i] rows of each sequence i of states (tokens, hidden), packed."""
    kept = unpadded(counts, states.device)
    skipped = (packed.cu_seqlens - kept.cu_seqlens)[1:]  # rows left out up to each sequence's end
    row = torch.arange(kept.tokens, device=states.device)
    return states[row + skipped[kept.sequence]], kept
