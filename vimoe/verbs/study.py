"""The verb `study`."""

from __future__ import annotations

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


def study(argv: list[str]) -> Result:
    """Compare arms over seeds, such as a ViMoE and its dense ViT, each at the best of the same learning rates.

    Example: vimoe study mine --new --data.path photos/ --model.name vit_small_patch14_dinov2 --train.train_only last:2
    """
    parser = _parser("--new" in argv)
    options = parser.parse_args(argv)
    folder = Path(options["folder"])
    if options["new"]:
        from vimoe.study.first import write_first

        given = {name: parser.given(argv, name) for name in SECTIONS}
        path = write_first(folder, parser.settings(options), given)
        return f"{path}\nlook it over, then: vimoe study {folder}", {"study": str(path)}
    if options["workers"] < 1:
        raise ConfigError(f"--workers {options['workers']}: expected at least 1; leave it out for one")
    from vimoe.study.plan import Study

    asked = Study(folder, () if options["report"] else tuple(options["datasets"]))
    return _tables(asked) if options["report"] else _work(asked, options)


def _parser(new: bool) -> Parser:
    """Return the parser of the verb; `new` adds the options of `vimoe train`."""
    parser = parser_of(
        study,
        runs="folder for run folders (default: runs/FOLDER)",
        cell="compute this cell alone, in this process",
        key="with --cell: the hash that its file is to have, of settings, data and code (default: any)",
    )
    parser.add_argument("folder", help="folder of study.yaml, the results, and README.md with the tables")
    for flag, text in {
        "new": "write a first study.yaml; takes the options of vimoe train, shown by --new --help",
        "report": "write tables and figures alone",
        "keep": "keep the run folders of finished cells",
        "dry_run": "show what would be computed or submitted",
    }.items():
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


def _work(asked: Study, options: Any) -> Result:
    """Compute what is left, or one cell, or show or submit it, as the options say."""
    from vimoe.study.report import check_page
    from vimoe.study.work import Work

    runs = Path(options["runs"] or Path("runs", asked.folder.resolve().name))
    work = Work(asked, options["set"], runs, lambda name, *given: STEPS[name]([*given])[1], options["keep"])
    if options["cell"]:
        there = work.compute(options["cell"], options["key"])
        return f"{options['cell']}: {'done' if there else 'another process has it'}", {"done": there}
    check_page(asked.folder)
    queue = work.queue(options["arms"])
    if options["slurm"] is not None:
        from vimoe.study.slurm import submit

        job = work.command(*(["--arms", *options["arms"]] if options["arms"] else []))
        lines = submit(job, options["workers"], options["slurm"], runs / "slurm", options["dry_run"])
        return "\n".join(lines), {"jobs": lines}
    workers = work.workers(queue, options["workers"], tell)
    state = workers.state(options["workers"])
    if options["dry_run"]:
        ready, waiting = ([cell.name for cell in cells] for cells in queue.left(queue.done()))
        last = f"and {len(waiting)} cells at the rates that the search will choose; {state}"
        return "\n".join([*ready, last]), {"ready": ready, "waiting": len(waiting)}
    tell(state)
    if failed := workers.work(options["workers"]):
        raise VimoeError(
            f"{counted(len(failed), 'cell')} failed: {', '.join(failed)}; their logs are in {runs}; mend the cause and "
            f"start again, which computes what is left"
        )
    return _tables(asked)


def _tables(asked: Study) -> Result:
    """Write the page of a study, and return what it answers."""
    from vimoe.study.contrasts import answers
    from vimoe.study.report import PAGE, write_report
    from vimoe.study.tables import at_an_end

    results, path = write_report(asked), str(asked.folder / PAGE)
    found = {data: answers(results, data) for data in asked.data}
    lines = [
        f"{data}: {answer}" for data in found for answer in (*found[data], at_an_end(results, data)) if str(answer)
    ]
    values = {data: [answer.to_dict() for answer in answers] for data, answers in found.items()}
    return "\n".join([*lines, path]), {"contrasts": values, "report": path}
