"""Workers of a study as jobs of a SLURM cluster, through submitit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from vimoe.config.yaml_reader import read_yaml
from vimoe.errors import ConfigError, first_line


def submit(command: Sequence[str], jobs: int, options: Sequence[str], logs: Path, dry_run: bool) -> list[str]:
    """Submit jobs that each work on the queue; return a line for each.

    A job takes cells until none is left; one that ends before, by the cluster's limit of time, leaves a cell that the
    next job goes on with. So a job is no cell, and submitting too many or too few of them does no harm.

    Args:
        command: command of one worker.
        jobs: number of jobs.
        options: NAME=VALUE for submitit's `update_parameters`, such as timeout_min=240 or slurm_partition=gpu.
        logs: folder of submitit's scripts and logs.
        dry_run: only show the jobs, and import nothing.

    Raises:
        ConfigError: if submitit is not installed, or an option is no NAME=VALUE.
    """
    for option in options:
        if "=" not in option:
            raise ConfigError(f"--slurm {option}: expected NAME=VALUE, such as timeout_min=240")
    try:
        given = {name: read_yaml(value) for name, value in (option.split("=", 1) for option in options)}
    except yaml.YAMLError as error:
        raise ConfigError(f"--slurm {' '.join(options)}: {first_line(error)}; expected values as in YAML") from error
    if dry_run:
        return [f"job {number + 1} of {jobs} with {given}: {shlex.join(command)}" for number in range(jobs)]
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("--slurm needs submitit, which is not installed: pip install submitit") from error
    executor = submitit.AutoExecutor(folder=logs)
    executor.update_parameters(**given)
    submitted = [executor.submit(submitit.helpers.CommandFunction(list(command))) for _ in range(jobs)]
    return [f"submitted job {job.job_id}" for job in submitted]
