"""HTML page in one self-contained file, written from top to bottom. Imports no torch.

Each method escapes the text that it gets.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vimoe.analysis.figures import png
from vimoe.files import write_bytes, write_text

STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; overflow-wrap: break-word }
p, ul { max-width: 62rem } figcaption { max-width: 62rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05rem; margin-top: 1.8rem } nav a { margin-right: 1rem; white-space: nowrap } a { color: #0645ad }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92em; font-variant-numeric: tabular-nums; margin: .8rem 0 }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap;
  vertical-align: top }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
th { font-weight: 600; white-space: normal; border-bottom: 2px solid #999; vertical-align: bottom }
table.words td { text-align: left; white-space: normal } table.words th { text-align: left }
img { max-width: 100%; height: auto; display: block } figure { margin: 1rem 0 }
figcaption, .note { color: #505050; font-size: .9em } summary { cursor: pointer; font-weight: 600 }
.print { display: none }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .8rem } .scroll img { max-width: 40rem }
  th, td { padding: .3rem .45rem; white-space: normal }
}
@media print {
  @page { margin: 12mm }
  body { max-width: none; margin: 0; padding: 0; font-size: 10pt }
  nav, .screen { display: none } .print { display: block }
  .scroll { overflow: visible } .scroll img { max-width: 100%; max-height: 24cm } figure, tr { break-inside: avoid }
  th, td { white-space: normal; padding: .2rem .35rem; font-size: 8pt; position: static }
  h2, h3 { break-after: avoid } details::details-content { content-visibility: visible; display: block; height: auto }
}
"""
WITHOUT_SCRIPTS = "<noscript><style>.print { display: block } .screen { display: none }</style></noscript>"


class Page:
    """HTML page; each method adds one element at the end.

    Args:
        title: title of the page.
        figures: folder that gets a PNG file of each figure; None to write none.
    """

    def __init__(self, title: str, figures: Path | None = None) -> None:
        self.title, self.figures = title, figures
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._plots = 0

    def heading(self, text: str) -> None:
        """Add the heading of a section, with a link to it at the top of the page."""
        self._sections.append(html.escape(text))
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{html.escape(text)}</h2>')

    def subheading(self, text: str) -> None:
        """Add the heading of a part of a section."""
        self._parts.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, text: str, note: bool = False) -> None:
        """Add a paragraph; a note is in small grey type."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def items(self, lines: Iterable[str]) -> None:
        """Add a bulleted list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False, folded: str | None = None
    ) -> None:
        """Add a table, whose first column names the rows.

        Args:
            header: names of the columns.
            rows: text of the cells; a line break in a cell is kept.
            words: True for a table of words, which are left-aligned and wrap; False for numbers.
            folded: label of a fold that hides the table until a click; None shows the table.
        """
        head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in header)
        cells = (("".join(f"<td>{html.escape(c)}</td>" for c in row)).replace("\n", "<br>") for row in rows)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        table = f"<table{' class=words' if words else ''}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        table = f"<div class=scroll tabindex=0>{table}</div>"
        if folded is not None:
            table = f"<details><summary>{html.escape(folded)}</summary>{table}</details>"
        self._parts.append(table)

    def figure(self, figure: Figure, name: str, caption: str) -> None:
        """Add a matplotlib figure, and write it to figures/NAME.png."""
        self._add_figure(self._img_of(figure, name, caption), caption)

    def plotly_figure(self, plot: Any, caption: str, printed: Figure | None = None, name: str = "") -> None:
        """Add an interactive plotly figure.

        Args:
            plot: plotly Figure; it keeps its height and gets the width of the page.
            caption: text below the figure.
            printed: matplotlib Figure for print and for browsers without scripts; None shows nothing there.
            name: name of the PNG file of `printed` in figures/.
        """
        import plotly.io  # not at the top: pages without such figures should not wait for the import

        self._plots += 1
        content = plotly.io.to_html(
            plot,
            full_html=False,
            include_plotlyjs=False,  # it is written once, in the head
            default_height=f"{plot.layout.height}px",
            div_id=f"plot-{self._plots}",
            config={"responsive": True, "displayModeBar": False},
        )
        paper = "" if printed is None else f"<div class=print>{self._img_of(printed, name, caption)}</div>"
        self._add_figure(f"<div class=screen>{content}</div>{paper}", caption, screen=printed is None)

    def image(self, png: Path, caption: str) -> None:
        """Add a PNG file."""
        self._add_figure(_img(png.read_bytes(), caption), caption)

    def write(self, path: Path) -> Path:
        """Write the page to a file, whole or not at all, and return its path."""
        links = (f'<a href="#section-{i}">{name}</a>' for i, name in enumerate(self._sections, start=1))
        title, script = html.escape(self.title), ""
        if self._plots:
            from plotly.offline import get_plotlyjs

            script = f"<script>{get_plotlyjs()}</script>"
        head = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{STYLE}</style>{WITHOUT_SCRIPTS}{script}</head><body><h1>{title}</h1><nav>{' '.join(links)}</nav>"
        )
        write_text(path, head + "\n".join(self._parts) + "</body></html>\n")
        return path

    def _img_of(self, figure: Figure, name: str, caption: str) -> str:
        content = png(figure, dpi=130)
        if self.figures:
            self.figures.mkdir(exist_ok=True)
            write_bytes(self.figures / f"{name}.png", content)
        return _img(content, caption, f" width={96 * figure.get_figwidth():.0f}")

    def _add_figure(self, content: str, caption: str, screen: bool = False) -> None:
        self._parts.append(
            f"<figure{' class=screen' if screen else ''}><div class=scroll>{content}</div>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )


def _img(png: bytes, alt: str, size: str = "") -> str:
    return f'<img{size} src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alt)}">'
