"""The command line: parses, calls the library, prints. One function a verb; heavy imports inside them."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vimoe.errors import ConfigError, VimoeError, nearest
from vimoe.options import Parser, Settings
from vimoe.runs import SCHEMA

if TYPE_CHECKING:
    from torch import nn

    from vimoe.analysis import Evidence
    from vimoe.data import Data
    from vimoe.runs import Run

Result = tuple[str, dict[str, Any]]  # what a person reads, what --json prints


def main(argv: list[str] | None = None) -> int:
    """Runs `vimoe VERB ...` and returns the exit status: 0, or 2 after a mistake of the user."""
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if argv[0] == "--version":
            from vimoe import __version__

            print(__version__)
            return 0
        if argv[0] not in VERBS:
            raise ConfigError(f"unknown verb {argv[0]!r}: {nearest(argv[0], VERBS)}")
        _log_to_stderr()
        verb = VERBS[argv[0]]
        text, values = verb(argv[0], argv[1:])
    except VimoeError as error:
        message = _one_line(error)
        if as_json:
            print(json.dumps({"error": message}))
        print(f"vimoe: {message}", file=sys.stderr)
        return 2
    print(json.dumps({"schema": SCHEMA, "command": argv[0], **values}) if as_json else text)
    return 0


def plan(verb: str, argv: list[str]) -> Result:
    """Say what would be converted and what that costs; change nothing, download nothing.

    Example: vimoe plan --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers last:2
    """
    settings, _ = _settings(verb, argv, "model", "moe")
    from vimoe.backbone import create_without_weights
    from vimoe.upcycling import plan as make_plan

    made = make_plan(create_without_weights(settings.model), settings.moe)
    dense = {"params": made.dense.params, "macs": made.dense.macs}
    moe = {name: getattr(made.moe, name) for name in ("params", "activated_params", "macs")}
    return str(made), {"dense": dense, "moe": {**moe, "layers": [site.name for site in made.sites]}}


def count(verb: str, argv: list[str]) -> Result:
    """Count parameters, activated parameters and multiply-adds of a model before and after; download nothing.

    Example: vimoe count --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers all --json
    """
    text, values = plan(verb, argv)
    return "\n".join(text.splitlines()[:2]), values


def train(verb: str, argv: list[str]) -> Result:
    """Train a ViT, or the ViMoE that is made of it, on a folder of images; writes a run folder.

    Example: vimoe train --data.path photos/ --model.name vit_tiny_patch16_224 --moe.layers last:2 --out runs/photos
    """
    settings, options = _settings(verb, argv, "model", "moe", "data", "train", out="folder to make for the run")
    from vimoe.experiment import run_training

    summary = run_training(settings, options["out"])
    val = summary["val"]
    text = (
        f"validation top-1 {val['top1']:.2%}, loss {val['loss']:.4f} ({val['images']} images) "
        f"in epoch {summary['best_epoch']} of {summary['epochs']}\n{summary['report']}"
    )
    return text, summary


def evaluate(verb: str, argv: list[str]) -> Result:
    """Score a run's model on its test images (on validation where it has none), or on another folder's.

    Example: vimoe evaluate runs/photos --data.path other/photos
    """
    run, options = _run_options(verb, argv, **{"data.path": "folder with the same classes (default: the run's data)"})
    from vimoe.data import load_folder
    from vimoe.evaluate import evaluate as score_on
    from vimoe.evaluate import label_names

    model = _load(run)
    if options["data.path"]:
        split, samples = "test", load_folder(options["data.path"], label_names(model))
    else:
        split, samples = _reported(_data(run, model))
    score = score_on(model, _loader(run, model, samples))
    text = f"{split}: top-1 {score.top1:.2%}, top-5 {score.top5:.2%}, loss {score.loss:.4f} of {score.images} images"
    return text, {**score.to_dict(), "split": split}


def predict(verb: str, argv: list[str]) -> Result:
    """Name the most likely classes of image files, or of all images in folders.

    Example: vimoe predict runs/photos cat.jpg holiday/ --top 3
    """
    parser = _parser(verb)
    parser.add_argument("run", help="run folder")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name")
    options = parser.parse_args(argv)
    if options["top"] < 1:
        raise ConfigError(f"--top {options['top']}: expected at least 1")
    from vimoe.data import list_images
    from vimoe.evaluate import predict as predict_files
    from vimoe.runs import open_run

    run = open_run(options["run"])
    files = list_images(options["images"])
    predictions = predict_files(_load(run), files, options["top"])
    lines = [
        f"{p['file']}: " + ", ".join(f"{c['name']} {c['probability']:.1%}" for c in p["classes"]) for p in predictions
    ]
    return "\n".join(lines), {"predictions": predictions}


def analyze(verb: str, argv: list[str]) -> Result:
    """Measure on validation images which MoE layers specialise and which matter; writes routing.json and the report.

    Example: vimoe analyze runs/photos
    """
    run, _ = _run_options(verb, argv)
    from vimoe.report import write_run_report

    model = _load(run)
    evidence = _evidence(run, model, _data(run, model))
    report = write_run_report(run.path)
    values = evidence.to_dict()
    for layer in values["layers"]:
        del layer["counts"]
    return f"{evidence}\n{report}", {**values, "routing": str(run.path / "routing.json"), "report": str(report)}


def prune(verb: str, argv: list[str]) -> Result:
    """Make the MoE layers dense that validation does not support; writes a new run with a receipt.

    Example: vimoe prune runs/photos --out runs/photos-pruned
    """
    from vimoe.config import PRUNE_TOLERANCE

    parser = _parser(verb, out="folder to make for the pruned run")
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--tolerance", type=float, default=PRUNE_TOLERANCE, help="largest loss change of a removed layer, nats"
    )
    options = parser.parse_args(argv)
    from vimoe import runs
    from vimoe.analysis import Evidence
    from vimoe.evaluate import label_names
    from vimoe.experiment import write_validation
    from vimoe.folder import save
    from vimoe.pruning import prune as remove
    from vimoe.pruning import receipts
    from vimoe.report import write_run_report

    run = runs.open_run(options["run"])
    model, pruned = _load(run), _load(run)
    data = _data(run, model)
    out = runs.new_run(_required_out(options))
    known = run.path / "routing.json"
    evidence = Evidence.from_dict(json.loads(known.read_text())) if known.exists() else _evidence(run, model, data)
    decided = remove(pruned, evidence, options["tolerance"])
    split, samples = _reported(data)
    before, after = receipts([model, pruned], _loader(run, model, samples))
    values = {
        "verdicts": [str(verdict) for verdict in decided],
        "kept": [verdict.layer for verdict in decided if verdict.keep],
        "split": split, "before": before.to_dict(), "after": after.to_dict(),
    }  # fmt: skip
    runs.write_settings(out, run.settings)
    write_validation(out, run.settings, data)
    save(pruned, out / runs.MODEL, label_names=label_names(model))
    runs.write_json(out / runs.SUMMARY, {"schema": runs.SCHEMA, "command": verb, **values})
    runs.write_json(out / "routing.json", evidence.to_dict())
    report = write_run_report(out)
    lines = [*values["verdicts"], *_table(values), str(report)]
    return "\n".join(lines), {**values, "out": str(out), "report": str(report)}


def demo(verb: str, argv: list[str]) -> Result:
    """A tour in a few minutes on scikit-learn's handwritten digits: train, upcycle, compare, analyse, prune.

    Example: vimoe demo
    """
    parser = _parser(verb, out="folder to make (default: runs/demo-DATE-TIME)")
    parser.add_argument("--task", choices=["classification"], default="classification", help="what to show")
    options = parser.parse_args(argv)
    from vimoe.demo import run_demo

    return run_demo(options["out"])


VERBS: dict[str, Callable[[str, list[str]], Result]] = {
    "demo": demo,
    "plan": plan,
    "count": count,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "analyze": analyze,
    "prune": prune,
}


def _overview() -> str:
    lines = ["usage: vimoe VERB [--config FILE.yaml] [--section.option value ...] [--json]", ""]
    lines += [f"  {name:<10}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "vimoe VERB --help says more."])


def _parser(verb: str, **extra: str) -> Parser:
    """A parser with --json, and an option for each name in `extra`, described by its value."""
    summary, _, example = (VERBS[verb].__doc__ or "").partition("Example:")
    parser = Parser(prog=f"vimoe {verb}", description=summary.strip(), epilog=f"Example: {example.strip()}")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    return parser


def _settings(verb: str, argv: list[str], *sections: str, **extra: str) -> tuple[Settings, Any]:
    parser = _parser(verb, **extra)
    parser.add_sections(*sections)
    values = parser.parse_args(argv)
    if "out" in extra:
        _required_out(values)
    return parser.settings(values), values


def _required_out(options: Any) -> str:
    if not options["out"]:
        raise ConfigError("--out is missing: expected the folder to make, such as --out runs/first")
    return options["out"]


def _run_options(verb: str, argv: list[str], **extra: str) -> tuple[Run, Any]:
    parser = _parser(verb, **extra)
    parser.add_argument("run", help="run folder")
    options = parser.parse_args(argv)
    from vimoe.runs import open_run

    return open_run(options["run"]), options


def _load(run: Run) -> nn.Module:
    import torch

    from vimoe.folder import load

    return load(run.model, torch.accelerator.current_accelerator(check_available=True) or "cpu")


def _data(run: Run, model: nn.Module) -> Data:
    from vimoe.data import load_data
    from vimoe.evaluate import label_names

    return load_data(run.settings.data, label_names(model), run.validation())


def _reported(data: Data) -> tuple[str, Any]:
    return ("test", data.test) if data.test else ("validation", data.val)


def _loader(run: Run, model: nn.Module, samples: Any) -> Any:
    from vimoe.data import eval_loader, preprocessing

    return eval_loader(samples, preprocessing(model), 2 * run.settings.train.batch_size, run.settings.data.workers)


def _evidence(run: Run, model: nn.Module, data: Data) -> Evidence:
    from vimoe.analysis import analyze as observe
    from vimoe.runs import write_json

    evidence = observe(model, _loader(run, model, data.val))
    write_json(run.path / "routing.json", evidence.to_dict())
    return evidence


def _table(values: dict[str, Any]) -> list[str]:
    from vimoe.report import RECEIPT_HEADER, receipt_row

    rows = [RECEIPT_HEADER, *(receipt_row(when, values[when]) for when in ("before", "after"))]
    return ["".join(f"{cell:>13}" for cell in row) for row in rows]


def _log_to_stderr() -> None:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"


def _one_line(error: VimoeError) -> str:
    """The message; where a data worker sent it with its traceback, the last line of that."""
    last = [line for line in str(error).splitlines() if line.strip()][-1]
    return last.partition("Error: ")[2] if last.startswith("vimoe.errors.") else last


if __name__ == "__main__":
    sys.exit(main())
