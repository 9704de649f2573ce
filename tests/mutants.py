"""Break the package in one place at a time, and see that the tests notice.

    python tests/mutants.py                     # all mutants, two at a time; takes some minutes
    python tests/mutants.py --only combine      # those with the word in their name
    python tests/mutants.py --out results.json

A mutant is a text in a module, what stands there instead, and the tests that ought to fail. Each runs in a copy of the
repository, so that a broken package never meets the real one. `tests/test_mutants.py` holds that each text is there
once, so that no mutant goes stale unseen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info", "runs", "build")
AT_ONCE = 2
LIMIT = 600  # seconds for the tests of one mutant; a mutant that hangs is noticed, too


class Mutant(NamedTuple):
    """One change of one module.

    Attributes:
        name: what goes wrong.
        module: path of the module within the package.
        text: what stands there now, once.
        instead: what stands there in the mutant.
        tests: paths within tests/ that ought to notice.
    """

    name: str
    module: str
    text: str
    instead: str
    tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = ()


@contextmanager
def changed(copy: Path, mutant: Mutant) -> Iterator[None]:
    """Break the copy of the repository while the block runs."""
    path = copy / "vimoe" / mutant.module
    source = path.read_text(encoding="utf-8")
    assert source.count(mutant.text) == 1, f"{mutant.name}: {source.count(mutant.text)} times in {mutant.module}"
    path.write_text(source.replace(mutant.text, mutant.instead), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")


def run(copy: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Run tests in a copy of the repository. Returns whether they pass, and the last line of pytest."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/{each}" for each in tests),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"more than {LIMIT} s"
    if done.returncode not in (0, 1):  # 1 is a test that failed; more is a mistake in this file
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (failed or done.stdout.splitlines()[-1:])[0][:160]


def main() -> None:
    """Run the mutants and print which of them the tests notice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="word in the names of the mutants to run")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    results = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        copies: Queue[Path] = Queue()
        for number in range(AT_ONCE):
            copies.put(Path(shutil.copytree(ROOT, Path(folder, str(number)), ignore=LEFT_OUT)))

        def one(mutant: Mutant) -> dict[str, object]:
            copy, start = copies.get(), time.perf_counter()
            try:
                with changed(copy, mutant):
                    passes, last = run(copy, mutant.tests)
            finally:
                copies.put(copy)
            return {"name": mutant.name, "killed": not passes, "by": last, "seconds": time.perf_counter() - start}

        for result in pool.map(one, chosen):
            results.append(result)
            print(f"{'killed  ' if result['killed'] else 'SURVIVED'} {result['name']}: {result['by']}", flush=True)
    killed = sum(bool(result["killed"]) for result in results)
    print(f"{killed} of {len(results)} killed")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
