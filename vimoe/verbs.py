"""The verbs of the command line: parse options, call the library, return what to print.

Each verb is one function, which holds its slow imports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimoe import process
from vimoe.config.analysis import DRAWS, OVERRULED_IMAGES, PRUNE_TOLERANCE
from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.command_line import Parser
from vimoe.config.data import TASKS
from vimoe.config.export import FORMATS
from vimoe.config.moe import MoEConfig
from vimoe.config.parallel import bytes_of
from vimoe.config.settings import SECTIONS, Settings
from vimoe.errors import ConfigError, VimoeError, counted
from vimoe.files import one_line
from vimoe.run_folder import check_new, open_run, open_unfinished

if TYPE_CHECKING:
    from vimoe.models.upcycling import Plan
    from vimoe.study.plan import Study

SHARED = ("train", "evaluate", "predict", "analyze")  # verbs whose work several processes may share

Result = tuple[str, dict[str, Any]]  # text for a person, values for --json


def plan(verb: str, argv: list[str]) -> Result:
    """Show the layers that would be converted and their cost; with --devices, the memory of a training on these too.

    Example: vimoe plan --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers last:2
    """
    parser = _parser(verb)
    many = "number of devices to train on; takes the options data and train as well, shown by --devices 8 --help"
    parser.add_argument("--devices", type=int | None, default=None, help=many)
    parser.add_argument("--memory", type=str | None, default=None, help="memory of each device, such as 80GB")
    over_devices = any(arg.partition("=")[0] == "--devices" for arg in argv)
    parser.add_sections("model", "moe", *(("data", "train") if over_devices else ()))
    options = parser.parse_args(argv)
    devices, limit = _devices(options)
    settings, conversion = _conversion(parser, options, argv)
    from vimoe.models.create import create
    from vimoe.models.upcycling import needs_images
    from vimoe.models.upcycling import plan as make_plan

    at_hand = settings.model.pretrained and settings.model.name.startswith("local-dir:")
    if conversion.start and at_hand and not needs_images(settings.moe):
        conversion = make_plan(create(settings.model), settings.moe, read=settings.model.read)
    text, values = str(conversion), _costs(conversion)
    if devices is None:
        return text, values
    from vimoe.experiments.size import size_of

    size = size_of(settings, devices, limit)
    return f"{text}\n\n{size}", {**values, "size": size.to_dict()}


def count(verb: str, argv: list[str]) -> Result:
    """Count parameters, activated parameters and multiply-adds before and after conversion; download nothing.

    Example: vimoe count --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers all --json
    """
    parser = _parser(verb)
    parser.add_sections("model", "moe")
    _, conversion = _conversion(parser, parser.parse_args(argv), argv)
    return "\n".join(str(conversion).splitlines()[:2]), _costs(conversion)


def train(verb: str, argv: list[str]) -> Result:
    """Train a ViT, or the ViMoE made from it, on your images; write a run folder.

    Example: vimoe train --data.path photos/ --model.name vit_tiny_patch16_224 --moe.layers last:2 --out runs/photos
    """
    resume = "run folder of a stopped or killed training to continue; takes no other option"
    parser = _parser(verb, out="run folder to create", resume=resume)
    parser.add_sections("model", "moe", "data", "train")
    options = parser.parse_args(argv)
    if options["resume"] is None:
        _required_out(options)
    elif others := [a for a in argv if a.startswith("--") and a.partition("=")[0] not in ("--resume", "--json")]:
        raise ConfigError(f"{others[0]} with --resume: expected none, since the run has its own settings; leave it out")
    settings = parser.settings(options)
    from vimoe.models.names import check_layer_names, check_name

    check_name(settings.model, segmentation=True)  # the task judges the folder of a segmenter
    check_layer_names(settings.model, settings.moe.selection, *settings.train.parts)
    from vimoe.data.data_path import check_there

    resumed = options["resume"]
    alone = process.launched() == 1  # else another process may be ahead, and have made or locked the folder
    if resumed is None:
        check_there(settings.data.path)
        if alone:
            check_new(options["out"])
    elif alone:
        open_unfinished(resumed)
    from vimoe.experiments.train import resume_training, run_training
    from vimoe.models.continued import with_own_layers

    if resumed is None:
        summary = run_training(with_own_layers(settings, parser.given(argv, "moe")), options["out"])
    else:
        summary = resume_training(resumed)
    from vimoe.metrics.registry import shown

    val = summary["val"]
    names = shown(val)
    text = (
        f"validation {names.judge_name} {val[names.judge]:.2%}, loss {val['loss']:.4f} "
        f"({counted(val['images'], 'image')}) "
        f"in epoch {summary['best_epoch']} of {summary['epochs']}\n{_tasks_line(summary)}{summary['report']}"
    )
    return text, summary


def _tasks_line(summary: dict[str, Any]) -> str:
    """Return a line on the tasks that were learnt one after the other; nothing for other trainings."""
    if "tasks" not in summary:
        return ""
    seen, own = summary["tasks"]["seen"], summary["tasks"]["own"]
    return (
        f"{len(summary['tasks']['trained'])} tasks: mean accuracy {seen['mean']:.2%} among all classes, "
        f"{own['mean']:.2%} within a task; forgetting {seen['forgetting']:.2%} and {own['forgetting']:.2%}\n"
    )


def evaluate(verb: str, argv: list[str]) -> Result:
    """Score a run's model on its test images (without those, on validation), or on other data.

    Example: vimoe evaluate runs/photos --data.path other/photos
    """
    other = "other data with the same classes (default: data of the run, or their features if it cached some)"
    parser = _parser(verb, **{"data.path": other})
    _add_inference(parser)
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


def predict(verb: str, argv: list[str]) -> Result:
    """Name the most likely classes of images (files or folders); with a segmentation model, write their masks.

    Example: vimoe predict runs/photos cat.jpg holiday/ --top 3
    """
    parser = _parser(verb, out="folder for masks and overlays; required for segmentation, refused for classification")
    _add_inference(parser)
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
            check_outside("--out", _required_out(options, "masks"), images)
    elif out:
        raise ConfigError(f"--out {out}: this run's predictions are no files; leave it out")
    predictions = run.predict(files, out, options["top"])
    lines = [
        each["error"].replace(each["file"], one_line(each["file"])) if "error" in each
        else run.task.line(each, options["top"])
        for each in predictions
    ]  # fmt: skip
    return "\n".join(lines), {"predictions": predictions}


def trust(verb: str, argv: list[str]) -> Result:
    """Fit scores of how far to trust each prediction: how familiar the image is, how likely its class is right.

    Example: vimoe trust runs/photos
    """
    parser = _parser(verb)
    parser.add_argument("run", help="run folder; vimoe predict then gives the scores of each image")
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.analysis.trust import in_words
    from vimoe.experiments.finished_run import FinishedRun

    facts = FinishedRun(options["run"]).trust()
    return in_words(facts), facts


def analyze(verb: str, argv: list[str]) -> Result:
    """Measure on validation images which MoE layers specialise and which matter; write routing.json and the report.

    Example: vimoe analyze runs/photos
    """
    parser = _parser(verb)
    parser.add_argument("run", help="run folder")
    parser.add_argument(
        "--draws", type=int, default=DRAWS, help="maximum number of permutations of the images' decisions"
    )
    parser.add_argument("--probe", type=bool, default=False, help="also measure each expert alone, class by class")
    _add_sampling(parser, "; 0 for no interventions")
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


def explore(verb: str, argv: list[str]) -> Result:
    """Show on a page what each MoE layer chose for an image, and what changes if layers are overruled.

    Example: vimoe explore runs/photos
    """
    parser = _parser(verb, static="folder for a page that needs no server, with some images; then nothing is served")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; others than this machine may look")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at; 0 for any that is free")
    parser.add_argument("--images", type=int, default=200, help="largest number of validation images to show")
    options = parser.parse_args(argv)
    if options["images"] < 1:
        raise ConfigError(f"--images {options['images']}: expected at least 1")
    if not 0 <= options["port"] < 2**16:
        raise ConfigError(f"--port {options['port']}: expected 0 to {2**16 - 1}; name another")
    run = open_run(options["run"])  # reports a wrong folder before the slow import of torch
    static = options["static"]
    if static is None and not (find_spec("starlette") and find_spec("uvicorn")):
        raise ConfigError(
            "vimoe explore needs starlette and uvicorn: pip install 'vimoe[explore]'; or use --static DIR"
        )
    from vimoe.experiments.train import check_outside
    from vimoe.explore.server import bound, serve
    from vimoe.explore.session import Session
    from vimoe.explore.static_page import make_place, write_page

    # a mistaken place is told before the work that a session is
    if static is None:
        host = options["host"]
        with bound(host, options["port"]) as listening, closing(Session(options["run"], options["images"])) as session:
            serve(session, listening, host, _tell)
        return "stopped", {}
    check_outside("--static", static, run.settings.data.path)
    make_place(Path(static))
    with closing(Session(options["run"], options["images"])) as session:
        page = write_page(session, Path(static))
    return str(page), {"page": str(page)}


def diagnose(verb: str, argv: list[str]) -> Result:
    """Say whether experts differ, weigh enough and are routed to some use, and what to try next; write diagnosis.json.

    Example: vimoe diagnose runs/photos
    """
    parser = _parser(verb)
    parser.add_argument("run", help="run folder")
    draws = "analyze anew, with at most this number of permutations (default: the run's analysis, made if needed)"
    parser.add_argument("--draws", type=int | None, default=None, help=draws)
    _add_sampling(parser)
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.experiments.finished_run import FinishedRun

    run = FinishedRun(options["run"])
    found, folder = run.diagnose(options["draws"], options["overrule"], options["seed"]), run.run.path
    paths = {"diagnosis": str(folder / "diagnosis.json"), "report": str(folder / "report.html")}
    return f"{found}\n{paths['report']}", {**found.to_dict(), **paths}


def prune(verb: str, argv: list[str]) -> Result:
    """Make dense the MoE layers that validation does not support, or all; write a new run with a receipt.

    Example: vimoe prune runs/photos --out runs/photos-pruned
    """
    parser = _parser(verb, out="folder to create for the pruned run")
    parser.add_argument("run", help="run folder")
    tolerance = "largest accepted upper bound of the loss change by a removal, in nats"
    parser.add_argument("--tolerance", type=float, default=PRUNE_TOLERANCE, help=tolerance)
    parser.add_argument(
        "--experts", type=bool, default=False, help="also remove single experts of the layers that stay"
    )
    merge_all = "make every MoE layer dense, as the mean of its experts or their pieces together, whatever it costs"
    parser.add_argument("--merge_all", type=bool, default=False, help=merge_all)
    parser.add_argument("--recover", type=int, default=0, help="number of epochs to train the pruned model")
    parser.add_argument(
        "--recover_lr",
        type=float | None,
        default=None,
        help="learning rate of --recover (default: a tenth of the run's)",
    )
    options = parser.parse_args(argv)
    out = _required_out(options)
    open_run(options["run"])
    from vimoe.experiments.finished_run import FinishedRun
    from vimoe.metrics.registry import shown
    from vimoe.report.table_cells import receipt_header, receipt_row

    keys = ("tolerance", "experts", "recover", "recover_lr", "merge_all")
    values = FinishedRun(options["run"]).prune(out, **{key: options[key] for key in keys})
    stages = [key for key in ("before", "after", "recovered") if key in values]
    rows = [receipt_header(shown(values["before"])), *(receipt_row(key, [values[key]]) for key in stages)]
    table = ["".join(f"{cell:>15}" for cell in row) for row in rows]
    measured = f"measured on {counted(values['before']['images'], values['split'] + ' image')}"
    return "\n".join([values.pop("text"), *table, measured, values["report"]]), values


def export(verb: str, argv: list[str]) -> Result:
    """Write a run's model as an ONNX file or a program of torch.export, checked against the model.

    Example: vimoe export runs/photos --format onnx --int8 true
    """
    parser = _parser(verb, out="folder to create (default: a folder in the run, named as the format)")
    _add_inference(parser)
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


def report(verb: str, argv: list[str]) -> Result:
    """Write the page of a run again from its files, or a page that compares several runs.

    Example: vimoe report runs/dense runs/vimoe --out comparison.html
    """
    parser = _parser(verb, out="HTML file to create for several runs; the page of one run is RUN/report.html")
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

        page = write_comparison(folders, Path(_required_out(options, "comparison.html", "file")))
    return str(page), {"report": str(page)}


def push(verb: str, argv: list[str]) -> Result:
    """Upload a run's model to the Hugging Face hub, with a model card that has the run's figures.

    Example: vimoe push runs/photos me/photos --private true
    """
    parser = _parser(verb, revision="branch to commit to (default: main)")
    parser.add_argument("run", help="run folder")
    parser.add_argument("repo", help="repository, USER/REPO, which is made if it is not there")
    parser.add_argument("--private", type=bool | None, default=None, help="make a new repository private")
    parser.add_argument("--message", type=str, default="Upload model", help="message of the commit")
    options = parser.parse_args(argv)
    open_run(options["run"])  # reports a wrong folder before the slow import of torch
    from vimoe.experiments.push import push_run

    url = push_run(options["run"], options["repo"], options["private"], options["message"], options["revision"])
    return url, {"url": url}


def study(verb: str, argv: list[str]) -> Result:
    """Compare arms over seeds, such as a ViMoE and its dense ViT, each at the best of the same learning rates.

    Example: vimoe study mine --new --data.path photos/ --model.name vit_small_patch14_dinov2 --train.train_only last:2
    """
    parser = _parser(verb, runs="folder for run folders (default: runs/FOLDER)", cell="compute this cell alone, here")
    parser.add_argument("folder", help="folder of study.yaml, the results, and README.md with the tables")
    new = "write a first study.yaml; takes the options of vimoe train, shown by --new --help"
    submitted = "submit workers as jobs of a cluster, with these parameters of submitit"
    for flag, text in {
        "new": new, "report": "write tables and figures alone", "keep": "keep the run folders of finished cells",
        "dry_run": "show what would be computed or submitted",
    }.items():  # fmt: skip
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=PATH", help="value of ${NAME} in study.yaml"
    )
    parser.add_argument("--arms", nargs="+", default=[], help="arms to compute (default: all)")
    parser.add_argument("--datasets", nargs="+", default=[], help="data sets to compute (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time; with --slurm the number of jobs")
    parser.add_argument("--slurm", nargs="*", default=None, metavar="NAME=VALUE", help=submitted)
    if "--new" in argv:
        parser.add_sections("model", "moe", "data", "train")
    options = parser.parse_args(argv)
    folder = Path(options["folder"])
    if options["new"]:
        from vimoe.study.first import write_first

        given = {name: parser.given(argv, name) for name in SECTIONS}
        path = write_first(folder, parser.settings(options), given)
        return f"{path}\nlook it over, then: vimoe study {folder}", {"study": str(path)}
    from vimoe.study.plan import Study

    asked = Study(folder, () if options["report"] else tuple(options["datasets"]))
    if options["report"]:
        return _tables(asked)
    from vimoe.study.report import check_page
    from vimoe.study.work import Work

    if options["workers"] < 1:
        raise ConfigError(f"--workers {options['workers']}: expected at least 1; leave it out for one")
    runs = Path(options["runs"] or Path("runs", folder.resolve().name))
    work = Work(asked, options["set"], runs, lambda name, *given: VERBS[name](name, [*given])[1], options["keep"])
    if options["cell"]:
        there = work.compute(options["cell"])
        return f"{options['cell']}: {'done' if there else 'another process has it'}", {"done": there}
    check_page(folder)
    queue = work.queue(options["arms"])
    if options["slurm"] is not None:
        from vimoe.study.slurm import submit

        job = work.command(*(["--arms", *options["arms"]] if options["arms"] else []))
        lines = submit(job, options["workers"], options["slurm"], runs / "slurm", options["dry_run"])
        return "\n".join(lines), {"jobs": lines}
    workers = work.workers(queue, _tell)
    if options["dry_run"]:
        ready, waiting = ([cell.name for cell in cells] for cells in queue.left(queue.done()))
        last = f"and {len(waiting)} cells at the rates that the search will choose; {workers.state(options['workers'])}"
        return "\n".join([*ready, last]), {"ready": ready, "waiting": len(waiting)}
    _tell(workers.state(options["workers"]))
    if failed := workers.work(options["workers"]):
        raise VimoeError(
            f"{counted(len(failed), 'cell')} failed: {', '.join(failed)}; their logs are in {runs}; mend the cause and "
            f"start again, which computes what is left"
        )
    return _tables(asked)


def _tables(study: Study) -> Result:
    """Write the page of a study, and return what it answers."""
    from vimoe.study.report import PAGE, write_report

    found = write_report(study)
    lines = [f"{data}: {answer}" for data, answers in found.items() for answer in answers]
    path = str(study.folder / PAGE)
    values = {data: [answer.to_dict() for answer in answers] for data, answers in found.items()}
    return "\n".join([*lines, path]), {"contrasts": values, "report": path}


def demo(verb: str, argv: list[str]) -> Result:
    """Show a tour of a few minutes on scikit-learn's handwritten digits: train, upcycle, compare, look at experts.

    Example: vimoe demo --task segmentation
    """
    parser = _parser(verb, out="folder to create (default: runs/demo-DATE-TIME)")
    parser.add_argument("--task", choices=list(TASKS), default="classification", help="kind of model to show")
    options = parser.parse_args(argv)
    from vimoe.demo.tours import run_demo

    return run_demo(options["out"], options["task"])


def bench(verb: str, argv: list[str]) -> Result:
    """Time the MoE layer (`layer`) or a whole model (`model`) against dense FFNs of the same arithmetic.

    Example: vimoe bench layer --moe.routing token --bench.dtype bfloat16
    """
    what = argv[0] if argv and not argv[0].startswith("-") else None
    if what not in ("layer", "model") and argv[:1] not in (["-h"], ["--help"]):
        raise ConfigError(f"bench {what or 'alone'}: expected layer or model, for example vimoe bench layer")
    parser = _parser(verb)
    parser.prog += f" {what or 'layer|model'}"
    if what is None:
        parser.epilog = (
            f"These are the options of vimoe bench layer; for a model, see vimoe bench model --help. {parser.epilog}"
        )
    if what == "model":
        parser.epilog = "Example: vimoe bench model --model.name vit_small_patch14_dinov2 --moe.layers last:2"
        parser.add_sections("model", "moe")
        parser.add_class_arguments(ModelBench, "bench")
    else:
        parser.add_sections("moe")
        parser.add_class_arguments(LayerBench, "bench")
    options = parser.parse_args(argv[what is not None :])
    shape, settings = parser.instantiate(options)["bench"], parser.settings(options)
    if what == "layer" and settings.moe.layers != MoEConfig.layers:
        raise ConfigError(
            f"moe.layers={settings.moe.layers!r} with bench layer: expected none for a single layer; leave it out"
        )
    if what == "model":
        from vimoe.models.names import check_layer_names, check_name

        check_name(settings.model)
        check_layer_names(settings.model, settings.moe.selection)
    from vimoe.bench.layer import bench_layer
    from vimoe.bench.model import bench_model

    timings = bench_model(shape, settings.model, settings.moe) if what == "model" else bench_layer(shape, settings.moe)
    return str(timings), timings.to_dict()


VERBS: dict[str, Callable[[str, list[str]], Result]] = {
    "demo": demo,
    "plan": plan,
    "count": count,
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "trust": trust,
    "analyze": analyze,
    "diagnose": diagnose,
    "explore": explore,
    "prune": prune,
    "export": export,
    "report": report,
    "push": push,
    "study": study,
    "bench": bench,
}


def _parser(verb: str, **extra: str) -> Parser:
    """Return a parser with --json and one option for each name in `extra`, whose value is the help text."""
    summary, _, example = (VERBS[verb].__doc__ or "").partition("Example:")
    parser = Parser(prog=f"vimoe {verb}", description=summary.strip(), epilog=f"Example: {example.strip()}")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    return parser


def _add_inference(parser: Parser) -> None:
    """Add the options that change the inference of a segmentation model from that of its run."""
    for name, kind in (("inference", str), ("flip_test", bool)):
        what = "segmentation only: as in vimoe train (default: setting of the run)"
        parser.add_argument(f"--data.{name}", type=kind | None, default=None, help=what)


def _add_sampling(parser: Parser, note: str = "") -> None:
    """Add the options that draw the images that are measured; `note` is the end of the first one's help text."""
    what = f"number of images for interventions, drawn at random{note}"
    parser.add_argument("--overrule", type=int, default=OVERRULED_IMAGES, help=what)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")


