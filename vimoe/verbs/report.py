"""The verb `report`."""

from __future__ import annotations

from pathlib import Path

from vimoe.errors import ConfigError
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, parser_of, required_out


def report(argv: list[str]) -> Result:
    """Write the page of a run again from its files, or a page that compares several runs.

    Example: vimoe report runs/dense runs/vimoe --out comparison.html
    """
    parser = parser_of(report, out="HTML file to create for several runs; the page of one run is RUN/report.html")
    parser.add_argument("runs", nargs="+", help="run folders")
    options = parser.parse_args(argv)
    folders = [open_run(path).path for path in options["runs"]]
    if len(folders) == 1:
        if options["out"]:
            raise ConfigError(f"--out {options['out']} with one run: its page is report.html in it; leave --out out")
        from vimoe.report.run_report import write_run_report

        page = write_run_report(folders[0])
    else:
        from vimoe.report.run_comparison import write_comparison

        page = write_comparison(folders, Path(required_out(options, "comparison.html", "file")))
    return str(page), {"report": str(page)}
