"""PEFT's methods, added before patch and after it: states, and the adapters' gradients."""

import pytest
import torch
from torch import nn

import embedfuse
from embedfuse.patching import PatchError
from tests.tools.rows import Row, cases, check, check_document
from tests.tools.twins import batch_for, make_model, outcome, states

peft = pytest.importorskip("peft")

LINEAR = {
    "bert": ["query", "value", "intermediate.dense"],
    "mistral": ["q_proj", "v_proj", "up_proj"],
}
WORDS = {"bert": "word_embeddings", "mistral": "embed_tokens"}


def family_of(model: nn.Module) -> str:
    return model.config.model_type


def added(make):
    """make(family) -> config. Adapters get values that change the output."""

    def act(model, folder):
        torch.manual_seed(3)
        model = peft.get_peft_model(model, make(family_of(model)))
        return moved(model).eval()

    return act


def moved(model: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return model


def on_linears(kind: str, **options):
    def make(family):
        return getattr(peft, f"{kind}Config")(
            task_type="FEATURE_EXTRACTION", target_modules=LINEAR[family], **options
        )

    return added(make)


def ia3(family):
    modules = LINEAR[family]
    return peft.IA3Config(
        task_type="FEATURE_EXTRACTION", target_modules=modules, feedforward_modules=modules[-1:]
    )


def on(targets, **options):
    """LoRA on other modules; targets: one for all families, or a dict by family."""

    def make(family):
        named = targets[family] if isinstance(targets, dict) else targets
        return peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=named, **options)

    return added(make)


def saved(modules):
    def make(family):
        return peft.LoraConfig(
            task_type="FEATURE_EXTRACTION",
            target_modules=LINEAR[family],
            modules_to_save=[modules[family]],
        )

    return added(make)


def prompts(kind: str, **options):
    return added(
        lambda _: getattr(peft, f"{kind}Config")(
            task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, **options
        )
    )


def trained_tokens(family):
    return peft.TrainableTokensConfig(
        task_type="FEATURE_EXTRACTION", token_indices=[7, 9], target_modules=[WORDS[family]]
    )


METHODS = {
    "LoRA": ("Lora", {}),
    "DoRA": ("Lora", {"use_dora": True}),
    "rsLoRA": ("Lora", {"use_rslora": True}),
    "LoRA with biases": ("Lora", {"bias": "all"}),
    "QALoRA": ("Lora", {"use_qalora": True, "qalora_group_size": 8}),
    "KaSA": ("Lora", {"kasa_config": {}}),
    "VeLoRA": ("Lora", {"velora_config": {}}),
    "MonteCLoRA": ("Lora", {"monteclora_config": {}}),
    "AdaLoRA": ("AdaLora", {"total_step": 10}),
    "AdaMSS": ("Adamss", {}),
    "BEFT": ("Beft", {}),
    "BOFT": ("BOFT", {}),
    "C3A": ("C3A", {"block_size": 8}),
    "DEFT": ("Deft", {}),
    "DeLoRA": ("Delora", {}),
    "FourierFT": ("FourierFT", {}),
    "FRoD": ("Frod", {}),
    "GLoRA": ("Glora", {}),
    "GraLoRA": ("Gralora", {}),
    "HiRA": ("Hira", {}),
    "HRA": ("HRA", {}),
    "LN tuning of linear layers": ("LNTuning", {}),
    "LoHa": ("LoHa", {}),
    "LoKr": ("LoKr", {}),
    "MiSS": ("Miss", {"r": 4}),
    "MiSS, bat (Bone)": ("Miss", {"r": 4, "init_weights": "bat"}),
    "OFT": ("OFT", {}),
    "OSF": ("OSF", {}),
    "PEANuT": ("Peanut", {}),
    "PSOFT": ("Psoft", {"r": 4}),
    "PVeRA": ("Pvera", {}),
    "RandLoRA": ("RandLora", {}),
    "RoAd": ("Road", {"group_size": 8}),
    "SHiRA": ("Shira", {"r": 4}),
    "SuperTuning": ("Supertuning", {}),
    "TinyLoRA": ("TinyLora", {}),
    "UniLoRA": ("UniLora", {}),
    "VB-LoRA": ("VBLoRA", {"num_vectors": 16, "vector_length": 8}),
    "VeRA": ("Vera", {}),
    "WaveFT": ("WaveFT", {"n_frequency": 50}),
}
_IDS = {"before": "original", "after": "original", "reason": "called with inputs_embeds"}
_KEYS = {"before": "original", "after": "original", "reason": "called with past_key_values"}
_MIXES = {"before": "refused", "after": "original", "reason": "which mixes rows"}

