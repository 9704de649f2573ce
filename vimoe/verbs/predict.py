"""The verb `predict`."""

from __future__ import annotations

from vimoe import process
from vimoe.errors import ConfigError
from vimoe.files import one_line
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, add_inference, parser_of, required_out


def predict(argv: list[str]) -> Result:
    """Name the most likely classes of images (files or folders); with a segmentation model, write their masks.

    Example: vimoe predict runs/photos cat.jpg holiday/ --top 3
    """
    parser = parser_of(
        predict, out="folder for masks and overlays; required for segmentation, refused for classification"
    )
    add_inference(parser)
    parser.add_argument("run", help="run folder")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--top", type=int, default=5, help="number of classes to name")
    options = parser.parse_args(argv)
    if options["top"] < 1:
        raise ConfigError(f"--top {options['top']}: expected at least 1")
    open_run(options["run"])
    from vimoe.data.image_files import list_images
    from vimoe.experiments.finished_run import FinishedRun
    from vimoe.experiments.train import check_outside

    run = FinishedRun(options["run"], options["data.inference"], options["data.flip_test"], process.joined())
    files = list_images(options["images"])
    out = options["out"]
    if run.task.writes_predictions:
        for images in (*options["images"], run.run.settings.data.path):
            check_outside("--out", required_out(options, "masks"), images)
    elif out:
        raise ConfigError(f"--out {out}: this run's predictions are no files; leave it out")
    predictions = run.predict(files, out, options["top"])
    lines = [
        each["error"].replace(each["file"], one_line(each["file"])) if "error" in each
        else run.task.line(each, options["top"])
        for each in predictions
    ]  # fmt: skip
    return "\n".join(lines), {"predictions": predictions}
