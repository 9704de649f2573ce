"""The verb `evaluate`."""

from __future__ import annotations

from vimoe import process
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, add_inference, parser_of


def evaluate(argv: list[str]) -> Result:
    """Score a run's model on its test images (without those, on validation), or on other data.

    Example: vimoe evaluate runs/photos --data.path other/photos
    """
    other = (
        "other data with the same classes, of which test, else validation, else train is scored (default: the run's)"
    )
    parser = parser_of(evaluate, **{"data.path": other})
    add_inference(parser)
    parser.add_argument("run", help="run folder")
    more = "also measure masks image by image: J, their overlap, and F, the accuracy of contours (segmentation)"
    parser.add_argument("--contours", type=bool, default=False, help=more)
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.experiments.finished_run import FinishedRun

    run = FinishedRun(options["run"], options["data.inference"], options["data.flip_test"], process.joined())
    split, score, facts = run.score(options["data.path"], options["contours"])
    source = f", from features before {facts['features']['before']}" if "features" in facts else ""
    calibrated = (
        f"; at temperature {facts['temperature']:.3f}, fitted on validation: loss {facts['loss_at_temperature']:.4f}, "
        f"calibration error {facts['ece_at_temperature']:.2%}"
        if "temperature" in facts
        else ""
    )
    return f"{split}: {score}{source}{calibrated}", {**score.to_dict(), "split": split, **facts}
