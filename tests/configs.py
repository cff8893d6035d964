"""Configs from fields by name or by path, whatever part of the config they belong to."""

from __future__ import annotations

from typing import Any

from spherelm.models import ARCHITECTURES, CONFIGS, Config
from spherelm.recipes.overrides import architecture_of, model_config


def make_config(arm: str, kind: str = "decoder", **fields: Any) -> Config:
    """The config of `arm` in the architecture `kind`; a field of a field by its path, such as "alpha.init"."""
    given = dict(fields)
    architecture = architecture_of(ARCHITECTURES[kind](), given)
    config = model_config(CONFIGS[arm], architecture, {}, given)
    assert not given, f"no field is called {', '.join(given)}"
    return config


def scales_of(config: Config, *names: str) -> dict[str, tuple[float, float]]:
    """(init, scale) of the learned scales as the oracle's shapes have them, 0 for a scale of 1/sqrt(d_model); none of a GPT."""
    specs = {name: getattr(config, name) for name in names if config.arm == "ngpt"}
    return {name: (spec.init, spec.scale or 0.0) for name, spec in specs.items()}
