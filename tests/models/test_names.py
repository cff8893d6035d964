"""Names of version 0.1.0, which were the oracle's, are read as those of today."""

from __future__ import annotations

from typing import Any

import pytest
from cases import config_of, hybrid_config, pair_config
from oracle_names import by_oracle_names

from spherelm.models import build
from spherelm.models.older import is_old, today

CONFIGS: dict[str, Any] = {
    "gpt": config_of("gpt"),
    "ngpt": config_of("ngpt"),
    "tied": config_of("ngpt", tie_embeddings=True),
    "encdec of gpt": pair_config("gpt"),
    "encdec of ngpt": pair_config("ngpt"),
    "encoder of gpt": config_of("gpt", "encoder"),
    "encoder of ngpt": config_of("ngpt", "encoder"),
    "hybrid of gpt": hybrid_config("gpt", "MA-O", n_shared_experts=1),
    "hybrid of ngpt": hybrid_config("ngpt", "MA-O", n_shared_experts=1),
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("kind", CONFIGS)
def test_old_names_become_todays_and_todays_stay(kind: str, prefix: str) -> None:
    state = build(CONFIGS[kind]).state_dict()
    ours = {prefix + name: value for name, value in state.items()}
    old = {prefix + name: value for name, value in by_oracle_names(state).items()}
    assert is_old(old)
    assert not is_old(ours)
    assert old.keys() != ours.keys()
    for given in (old, ours):
        found = today(given)
        assert found.keys() == ours.keys()
        assert all(found[name] is ours[name] for name in ours)
