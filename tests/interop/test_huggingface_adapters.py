"""LoRA on a model whose weights are unit: the adapted weight is Norm(W + s B A), and anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from configs import make_config
from old_files import rename_adapters
from safetensors.torch import load_file
from torch import Tensor

from spherelm import departure
from spherelm.models import Decoder, build

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
peft = pytest.importorskip("peft", reason="needs the extra hf")

from spherelm.interop.huggingface import to_hf  # noqa: E402
from spherelm.interop.huggingface.adapters import on_sphere  # noqa: E402

# peft still asks transformers by its old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*_gradient_checkpointing. is deprecated:FutureWarning")

EVERYTHING = ["q", "k", "v", "o", "u", "head.linear"]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def make_model(arm: str = "ngpt") -> Decoder:
    torch.manual_seed(0)
    return build(make_config(arm, vocab_size=50, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, max_seq_len=32))


def adapted(targets: list[str] | str = EVERYTHING, **settings: Any) -> Any:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(to_hf(make_model()), on_sphere(config))


def trained(model: Any, tokens: Tensor, updates: int, lr: float) -> list[float]:
    """Update what takes a gradient on `tokens`; the losses."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr), []
    for _ in range(updates):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def disturb(model: Any) -> None:
    """Give the adapters, which start at zero, something to do."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=noise))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))


def merged_by_hand(model: Any) -> Decoder:
    """The bare model with every adapted weight replaced: the definition, written out."""
    bare = make_model()
    adapters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in bare.named_parameters():
            path = f"base_model.model.model.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.default.weight" in adapters:
                delta = adapters[f"{path}.lora_B.default.weight"] @ adapters[f"{path}.lora_A.default.weight"] * (8 / 4)
                columns = name.endswith(".o.weight")
                total = weight + delta
                weight.copy_(total / total.norm(dim=0 if columns else 1, keepdim=True))
    return bare


def test_a_new_adapter_changes_nothing(tokens: Tensor) -> None:
    torch.testing.assert_close(adapted()(tokens).logits, make_model()(tokens), rtol=0, atol=1e-5)


@pytest.mark.row("Hugging Face transformers")
def test_the_adapted_weight_is_normalized(tokens: Tensor) -> None:
    model = adapted()
    disturb(model)
    oracle = merged_by_hand(model)(tokens)
    assert (oracle - make_model()(tokens)).abs().max() > 0.1
    torch.testing.assert_close(model(tokens).logits, oracle, rtol=0, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, make_model()(tokens), rtol=0, atol=1e-5)


def test_merging_changes_nothing_and_can_be_undone(tokens: Tensor) -> None:
    model = adapted()
    disturb(model)
    before, weights = model(tokens).logits, {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
    assert departure(model) < 1e-6
    with model.disable_adapter():
        torch.testing.assert_close(model(tokens).logits, make_model()(tokens), rtol=0, atol=1e-5)
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    plain = model.merge_and_unload()
    assert departure(plain) < 1e-6
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    torch.testing.assert_close(plain(tokens).logits, before, rtol=0, atol=1e-5)


def test_adapters_learn_and_the_rest_stays(tokens: Tensor) -> None:
    model = adapted("all-linear")
    assert not isinstance(model.base_model.model.model.head.linear, peft.tuners.lora.LoraLayer)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = trained(model, tokens, 20, lr=5e-2)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_adapters_are_saved_and_loaded(tokens: Tensor, tmp_path: Path) -> None:
    model = adapted(["q", "v"])
    disturb(model)
    model.save_pretrained(tmp_path)
    config = on_sphere(peft.LoraConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(to_hf(make_model()), tmp_path, config=config)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="off the unit sphere"):
        peft.PeftModel.from_pretrained(to_hf(make_model()), tmp_path)(tokens)


@pytest.mark.parametrize("targets", [["q"], ["u"], ["head.linear"]])
def test_an_adapter_that_leaves_the_sphere_is_refused(targets: list[str], tokens: Tensor) -> None:
    model = peft.get_peft_model(to_hf(make_model()), peft.LoraConfig(target_modules=targets))
    with pytest.raises(ValueError, match=r"off the unit sphere: pass peft .*on_sphere"):
        model(tokens)


def test_an_embedding_takes_no_adapter_and_can_be_trained_whole(tokens: Tensor) -> None:
    """With `on_sphere` or without; what is advised works, and keeps the trained copy on the sphere."""
    plain = peft.get_peft_model(to_hf(make_model()), peft.LoraConfig(target_modules=["embed"]))
    rows = peft.get_peft_model(to_hf(make_model()), peft.TrainableTokensConfig(target_modules=["embed"]))
    for model in (plain, rows, adapted(["embed"]), adapted(["q"], trainable_token_indices={"embed": [1, 2]})):
        with pytest.raises(
            ValueError, match=r"embed.* off the unit sphere: .* leave it out, .* modules_to_save"
        ) as said:
            model(tokens)
        assert "on_sphere" not in str(said.value)
    model = adapted(["q"], modules_to_save=["embed"])
    start = model.base_model.model.model.embed.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert (model.base_model.model.model.embed.weight - start).abs().max() > 1e-3
    assert departure(model) < 1e-6


def test_adapters_of_version_0_1_0_are_read(tokens: Tensor, tmp_path: Path) -> None:
    """Files and targets that name the read-out `head`, and no parts in the blocks."""
    model = adapted()
    disturb(model)
    model.save_pretrained(tmp_path)
    start = "base_model.model.model."
    rename_adapters(tmp_path / "adapter_model.safetensors", start)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {f"{start}head.lora_A.weight", f"{start}blocks.1.attention.q.lora_B.weight"} < stored.keys()
    config = peft.LoraConfig.from_pretrained(tmp_path)
    config.target_modules = {"head" if name == "head.linear" else name for name in config.target_modules}
    loaded = peft.PeftModel.from_pretrained(to_hf(make_model()), tmp_path, config=on_sphere(config))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_other_adapters_are_told_of_lora(tokens: Tensor) -> None:
    config = peft.LoHaConfig(target_modules=["q"])
    with pytest.raises(ValueError, match="pass a LoraConfig, not a LoHaConfig"):
        on_sphere(config)
    with pytest.raises(ValueError, match=r"q off the unit sphere: take LoRA on matrices"):
        peft.get_peft_model(to_hf(make_model()), config)(tokens)


PROMPTS = [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig]


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # of peft, whenever it generates
def test_trained_prompts_take_their_sizes_from_the_config(kind: Any, arm: str, tokens: Tensor) -> None:
    model = peft.get_peft_model(to_hf(make_model(arm)), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    losses = trained(model, tokens, 10, lr=0.1)
    assert losses[-1] < losses[0]
    model.eval()
    written = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False
    )
    assert written.shape == (2, 11)


def test_gpt_is_adapted_as_any_other_model(tokens: Tensor) -> None:
    model = peft.get_peft_model(
        to_hf(make_model("gpt")),
        on_sphere(peft.LoraConfig(target_modules=["q", "u", "embed"], init_lora_weights=False)),
    )
    before = model(tokens).logits
    assert (before - make_model("gpt")(tokens)).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, before, rtol=0, atol=1e-5)
    on_head = peft.get_peft_model(to_hf(make_model("gpt")), peft.LoraConfig(target_modules=["head.linear"]))
    with pytest.raises(ValueError, match="would have no effect"):
        on_head(tokens)


def test_adapters_that_cannot_be_merged_or_mixed(tokens: Tensor) -> None:
    model = adapted(["q"]).eval()
    with pytest.raises(ValueError, match=r"set_adapter\(\['other'\]\) first"):
        model.base_model.model.model.blocks[0].attention.part.q.merge(adapter_names=["other"])
    with pytest.raises(ValueError, match="one adapter for the whole batch: leave out adapter_names"):
        model(tokens, adapter_names=["default", "__base__"])
    with torch.no_grad():
        model.base_model.model.model.blocks[0].attention.part.q.lora_B["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"bias": "all"}])
def test_options_that_have_no_meaning_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* does not fit weights on the sphere"):
        on_sphere(peft.LoraConfig(target_modules=["q"], **option))
