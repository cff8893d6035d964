from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from spherelm.models import GPT, NGPT, GPTConfig, NGPTConfig, ScaleSpec, build

CONFIGS = [GPTConfig, NGPTConfig]
GOOD: dict[str, Any] = {"vocab_size": 11, "n_layers": 1, "d_model": 12, "n_heads": 3, "max_seq_len": 8}


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 5}, "n_heads=5 does not divide d_model=12"),
        ({"n_heads": 4}, "d_model / n_heads = 3 is odd"),
        ({"n_kv_heads": 2}, "n_kv_heads=2 does not divide n_heads=3"),
        ({"vocab_size": 0}, "vocab_size must be more than 0, got 0"),
        ({"n_layers": -1}, "n_layers must be more than 0, got -1"),
        ({"n_layers": True}, "n_layers must be a valid integer, got True"),
        ({"d_model": 12.0}, "d_model must be a valid integer, got 12.0"),
        ({"n_heads": 0}, "n_heads must be more than 0, got 0"),
        ({"n_kv_heads": 0}, "n_kv_heads must be more than 0, got 0"),
        ({"d_ff": 0}, "d_ff must be more than 0, got 0"),
        ({"max_seq_len": 0}, "max_seq_len must be more than 0, got 0"),
        ({"rope_base": 1.0}, "rope_base must be more than 1, got 1.0"),
    ],
)
def test_sizes_that_cannot_make_a_model_are_refused(config_class: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        config_class(**{**GOOD, **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["alpha", "s_qk", "s_u", "s_v", "s_z", "s_mamba", "s_moe"])
def test_scales_that_cannot_be_stored_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"init must be more than 0, got 0"):
        NGPTConfig(**GOOD, **{name: ScaleSpec(init=0.0)})
    with pytest.raises(ValueError, match=r"scale must be more than 0, got -1\.0"):
        NGPTConfig(**GOOD, **{name: ScaleSpec(scale=-1.0)})


def test_a_spread_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="init_std must be more than 0, got 0"):
        GPTConfig(**GOOD, init_std=0.0)


def test_both_arms_share_the_names_of_their_shape() -> None:
    gpt, ngpt = ({f.name: f.default for f in dataclasses.fields(c)} for c in CONFIGS)
    shared = {"vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "max_seq_len", "rope_base"}
    assert shared <= gpt.keys() & ngpt.keys()
    assert all(gpt[name] == ngpt[name] for name in gpt.keys() & ngpt.keys())


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_config_is_a_frozen_value(config_class: Any) -> None:
    assert config_class(**GOOD) == config_class(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config_class(**GOOD).d_model = 24


def test_build_picks_the_model_of_the_config() -> None:
    for config, model_class, arm in ((GPTConfig(**GOOD), GPT, "gpt"), (NGPTConfig(**GOOD), NGPT, "ngpt")):
        model = build(config)
        assert type(model) is model_class
        assert model.config is config
        assert config.arm == arm
    with pytest.raises(ValueError, match="no model is built from a dict"):
        build({})  # type: ignore[arg-type]
