"""HTML and SVG elements whose text is escaped unless it is markup already, and the tables made of them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any


class Markup(str):
    """Text that is markup and is not escaped again."""

    __slots__ = ()


def element(tag: str, *children: Any, **attributes: Any) -> Markup:
    """`<tag attributes>children</tag>`.

    Children that are not Markup are escaped, None is skipped, lists are flattened. In attribute
    names `class_` is `class` and `_` is `-`; attributes that are None or False are left out.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if not children and tag in ("br", "circle", "line", "meta", "path", "rect"):
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Any) -> Markup:
    """Children one after another."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, list | tuple):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Markup) else escape(str(child)))
    return Markup("".join(parts))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A plain table: the first column is text, the others are figures."""
    head = element("tr", [element("th", name, scope="col") for name in header])
    body = [
        element("tr", element("th", row[0], scope="row"), [element("td", cell) for cell in row[1:]]) for row in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="scroll")
