"""HTML page in one self-contained file, written from top to bottom. Imports no torch.

Each method escapes the text that it gets. The first section is open, the others are folded. Every table can be copied,
and downloaded as CSV: its link holds the file, so that it needs no script and no server.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure

from vimoe.analysis.figures import png
from vimoe.files import read_text, write_bytes, write_text

PAGE = Path(__file__).parent / "page"
LOOK = PAGE / "look.css"  # of the explorer and the documentation too
WITHOUT_SCRIPTS = "<noscript><style>.print { display: block } .screen, .copy { display: none }</style></noscript>"


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
        self._plots = self._tables = 0

    def heading(self, text: str) -> None:
        """Begin a section, with a link to it at the top of the page; the first is open, the others are folded."""
        end, state = ("</div></details>", "") if self._sections else ("", " open")
        self._sections.append(html.escape(text))
        # a link to what is in a fold opens it; a link to the fold would not
        self._parts.append(
            f"{end}<details class=section{state}><summary><h2>{self._sections[-1]}</h2></summary>"
            f'<div id="section-{len(self._sections)}">'
        )

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
        rows, self._tables = [*rows], self._tables + 1
        names = (re.sub(r"\w+(-\w+)+", r"<span>\g<0></span>", html.escape(cell)) for cell in header)
        head = "".join(f"<th scope=col>{name}</th>" for name in names)
        cells = (("".join(f"<td>{html.escape(c)}</td>" for c in row)).replace("\n", "<br>") for row in rows)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        table = f"<table{' class=words' if words else ''}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        file = f"{re.sub('[^a-z0-9]+', '-', self.title.lower()).strip('-')}-{self._tables}.csv"
        csv = quote(as_csv([header, *rows]), errors="backslashreplace")  # names of files may be no text
        table = (
            f"<div class=table><div class=scroll tabindex=0>{table}</div><p class=tools>"
            f'<button class=copy type=button>Copy</button> <a download="{file}" '
            f'href="data:text/csv;charset=utf-8,{csv}">CSV</a></p></div>'
        )
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
        title, plotly = html.escape(self.title), ""
        if self._plots:
            from plotly.offline import get_plotlyjs

            plotly = f"<script>{get_plotlyjs()}</script>"
        style, script = read_text(LOOK) + read_text(PAGE / "report.css"), read_text(PAGE / "report.js")
        head = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{style}</style>{WITHOUT_SCRIPTS}{plotly}</head><body><h1>{title}</h1><nav>{' '.join(links)}</nav>"
        )
        end = "</div></details>" if self._sections else ""
        write_text(path, "\n".join([head, *self._parts, f"{end}<script>\n{script}</script></body></html>\n"]))
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


def as_csv(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as CSV (RFC 4180), each cell on one line, with the mark by which Excel knows UTF-8."""
    text = io.StringIO()
    csv.writer(text).writerows([" ".join(cell.split()) for cell in row] for row in rows)
    return "\ufeff" + text.getvalue()


def _img(png: bytes, alt: str, size: str = "") -> str:
    return f'<img{size} src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alt)}">'
