"""The verb `study`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimoe.config.command_line import Parser
from vimoe.config.settings import SECTIONS
from vimoe.errors import ConfigError, VimoeError, counted
from vimoe.verbs import analyze, count, evaluate, prune, train
from vimoe.verbs.options import Result, parser_of, tell

if TYPE_CHECKING:
    from vimoe.study.plan import Study

STEPS = {"train": train.train, "evaluate": evaluate.evaluate, "analyze": analyze.analyze, "prune": prune.prune,
         "count": count.count}  # verbs that a cell takes  # fmt: skip
FLAGS = {
    "new": "write a first study.yaml; takes the options of vimoe train, shown by --new --help",
    "report": "write tables and figures alone",
    "keep": "keep the run folders of finished cells",
    "dry_run": "show what would be computed or submitted",
}
DEFAULTS = {"set": [], "arms": [], "datasets": [], "workers": 1, "runs": None, "cell": None, "key": None, "slurm": None}


def study(argv: list[str]) -> Result:
    """Compare arms over seeds, such as a ViMoE and its dense ViT, each at the best of the same learning rates.

    Example: vimoe study mine --new --data.path photos/ --model.name vit_small_patch14_dinov2 --train.train_only last:2
    """
    parser = _parser("--new" in argv)
    options = parser.parse_args(argv)
    _check_together(options)
    folder = Path(options["folder"])
    if options["new"]:
        from vimoe.study.first import write_first

        given = {name: parser.given(argv, name) for name in SECTIONS}
        path = write_first(folder, parser.settings(options), given)
        return f"{path}\nlook it over, then: vimoe study {shlex.quote(str(folder))}", {"study": str(path)}
    if options["workers"] < 1:
        raise ConfigError(f"--workers {options['workers']}: expected at least 1; leave it out for one")
    from vimoe.study.plan import Study

    asked = Study(folder, tuple(options["datasets"]))
    return _tables(asked) if options["report"] else _work(asked, options)


def _parser(new: bool) -> Parser:
    """Return the parser of the verb; `new` adds the options of `vimoe train`."""
    parser = parser_of(
        study,
        runs="folder for run folders and locks (default: FOLDER/runs)",
        cell="compute this cell alone, in this process",
        key="with --cell: the hash that its file is to have, of settings, data and code (default: any)",
    )
    parser.add_argument("folder", help="folder of study.yaml, the results, and README.md with the tables")
    for flag, text in FLAGS.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=PATH", help="value of a ${NAME}")
    parser.add_argument("--arms", nargs="+", default=[], help="arms to compute (default: all)")
    parser.add_argument("--datasets", nargs="+", default=[], help="data sets to compute (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time; with --slurm the number of jobs")
    submitted = "submit workers as jobs of a cluster, with these parameters of submitit"
    parser.add_argument("--slurm", nargs="*", default=None, metavar="NAME=VALUE", help=submitted)
    if new:
        parser.add_sections("model", "moe", "data", "train")
    return parser


def _check_together(options: Any) -> None:
    """Raise ConfigError for options of which one would be passed over."""
    given = [name for name, default in {**dict.fromkeys(FLAGS, False), **DEFAULTS}.items() if options[name] != default]
    beside = {"new": (), "report": (), "cell": ("set", "datasets", "keep", "runs", "key")}
    for name, others in beside.items():
        if name in given and (more := [each for each in given if each != name and each not in others]):
            raise ConfigError(f"--{more[0]} with --{name}: expected one of both; leave one out")
    if options["key"] and not options["cell"]:
        raise ConfigError("--key without --cell: expected both; leave it out")


def _work(asked: Study, options: Any) -> Result:
    """Compute what is left, or one cell, or show or submit it, as the options say."""
    from vimoe.study.report import check_page
    from vimoe.study.work import Work

    runs, one = Path(options["runs"] or asked.folder / "runs"), options["cell"]
    work = Work(asked, options["set"], runs, lambda name, *given: STEPS[name]([*given])[1], options["keep"], one)
    if one:
        there = work.compute(options["key"])
        return f"{one}: {'done' if there else 'another process has it'}", {"done": there}
    check_page(asked.folder)
    queue = work.queue(options["arms"])
    if options["slurm"] is not None:
        from vimoe.study.slurm import submit

        job = work.command(*(["--arms", *options["arms"]] if options["arms"] else []))
        lines = submit(job, options["workers"], options["slurm"], runs / "slurm", options["dry_run"])
        return "\n".join(lines), {"jobs": lines}
    workers = work.workers(queue, options["workers"], tell)
    state = workers.state(options["workers"])
    ready, waiting = queue.left(queue.done())
    work.check_trainings([*ready, *waiting])
    if options["dry_run"]:
        names = [cell.name for cell in ready]
        last = f"and {len(waiting)} cells at the rates that the search will choose; {state}"
        return "\n".join([*names, last]), {"ready": names, "waiting": len(waiting)}
    tell(state)
    try:
        failed = workers.work(options["workers"])
    except KeyboardInterrupt:
        tell("trainings end with a checkpoint; start again to go on")
        raise
    if failed:
        raise VimoeError(
            f"{counted(len(failed), 'cell')} failed: {', '.join(failed)}; their logs are in {runs}; mend the cause and "
            f"start again, which computes what is left"
        )
    if asked.chosen:  # whose page has the other data sets too
        return workers.state(options["workers"]), {"cells": queue.number()}
    return _tables(asked, work.keys)


def _tables(asked: Study, keys: dict[str, list[str]] | None = None) -> Result:
    """Write the page of a study, and return what it answers; `keys` are those that count, if they are known."""
    from vimoe.study.contrasts import answers
    from vimoe.study.report import PAGE, write_report
    from vimoe.study.tables import at_an_end

    results, path = write_report(asked, keys), str(asked.folder / PAGE)
    found = {data: answers(results, data) for data in asked.data}
    lines = [
        f"{data}: {answer}" for data in found for answer in (*found[data], at_an_end(results, data)) if str(answer)
    ]
    values = {data: [answer.to_dict() for answer in answers] for data, answers in found.items()}
    return "\n".join([*lines, path]), {"contrasts": values, "report": path}
