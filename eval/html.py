"""Pages that stand alone: one HTML file with its style and its pictures inside, which loads nothing and runs no script.

Everything that comes from a run is text and is escaped here; `Markup` marks what is HTML already.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import NewType

from eval.tables import cell

Markup = NewType("Markup", str)
EMPTY = Markup("")

# A policy that forbids every request, so that not even a mistake here could make one.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1>$lead</header>
<nav aria-label="Sections">$links</nav>
<main>$sections</main>
</body>
</html>
""")

STYLE = """
:root { --text: #1d2127; --soft: #5c6470; --ground: #ffffff; --panel: #f5f6f8; --line: #dcdfe4; --link: #1557b0;
  --for: 21, 87, 176; --against: 190, 48, 20 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #9aa3b0; --ground: #15181c; --panel: #1f2329;
  --line: #353b44; --link: #8ab4f8; --for: 90, 150, 255; --against: 255, 110, 80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 2rem 4rem; max-width: 1240px; color: var(--text); background: var(--ground);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem } p { margin: .5rem 0 } a { color: var(--link) }
header p { color: var(--soft) }
nav { position: sticky; top: 0; background: var(--ground); padding: .5rem 0; border-bottom: 1px solid var(--line);
  display: flex; flex-wrap: wrap; gap: 1.1rem; z-index: 1 }
section { scroll-margin-top: 3rem }
.badge { display: inline-block; padding: 0 .5rem; border: 1px solid var(--line); border-radius: .6rem; color: var(--soft) }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; margin: .8rem 0; padding: 0 }
.figures div { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .9rem }
.figures dt { color: var(--soft); font-size: .8rem } .figures dd { margin: 0; font-size: 1.15rem }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .87rem; margin: .6rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { background: var(--panel) } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre, code, .text { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .82rem }
code { background: var(--panel); padding: 0 .2rem; border-radius: .2rem }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; overflow-x: auto;
  line-height: 1.4 }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1rem 0 } figcaption { color: var(--soft); font-size: .85rem }
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .4rem }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--link) }
.text { background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; line-height: 1.7;
  white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: .15rem }
.text span.for { background: rgba(var(--for), var(--a)) } .text span.against { background: rgba(var(--against), var(--a)) }
.text b { border-bottom: 2px solid var(--link) }
"""


def escaped(value: object) -> Markup:
    return Markup(html.escape(str(value)))


def joined(parts: Sequence[Markup], between: str = "\n") -> Markup:
    return Markup(between.join(parts))


def tag(name: str, inside: Markup, **attributes: object) -> Markup:
    """``class_`` stands for class."""
    said = "".join(f' {key.rstrip("_")}="{escaped(value)}"' for key, value in attributes.items())
    return Markup(f"<{name}{said}>{inside}</{name}>")


def text(name: str, inside: object, **attributes: object) -> Markup:
    """A tag around text."""
    return tag(name, escaped(inside), **attributes)


def page(title: str, lead: Markup, sections: Sequence[tuple[str, Markup]]) -> str:
    """A whole file: sections by title, with links to them; empty ones are left out."""
    shown = [(name, slug(name), inside) for name, inside in sections if inside]
    return PAGE.substitute(
        title=escaped(title),
        style=STYLE,
        lead=lead,
        links=joined([text("a", name, href=f"#{at}") for name, at, _ in shown]),
        sections=joined([tag("section", joined([text("h2", name), inside]), id=at) for name, at, inside in shown]),
    )


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def figures(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Few numbers, large."""
    return tag(
        "dl", joined([tag("div", joined([text("dt", k), text("dd", cell(v))])) for k, v in pairs]), class_="figures"
    )


def table(
    headers: Sequence[object], rows: Sequence[Sequence[object]], shown: Callable[[str], Markup] = escaped
) -> Markup:
    """As `eval.tables.markdown`; columns of numbers are right-aligned. ``shown``: of the text of a cell."""
    numeric = [all(_numeric(row[i]) for row in rows) for i in range(len(headers))]

    def line(name: str, cells: Sequence[object]) -> Markup:
        made = [
            tag(name, shown(cell(v)), **({"class_": "number"} if n else {}))
            for v, n in zip(cells, numeric, strict=True)
        ]
        return tag("tr", joined(made, ""))

    head, body = tag("thead", line("th", headers)), tag("tbody", joined([line("td", row) for row in rows]))
    return tag("div", tag("table", joined([head, body])), class_="scroll")


def _numeric(value: object) -> bool:
    """Also what `cell` makes of numbers."""
    if value is None or isinstance(value, int | float):
        return True
    return bool(re.fullmatch(r"-|nan|[-+]?[\d,.]+(e[-+]?\d+)?%?", str(value)))


def picture(png: bytes, caption: str, width: int | None = None) -> Markup:
    """``width``: in CSS pixels, at most; default: that of the page."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    narrow = f' style="max-width: min({width}px, 100%)"' if width else ""
    image = Markup(f'<img alt="{escaped(caption)}" src="{source}"{narrow}>')
    return tag("figure", joined([image, text("figcaption", caption)]))


def folded(title: str, inside: Markup) -> Markup:
    return tag("details", joined([text("summary", title), inside]))


# -- Markdown as this program writes it

# Backticks at the start of a line, what language it is, lines, and at least as many backticks in a line of their own.
FENCED = re.compile(r"^(`{3,})[^`\n]*\n(.*?)^\1`*[ \t]*$", re.DOTALL | re.MULTILINE)


def from_markdown(words: str, folder: Path) -> Markup:
    """Headings, tables, pictures of ``folder``, fenced blocks and paragraphs with `code`; anything else is a paragraph. Nothing in
    it is HTML."""
    found, end = [], 0
    for match in FENCED.finditer(words):
        found += [*_blocks(words[end : match.start()], folder), text("pre", match[2].removesuffix("\n"), class_="wrap")]
        end = match.end()
    return joined([*found, *_blocks(words[end:], folder)])


def _blocks(words: str, folder: Path) -> list[Markup]:
    """What stands between empty lines."""
    found = []
    for block in filter(None, re.split(r"\n\s*\n", words.strip())):
        lines = block.split("\n")
        image = re.fullmatch(r"!\[(.*)\]\(([\w.+-]+\.png)\)", block.strip())
        if image and (folder / image[2]).is_file():
            found.append(picture((folder / image[2]).read_bytes(), image[1]))
        elif len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"[|:\- ]+", lines[1]):
            head, _, *rows = map(_cells, lines)
            found.append(table(head, rows, _inline))
        elif title := re.fullmatch(r"#+ (.+)", lines[0]):
            found.append(text("h3", title[1]))
        else:
            found.append(tag("p", _inline(block)))
    return found


def _cells(line: str) -> list[str]:
    """Of a row; a bar in a cell is written with a backslash before it."""
    return [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def _inline(words: str) -> Markup:
    """Text with code between equally long runs of backticks, less one space on both sides."""
    found, end = [], 0
    for match in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", words, re.DOTALL):
        found += [escaped(words[end : match.start()]), text("code", _unpadded(match[2]))]
        end = match.end()
    return joined([*found, escaped(words[end:])], "")


def _unpadded(code: str) -> str:
    padded = code.startswith(" ") and code.endswith(" ") and code.strip(" ")
    return code[1:-1] if padded else code
