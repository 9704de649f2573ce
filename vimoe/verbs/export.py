"""The verb `export`."""

from __future__ import annotations

from vimoe.config.export import FORMATS
from vimoe.errors import counted
from vimoe.run_folder import open_run
from vimoe.verbs.options import Result, add_inference, parser_of


def export(argv: list[str]) -> Result:
    """Write a run's model as an ONNX file or a program of torch.export, checked against the model.

    Example: vimoe export runs/photos --format onnx --int8 true
    """
    parser = parser_of(export, out="folder to create (default: a folder in the run, named as the format)")
    add_inference(parser)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--format", type=str, default="onnx", help=f"one of {', '.join(FORMATS)}")
    also = "also write a file with int8 weights (onnx), and score and time both"
    parser.add_argument("--int8", type=bool, default=False, help=also)
    options = parser.parse_args(argv)
    FORMATS.check(options["format"])
    open_run(options["run"])
    from vimoe.experiments.finished_run import FinishedRun
    from vimoe.metrics.registry import shown

    run = FinishedRun(options["run"], options["data.inference"], options["data.flip_test"])
    values = run.export(options["out"], options["format"], options["int8"])
    checked = values["checked"]
    lines = [
        f"compared with the model on {counted(checked['images'], 'image')}: "
        f"logits within {checked['largest_difference']:.1g}"
    ]
    lines += [
        f"not compared, as nothing reaches them: experts {e} of {layer}" for layer, e in checked["unreached"].items()
    ]
    for name, score in values.get("scores", {}).items():
        names, speed = shown(score), values["images_per_second"][name]
        lines.append(f"{name}: {values['split']} {names.judge_name} {score[names.judge]:.2%}, {speed:.1f} images/s")
    return "\n".join([*lines, values["out"]]), values
