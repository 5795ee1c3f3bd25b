"""A report as Markdown, with pictures beside it, and as one page of HTML that needs no other file."""

import base64
import html
from typing import NamedTuple

from lib.tables import Row, markdown

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
.answer { font-size: 1.2rem; border-left: 4px solid #36c; padding-left: 1rem }
img { max-width: 100% }
code { background: #f3f3f3; padding: .1rem .3rem }
"""
IN_MARKDOWN = {"text": "{}", "code": "`{}`", "answer": "**{}**", "heading": "## {}"}
IN_HTML = {
    "text": "<p>{}</p>",
    "code": "<p><code>{}</code></p>",
    "answer": '<p class="answer">{}</p>',
    "heading": "<h2>{}</h2>",
}


class Part(NamedTuple):
    """A paragraph, a table or a picture of a report."""

    kind: str  # text, code, answer, heading, table, picture
    content: str | list[Row] | bytes
    name: str = ""  # of a picture


def in_markdown(title: str, parts: list[Part]) -> str:
    lines = [f"# {title}", ""]
    for part in parts:
        if part.kind == "table":
            lines += markdown(part.content)
        elif part.kind == "picture":
            lines.append(f"![{part.name}]({part.name}.png)")
        else:
            lines.append(IN_MARKDOWN[part.kind].format(part.content))
        lines.append("")
    return "\n".join(lines)


def in_html(title: str, parts: list[Part]) -> str:
    """One file that needs no other."""
    title = html.escape(title)
    body = [f"<h1>{title}</h1>"]
    for part in parts:
        if part.kind == "table":
            body.append(html_table(part.content))
        elif part.kind == "picture":
            data = base64.b64encode(part.content).decode()
            body.append(f'<img alt="{part.name}" src="data:image/png;base64,{data}">')
        else:
            body.append(IN_HTML[part.kind].format(html.escape(part.content)))
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    content = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{content}\n</body></html>\n'


def html_table(rows: list[Row]) -> str:
    lines, tag = ["<table>"], "th"
    for label, cells in rows:
        inside = [f"<{tag}>{html.escape(cell)}</{tag}>" for cell in (label, *cells)]
        lines.append(f"<tr>{''.join(inside)}</tr>")
        tag = "td"
    return "\n".join([*lines, "</table>"])
