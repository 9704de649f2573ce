"""A page that is written from top to bottom: one HTML file that holds all it shows and opens from disk. No torch."""

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
    """A page that is written from top to bottom.

    Args:
        title: of the page.
        figures: a folder that figures are written to as well; None for the page alone.
    """

    def __init__(self, title: str, figures: Path | None = None) -> None:
        self.title, self.figures = title, figures
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._plots = 0

    def heading(self, text: str) -> None:
        """Starts a section."""
        self._sections.append(html.escape(text))
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{html.escape(text)}</h2>')

    def subheading(self, text: str) -> None:
        """Starts a part of a section."""
        self._parts.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, text: str, note: bool = False) -> None:
        """Adds a paragraph."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def items(self, lines: Iterable[str]) -> None:
        """Adds a list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def table(
        self, header: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False, folded: str | None = None
    ) -> None:
        """Adds a table; the first column is the name of the row.

        Args:
            header: names of the columns.
            rows: cells; a line break in one is kept.
            words: text, which is set to the left and may wrap, instead of numbers.
            folded: what to click on to see the table; by default it is open.
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
        """Adds a figure, and writes it as figures/NAME.png too."""
        self._add_figure(self._image(figure, name, caption), caption)

    def interactive(self, plot: Any, caption: str, twin: Figure | None = None, name: str = "") -> None:
        """Adds a plotly figure.

        Args:
            plot: the plotly Figure; its height is kept, its width is that of the page.
            caption: below it.
            twin: the same on paper, and where scripts are off; without it, there is nothing.
            name: the twin is written as figures/NAME.png too.
        """
        import plotly.io  # here, for pages without such figures do not wait for it

        self._plots += 1
        content = plotly.io.to_html(
            plot,
            full_html=False,
            include_plotlyjs=False,  # once a page
            default_height=f"{plot.layout.height}px",
            div_id=f"plot-{self._plots}",
            config={"responsive": True, "displayModeBar": False},
        )
        paper = "" if twin is None else f"<div class=print>{self._image(twin, name, caption)}</div>"
        self._add_figure(f"<div class=screen>{content}</div>{paper}", caption, screen=twin is None)

    def picture(self, png: Path, caption: str) -> None:
        """Adds an image file."""
        self._add_figure(_img(png.read_bytes(), caption), caption)

    def write(self, path: Path) -> Path:
        """Writes the page whole or not at all."""
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

    def _image(self, figure: Figure, name: str, caption: str) -> str:
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
