"""The verb `analyze`."""

from __future__ import annotations

from vimoe import process
from vimoe.config.analysis import DRAWS
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, add_sampling, parser_of


def analyze(argv: list[str]) -> Result:
    """Measure on validation images which MoE layers specialise and which matter; write routing.json and the report.

    Example: vimoe analyze runs/photos
    """
    parser = parser_of(analyze)
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help="maximum number of permutations of the images' decisions"
    )
    parser.add_argument("--probe", type=bool, default=False, help="also measure each expert alone, class by class")
    add_sampling(parser, "; 0 for no interventions")
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.experiments.finished_run import FinishedRun

    run = FinishedRun(options["run"], process=process.joined())
    evidence = run.analyze(**{key: options[key] for key in ("draws", "overrule", "seed", "probe")})
    folder = run.run.path
    values = evidence.to_dict()
    for layer in values["layers"]:
        del layer["counts"], layer["drawn"]  # large; routing.json has them
    paths = {"routing": str(folder / "routing.json"), "report": str(folder / "report.html")}
    return f"{evidence}\n{paths['report']}", {**values, **paths}
