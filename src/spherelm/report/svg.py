"""Drawings for a page: matplotlib's SVG made small, free of fixed colours and of ids that clash.

One `<svg>` element: text as text, no background, every colour a CSS variable (`VARIABLES` names them), so that one
drawing serves light and dark pages; ids that start with a key, so that several fit on one page.
`standalone` makes it a file.
"""

from __future__ import annotations

import re
from html import escape

# What is drawn (a colour that nothing else uses) -> CSS variable, its light value, its dark value.
VARIABLES = {
    "#010203": ("--fg", "#1d2126", "#e4e6e9"),
    "#010204": ("--muted", "#5c6570", "#9aa4af"),
    "#010205": ("--grid", "#e3e5e8", "#30363d"),
    "#010206": ("--c-gpt", "#5b7089", "#93a9c2"),
    "#010207": ("--c-ngpt", "#d1410c", "#ff8552"),
    "#010208": ("--c-second", "#7a3e9d", "#c79be3"),
    "#010209": ("--c-third", "#0b7a6f", "#4cc4b4"),
    "#01020a": ("--bg", "#ffffff", "#14171a"),
}


def palette(light: str, dark: str, automatic: str) -> str:
    """CSS that gives `VARIABLES` their values: selectors for light, for dark, and for dark where the reader prefers it.

    On paper it is always light.
    """
    day = "".join(f"{name}:{value};" for name, value, _ in VARIABLES.values())
    night = "".join(f"{name}:{value};" for name, _, value in VARIABLES.values())
    rules = f"@media screen and (prefers-color-scheme:dark){{{automatic}{{{night}}}}}"
    return f"{light}{{{day}}}{rules}" + (f"@media screen{{{dark}{{{night}}}}}" if dark else "")


def standalone(svg: str) -> str:
    """The same drawing as a file of its own: with the colours of `VARIABLES`, light or dark as the reader prefers."""
    head, tail = svg.split(">", 1)
    return f'{head} font-family="system-ui, sans-serif"><style>{palette("svg", "", "svg")}</style>{tail}'


def inline(svg: str, key: str, title: str, description: str) -> str:
    """matplotlib's file as one small element for a page: see the module's docstring."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: _shorten(tag[0]), svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r'<g( id="[^"]*")?><path d="[^"]*" style="fill: none"/></g>', "", svg)  # see-through backgrounds
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg))
    names = {name for pair in used for name in pair if name}
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in names else "", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", svg)
    for sentinel, (variable, _, _) in VARIABLES.items():
        svg = svg.replace(sentinel, f"var({variable})")
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view[1]}" role="img" aria-labelledby="{key}-title {key}-desc"'
        f' stroke-linejoin="round"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape(description)}</desc>'
    )
    return root + svg[svg.index(">") + 1 :].strip()


def _shorten(tag: str) -> str:
    """Coordinates to a hundredth of a point, and the page's own fonts."""
    tag = re.sub(r"\s+", " ", tag.replace("xlink:href", "href"))
    tag = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)
    tag = re.sub(r"font: (?:normal )?([\d.]+)px [^;\"]*", r"font-size: \1px", tag)
    return re.sub(r"font-family: [^;\"]*;? ?", "", tag)
