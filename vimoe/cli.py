"""The command line: parses, calls the library, prints. One function a verb; heavy imports inside them."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from vimoe.config.analysis import DRAWS, OVERRULED_IMAGES, PRUNE_TOLERANCE
from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.command_line import Parser
from vimoe.config.data import Task
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.errors import ConfigError, FolderError, Stopped, VimoeError, nearest
from vimoe.files import printable
from vimoe.run_folder import SCHEMA, open_run

_OF_THE_MACHINE = {  # errors that are no mistakes of ours: of disks, permissions and names
    getattr(errno, name, 0)
    for name in ("EACCES", "EPERM", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EIO", "ENAMETOOLONG", "ESTALE", "EMFILE")
}
Result = tuple[str, dict[str, Any]]  # what a person reads, what --json prints


def main(argv: list[str] | None = None) -> int:
    """Runs `vimoe VERB ...` and returns the exit status: 0, or 2 after a mistake of the user."""
    argv = sys.argv[1:] if argv is None else argv
    as_json = "--json" in argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that it cannot write should not end what is done
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(_answer(argv, as_json), flush=True)
    except BrokenPipeError:  # who reads has enough, such as head
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115,PTH123  what Python flushes at its end
        return 128 + signal.SIGPIPE
    except Stopped as stopped:
        print(f"vimoe: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt as interrupt:
        print("vimoe: interrupted", file=sys.stderr)
        return 128 + next(iter(interrupt.args), signal.SIGINT)
    except (VimoeError, OSError) as error:
        if not isinstance(error, VimoeError) and error.errno not in _OF_THE_MACHINE:
            raise
        message = _one_line(error if isinstance(error, VimoeError) else _of_machine(error))
        if as_json:
            with suppress(OSError):  # where standard output is what is full
                print(json.dumps({"error": message}), flush=True)
        print(f"vimoe: {message}", file=sys.stderr)
        return 2
    return 0


def _answer(argv: list[str], as_json: bool) -> str:
    """Does what is asked and returns what is to be printed."""
    if not argv or argv[0] in ("-h", "--help"):
        return _overview()
    if argv[0] == "--version":
        from vimoe import __version__

        return __version__
    if argv[0] not in VERBS:
        raise ConfigError(f"unknown verb {argv[0]!r}: {nearest(argv[0], VERBS)}")
    _log_to_stderr()
    with _terminated_as_interrupted():
        text, values = VERBS[argv[0]](argv[0], argv[1:])
    return json.dumps({"schema": SCHEMA, "command": argv[0], **values}) if as_json else text


def plan(verb: str, argv: list[str]) -> Result:
    """Say what would be converted and what that costs; change nothing, download nothing.

    Example: vimoe plan --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers last:2
    """
    settings, _ = _settings(verb, argv, "model", "moe")
    from vimoe.models.timm_vit import FFN_NAME, check_name, create_without_weights

    check_name(settings.model)
    settings.moe.selection.check_names(FFN_NAME)
    from vimoe.models.upcycling import plan as make_plan

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
    """Train a ViT, or the ViMoE that is made of it, on your images; writes a run folder.

    Example: vimoe train --data.path photos/ --model.name vit_tiny_patch16_224 --moe.layers last:2 --out runs/photos
    """
    go_on = "run folder whose stopped or killed training goes on; takes no other option"
    parser = _parser(verb, out="folder to make for the run", resume=go_on)
    parser.add_sections("model", "moe", "data", "train")
    options = parser.parse_args(argv)
    if options["resume"] is None:
        _required_out(options)
    elif others := [a for a in argv if a.startswith("--") and a.partition("=")[0] not in ("--resume", "--json")]:
        raise ConfigError(f"{others[0]} with --resume: expected none, the run has its own settings; leave it out")
    settings = parser.settings(options)
    from vimoe.models.timm_vit import FFN_NAME, check_name

    check_name(settings.model, segmentation=settings.data.task == "segmentation")
    settings.moe.selection.check_names(FFN_NAME)
    from vimoe.experiments.train import resume_training, run_training

    resumed = options["resume"]
    summary = run_training(settings, options["out"]) if resumed is None else resume_training(resumed)
    from vimoe.report.run_report import MEASURES, judged_by

    val = summary["val"]
    shares = f"{MEASURES[judged_by(val)].removesuffix(', %')} {val[judged_by(val)]:.2%}"
    text = (
        f"validation {shares}, loss {val['loss']:.4f} ({val['images']} images) "
        f"in epoch {summary['best_epoch']} of {summary['epochs']}\n{summary['report']}"
    )
    return text, summary


def evaluate(verb: str, argv: list[str]) -> Result:
    """Score a run's model on its test images (on validation where it has none), or on other data.

    Example: vimoe evaluate runs/photos --data.path other/photos
    """
    parser = _parser(verb, **{"data.path": "other data with the same classes (default: the run's)"})
    _add_inference(parser)
    parser.add_argument("run", help="run folder")
    options = parser.parse_args(argv)
    open_run(options["run"])  # a mistake is told before torch is imported
    from vimoe.experiments.finished_run import FinishedRun

    run = FinishedRun(options["run"], options["data.inference"], options["data.flip_test"])
    split, score = run.score(options["data.path"])
    return f"{split}: {score}", {**score.to_dict(), "split": split}


def predict(verb: str, argv: list[str]) -> Result:
    """Name the most likely classes of image files, or of all images in folders; of a segmentation, write their masks.

    Example: vimoe predict runs/photos cat.jpg holiday/ --top 3
    """
    parser = _parser(verb, out="of a segmentation, and needed there: folder for masks and overlays")
    _add_inference(parser)
    parser.add_argument("run", help="run folder")
    parser.add_argument("images", nargs="+", help="image files and folders")
    parser.add_argument("--top", type=int, default=5, help="how many classes to name")
    options = parser.parse_args(argv)
    if options["top"] < 1:
        raise ConfigError(f"--top {options['top']}: expected at least 1")
    open_run(options["run"])
    from vimoe.data.image_files import list_images
    from vimoe.experiments.finished_run import FinishedRun
    from vimoe.experiments.train import check_outside

    run = FinishedRun(options["run"], options["data.inference"], options["data.flip_test"])
    files = list_images(options["images"])
    if run.segments:
        out = _required_out(options, "masks")
        for images in (*options["images"], run.run.settings.data.path):
            check_outside("--out", out, images)
        predictions = run.predict_scenes(files, out)
        lines = [p.get("error") or f"{p['mask']}: {_areas(p, options['top'])}" for p in predictions]
        return "\n".join(lines), {"predictions": predictions}
    if options["out"]:
        raise ConfigError(f"--out {options['out']}: expected it for a segmentation alone; leave it out")
    from vimoe.tasks.predictions import predict as name_classes

    predictions = name_classes(run.model, files, options["top"])
    lines = [p.get("error") or f"{p['file']}: {_classes(p)}" for p in predictions]
    return "\n".join(lines), {"predictions": predictions}


def analyze(verb: str, argv: list[str]) -> Result:
    """Measure on validation images which MoE layers specialise and which matter; writes routing.json and the report.

    Example: vimoe analyze runs/photos
    """
    parser = _parser(verb)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--draws", type=int, default=DRAWS, help="permutations of the images' decisions, at most")
    overrule = "images to overrule the routing on, drawn at random; 0 for none"
    parser.add_argument("--overrule", type=int, default=OVERRULED_IMAGES, help=overrule)
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    options = parser.parse_args(argv)
    open_run(options["run"])  # a mistake is told before torch is imported
    from vimoe.experiments.finished_run import FinishedRun

    run = FinishedRun(options["run"])
    evidence, folder = run.analyze(options["draws"], options["overrule"], options["seed"]), run.run.path
    values = evidence.to_dict()
    for layer in values["layers"]:
        del layer["counts"], layer["drawn"]  # they are in routing.json
    paths = {"routing": str(folder / "routing.json"), "report": str(folder / "report.html")}
    return f"{evidence}\n{paths['report']}", {**values, **paths}


def prune(verb: str, argv: list[str]) -> Result:
    """Make the MoE layers dense that validation does not support; writes a new run with a receipt.

    Example: vimoe prune runs/photos --out runs/photos-pruned
    """
    parser = _parser(verb, out="folder to make for the pruned run")
    parser.add_argument("run", help="run folder")
    tolerance = "largest upper bound of a removal's loss change, nats"
    parser.add_argument("--tolerance", type=float, default=PRUNE_TOLERANCE, help=tolerance)
    parser.add_argument("--experts", type=bool, default=False, help="also drop experts of the layers that stay")
    parser.add_argument("--recover", type=int, default=0, help="epochs to train the pruned model")
    parser.add_argument("--recover_lr", type=float | None, default=None, help="default: a tenth of the run's")
    options = parser.parse_args(argv)
    out = _required_out(options)
    open_run(options["run"])
    from vimoe.experiments.finished_run import FinishedRun
    from vimoe.report.run_report import receipt_header, receipt_row

    keys = ("tolerance", "experts", "recover", "recover_lr")
    values = FinishedRun(options["run"]).prune(out, **{key: options[key] for key in keys})
    when = [key for key in ("before", "after", "recovered") if key in values]
    rows = [receipt_header(values["before"]), *(receipt_row(key, [values[key]]) for key in when)]
    table = ["".join(f"{cell:>15}" for cell in row) for row in rows]
    measured = f"measured on {values['before']['images']} {values['split']} images"
    return "\n".join([values.pop("text"), *table, measured, values["report"]]), values


def report(verb: str, argv: list[str]) -> Result:
    """Write the page of a run again from its files, or one page of several runs side by side.

    Example: vimoe report runs/dense runs/vimoe --out comparison.html
    """
    parser = _parser(verb, out="file to write, of several runs; the page of one run is report.html in it")
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

        page = write_comparison(folders, Path(_required_out(options, "comparison.html")))
    return str(page), {"report": str(page)}


def demo(verb: str, argv: list[str]) -> Result:
    """A tour in a few minutes on scikit-learn's handwritten digits: train, upcycle, compare, look at the experts.

    Example: vimoe demo --task segmentation
    """
    parser = _parser(verb, out="folder to make (default: runs/demo-DATE-TIME)")
    parser.add_argument("--task", choices=get_args(Task), default="classification", help="what to show")
    options = parser.parse_args(argv)
    from vimoe.demo.tours import run_demo

    return run_demo(options["out"], options["task"])


def bench(verb: str, argv: list[str]) -> Result:
    """Time the MoE layer (`layer`) or a whole model (`model`) beside dense FFNs of the same arithmetic.

    Example: vimoe bench layer --moe.routing token --bench.dtype bfloat16
    """
    what = argv[0] if argv and not argv[0].startswith("-") else None
    if what not in ("layer", "model") and argv[:1] not in (["-h"], ["--help"]):
        raise ConfigError(f"bench {what or 'of nothing'}: expected layer or model, such as vimoe bench layer")
    parser = _parser(verb)
    parser.prog += f" {what or 'layer|model'}"
    if what is None:
        parser.epilog = f"These are the options of layer; for those of model: vimoe bench model --help. {parser.epilog}"
    if what == "model":
        parser.epilog = "Example: vimoe bench model --model.name vit_small_patch14_dinov2 --moe.layers last:2"
        parser.add_sections("model", "moe")
        parser.add_class_arguments(ModelBench, "bench")
    else:
        parser.add_sections("moe")
        parser.add_class_arguments(LayerBench, "bench")
    options = parser.parse_args(argv[what is not None :])
    made, settings = parser.instantiate(options)["bench"], parser.settings(options)
    if what == "layer" and settings.moe.layers != MoEConfig.layers:
        raise ConfigError(f"moe.layers={settings.moe.layers!r} with bench layer: a layer stands alone; leave it out")
    if what == "model":
        from vimoe.models.timm_vit import FFN_NAME, check_name

        check_name(settings.model)
        settings.moe.selection.check_names(FFN_NAME)
    from vimoe.bench.layer import bench_layer
    from vimoe.bench.model import bench_model

    done = bench_model(made, settings.model, settings.moe) if what == "model" else bench_layer(made, settings.moe)
    return str(done), done.to_dict()


VERBS: dict[str, Callable[[str, list[str]], Result]] = {
    "demo": demo,
    "plan": plan,
    "count": count,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "analyze": analyze,
    "prune": prune,
    "report": report,
    "bench": bench,
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


def _add_inference(parser: Parser) -> None:
    """How a segmentation goes over an image, where that is to be another way than in training."""
    for name, kind in (("inference", str), ("flip_test", bool)):
        what = "of a segmentation, as in vimoe train (default: the run's)"
        parser.add_argument(f"--data.{name}", type=kind | None, default=None, help=what)


def _settings(verb: str, argv: list[str], *sections: str, **extra: str) -> tuple[Settings, Any]:
    parser = _parser(verb, **extra)
    parser.add_sections(*sections)
    values = parser.parse_args(argv)
    if "out" in extra:
        _required_out(values)
    return parser.settings(values), values


def _classes(prediction: dict[str, Any]) -> str:
    return ", ".join(f"{each['name']} {each['probability']:.1%}" for each in prediction["classes"])


def _areas(prediction: dict[str, Any], most: int) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in list(prediction["areas"].items())[:most])


def _required_out(options: Any, example: str = "runs/first") -> str:
    if not options["out"]:
        raise ConfigError(f"--out is missing: expected what to make, such as --out {example}")
    return options["out"]


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """While it holds, SIGTERM ends a verb as Ctrl-C does, so that half-written files (features, masks) are removed."""

    def end(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Stderr(logging.StreamHandler):
    """Writes to what standard error is at the moment, so that a progress bar that redirects it stays whole."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _value: Any) -> None:
        pass


def _log_to_stderr() -> None:
    if not sys.stderr.isatty():  # where no progress bar is seen
        logging.getLogger("vimoe").setLevel(logging.INFO)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING, handlers=[_Stderr()])
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"


def _of_machine(error: OSError) -> FolderError:
    """Return an error of disks and permissions in the form of all others."""
    where = error.filename if error.filename is not None else "a file or folder"
    remedies = {errno.ENAMETOOLONG: "choose a shorter name", errno.ENOSPC: "make room", errno.EDQUOT: "make room"}
    remedy = remedies.get(error.errno or 0, "make room, or mend permissions")
    return FolderError(f"{where} cannot be used ({error.strerror or error}); {remedy}")


def _one_line(error: Exception) -> str:
    """The message; where a data worker sent it with its traceback, the last line of that."""
    message = str(error)
    if "Traceback (most recent call last)" in message:
        message = [line for line in message.split("\n") if line.strip()][-1]
        message = message.partition("Error: ")[2] if message.startswith("vimoe.errors.") else message
    return printable(message)  # names may hold line ends


if __name__ == "__main__":
    sys.exit(main())
