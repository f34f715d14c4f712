"""Edits of a live model by path, for any family: its layers, their modules, and what people do to them."""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils import parametrize, prune


def blocks(model) -> nn.ModuleList:
    base = model.base_model
    return base.layers if hasattr(base, "layers") else base.encoder.layer


def attention_of(model, layer=1) -> nn.Module:
    block = blocks(model)[layer]
    return block.self_attn if hasattr(block, "self_attn") else block.attention.self


def query_of(model) -> tuple[nn.Module, str]:
    attention = attention_of(model)
    return attention, "q_proj" if hasattr(attention, "q_proj") else "query"


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        out = self.inner(*args, **kwargs)
        return tuple(2 * x for x in out) if isinstance(out, tuple) else 2 * out


class SumOfRows(Twice):
    """Mixes rows, as a per-tensor quantisation does."""

    def forward(self, x):
        return self.inner(x) + x.flatten(0, -2).sum(0).mean()


def append_layer(model):
    blocks(model).append(copy.deepcopy(blocks(model)[0]))
    if hasattr(model.base_model, "layers"):
        model.config.num_hidden_layers += 1
        if getattr(model.config, "layer_types", None):
            model.config.layer_types.append(model.config.layer_types[0])


def remove_layer(model):
    del blocks(model)[1]
    model.config.num_hidden_layers -= 1


def swap_layers(model):
    layers = blocks(model)
    layers[0], layers[2] = layers[2], layers[0]


def same_layer_twice(model):
    blocks(model)[2] = blocks(model)[0]


def wrap(get):
    def change(model):
        parent, name = get(model)
        setattr(parent, name, Twice(getattr(parent, name)))

    return change


def mix_rows(model):
    parent, name = query_of(model)
    setattr(parent, name, SumOfRows(getattr(parent, name)))


def word_table(model) -> tuple[nn.Module, str]:
    base = model.base_model
    return (
        (base, "embed_tokens") if hasattr(base, "layers") else (base.embeddings, "word_embeddings")
    )


def first_norm(model) -> tuple[nn.Module, str]:
    block = blocks(model)[0]
    name = "input_layernorm"
    return (block, name) if hasattr(block, name) else (block.output, "LayerNorm")


def own_forward(model):
    module = blocks(model)[1]
    forward = module.forward
    module.forward = lambda x, *args, **kwargs: forward(2 * x, *args, **kwargs)


def forward_of_a_linear(model):
    parent, name = query_of(model)
    module = getattr(parent, name)
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)


def a_hook(model):
    blocks(model)[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))


def an_attention_function(model):
    from transformers import AttentionInterface

    def half(module, query, key, value, *args, **kwargs):
        sdpa = AttentionInterface._global_mapping["sdpa"]
        return sdpa(module, query / 2, key, value, *args, **kwargs)

    AttentionInterface.register("half", half)
    model.set_attn_implementation("half")


def a_parametrization(model):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    parent, name = query_of(model)
    parametrize.register_parametrization(getattr(parent, name), "weight", Half())


def pruning(model):
    parent, name = query_of(model)
    prune.l1_unstructured(getattr(parent, name), "weight", 0.5)


def a_tied_weight(model):
    parent, name = query_of(model)
    other = getattr(attention_of(model, 2), name)
    other.weight = getattr(parent, name).weight


def another_weight(model):
    parent, name = query_of(model)
    module = getattr(parent, name)
    module.weight = nn.Parameter(module.weight.detach().flip(0))


def another_dtype_of_one_module(model):
    parent, name = query_of(model)
    getattr(parent, name).half()


def a_class_of_its_own(model):
    block = blocks(model)[1]
    kind = type(block)

    class Mine(kind):
        def forward(self, x, *args, **kwargs):
            return kind.forward(self, 2 * x, *args, **kwargs)

    block.__class__ = Mine


def a_table_of_hooks(model):
    module = blocks(model)[1]
    module._forward_pre_hooks = OrderedDict()
    module.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))


def a_method(model):
    block = blocks(model)[1]
    if hasattr(block, "feed_forward_chunk"):
        block.feed_forward_chunk = lambda x: 2 * x
    else:
        block.mlp.forward = type(block.mlp).forward.__get__(blocks(model)[0].mlp)


def a_mixing_module_of_torch(model):
    block = blocks(model)[1]
    if hasattr(block, "mlp"):
        block.mlp.act_fn = nn.Softmax(dim=-2)
    else:
        block.intermediate.intermediate_act_fn = nn.Softmax(dim=-2)


def a_module_that_wants_a_batch(model):
    parent, name = query_of(model)
    linear = getattr(parent, name)
    columns = linear.out_features
    setattr(parent, name, nn.Sequential(linear, nn.Unflatten(2, (4, columns // 4)), nn.Flatten(2)))


def a_scripted_linear(model):
    parent, name = query_of(model)
    setattr(parent, name, torch.jit.script(getattr(parent, name)))


def a_sparse_weight(model):
    parent, name = query_of(model)
    weight = getattr(parent, name).weight.detach().to_sparse_csr()
    getattr(parent, name).weight = nn.Parameter(weight, requires_grad=False)


def odd_values_of_the_config(model):
    model.config.tensor, model.config.list = torch.ones(2), [torch.ones(2), object()]


CHANGES = {
    change.__name__: change
    for change in (
        *(append_layer, remove_layer, swap_layers, same_layer_twice, own_forward, a_hook),
        *(forward_of_a_linear, an_attention_function, a_parametrization, pruning, a_tied_weight),
        *(another_weight, another_dtype_of_one_module, a_class_of_its_own, mix_rows, a_method),
        *(a_table_of_hooks, a_mixing_module_of_torch, a_module_that_wants_a_batch),
        *(a_scripted_linear, a_sparse_weight, odd_values_of_the_config),
    )
} | {
    "wrap_a_query": wrap(query_of),
    "wrap_the_words": wrap(word_table),
    "wrap_a_norm": wrap(first_norm),
    "wrap_a_layer": wrap(lambda model: (blocks(model), "1")),
    "wrap_an_attention": wrap(
        lambda m: (blocks(m)[0], "self_attn" if hasattr(blocks(m)[0], "self_attn") else "attention")
    ),
}
