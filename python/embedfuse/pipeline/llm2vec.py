"""Texts as LLM2Vec reads them: wrapped, cut by words, pooled without the tokens of the instruction.

Behaviour of llm2vec/llm2vec.py (McGill-NLP/llm2vec, arXiv 2404.05961). There the text's own tokens are
counted on the text alone, and pooled are as many tokens at the end of the whole.
"""

import torch
from torch import Tensor

from embedfuse.packing import Packed, unpadded
from embedfuse.pipeline.presets import Preset
from embedfuse.pipeline.tokenize import TextTokenizer


class WrappedTexts:
    """Texts with prompt and wrap to token ids, and how many at the end are the text's own.

    What stands behind the text counts as the text's. A text of more than preset.text_max_length tokens
    first loses words: as long as it has n tokens too many, the share text_max_length / n of its words
    stays. Unlike LLM2Vec, a text that would lose its last word (one without blanks) is cut by tokens
    alone, and one without tokens pools the whole sequence; LLM2Vec gets vectors there that say nothing.
    """

    def __init__(self, tokenize: TextTokenizer, preset: Preset):
        self._tokenize = tokenize
        self._before, after = preset.wrap or ("", "")
        self._after = after + ((preset.eos_text or "") if preset.pooling == "last" else "")
        self._limit = preset.text_max_length
        self._masks = not preset.pools_prompt and preset.pooling != "last"

    def __call__(
        self, texts: list[str], prompt: str, max_length: int
    ) -> tuple[list[list[int]], list[int] | None]:
        """Token ids, and how many at the end of each are pooled; None: as the pooling says."""
        if self._limit is not None:
            texts = [self._shortened(text, max_length) for text in texts]
        if self._after:
            texts = [text.rstrip() + self._after for text in texts]
        before = self._before + (f"{prompt.strip()} " if prompt.strip() else "")
        sequences = self._tokenize([before + text for text in texts], max_length)
        if not self._masks:
            return sequences, None
        own = map(len, self._tokenize(texts, max_length, special=False))
        whole = map(len, sequences)
        return sequences, [min(n, m) or m for n, m in zip(own, whole, strict=True)]

    def _shortened(self, text: str, max_length: int) -> str:
        while (tokens := self._count(text, max_length)) > self._limit:
            words = text.split()
            if not (kept := int(len(words) * (self._limit / tokens))):
                break
            text = " ".join(words[:kept])
        return text

    def _count(self, text: str, max_length: int) -> int:
        """Tokens of a text, at most max_length; every word is one at least."""
        if len(text.split()) >= max_length:
            return max_length
        return len(self._tokenize([text], max_length, special=False)[0])


def tails(states: Tensor, packed: Packed, counts: list[int]) -> tuple[Tensor, Packed]:
    """The last counts[i] rows of each sequence i of states (tokens, hidden), end to end."""
    kept = unpadded(counts, states.device)
    before = (packed.cu_seqlens - kept.cu_seqlens)[1:]  # rows left out up to there
    row = torch.arange(kept.tokens, device=states.device)
    return states[row + before[kept.sequence]], kept
