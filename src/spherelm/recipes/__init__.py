"""Named runs: sizes (`presets`) and ways to train them (`named`)."""

from spherelm.recipes.choices import Choices
from spherelm.recipes.named import (
    ABLATIONS,
    RECIPE,
    RECIPES,
    WAYS,
    distinct,
    make_run,
    recipe,
    recipe_names,
    run_from,
)
from spherelm.recipes.overrides import changed
from spherelm.recipes.presets import PRESET, PRESETS, Preset

__all__ = [
    "ABLATIONS",
    "PRESET",
    "PRESETS",
    "RECIPE",
    "RECIPES",
    "WAYS",
    "Choices",
    "Preset",
    "changed",
    "distinct",
    "make_run",
    "recipe",
    "recipe_names",
    "run_from",
]
