"""The documents against the code: names, links and numbers that exist, diffs that apply, examples that run."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import spherelm

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")})
CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"^```diff\n(.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL)
SYMBOL = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.py):([A-Za-z_][\w.]*)`")
FILE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|toml))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def find(path: str) -> Path | None:
    """The file that a page means: from the repository's root, from the package, or from the tests."""
    candidates = [base / path for base in (ROOT, ROOT / "src" / "spherelm", ROOT / "tests")]
    return next((file for file in candidates if file.is_file()), None)


@lru_cache
def symbols(path: Path) -> set[str]:
    """Every function, class and variable at the top of a Python file, and every class's members as `Class.member`."""
    found: set[str] = set()

    def collect(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def exists(reference: str) -> bool:
    """Whether `path.py:symbol` is there."""
    path, _, symbol = reference.partition(":")
    file = find(path)
    return file is not None and symbol in symbols(file)


def slugs(page: Path) -> set[str]:
    """The anchors of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_symbol_and_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    references = [f"{path}:{symbol}" for path, symbol in SYMBOL.findall(text)]
    assert [reference for reference in references if not exists(reference)] == []
    assert [path for path in FILE.findall(text) if find(path) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)} links to {link}"
        assert not heading or heading in slugs(target), f"{name_of(page)} links to {link}"


def test_every_equation_has_its_code_and_its_test() -> None:
    rows = [line for line in PAPER.splitlines() if line.startswith("| ") and line.count("|") >= 5 and ".py:" in line]
    assert len(rows) > 20
    for row in rows:
        _, where, _, code, held_by, _ = re.split(r"(?<!\\)\|", row)
        assert SYMBOL.findall(code), where
        assert [symbol for _, symbol in SYMBOL.findall(held_by) if symbol.startswith("test_")], where


def changes(diff: str) -> list[tuple[str, str, str]]:
    """The hunks of a diff as (path, text before, text after)."""
    hunks: list[tuple[str, list[str], list[str]]] = []
    path = ""
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
        elif line.startswith("@@"):
            hunks.append((path, [], []))
        elif not line.startswith(("--- a/", "--- /dev/null")):
            kind, rest = line[:1] or " ", line[1:]
            assert kind in " +-", line
            if kind in " -":
                hunks[-1][1].append(rest)
            if kind in " +":
                hunks[-1][2].append(rest)
    return [(path, "\n".join(before) + "\n", "\n".join(after) + "\n") for path, before, after in hunks]


def apply(diff: str, root: Path) -> None:
    """Change the files below `root` as the diff says; what it takes away must be there exactly once."""
    for path, before, after in changes(diff):
        if before == "\n":
            assert not (root / path).exists()
            (root / path).write_text(after, encoding="utf-8")
            continue
        text = (root / path).read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} does not hold, once:\n{before}"
        (root / path).write_text(text.replace(before, after), encoding="utf-8")


def copy_package(root: Path) -> None:
    shutil.copytree(
        ROOT / "src" / "spherelm", root / "src" / "spherelm", ignore=shutil.ignore_patterns("*.xz", "__pycache__")
    )


FEW = {"ablation": (2, 3), "positions": (2, 5), "optimizer": (2, 40), "part": (1, 20)}
"""How many files each of the page's diffs touches, and how many lines with something on them it adds at most."""


def test_there_are_four_diffs() -> None:
    assert len(DIFFS) == len(FEW)


@pytest.mark.parametrize(("diff", "name"), list(zip(DIFFS, FEW, strict=False)), ids=FEW)
def test_a_diff_applies_and_touches_few_files(diff: str, name: str, tmp_path: Path) -> None:
    copy_package(tmp_path)
    apply(diff, tmp_path)
    paths = {path for path, _, _ in changes(diff)}
    for path in paths:
        ast.parse((tmp_path / path).read_text(encoding="utf-8"))
    added = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    files, lines = FEW[name]
    assert len(paths) == files
    assert len([line for line in added if line.strip()]) <= lines
    assert max(len(line) for line in added) <= 120


def test_the_floors_are_those_of_the_contract() -> None:
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("layers = [")[2].partition("]")[0]
    page = CONTRIBUTING.partition("## The floors")[2].partition("**The one mechanism.**")[0]
    floors = [re.split(r"  +", line.strip())[0] for line in page.splitlines() if line.startswith("    ")]
    assert floors == re.findall(r'"(.+?)"', contract)


USE_OF_THE_DIFFS = """
import torch
from spherelm import build, build_optimizer, departure
from spherelm.layers.rope import ROPES
from spherelm.recipes import make_run
from spherelm.runs.config import from_dict, to_dict

sizes = dict(d_model=16, n_layers=4, seq_len=8, steps=100)
for fields in ({}, {"variant.part_norm": False}, {"nope_every": 2}, {"optimizer": "signum", "momentum": 0.5}):
    run = make_run("ngpt", "demo", "paper", vocab_size=50, lr=1e-2, **fields, **sizes)
    assert from_dict(to_dict(run)) == run
    model = build(run.model)
    assert type(model.blocks[0].mlp.part).__name__ == "UnitGLU"
    turned = [block.attention.part.rotation is ROPES["standard"].unit_rotation for block in model.blocks]
    assert turned == ([True, False] * 2 if "nope_every" in fields else [True] * 4)
    optimizer = build_optimizer(model, run.optim)
    assert (type(optimizer).__name__ == "Signum") == ("optimizer" in fields)
    tokens, before = torch.randint(50, (4, 9)), None
    for _ in range(20):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert departure(model) < 1e-6
    assert loss.item() < before
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.ndim)
    counts = {"all": sum(parameter.numel() for parameter in model.parameters())}
    assert run.optim.optimizer.state_size(counts) == kept
ungated = build(make_run("ngpt", "demo", "paper", vocab_size=50, lr=1e-2, activation="relu2", **sizes).model)
assert type(ungated.blocks[0].mlp.part).__name__ == "UnitSquaredReLU"
gpt = make_run("gpt", "demo", "paper", vocab_size=50, lr=1e-2, nope_every=1, **sizes)
assert build(gpt.model).blocks[0].attention.part.rotation is ROPES["none"].rotation
"""


def test_what_the_diffs_add_works(tmp_path: Path) -> None:
    copy_package(tmp_path)
    for diff in DIFFS:
        apply(diff, tmp_path)
    script = f"import spherelm; assert spherelm.__file__.startswith({str(tmp_path)!r})\n{USE_OF_THE_DIFFS}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["architectures.md", "tutorials/layers-in-your-model.md"])
def test_the_python_of_a_page_runs(name: str) -> None:
    page = (ROOT / "docs" / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {"__name__": "page"})


def code_lines() -> list[tuple[str, str]]:
    """The lines of code that stand beside the five equations, as (where, line)."""
    page = (ROOT / "docs" / "concepts" / "five-equations.md").read_text(encoding="utf-8")
    readme = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("| equation of the paper |")[2].partition("\n\n")[0]
    )
    found = [("page", line) for line in re.findall(r"^```python\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)]
    return found + [("README", line) for line in re.findall(r"\| `([^`]*)` \|$", readme, re.MULTILINE)]


@pytest.mark.parametrize(("where", "line"), code_lines())
def test_the_code_beside_an_equation_is_the_code(where: str, line: str) -> None:
    files = (ROOT / "src" / "spherelm" / folder for folder in ("layers", "models"))
    assert any(line in file.read_text(encoding="utf-8") for folder in files for file in folder.glob("*.py"))


def test_there_is_a_line_of_code_for_each_equation() -> None:
    counts = [sum(where == place for where, _ in code_lines()) for place in ("page", "README")]
    assert counts == [6, 5]  # the page has the learned scales as well


PROSE = [page for page in PAGES if page.name == "README.md" or "docs" in page.parts]
NOT_OURS = {"recipes.md", "paper.md"}


@pytest.mark.parametrize("page", [page for page in PROSE if page.name not in NOT_OURS], ids=name_of)
def test_no_line_of_prose_is_wider_than_a_screen(page: Path) -> None:
    """But for tables, code and links that cannot be broken."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wide = [line for line in text.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "<summary>"))]
    assert wide == []


def test_the_version_is_the_same_everywhere() -> None:
    texts = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    }
    assert f'\nversion = "{spherelm.__version__}"\n' in texts["pyproject.toml"]
    assert f"\nversion: {spherelm.__version__}\n" in texts["CITATION.cff"]
    assert re.findall(r"^## \[(.+?)\]", texts["CHANGELOG.md"], re.MULTILINE)[0] == spherelm.__version__


def test_the_licence_is_apache_2() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "The spherelm authors" in licence
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "\nlicense: Apache-2.0\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("offline", [False, True])
def test_ci_runs_what_users_run(user: int, offline: bool, tmp_path: Path) -> None:
    """`make test`, whether or not the browser can be installed, which is tried as root only."""
    programs = {"id": f"echo {user}", "make": "echo make $*", "timeout": "shift; exec $*"}
    programs |= {"sh": f"echo $* >>{tmp_path}/installed; exit {int(offline)}", "apt-get": "exit 1"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "")
    done = subprocess.run(
        [ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "make test"
    assert (tmp_path / "installed").exists() == (user == 0)
    assert ("will skip" in done.stderr) == (user == 0 and offline)


def test_nothing_tells_to_install_from_an_index_that_does_not_have_it() -> None:
    """spherelm is installed from its clone; a name in brackets would be asked for at PyPI."""
    files = [
        *PAGES,
        *ROOT.glob("src/**/*.py"),
        *ROOT.glob("examples/*"),
        *ROOT.glob("research/*.py"),
        ROOT / "Makefile",
    ]
    asked = re.compile(r"pip install +['\"]?spherelm")
    assert [name_of(file) for file in files if asked.search(file.read_text(encoding="utf-8"))] == []


def test_what_the_demo_reads_is_what_ships() -> None:
    """The shipped text is prose of the nineteenth century, and no play."""
    shipped = (ROOT / "src" / "spherelm" / "data" / "shipped" / "PROVENANCE.md").read_text(encoding="utf-8")
    assert "Shakespeare" not in shipped
    assert [name_of(page) for page in PAGES if "Shakespeare" in page.read_text(encoding="utf-8")] == []
