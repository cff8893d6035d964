"""Additions of `make docs` to the pages of docs/:
the reference of commands and of Python, and source files that pages link to.

mkdocs calls the functions whose names begin with `on_` (mkdocs.yml).
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import spherelm
from spherelm.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
LINK_OUT = re.compile(r"\]\(((?:\.\./)+)([\w.-]+(?:/[\w.-]+)*)(#[\w-]+)?\)")
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".toml": "toml", ".ipynb": "json"}
HELP_COLUMNS = 96


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file outside of docs/ that a page links to."""
    pages = list(files.documentation_pages())
    targets = {target for page in pages for target in outside(page.src_uri, page.content_string)}
    for target in sorted(targets):
        files.append(File.generated(config, source_page(target), content=source_text(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in the reference, and lead links that leave docs/ to the pages that `on_files` added."""
    here = posixpath.dirname(page.file.src_uri)

    def led(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", here, link[1], link[2]))
        inside = target.startswith("docs/") or not (ROOT / target).is_file()
        return link[0] if inside else f"]({posixpath.relpath(source_page(target), here or '.')})"

    markdown = markdown.replace("<!-- commands -->", commands()) if "<!-- commands -->" in markdown else markdown
    markdown = markdown.replace("<!-- python -->", python_names())
    return LINK_OUT.sub(led, markdown)


def outside(page: str, text: str) -> set[str]:
    """The files outside of docs/ that a page's text links to, from the repository's root."""
    base = posixpath.join("docs", posixpath.dirname(page))
    found = {posixpath.normpath(posixpath.join(base, up, path)) for up, path, _ in LINK_OUT.findall(text)}
    return {target for target in found if not target.startswith("docs/") and (ROOT / target).is_file()}


def source_page(target: str) -> str:
    """Where the page of a file lies on the site."""
    return f"source/{target}.md"


def source_text(file: Path) -> str:
    """A file as a page: its path, and its text as code; Markdown as it is, without its links."""
    text = file.read_text(encoding="utf-8")
    title = f"---\nsearch:\n  exclude: true\n---\n\n# {file.relative_to(ROOT)}\n\n"
    fence = "`````"
    return f"{title}{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}{fence}\n"


def python_names() -> str:
    """The public names by the module that they come from, for mkdocstrings to fill in."""
    homes: dict[str, list[str]] = {}
    for name, home in spherelm._HOMES.items():
        homes.setdefault(home, []).append(name)
    parts = []
    for home, names in homes.items():
        parts += [f"## {home}", *(f"::: {where(home, name)}" for name in sorted(names))]
    return "\n\n".join(parts)


def where(home: str, name: str) -> str:
    """The module that defines a public name, whichever module it is imported through."""
    found = getattr(spherelm, name)
    return f"{getattr(found, '__module__', home)}.{name}"


def commands() -> str:
    """Every command's help, under a heading of its own."""
    return "\n\n".join(f"## spherelm {name}\n\n```text\n{help_of(name)}\n```" for name in COMMANDS)


def help_of(name: str) -> str:
    """The output of `spherelm NAME --help`."""
    environment = {**os.environ, "COLUMNS": str(HELP_COLUMNS), "NO_COLOR": "1", "TERM": "dumb"}
    words = [sys.executable, "-m", "spherelm", *name.split(), "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.strip()
