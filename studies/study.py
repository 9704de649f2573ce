"""Compute the cells of a study, in any number of processes, and write its tables and figures from their files.

    python studies/study.py studies/vimoe --set CUB100=cub100 --set DINOV2=dinov2 --workers 2
    python studies/study.py studies/vimoe --report

STUDY/study.yaml has the settings that all arms share, data sets, arms, learning rates, seeds and contrasts. Every arm
(the dense one too) is trained with all rates on the search's seeds; the rate of the best mean rank on validation is
then trained on all seeds. With one rate only arms among which a contrast has to choose are searched. A cell is one JSON
file in STUDY/results, whose name ends in a hash of settings, data and code: what changed is computed anew. A cell that
was killed goes on from its checkpoint, in whichever process takes it.
Tables stand between two marks in STUDY/README.md; nothing in them is typed by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

# The package of this checkout, whose version is a part of the cells' keys. Without it the folder studies/vimoe, which
# lies beside this script, would pass for the package where that is installed as editable.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.one_cell import compute
from harness.plan import Cell, Study, code_version, digest_of_path, given_values
from harness.queue import Queue, Workers
from harness.slurm import submit

from vimoe.config.yaml_reader import write_yaml
from vimoe.errors import ConfigError, VimoeError, choice
from vimoe.files import write_text


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", type=Path, help="folder with study.yaml")
    parser.add_argument("--report", action="store_true", help="write tables and figures, and compute nothing")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=PATH", help="value of ${NAME}")
    parser.add_argument("--arms", nargs="+", default=[], help="arms to compute (default: all)")
    parser.add_argument("--data", nargs="+", default=[], help="data sets to compute (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time; with --slurm the number of jobs")
    parser.add_argument("--runs", type=Path, help="folder for run folders and claims (default: runs/STUDY)")
    parser.add_argument("--keep", action="store_true", help="keep the run folders of finished cells")
    parser.add_argument("--cell", help="compute this cell alone, in this process")
    parser.add_argument(
        "--slurm", nargs="*", metavar="NAME=VALUE", help="submit workers as jobs; submitit's parameters"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be computed or submitted")
    args = parser.parse_args(argv)
    args.runs = args.runs or Path("runs") / args.study.resolve().name
    return args


def macs(cell: Cell, values: dict[str, str]) -> float:
    """Return the multiply-adds of an image in a cell's ViT, without the decoder of a segmenter."""
    from vimoe.verbs import count

    settings = cell.filled(values)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "cell.yaml")
        asked = {name: dict(settings[name]) for name in ("model", "moe") if name in settings}
        asked.get("model", {}).pop("decoder", None)
        write_text(config, write_yaml(asked))
        _, found = count("count", ["--config", str(config)])
    return float(found["moe"]["macs"])


def work(study: Study, args: argparse.Namespace, argv: list[str]) -> int:
    """Compute cells, or one of them, or submit jobs that do; return an exit status."""
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: expected at least 1; leave it out for one")
    for arm in args.arms:
        if arm not in study.arms:
            raise ConfigError(f"--arms {arm}: {choice(arm, list(study.arms))}")
    values = given_values(args.set)
    study.check(values)
    cells = {cell.name: cell for cell in study.all_cells()}
    names = sorted({name for cell in cells.values() for name in cell.variables})
    inputs = {name: digest_of_path(values[name]) for name in names}
    codes = {after: code_version(after) for after in (False, True)}
    keys = study.keys(inputs, codes)
    if args.cell:
        if args.cell not in cells:
            raise ConfigError(f"--cell {args.cell}: {choice(args.cell, list(cells))}")
        cell = cells[args.cell]
        code = codes[bool(cell.after)]
        return compute(study, cell, keys[cell.fingerprint][0], inputs, values, args.runs, args.keep, code)
    queue = Queue(study, keys, args.runs, lambda cell: macs(cell, values), tuple(args.arms))
    this = [sys.executable, str(Path(__file__).resolve()), *argv]
    if args.slurm is not None:
        worker = [*without_slurm(this), "--workers", "1"]
        submit(worker, args.workers, args.slurm, args.runs / "slurm", args.dry_run, print)
        return 0
    workers = Workers(queue, lambda cell: in_process(this, cell, args.runs, keys[cell.fingerprint][0]), say)
    if args.dry_run:
        ready, waiting = queue.left(queue.done())
        print("\n".join(cell.name for cell in ready))
        print(f"and {len(waiting)} cells at the rates that the search will choose; {workers.state(args.workers)}")
        return 0
    say(workers.state(args.workers))
    failed = workers.work(args.workers)
    for name in failed:
        say(f"failed: {name}; see its log in {args.runs}, and start again to try it again")
    return 1 if failed else 0


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def without_slurm(command: list[str]) -> list[str]:
    """Return a command without --slurm and its values, --workers and --dry-run."""
    dropped = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    dropped.add_argument("--slurm", nargs="*")
    dropped.add_argument("--workers")
    dropped.add_argument("--dry-run", action="store_true")
    return dropped.parse_known_args(command)[1]


def in_process(command: list[str], cell: Cell, runs: Path, key: str) -> int:
    """Compute a cell by this script in a new process, with its log in the runs folder; return the exit status."""
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / f"{cell.name}.{key}.log"
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run([*command, "--cell", cell.name], stdout=out, stderr=out, check=False)
    if done.returncode == 0:
        log.unlink(missing_ok=True)
    return done.returncode


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 if a cell failed, 2 after a mistake, 130 after Ctrl-C."""
    given = sys.argv[1:] if argv is None else argv
    args = arguments(given)
    try:
        study = Study(args.study, () if args.report else tuple(args.data))
        if args.report:
            from harness.report import write_report

            write_report(study)
            return 0
        return work(study, args, given)
    except VimoeError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the cells in their processes have had it too, and left checkpoints
        print("study.py: interrupted; start again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