def _conversion(parser: Parser, options: Any, argv: list[str]) -> tuple[Settings, Plan]:
    """Return the settings that were asked for, and the plan of their model without weights."""
    settings = parser.settings(options)
    from vimoe.models.names import check_layer_names, check_name

    check_name(settings.model)
    check_layer_names(settings.model, settings.moe.selection)
    from vimoe.models.continued import plan_of_own, with_own_layers
    from vimoe.models.create import create_without_weights
    from vimoe.models.upcycling import plan as make_plan

    settings = with_own_layers(settings, parser.given(argv, "moe"))
    own = plan_of_own(settings.model)
    return settings, own or make_plan(create_without_weights(settings.model), settings.moe, read=settings.model.read)


def _costs(conversion: Plan) -> dict[str, Any]:
    """Return what a plan says for --json."""
    dense = {name: getattr(conversion.dense, name) for name in ("params", "macs", "computed_macs")}
    moe = {name: getattr(conversion.moe, name) for name in ("params", "activated_params", "macs", "computed_macs")}
    change = conversion.start and conversion.start.change
    return {"dense": dense, "moe": {**moe, "layers": [site.name for site in conversion.sites], "change": change}}


def _devices(options: Any) -> tuple[int | None, float]:
    """Return the number of devices of `plan`, None without one, and the memory of each in bytes."""
    devices, memory = options["devices"], options["memory"]
    if devices is None and memory is None:
        return None, 0
    if devices is None or memory is None:
        missing, example = ("--devices", 8) if devices is None else ("--memory", "80GB")
        raise ConfigError(
            f"{missing} is required for the memory of a training: add it, for example {missing} {example}"
        )
    if devices < 1:
        raise ConfigError(f"--devices {devices}: expected at least 1")
    return devices, bytes_of(memory)


def _required_out(options: Any, example: str = "runs/first", kind: str = "folder") -> str:
    if not options["out"]:
        raise ConfigError(f"--out is required: name the {kind} to create, for example --out {example}")
    return options["out"]


def _tell(line: str) -> None:
    """Print a line for the person who waits, beside the answer."""
    print(f"vimoe: {line}", file=sys.stderr)
