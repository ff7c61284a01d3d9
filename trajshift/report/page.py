"""A self-contained HTML page: headings, prose, tables, figures. Nothing is fetched from anywhere.

What it looks like is in `templates/`: `page.html.j2`, a macro for each kind of part in `blocks.html.j2`, `style.css`.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from trajshift.utils.imports import missing_report_extra
from trajshift.utils.table import Table

if TYPE_CHECKING:
    from jinja2 import Environment


class Page:
    """Collects parts in reading order; every text is escaped, SVG elements are put in as they are."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[tuple[str, dict[str, Any]]] = []
        self._figures = 0

    def heading(self, text: str, level: int = 2) -> None:
        """A section (2) or sub-section (3)."""
        self._add("heading", text=text, level=level)

    def paragraph(self, text: str, kind: str = "") -> None:
        """A paragraph; kind `lead`, `quiet` or `note`."""
        self._add("paragraph", text=text, kind=kind)

    def table(self, table: Table, text: Collection[int] = ()) -> None:
        """A table; the first column and those numbered in `text` are set as text, the others as numbers."""
        self._add("table", header=table.header, rows=table.rows, caption=table.caption, text=text)

    def figure(self, svg: str, caption: str) -> None:
        """A numbered figure from an SVG element."""
        self._figures += 1
        self._add("figure", number=self._figures, drawing=_trusted(svg.removeprefix("<svg ")), caption=caption)

    def code(self, text: str, summary: str) -> None:
        """Preformatted text that unfolds under a line."""
        self._add("code", text=text, summary=summary)

    def markup(self, html: str) -> None:
        """A trusted piece of HTML, put in as it is."""
        self._add("markup", html=_trusted(html))

    def _add(self, macro: str, /, **values: Any) -> None:
        self._parts.append((macro, values))

    def html(self) -> str:
        """The whole page."""
        style = _trusted((files(__package__) / "templates" / "style.css").read_text(encoding="utf-8"))
        page = _environment().get_template("page.html.j2")
        return page.render(title=self.title, style=style, parts=self._parts)


def fill(template: str, *, trusted: Collection[str] = (), **values: Any) -> str:
    """A piece of HTML from the text of a template; values are escaped, except those named in `trusted`."""
    given = {name: _trusted(value) if name in trusted else value for name, value in values.items()}
    return _environment().from_string(template).render(given)


def _trusted(html: str) -> Any:
    """HTML that is not escaped again."""
    try:
        from markupsafe import Markup
    except ImportError as error:
        raise missing_report_extra("jinja2") from error
    return Markup(html)


@cache
def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise missing_report_extra("jinja2") from error
    made = Environment(
        loader=PackageLoader("trajshift.report"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    made.policies["json.dumps_kwargs"] = {}  # keys in their own order
    return made