ROWS = [
    *(
        # Families alternate: a method has the same layers in both.
        Row(f"peft: {name}", act=on_linears(kind, **options), families=(family,))
        for (name, (kind, options)), family in zip(
            METHODS.items(), ["bert", "mistral"] * len(METHODS), strict=False
        )
    ),
    Row("peft: IA3", act=added(ia3)),
    Row("peft: LoRA on all linear layers", act=on("all-linear")),
    Row("peft: LoRA on word embeddings", act=on({k: [v] for k, v in WORDS.items()})),
    Row(
        "peft: LoRA on position and token type embeddings",
        act=on(["position_embeddings", "token_type_embeddings"]),
        families=("bert",),
    ),
    Row(
        "peft: LoRA on parameters (`target_parameters`)",
        act=added(
            lambda family: peft.LoraConfig(
                task_type="FEATURE_EXTRACTION",
                target_modules=[],
                target_parameters=[f"{LINEAR[family][0]}.weight"],
            )
        ),
    ),
    Row(
        "peft: `trainable_token_indices`",
        act=added(
            lambda family: peft.LoraConfig(
                task_type="FEATURE_EXTRACTION",
                target_modules=LINEAR[family],
                trainable_token_indices=[7, 9],
            )
        ),
    ),
    Row("peft: trainable tokens", act=added(trained_tokens)),
    Row("peft: `modules_to_save`, embeddings", act=saved(WORDS)),
    Row("peft: `modules_to_save`, LayerNorm", act=saved({"bert": "LayerNorm"}), families=("bert",)),
    Row(
        "peft: `modules_to_save`, RMSNorm",
        before="original",
        after="original",
        reason="ModulesToSaveWrapper",
        act=saved({"mistral": "input_layernorm"}),
        families=("mistral",),
    ),
    Row("peft: Lily", **_MIXES, act=on_linears("Lily")),
    Row("peft: prompt tuning", **_IDS, act=prompts("PromptTuning")),
    Row("peft: p-tuning", **_IDS, act=prompts("PromptEncoder")),
    Row("peft: prefix tuning", **_KEYS, act=prompts("PrefixTuning")),
    Row("peft: Cartridge", **_KEYS, act=prompts("Cartridge")),
    Row(
        "peft: ShadowPEFT",
        before="original",
        after="original",
        reason="has a hook",
        act=added(lambda _: peft.ShadowConfig(task_type="FEATURE_EXTRACTION")),
        families=("mistral",),
    ),
    Row("peft: Poly, with `task_ids`", before="refused", after="original", reason="has a hook"),
    Row(
        "peft: LoRA with `adapter_names`", before="original", after="original", reason="has a hook"
    ),
    Row(
        "peft: merged, unmerged, switched off", after="-", remark="tests/integrations/test_peft.py"
    ),
    Row(
        "peft: X-LoRA, adaption prompt, CPT, multitask prompts",
        before="-",
        after="-",
        remark="only for models with a language-modelling head",
    ),
]


@cases(ROWS)
def test_method(row, when, family, tmp_path):
    check(row, when, family, tmp_path)


@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_adapters_chosen_by_the_call(when):
    """adapter_names: an adapter for each row, passed to the layers by hooks."""
    twins = [make_model("mistral") for _ in range(2)]
    if when == "after patch":
        embedfuse.patch(twins[0])
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=LINEAR["mistral"])
    found = []
    for model in twins:
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        model.add_adapter("second", config)
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            moved(model)
        found.append(model.eval())
    if when == "before patch":
        embedfuse.patch(found[0])
    batch = batch_for(found[0])
    names = ["default", "second", "__base__", "second"]
    with torch.no_grad():
        first, second = (states(m, {**batch, "adapter_names": names}) for m in found)
        assert (second - states(found[1], batch)).abs().max() > 0.01
    assert torch.equal(first, second)
    assert "has a hook" in outcome(found[0])


@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_poly(when):
    config = peft.PolyConfig(
        task_type="FEATURE_EXTRACTION", target_modules=LINEAR["mistral"], r=4, n_tasks=2, n_skills=2
    )
    patched, original = make_model("mistral"), make_model("mistral")
    if when == "after patch":
        embedfuse.patch(patched)
    twins = []
    for model in (patched, original):
        torch.manual_seed(3)
        twins.append(moved(peft.get_peft_model(model, config)).eval())
    if when == "before patch":
        with pytest.raises((PatchError, ValueError), match=r"task_ids|rows"):
            embedfuse.patch(twins[0])
        return
    batch = {**batch_for(patched), "task_ids": torch.tensor([0, 1, 1, 0])}
    with torch.no_grad():
        first, second = (states(m, batch) for m in twins)
    assert torch.equal(first, second)
    assert "has a hook" in outcome(twins[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["before patch", "after patch"])
def test_an_untrained_adapter_that_mixes_rows(when, dtype):
    """It adds zero, so comparing outputs cannot show what it does once it is trained."""
    config = peft.LilyConfig(task_type="FEATURE_EXTRACTION", target_modules=LINEAR["mistral"])
    model = make_model("mistral").to(dtype)
    if when == "before patch":
        model = peft.get_peft_model(model, config).eval()
        with pytest.raises(PatchError, match=r"lily\.layer\.Linear, which mixes rows"):
            embedfuse.patch(model)
        return
    embedfuse.patch(model)
    torch.manual_seed(3)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        states(model)
    assert "lily.layer.Linear, which mixes rows" in outcome(model)


def test_every_method_has_a_row():
    """Fails for a method that a new release of PEFT adds, until it has a row."""
    tried = {kind.lower() for kind, _ in METHODS.values()}
    tried |= {"ia3", "lily", "poly", "shadow", "cartridge", "trainable_tokens"}
    tried |= {"prompt_tuning", "p_tuning", "prefix_tuning"}
    tried |= {"xlora", "adaption_prompt", "cpt", "multitask_prompt_tuning"}
    tried |= {"ln_tuning"}
    known = {kind.value.lower() for kind in peft.PeftType}
    assert known - tried == set()


def test_document():
    check_document("PEFT", ROWS)
