"""The processes that `accelerate launch --cpu` was asked for: without MPI it starts one, and torch's launcher does."""

from __future__ import annotations

import os
import re

from vimoe.errors import ConfigError

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # of torch, and of each MPI


def starts(argv: list[str]) -> int | None:
    """Start all processes of a command that Accelerate started once, wait for them, and return the exit status.

    Accelerate tells the one process that there are to be several, and not how many: that is read off its own command.

    Args:
        argv: arguments of vimoe.

    Returns:
        Exit status of the first process that failed, or 0; None where nothing has to be started.

    Raises:
        ConfigError: if Accelerate's command cannot be found, or does not say how many.
    """
    # there is a port to meet at, and nobody has a rank
    if "MASTER_PORT" not in os.environ or any(rank in os.environ for rank in _RANKS):
        return None
    from accelerate.utils import parse_flag_from_env

    if not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return None
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main([*_like(_command()), "-m", "vimoe", *argv])
    except ChildFailedError as error:
        return abs(error.get_first_failure()[1].exitcode)  # which has said why
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _command() -> list[str]:
    """Return the arguments of the `accelerate launch` that started this process."""
    import psutil

    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error:  # of another user, or gone
            continue
        # accelerate launch, accelerate-launch, -m accelerate.commands.launch
        at = next((i for i, word in enumerate(words) if re.search(r"\blaunch(\.py)?$", word)), None)
        if at is not None and "accelerate" in " ".join(words[: at + 1]):
            return words[at + 1 :]
    raise _unknown()


def _like(command: list[str]) -> list[str]:
    """Return the options of torchrun for those of `accelerate launch`."""
    from accelerate.commands.launch import launch_command_parser

    options, _ = launch_command_parser().parse_known_args(command)
    if options.num_processes is None:  # it is in a file
        raise _unknown()
    machines = int(options.num_machines or 1)
    each = f"--nproc-per-node={options.num_processes // machines}"
    if machines == 1:
        return ["--standalone", each]
    place = [f"--master-addr={options.main_process_ip}", f"--master-port={options.main_process_port}"]
    return [f"--nnodes={machines}", f"--node-rank={options.machine_rank or 0}", *place, each]


def _unknown() -> ConfigError:
    return ConfigError(
        "accelerate launch --cpu started one process and not the others: expected --num_processes in its command; use "
        "torchrun --nproc-per-node=N -m vimoe train ..."
    )
