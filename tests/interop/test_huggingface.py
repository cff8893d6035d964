"""Our models inside transformers: the same numbers, whatever way they are asked for. The oracle is the bare model."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import make_config
from old_files import rename_export
from safetensors.torch import load_file
from torch import Tensor

from spherelm import attach_retraction, departure
from spherelm.models import CONFIGS, Decoder, build

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from spherelm.interop.huggingface import SphereLMConfig, SphereLMForCausalLM, SphereSeq2SeqConfig, to_hf  # noqa: E402
from spherelm.interop.huggingface.modeling import eager_attend  # noqa: E402

SIZES = {"vocab_size": 50, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48, "max_seq_len": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "nvidia": {"rope": "nvidia", "n_kv_heads": 1},
}
both_arms = pytest.mark.parametrize("arm", ["gpt", "ngpt"])
every_variant = pytest.mark.parametrize("variant", sorted(VARIANTS))


def make_model(arm: str, **fields: Any) -> Decoder:
    """A small model whose logits differ enough for a greedy choice to be clear."""
    extra = {"s_z.init": 20.0, "alpha.init": 0.3} if arm == "ngpt" else {"init_std": 0.3}
    return build(make_config(arm, **{**SIZES, **extra, **fields})).eval()


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(3))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        yield


@pytest.mark.row("Hugging Face transformers")
@both_arms
@every_variant
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_bare_model(arm: str, variant: str, attention: str) -> None:
    model, tokens = make_model(arm, **VARIANTS[variant]), make_tokens(2, 9)
    hf = to_hf(model)
    hf.set_attn_implementation(attention)
    close(hf(tokens).logits, model(tokens))
    close(hf(inputs_embeds=model.embedded(tokens)).logits, model(tokens))
    close(hf(tokens, logits_to_keep=2).logits, model(tokens)[:, -2:])
    close(hf(tokens, logits_to_keep=torch.tensor([1, 4])).logits, model(tokens)[:, [1, 4]])
    assert isinstance(hf(tokens, return_dict=False), tuple)


@both_arms
def test_the_loss_shifts_labels_and_ignores_minus_100(arm: str) -> None:
    model, tokens = make_model(arm), make_tokens(2, 9)
    labels = tokens.clone()
    labels[0, :4] = -100
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    close(to_hf(model)(tokens, labels=labels).loss, model.loss(tokens, targets))


@both_arms
@every_variant
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_changes_nothing(arm: str, variant: str, attention: str) -> None:
    model, tokens = make_model(arm, **VARIANTS[variant]), make_tokens(2, 9)
    hf = to_hf(model)
    hf.set_attn_implementation(attention)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = mask[1, 9:] = 0
    padded = torch.zeros(2, 12, dtype=torch.int64)
    padded[0, 3:], padded[1, :9] = tokens[0], tokens[1]
    logits = hf(padded, attention_mask=mask).logits
    assert logits.isfinite().all()
    close(torch.stack([logits[0, 3:], logits[1, :9]]), model(tokens))


@both_arms
def test_the_wrapped_model_is_usable_alone(arm: str) -> None:
    model, tokens = make_model(arm, n_kv_heads=2), make_tokens(2, 9)
    hf = to_hf(model)
    for attention in ("sdpa", "eager"):
        hf.set_attn_implementation(attention)
        close(hf.model(tokens), model(tokens))
        cache = hf.model.new_cache()
        close(torch.cat([hf.model(part, cache) for part in tokens.split([4, 3, 1, 1], 1)], 1), model(tokens))
    hf.config._attn_implementation = "paged"
    with pytest.raises(ValueError, match="'paged' is not supported: choose one of sdpa, eager"):
        hf.model(tokens)
    assert hf.get_input_embeddings() is hf.model.embed
    assert hf.get_output_embeddings() is hf.model.head.linear


@both_arms
def test_packed_sequences_do_not_see_each_other(arm: str) -> None:
    model, tokens = make_model(arm), make_tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], 1)
    close(to_hf(model)(tokens, position_ids=positions).logits, alone)


@both_arms
@every_variant
def test_a_cache_of_transformers_continues_where_it_stopped(arm: str, variant: str) -> None:
    model, tokens = make_model(arm, **VARIANTS[variant]), make_tokens(2, 12)
    hf = to_hf(model)
    wanted = model(tokens)
    static = transformers.StaticCache(config=hf.config, max_cache_len=16)
    for cache in (transformers.DynamicCache(config=hf.config), static):
        pieces = [hf(part, cache=cache).logits for part in tokens.split([5, 1, 4, 1, 1], 1)]
        close(torch.cat(pieces, 1), wanted)
        assert cache.get_seq_length() == 12


def test_hidden_states_and_attentions() -> None:
    model, tokens = make_model("ngpt", n_kv_heads=2), make_tokens(2, 9)
    hf = to_hf(model)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        hf(tokens, output_attentions=True)
    hf.set_attn_implementation("eager")
    out = hf(tokens, output_attentions=True, output_hidden_states=True)
    assert [s.shape for s in out.hidden_states] == [(2, 9, 32)] * 3
    close(out.hidden_states[0], model.embedded(tokens))
    close(out.hidden_states[-1] @ model.readout(out.hidden_states[-1])[1].T, out.logits)
    assert [w.shape for w in out.attentions] == [(2, 4, 9, 9)] * 2
    for weights in out.attentions:
        close(weights.sum(-1), torch.ones(2, 4, 9))
        assert weights.triu(1).abs().max() == 0
    assert hf(tokens).attentions is None


def test_heads_by_both_names_are_ours_and_stored_once(tmp_path: Path) -> None:
    config = to_hf(make_model("ngpt", n_kv_heads=2)).config
    described = config.to_dict()
    assert (described["num_attention_heads"], described["num_key_value_heads"]) == (4, 2)
    changed = SphereLMConfig.from_dict(described | {"n_heads": 8, "n_kv_heads": 4})
    assert (changed.num_attention_heads, changed.n_heads, changed.n_kv_heads) == (8, 8, 4)
    config.save_pretrained(tmp_path)
    assert "num_attention_heads" not in (tmp_path / "config.json").read_text()
    assert SphereLMConfig.from_pretrained(tmp_path).arm_config() == config.arm_config()


@both_arms
def test_prompts_padded_where_new_tokens_go_are_refused(arm: str) -> None:
    """With a mask, and where transformers makes one of the padding token."""
    hf, tokens = to_hf(make_model(arm)), make_tokens(2, 6).clamp_min(1)
    left, right = tokens.clone(), tokens.clone()
    left[1, :2] = right[1, -2:] = 0
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 49}
    for mask in ({"attention_mask": right.ne(0).long()}, {}):
        with pytest.raises(ValueError, match=r"prompts are padded on the right, .* pad on the left"):
            hf.generate(right, **mask, **settings)
    alone = hf.generate(tokens[1:, 2:], **settings)
    assert torch.equal(hf.generate(left, attention_mask=left.ne(0).long(), **settings)[1:, 2:], alone)
    beams = hf.generate(left, attention_mask=left.ne(0).long(), num_beams=2, **settings)
    assert beams.shape[1] > 6


def slow_greedy(model: Decoder, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


@both_arms
@every_variant
def test_greedy_generation_is_argmax_of_the_full_forward_pass(arm: str, variant: str) -> None:
    model, tokens = make_model(arm, **VARIANTS[variant]), make_tokens(2, 5)
    hf = to_hf(model)
    wanted = slow_greedy(model, tokens, 6)
    for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(hf.generate(tokens, max_new_tokens=6, do_sample=False, **settings), wanted), settings


@both_arms
def test_prompts_of_different_lengths_are_generated_as_if_alone(arm: str) -> None:
    model, prompts = make_model(arm), [make_tokens(1, 7), make_tokens(1, 3)]
    hf = to_hf(model)
    padded = torch.zeros(2, 7, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt, 1
    generated = hf.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(prompts):
        assert torch.equal(generated[row, 7:], slow_greedy(model, prompt, 6)[0, prompt.shape[1] :])


def test_sampling_and_beams_run() -> None:
    model, tokens = make_model("ngpt"), make_tokens(2, 5)
    hf = to_hf(model)
    torch.manual_seed(1)
    drawn = hf.generate(tokens, max_new_tokens=6, do_sample=True, top_k=5, num_return_sequences=3)
    assert drawn.shape == (6, 11)
    beams = hf.generate(tokens, max_new_tokens=4, num_beams=4, do_sample=False)
    greedy = hf.generate(tokens, max_new_tokens=4, do_sample=False)

    def log_probability(rows: Tensor) -> Tensor:
        scores = model(rows).log_softmax(-1)[:, 4:-1]
        return scores.gather(-1, rows[:, 5:, None]).sum((1, 2))

    assert (log_probability(beams) >= log_probability(greedy) - 1e-5).all()


@pytest.mark.row("Hugging Face transformers")
@both_arms
@pytest.mark.parametrize("variant", ["grouped", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_what_is_saved_is_loaded_bitwise(arm: str, variant: str, shard: str, tmp_path: Path) -> None:
    model, tokens = make_model(arm, **VARIANTS[variant]), make_tokens(2, 9)
    to_hf(model).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "10KB")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded, SphereLMForCausalLM)
    assert loaded.config.arm_config() == dataclasses.replace(model.config, n_kv_heads=loaded.config.n_kv_heads)
    ours, theirs = model.state_dict(), loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (loaded.model.head.linear.weight is loaded.model.embed.weight) == (variant == "tied")
    assert torch.equal(loaded(tokens).logits, to_hf(model)(tokens).logits)
    assert departure(loaded) < 1e-6


@both_arms
@pytest.mark.parametrize("variant", ["grouped", "tied"])
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_what_version_0_1_0_saved_is_loaded_bitwise(arm: str, variant: str, shard: str, tmp_path: Path) -> None:
    """And saved again under the names of today."""
    model, tokens = make_model(arm, **VARIANTS[variant]), make_tokens(2, 9)
    to_hf(model).save_pretrained(tmp_path / "new", max_shard_size=shard)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    rename_export(tmp_path / "old")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(tokens).logits, to_hf(model)(tokens).logits)
    loaded.save_pretrained(tmp_path / "again", max_shard_size=shard)
    names = [{n for file in (tmp_path / to).glob("*.safetensors") for n in load_file(file)} for to in ("new", "again")]
    assert names[0] == names[1]


@both_arms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_load_in_other_dtypes(arm: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = make_model(arm), make_tokens(1, 6)
    to_hf(model).save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    logits = loaded(tokens).logits
    assert logits.dtype == dtype
    spacing = torch.finfo(dtype).eps
    assert departure(loaded) < 2 * spacing
    difference = (logits.float() - model(tokens)).abs().max() / model(tokens).abs().max()
    assert difference < 16 * spacing


def test_what_a_checkpoint_lacks_is_drawn_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model("ngpt")
    to_hf(model).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = ["model.blocks.1.mlp.part.o.weight", "model.head.s_z.value"]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers.utils.logging.set_verbosity_error()
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["missing_keys"]) == lost
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert departure(loaded) < 1e-6
    assert torch.equal(loaded.model.head.s_z.value, model.head.s_z.value), "a learned scale starts at its start"


@both_arms
def test_a_new_model_starts_as_ours_does(arm: str) -> None:
    hf = transformers.AutoModelForCausalLM.from_config(SphereLMConfig(**SIZES, arm=arm))
    fresh = make_model(arm, **({"s_z.init": 1.0, "alpha.init": 0.05} if arm == "ngpt" else {"init_std": 0.02}))
    assert departure(hf) < 1e-6
    for (name, one), (_, other) in zip(hf.model.named_parameters(), fresh.named_parameters(), strict=True):
        if one.ndim == 1:
            assert torch.equal(one, other), name
        else:
            assert abs(one.std() / other.std() - 1) < 0.1, name


def test_the_two_share_their_parameters() -> None:
    model = make_model("ngpt", tie_embeddings=True).train()
    model.runtime.compute_dtype = torch.bfloat16
    hf = to_hf(model)
    assert [id(p) for p in hf.parameters()] == [id(p) for p in model.parameters()]
    assert hf.training
    assert hf.model.runtime.compute_dtype == torch.bfloat16
    assert hf.config.dtype == torch.float32


@both_arms
@pytest.mark.parametrize("settings", [None, {"use_reentrant": True}])
def test_gradient_checkpointing_gives_the_same_gradients(arm: str, settings: dict[str, bool] | None) -> None:
    hf, tokens = to_hf(make_model(arm)).train(), make_tokens(2, 9)
    gradients = []
    with torch.enable_grad():
        for checkpointing in (False, True):
            calls: list[object] = []
            hooks = [b.register_forward_pre_hook(lambda block, *_, to=calls: to.append(block)) for b in hf.model.blocks]
            if checkpointing:
                # Older versions of transformers have the other name only.
                getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)(settings)
            hf.zero_grad()
            hf(tokens, labels=tokens, use_cache=True).loss.backward()
            assert len(calls) == (4 if checkpointing else 2), "every block is computed a second time"
            gradients.append([p.grad.clone() for p in hf.parameters()])
            for hook in hooks:
                hook.remove()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_eager_and_fused_attention_have_the_same_gradients() -> None:
    hf, tokens = to_hf(make_model("ngpt", n_kv_heads=2)), make_tokens(2, 9)
    gradients = []
    with torch.enable_grad():
        for attention in ("sdpa", "eager"):
            hf.set_attn_implementation(attention)
            hf.zero_grad()
            hf(tokens, labels=tokens).loss.backward()
            gradients.append([p.grad.clone() for p in hf.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_retraction_and_copies() -> None:
    hf, tokens = to_hf(make_model("ngpt")), make_tokens(2, 9)
    twin = copy.deepcopy(hf)
    assert twin.model.runtime.attend.config is twin.config
    optimizer = torch.optim.AdamW(hf.parameters(), lr=0.1, weight_decay=0.0)
    attach_retraction(optimizer, hf)
    with torch.enable_grad():
        hf(tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert departure(hf) < 1e-6
    assert not torch.equal(hf(tokens).logits, twin(tokens).logits)


@both_arms
def test_the_config_has_every_field_of_ours(arm: str) -> None:
    """And writes it, so that no default of a later version can change a model."""
    defaults = SphereLMConfig(arm=arm, architecture={"kind": "decoder", "pattern": "MA-O"}, start={})
    written, ours = {**defaults.to_diff_dict(), **defaults.start}, defaults.arm_config()
    written["tie_embeddings"] = written.pop("tie_word_embeddings")  # the name that transformers has for it
    for field in dataclasses.fields(CONFIGS[arm]):
        assert field.name in written
        if field.default is not dataclasses.MISSING and field.name not in ("n_kv_heads", "d_ff", "architecture"):
            assert getattr(ours, field.name) == field.default, field.name
    assert written["architecture"] == dataclasses.asdict(ours.architecture)


OLDER = {"init_std": 0.3, "alpha_init": 0.1, "s_z_scale": None, "qk_norm": False, "mamba_chunk": 8, "n_experts": 4}
"""Some of what version 0.1.0 wrote into every config: fields of both arms and of every architecture."""

OF_NGPT = {"alpha.init": 0.1, "variant.qk_norm": False}


@pytest.mark.parametrize(
    ("arm", "fields", "read"),
    [
        ("gpt", {"pattern": None}, ("gpt", "decoder", {"init_std": 0.3})),
        ("ngpt", {"pattern": None}, ("ngpt", "decoder", OF_NGPT)),
        ("hybrid", {"pattern": "MA"}, ("gpt", "decoder", {"init_std": 0.3, "pattern": "MA", "mamba_chunk": 8})),
        ("nencdec", {"n_encoder_layers": 3}, ("ngpt", "encdec", {**OF_NGPT, "n_encoder_layers": 3})),
        ("encdec", {"share_embeddings": True}, ("gpt", "encdec", {"init_std": 0.3, "share_embeddings": True})),
    ],
)
def test_a_config_of_version_0_1_0_is_read(
    arm: str, fields: dict[str, Any], read: tuple[str, str, dict[str, Any]]
) -> None:
    kind = SphereSeq2SeqConfig if "encdec" in arm else SphereLMConfig
    config = kind(arm=arm, **{**SIZES, **OLDER, **fields})
    today, architecture, values = read
    assert config.arm_config() == make_config(today, architecture, n_kv_heads=4, **{**SIZES, **values})
    assert not set(OLDER) & set(config.to_diff_dict())


def test_the_config_speaks_transformers(tmp_path: Path) -> None:
    config = SphereLMConfig(
        arm="gpt", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    assert (config.d_model, config.n_layers, config.n_heads, config.n_kv_heads, config.d_ff) == (64, 3, 4, 2, 256)
    assert (config.intermediate_size, config.max_position_embeddings) == (256, 1024)
    config.save_pretrained(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.arm_config() == config.arm_config()
    assert again.to_diff_dict() == config.to_diff_dict()
    assert '"rope_base"' in (tmp_path / "config.json").read_text(), "defaults are written too"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arm": "rnn"}, "unknown arm 'rnn': choose one of gpt, ngpt$"),
        ({"d_model": 30, "n_heads": 4}, "n_heads=4 does not divide d_model=30"),
        ({"rope": "spiral"}, "rope must be 'standard', 'nvidia' or 'none', got 'spiral'"),
        ({"architecture": {"pattern": "MA-"}}, "a spherelm model has the architecture decoder"),
        ({"architecture": {"kind": "encdec"}}, "a spherelm model has the architecture decoder"),
        ({"architecture": {"kind": "decoder", "pattern": "MA-"}}, "pattern 'MA-' has 3 letters for n_layers=4"),
        (
            {"arm": "nhybrid", "pattern": 7},
            "pattern must be a valid string, got 7",
        ),
    ],
)
def test_configs_that_make_no_model_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SphereLMConfig(**fields)


def test_requests_that_make_no_sense_are_refused() -> None:
    hf, tokens = to_hf(make_model("ngpt")), make_tokens(1, 3)
    with pytest.raises(ValueError, match="one of the two"):
        hf(tokens, inputs_embeds=hf.model.embedded(tokens))
    with pytest.raises(ValueError, match="cannot be resized to 51"):
        hf.resize_token_embeddings(51)
    with pytest.raises(ValueError, match="cannot be resized to 64"):
        hf.resize_token_embeddings(pad_to_multiple_of=64)
    with pytest.raises(ValueError, match="cannot be resized to 52"):
        hf.resize_token_embeddings(50, 4)
    assert hf.resize_token_embeddings(50) is hf.get_input_embeddings()
    assert hf.resize_token_embeddings(49, pad_to_multiple_of=10) is hf.get_input_embeddings()
    with pytest.raises(ValueError, match=r"Embedding.* cannot take the place of UnitEmbedding"):
        hf.set_input_embeddings(torch.nn.Embedding(50, 32))
    with pytest.raises(ValueError, match=r"Linear.* cannot take the place of UnitLinear"):
        hf.set_output_embeddings(torch.nn.Linear(32, 50, bias=False))
    with pytest.raises(ValueError, match="flex_attention"):
        hf.set_attn_implementation("flex_attention")


def test_embeddings_of_the_same_kind_can_be_put_in() -> None:
    hf, other, tokens = to_hf(make_model("ngpt")), to_hf(make_model("ngpt")), make_tokens(1, 5)
    hf.set_input_embeddings(other.get_input_embeddings())
    hf.set_output_embeddings(other.get_output_embeddings())
    assert hf.model.embed is other.model.embed
    assert hf.model.head.linear is other.model.head.linear
    assert hf(tokens).logits.isfinite().all()


def test_a_padded_row_is_no_nan_in_float16() -> None:
    """A score of -64 and the lowest number of float16 have no sum in float16;
    from a row of NaN it would reach the others.
    """
    q = torch.full((1, 1, 3, 16), 4.0, dtype=torch.float16)
    v = torch.arange(48, dtype=torch.float16).view(1, 1, 3, 16)
    mask = torch.full((1, 1, 3, 3), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1)
    mask[:, :, :, 0] = torch.finfo(torch.float16).min  # the first position is padding, and sees nothing
    out = eager_attend(q, -q, v, 0.25, mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 1])
    torch.testing.assert_close(out[0, 0, 2], v[0, 0, 1:].mean(0))
