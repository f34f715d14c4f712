"""What Mistral, LLaMA, Qwen2 and Qwen3 share: module names, rotary positions, outputs."""

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from embedfuse.nn.decoder import DecoderLayer, decode, record
from embedfuse.nn.graphs import WEIGHT_BOUND_TOKENS
from embedfuse.nn.linear import is_inference
from embedfuse.nn.prefixes import PrefixCache, Step, shared_steps
from embedfuse.nn.programs import Programs
from embedfuse.nn.stamp import Stamp
from embedfuse.nn.tower import STEP_TOKENS
from embedfuse.packing import Packed
from embedfuse.patching.check import Probe
from embedfuse.patching.forward.packed_model import PackedModel
from embedfuse.patching.forward.tokens import Batch, check_ids, table_size
from embedfuse.patching.layout import Layout, not_stock
from embedfuse.patching.swap import REUSES

# Rotary positions whose angles depend on the longest text of the batch.
_ANGLES_BY_LENGTH = ("dynamic", "longrope")
_PROBE_TOKENS = 64  # at least as long as any text of the probe


class PackedDecoder(PackedModel):
    """A causal tower without its head, run once over whole texts: no cache is read or made.

    `past_key_values` of the output is None unless a call asks for it with use_cache=True, which runs on the
    original forward; config.use_cache, true by default, does not count as asking.
    """

    # Only the last row of a sequence can run alone: attention counts query rows from the end.
    pruned_poolings = ("last",)
    attentions = ("bidirectional",)
    reuses = REUSES

    @classmethod
    def probe(cls, model: nn.Module) -> Probe:
        config = model.config
        padding_idx = config.pad_token_id or 0
        return Probe.random(config.vocab_size, padding_idx, _PROBE_TOKENS, model.device)

    def longest_sequence(self) -> int:
        return self.config.max_position_embeddings

    def runs_packed(self, path: str) -> bool:
        return path.startswith(("embed_tokens", "layers."))

    def read_layers(self) -> list[DecoderLayer]:
        return [self._read_layer(i, block) for i, block in enumerate(self._blocks())]

    def model_refusal(self) -> str | None:
        if reason := not_stock(self, self._stock_modules()):
            return reason
        config, blocks = self.config, self._blocks()
        if config._attn_implementation == "eager" and self.norm.weight.dtype == torch.float64:
            return "eager attention in float64, whose softmax is float32"
        causal = getattr(config, "is_causal", True) and all(b.self_attn.is_causal for b in blocks)
        if not causal and not self._bidirectional:
            return "the model is configured to look ahead (is_causal is false)"
        for i, block in enumerate(blocks):
            attention, heads = block.self_attn, config.num_attention_heads
            settings = {
                "layer_idx": i,
                "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "num_key_value_groups": heads // config.num_key_value_heads,
            }
            for name, value in settings.items():
                if (found := getattr(attention, name)) != value:
                    return f"layers.{i}.self_attn.{name} is {found}, by the config {value}"
        windowed = any(self.window(i) is not None for i in range(len(blocks)))
        if windowed and not getattr(self, "has_sliding_layers", True):
            return "config.layer_types has sliding windows that the model was not made with"
        return None

    def _blocks(self) -> nn.ModuleList:
        return self.layers[: self.config.num_hidden_layers]

    def _stock_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Path and module of all whose class has to be transformers' own."""
        yield "norm", self.norm
        yield "rotary_emb", self.rotary_emb
        for i, block in enumerate(self.layers):
            yield f"layers.{i}", block
            for name, child in block.named_children():
                yield f"layers.{i}.{name}", child
            for name, child in block.self_attn.named_children():
                if name in ("q_norm", "k_norm"):
                    yield f"layers.{i}.self_attn.{name}", child

    def _read_layer(self, index: int, block: nn.Module) -> DecoderLayer:
        attention, mlp = block.self_attn, block.mlp
        return DecoderLayer(
            index=index,
            block=block,
            norm1=block.input_layernorm,
            qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
            head_dim=attention.head_dim,
            scale=attention.scaling,
            causal=not self._bidirectional,
            window=None if self._bidirectional else self.window(index),
            attention=attention,
            dropout=attention.attention_dropout,
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
            out=attention.o_proj,
            norm2=block.post_attention_layernorm,
            gate_up=(mlp.gate_proj, mlp.up_proj),
            activation=mlp.act_fn,
            down=mlp.down_proj,
        )

    def window(self, layer: int) -> int | None:
        """Keys that a token sees in this layer, its own among them; None: all up to its own."""
        types = getattr(self.config, "layer_types", None)
        return self.config.sliding_window if types and types[layer] == "sliding_attention" else None

    def batch_refusal(self, call: dict, packed: Packed) -> str | None:
        if call.get("position_ids") is not None and call.get("attention_mask") is None:
            return "position_ids without attention_mask: each restart begins a text of its own"
        return None

    def admit(self, call: dict, packed: Packed | None = None) -> tuple[Batch | None, str | None]:
        # Weights are about to change, and fused optimisers do not increase their version.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._embedfuse.prefixes.forget()
        return super().admit(call, packed)

    def check_tokens(self, batch: Batch) -> None:
        check_ids(batch, table_size(self.embed_tokens))

    def run_layers(self, batch: Batch, rows: Tensor | None) -> Tensor:
        packed, tokens = batch.packed, batch.tokens
        x = self.embed_tokens(tokens.input_ids)
        if tokens.position_ids is None:
            # Of all columns, as in the original: some rotary modules read the largest position. A token
            # gets the angle of its place in the text, because only differences of positions count.
            length = packed.max_seqlen if packed.index is None else packed.shape[1]
            columns = torch.arange(length, device=x.device)
            angles = [t[0][packed.places] for t in self.rotary_emb(x, columns[None])]
        else:
            angles = [t[0] for t in self.rotary_emb(x, tokens.position_ids[None])]
        # They hold each angle twice, once for each half of a head.
        cos, sin = (t[:, : t.shape[1] // 2] for t in angles)
        shared = self._shared_steps(batch, x, rows)
        layout = batch.layout
        return decode(layout.layers, self.norm, x, cos, sin, packed, rows, shared, layout.programs)

    def make_programs(self, layers: list[DecoderLayer]) -> Programs:
        return Programs(partial(record, layers, self.norm), self._embedfuse.report.one_call)

    def _shared_steps(self, batch: Batch, x: Tensor, rows: Tensor | None) -> Iterator[Step] | None:
        """Steps that run prefixes which texts share once; None where every token has to run."""
        state = self._embedfuse
        layout, packed, tokens = batch.layout, batch.packed, batch.tokens
        reuse = state.options.reuse_prefixes
        if (
            reuse == "off"
            or self._bidirectional
            or not is_inference(x)
            or (x.is_meta and packed.ids is None)  # prefixes are found on the host
            or tokens.position_ids is not None
        ):
            return None
        if packed.lengths is None:  # in a CUDA graph, see replays
            return None
        if any(layer.dropout and layer.attention.training for layer in layout.layers):
            return None
        cache = stamp = None
        if rows is not None:
            stamp = self._stamp(layout) if reuse == "stream" else None
            cache = PrefixCache() if stamp is None else state.prefixes
            if stamp is None:
                state.prefixes.forget()
        step_tokens = STEP_TOKENS if x.is_cpu else packed.tokens
        return shared_steps(tokens.input_ids, packed, step_tokens, cache, stamp)

    def replays(self, packed: Packed, bucket_tokens: int) -> bool:
        if self.rotary_emb.rope_type in _ANGLES_BY_LENGTH:
            return False
        # Up to WEIGHT_BOUND_TOKENS the time is that of reading the weights: to share a prefix saves nothing.
        small = packed.sequences == 1 or packed.tokens <= WEIGHT_BOUND_TOKENS
        return small or self._bidirectional or self._embedfuse.options.reuse_prefixes == "off"

    def _stamp(self, layout: Layout) -> Stamp | None:
        """What the keys of a prefix depend on, as a value to compare; None where that cannot be listed."""
        listed = not (layout.custom_modules or layout.loose_tensors)
        if self.rotary_emb.rope_type in _ANGLES_BY_LENGTH or not listed:
            return None
        parameters = [p for m in layout.modules for p in m._parameters.values() if p is not None]
        buffers = [b for m in layout.modules for b in m._buffers.values() if b is not None]
        # DataParallel's replicas have none, and one with a gradient is about to change.
        if not parameters or any(
            type(p) is not nn.Parameter or p.is_inference() or p.grad is not None
            for p in parameters
        ):
            return None
        return Stamp([t for t in (*parameters, *buffers) if not t.is_inference()])

    @property
    def _bidirectional(self) -> bool:
        return self._embedfuse.options.attention == "bidirectional"

    def original_forward(self, call: dict):
        mask, input_ids = call.get("attention_mask"), call.get("input_ids")
        if self._bidirectional and (mask is None or mask.dim() == 2):
            embeds = call.get("inputs_embeds")
            batch, length = (embeds if input_ids is None else input_ids).shape[:2]
            call = {**call, "attention_mask": self._open_mask(mask, batch, length)}
        return super().original_forward(call)

    def _open_mask(self, mask: Tensor | None, batch: int, length: int) -> Tensor:
        """(batch, 1, length, length) to add to scores: every token sees all that are no padding."""
        added = torch.zeros(batch, 1, length, length, dtype=self.dtype, device=self.device)
        if mask is not None:
            padding = mask.to(self.device)[:, None, None, :] == 0
            added = added.masked_fill(padding, torch.finfo(self.dtype).min)
        return added

    def make_output(self, states: Tensor, return_dict: bool):
        output = sys.modules[self.original.__module__].BaseModelOutputWithPast(
            last_hidden_state=states
        )
        return output if return_dict else output.to_tuple()
