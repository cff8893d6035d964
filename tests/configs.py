"""Configs from fields by name or by path, whatever part of the config they belong to."""

from __future__ import annotations

from typing import Any

from spherelm.models import ARCHITECTURES, CONFIGS, Config, ScaleSpec, Variant
from spherelm.optim import RULES
from spherelm.recipes.overrides import architecture_of, model_config


def make_config(arm: str, kind: str = "decoder", **fields: Any) -> Config:
    """The config of `arm` in the architecture `kind`; a field of a field by its path, such as "alpha.init"."""
    given = dict(fields)
    architecture = architecture_of(ARCHITECTURES[kind](), given)
    config = model_config(CONFIGS[arm], architecture, {}, given)
    assert not given, f"no field is called {', '.join(given)}"
    return config


PARTS_OF_CONFIGS = (ScaleSpec, Variant, *ARCHITECTURES.values(), *RULES.values())


def fields_by_path(config: Any) -> dict[str, Any]:
    """The fields of a config by name, those of the fields that are configs themselves by path."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        inner = fields_by_path(value) if isinstance(value, PARTS_OF_CONFIGS) else None
        found |= {name: value} if inner is None else {f"{name}.{path}": one for path, one in inner.items()}
    return found


def scales_of(config: Config, *names: str) -> dict[str, tuple[float, float]]:
    """(init, scale) of the learned scales as the oracle's shapes have them,
    0 for a scale of 1/sqrt(d_model); none of a GPT.
    """
    specs = {name: getattr(config, name) for name in names if config.arm == "ngpt"}
    return {name: (spec.init, spec.scale or 0.0) for name, spec in specs.items()}
