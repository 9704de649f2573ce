"""The verb `trust`."""

from __future__ import annotations

from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, parser_of


def trust(argv: list[str]) -> Result:
    """Fit scores of how far to trust each prediction: how familiar the image is, how likely its class is right.

    Example: vimoe trust runs/photos
    """
    parser = parser_of(trust)
    parser.add_argument("run", help="run folder; vimoe predict then gives the scores of each image")
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.analysis.trust import in_words
    from vimoe.experiments.finished_run import FinishedRun

    facts = FinishedRun(options["run"]).trust()
    return in_words(facts), facts
