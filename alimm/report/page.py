"""A self-contained HTML page: no script, no request, every picture inside.

page = Page("Title", "One line of what it is")
page.section("Figures", table(["method", "top-1"], [["ours", "61.2"]]))
page.write(Path("report.html"))
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--paper:#fff;--line:#d8dde5;--soft:#f4f6f9;--good:#1a7f37;--bad:#b35900}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ee;--paper:#14181f;--line:#343c48;--soft:#1d232c;--good:#4ac26b;
--bad:#e0963c}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:66rem;color:var(--ink);background:var(--paper);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.6rem 0 .7rem}
p.lead{margin:0 0 1rem;font-size:1.05rem}p{max-width:46rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.93rem;font-variant-numeric:tabular-nums}
th,td{padding:.4rem .5rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{border-bottom:2px solid var(--ink)}
tr.strong td{font-weight:650}
pre{background:var(--soft);border:1px solid var(--line);border-radius:6px;padding:.8rem 1rem;overflow-x:auto}
figure{margin:1rem 0;background:#fff;border-radius:6px}figure svg{max-width:100%;height:auto;display:block}
.hits td,.hits th{text-align:center;padding:.35rem .5rem;vertical-align:top}
.hits td:first-child,.hits th:first-child{text-align:center;border-right:1px solid var(--line);padding-right:1rem}
.hits img{width:64px;height:64px;background:#fff;border-radius:6px;padding:2px;border:3px solid transparent;
display:block;margin:0 auto}
.hits td.right img{border-color:var(--good)}.hits td.wrong img{border-color:var(--line)}
.hits small{display:block;max-width:7.5rem;white-space:normal;line-height:1.25;margin:.2rem auto 0}
.right small::before{content:"\\2713  ";color:var(--good);font-weight:700}
.met{color:var(--good);font-weight:650}.missed{color:var(--bad);font-weight:650}
"""


class Raw(str):
    """HTML that is already escaped."""


def escape(value: object) -> Raw:
    """Text to HTML; `Raw` passes as it is."""
    return value if isinstance(value, Raw) else Raw(html.escape(str(value)))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], strong: Iterable[int] = (), css: str = "") -> Raw:
    """A table.

    Args:
        header: names of the columns.
        rows: cells; text is escaped, `Raw` is not. A cell that starts with ``<td`` brings its own tag.
        strong: numbers of the rows to stress.
        css: class of the table.
    """
    stressed = set(strong)

    def cell(value: object) -> str:
        text = escape(value)
        return text if isinstance(value, Raw) and value.startswith("<td") else f"<td>{text}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr{' class=strong' if number in stressed else ''}>{''.join(map(cell, row))}</tr>"
        for number, row in enumerate(rows)
    )
    return Raw(
        f'<div class=scroll><table class="{html.escape(css)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def picture(pixels_HWC: NDArray[np.uint8], alt: str = "") -> Raw:
    """An ``img`` with the picture inside, as PNG; pixels are RGB."""
    import cv2

    ok, png = cv2.imencode(".png", np.ascontiguousarray(pixels_HWC[..., ::-1]))
    if not ok:
        raise ValueError(f"a picture of shape {pixels_HWC.shape} and type {pixels_HWC.dtype} cannot be written as PNG")
    data = base64.b64encode(png.tobytes()).decode()
    return Raw(f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}">')


class Page:
    """A page that grows section by section.

    Args:
        title: of the page.
        lead: one or two sentences on what it shows.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.sections: list[tuple[str, Raw]] = []

    def section(self, title: str, *parts: object) -> None:
        """Append a section; a text becomes a paragraph, `Raw` stays as it is."""
        body = "".join(part if isinstance(part, Raw) else f"<p>{escape(part)}</p>" for part in parts)
        self.sections.append((title, Raw(body)))

    def html(self) -> str:
        """The whole document."""
        body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in self.sections)
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>"
            f'<body><h1>{escape(self.title)}</h1><p class="lead">{escape(self.lead)}</p>{body}</body></html>'
        )

    def write(self, path: Path) -> None:
        """Write the page; a reader never sees half of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.html(), encoding="utf-8")
        os.replace(temporary, path)
