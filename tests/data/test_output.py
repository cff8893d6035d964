"""A directory that a command makes is there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from spherelm.data.output import whole_directory


def tree(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


@pytest.mark.parametrize("there", [False, True])
def test_it_appears_at_the_end(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        monkeypatch.chdir(out)
        out = Path()  # its own name cannot be replaced while one stands in it
    with whole_directory(out) as part:
        (part / "sub").mkdir()
        (part / "sub" / "file").write_text("whole")
        assert not (out / "sub").exists()
    assert tree(tmp_path) == ["out", "out/sub", "out/sub/file"]


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_no_trace_and_a_killed_process_no_hindrance(there: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
    before = tree(tmp_path)

    def fill() -> None:
        with whole_directory(out) as part:
            assert tree(part) == []
            (part / "file").write_text("half")
            raise KeyboardInterrupt

    killed = whole_directory(out)
    (killed.__enter__() / "half").write_text("half")
    with pytest.raises(KeyboardInterrupt):
        fill()
    assert tree(tmp_path) == before


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, tmp_path / "mine"):
        with (
            pytest.raises(FileExistsError, match="already holds something: choose another --report"),
            whole_directory(out, "--report"),
        ):
            pass
    assert tree(tmp_path) == ["mine"]
