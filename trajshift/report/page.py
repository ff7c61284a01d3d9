"""A small self-contained HTML page: headings, prose, tables, figures. Nothing is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #1b1b1b;
  background: #fff; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; padding-bottom: .2rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .5rem 0; max-width: 48rem; }
.lead { font-size: 1.06rem; }
.quiet, figcaption, caption { color: #555; font-size: .87rem; }
.note { border-left: 3px solid #d55e00; padding: .1rem 0 .1rem .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .7rem 0; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; caption-side: bottom; padding-top: .35rem; max-width: 48rem; }
th, td { padding: .28rem .75rem .28rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; }
thead th { border-bottom: 1.5px solid #333; border-top: 1.5px solid #333; font-weight: 600; }
tbody tr:last-child td { border-bottom: 1.5px solid #333; }
tbody tr:hover { background: #f5f7fa; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 48rem; margin-top: .3rem; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
code { font-size: .92em; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { body { margin: 0; max-width: none; font-size: 10.5pt; } figure, table { break-inside: avoid; }
  tbody tr:hover { background: none; } pre { white-space: pre-wrap; } }
"""


class Page:
    """Collects parts in reading order; every text is escaped, SVG elements are put in as they are."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]
        self._figures = 0

    def heading(self, text: str, level: int = 2) -> None:
        """A section (2) or sub-section (3)."""
        self._parts.append(f"<h{level}>{escape(text)}</h{level}>")

    def paragraph(self, text: str, kind: str = "") -> None:
        """A paragraph; kind `lead`, `quiet` or `note`."""
        self._parts.append(f"<p{_class(kind)}>{escape(text)}</p>")

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        caption: str = "",
        text: Collection[int] = (),
    ) -> None:
        """A table; the first column and those numbered in `text` are set as text, the others as numbers."""

        def cells(tag: str, values: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{_class('text' if place in text else '')}>{escape(value)}</{tag}>"
                for place, value in enumerate(values)
            )

        body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
        below = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{below}<thead><tr>{cells("th", header)}</tr></thead>'
            f"<tbody>\n{body}</tbody></table></div>"
        )

    def figure(self, svg: str, caption: str) -> None:
        """A numbered figure from an SVG element."""
        self._figures += 1
        label = escape(f"Figure {self._figures}. {caption}")
        element = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
        self._parts.append(f"<figure>{element}<figcaption>{label}</figcaption></figure>")

    def code(self, text: str, summary: str) -> None:
        """Preformatted text that unfolds under a line."""
        self._parts.append(
            f"<details><summary>{escape(summary)}</summary><pre><code>{escape(text)}</code></pre></details>"
        )

    def raw(self, html: str) -> None:
        """A trusted piece of HTML, put in as it is."""
        self._parts.append(html)

    def html(self) -> str:
        """The whole page."""
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_CSS}</style>"
        )
        body = "\n".join(self._parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
