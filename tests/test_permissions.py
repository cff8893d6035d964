"""Permissions of written files follow the user's umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import tiny
import tiny_pairs

from spherelm.interop.export import export
from spherelm.train.trainer import train


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027], ids=oct)
def test_every_file_has_the_permissions_of_a_new_one(umask: int, tmp_path: Path) -> None:
    """Of data, pairs, runs and exports. Some libraries write under a temporary name first,
    with permissions for one user.
    """
    before = os.umask(umask)
    try:
        data, pairs = tiny.make_data(tmp_path), tiny_pairs.make_pairs(tmp_path)
        train(tiny.run_config("ngpt", data, steps=1), tmp_path / "run", show_progress=False)
        export(tmp_path / "run", tmp_path / "exported", standalone=True)
    finally:
        os.umask(before)
    assert {"val.safetensors", "train.safetensors"} <= {path.name for path in pairs.iterdir()}
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask}
    assert wrong == {}
    assert (tmp_path / "exported" / "model.safetensors") in modes
