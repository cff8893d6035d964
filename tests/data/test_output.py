"""A directory that a command makes is there whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from spherelm.data.output import check_place, whole_directory


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
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for out, said in (
        (tmp_path, "already holds something"),
        (mine, f"{mine} is a file"),
        (mine / "a" / "b", f"{mine} is a file"),
    ):
        with pytest.raises(FileExistsError, match=f"{said}: choose another --report"), whole_directory(out, "--report"):
            pass
    assert tree(tmp_path) == ["mine"]


def test_a_link_to_nothing_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link is a link to nothing: choose another --out"):
        check_place(tmp_path / "link" / "run")
