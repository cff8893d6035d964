"""The installed package is complete: the wheel and the sdist hold every file,
and the commands run from a wheel alone.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tiny
from ruamel.yaml import YAML

import spherelm

ROOT = Path(__file__).resolve().parents[1]

BUILD = """
import sys
from setuptools import build_meta

out, *kinds = sys.argv[1:]
for kind in kinds:
    getattr(build_meta, f"build_{kind}")(out)
"""


def built(source: Path, out: Path, *kinds: str) -> None:
    """Put the wheel or the sdist of the sources in `source` into `out`, as pip does it, but without a network."""
    out.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD, out, *kinds], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """The files of the repository, as git lists them; without git the test is skipped."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("only git says which files belong to the repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def packages(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a fresh clone."""
    clone = tmp_path_factory.mktemp("clone")
    for name in tracked:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    out = tmp_path_factory.mktemp("packages")
    built(clone, out, "wheel", "sdist")
    return out


def files_of(wheel: Path) -> set[str]:
    """The package's files in a wheel, by their paths in src/."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}


def test_the_wheel_holds_every_file_of_the_package(packages: Path, tracked: list[str], tmp_path: Path) -> None:
    package = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    assert {Path(name).suffix for name in package} > {".py", ".js", ".css", ".html", ".json", ".xz"}
    (wheel,) = packages.glob("*.whl")
    assert files_of(wheel) == package
    (sdist,) = packages.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    built(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "again", "wheel")
    assert files_of(tmp_path / "again" / wheel.name) == package


def test_an_index_is_told_what_the_project_says(packages: Path) -> None:
    (wheel,) = packages.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = email.message_from_string(archive.read(about).decode())
    assert (told["Name"], told["Version"], told["License-Expression"]) == (
        "spherelm",
        spherelm.__version__,
        "Apache-2.0",
    )
    assert told["Description-Content-Type"] == "text/markdown"
    assert told.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    workflow = YAML().load(ROOT / ".github" / "workflows" / "ci.yml")
    (job,) = workflow["jobs"].values()
    assert told["Requires-Python"] == f">={job['strategy']['matrix']['python'][0]}"
    assert [ROOT / step["run"] for step in job["steps"] if "run" in step] == [ROOT / ".ci" / "run"]


INSTALLED = """
import sys
from pathlib import Path
import spherelm
from spherelm.cli import main

def command(line):
    sys.argv = ["spherelm", *line.split()]
    main()

if __name__ == "__main__":
    assert Path(spherelm.__file__).is_relative_to(sys.argv[1]), spherelm.__file__
    command("data prepare --input train.txt --val val.txt --out data --tokenizer default")
    small = "--preset 0.3m --steps 2 --seq-len 32 --batch-size 2 --dtype float32 --no-compile"
    command(f"compare --out runs --data data --quick --workers 1 {small}")
    command("inspect runs --out inside --tokens 64 --no-images")
    command("export runs/ngpt-0 model --standalone")
"""


@pytest.mark.slow
def test_the_commands_run_from_the_wheel_alone(packages: Path, tmp_path: Path) -> None:
    """With the libraries of this environment, and nothing else of it: `-S` leaves editable installs out."""
    pytest.importorskip("matplotlib", reason="needs the extra report")
    pytest.importorskip("transformers", reason="needs the extra hf")
    (wheel,) = packages.glob("*.whl")
    installed, work = tmp_path / "installed", tmp_path / "work"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    work.mkdir()
    for seed, name in enumerate(("train.txt", "val.txt")):
        (work / name).write_text(tiny.text(seed, 4000), encoding="utf-8")
    (work / "installed.py").write_text(INSTALLED, encoding="utf-8")
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "installed.py", installed],
        cwd=work,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(installed), *libraries])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be shown" not in done.stderr
    for made in ("runs/report.html", "runs/walk.html", "inside/index.html", "inside/walk.html", "model/config.json"):
        assert (work / made).stat().st_size > 0, made
    assert '<a href="walk.html">' in (work / "runs" / "report.html").read_text(encoding="utf-8")
