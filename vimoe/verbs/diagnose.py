"""The verb `diagnose`."""

from __future__ import annotations

from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, add_sampling, parser_of


def diagnose(argv: list[str]) -> Result:
    """Say whether experts differ, weigh enough and are routed to some use, and what to try next; write diagnosis.json.

    Example: vimoe diagnose runs/photos
    """
    parser = parser_of(diagnose)
    parser.add_argument("run", help="run folder")
    draws = "analyze anew, with at most this number of permutations (default: the run's analysis, made if needed)"
    parser.add_argument("--draws", type=int | None, default=None, help=draws)
    add_sampling(parser)
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.experiments.finished_run import FinishedRun

    run = FinishedRun(options["run"])
    found, folder = run.diagnose(options["draws"], options["overrule"], options["seed"]), run.run.path
    paths = {"diagnosis": str(folder / "diagnosis.json"), "report": str(folder / "report.html")}
    return f"{found}\n{paths['report']}", {**found.to_dict(), **paths}
