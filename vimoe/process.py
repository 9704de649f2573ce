"""This process among the processes of a job: its device, what all of them agree on, and which one writes."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from vimoe.errors import ConfigError, VimoeError

if TYPE_CHECKING:  # torch takes seconds to import, which the module of progress bars should not
    import torch
    from torch import Tensor

Result = TypeVar("Result")

LINGER = 5.0  # seconds that the first process waits for others to notice that the job has failed
# the longest waits for another process: in a step, and while the first decodes a million images for all
IMPATIENT, PATIENT = timedelta(minutes=30), timedelta(days=1)

logger = logging.getLogger(__name__)


def device() -> torch.device:
    """Return the device that this process computes on: a GPU if there is one, and the job's if it has joined one."""
    import torch
    from accelerate.state import PartialState

    if PartialState._shared_state:
        return PartialState().device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def writes() -> bool:
    """Return True in the process that writes: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> int:
    """Return the number of processes that a launcher started; a number without a rank is not a launcher's."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if "RANK" in os.environ and count.isdecimal() else 1


def speaks() -> bool:
    """Return True in the process that says why a job ends: the first that fails, since others fail because of it.

    They are counted in the job's store. Where no launcher keeps it, the first process does, and so lingers a moment.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return writes()  # a mistake that all see before they join
    try:
        store = distributed.distributed_c10d._get_default_store()
        failed, until = store.add("vimoe/failed", 1), monotonic() + LINGER
        while writes() and monotonic() < until and store.add("vimoe/failed", 0) < distributed.get_world_size():
            sleep(0.05)
    except RuntimeError:  # the first process was killed
        return True
    return bool(failed == 1)


def others_ended(error: Exception) -> bool:
    """Return True for the error of a process that waited for another one in vain."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    # a plain RuntimeError of gloo; another error may name a file, such as /data/igloo/1.jpg
    return launched() > 1 and isinstance(error, RuntimeError) and re.search(r"\bgloo\b", str(error)) is not None


class Process:
    """One of the processes of a job, as `torchrun` or `accelerate launch` starts them, or the only one.

    It is Accelerate's `PartialState` with vimoe's rules: the first process alone writes (files, logs, progress bars),
    and an error in what it does for all ends all. Each method is called by every process of the job, in one order; in
    a job of one process it changes nothing and waits for nobody. To make one joins the job, which waits for the others:
    only a training does, and a verb of the command line that shares its work (`joined`). All else asks `device` and
    `writes`, which a program with processes of its own may call, or is `Alone`.

    Tensors are summed on the device, and all else goes over the CPUs. Nothing waits for ever: a process that has ended
    is noticed at once, and one that is not heard of after half an hour, or a day where the first is at long work.

    Raises:
        ConfigError: if the environment speaks of several processes, and does not say enough to join them.

    Attributes:
        rank: index of this process, from 0.
        count: number of processes.
        first: True in the process that writes.
        device: device that this process computes on, a GPU where there is one.
    """

    rank: int
    count: int
    first: bool
    device: torch.device

    def __init__(self) -> None:
        import torch
        from accelerate.state import PartialState
        from accelerate.utils import parse_flag_from_env

        on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        # Accelerate takes a process that torchrun started for the only one, where no GPU is there and none is refused
        launched_on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
        # the state is one and the same for all of this process
        self._state = PartialState(cpu=launched_on_cpu or on_cpu)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        self.first, self.device = self._state.is_main_process, self._state.device
        several = os.environ.get("WORLD_SIZE", "1")
        if self.count == 1 and several != "1":  # else each would train alone, into the same folder
            raise ConfigError(
                f"WORLD_SIZE={several} in the environment of the only process: expected RANK, LOCAL_RANK, MASTER_ADDR "
                f"and MASTER_PORT too; start it by torchrun, or unset WORLD_SIZE"
            )
        if self.count > 1:
            self._quick, self._patient = _group(IMPATIENT), _group(PATIENT)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, of the same shape, type and device in each, without gradient.

        In a job of one process it is the tensor itself.
        """
        import torch

        if self.count == 1:
            return tensor
        summed = torch.clone(tensor.detach().to(self.device), memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes; its gradient goes to the tensor of this process, undivided.

        So losses over a batch that the processes share are right where gradients are then averaged over them, as
        DistributedDataParallel does: for a loss L of the means m = 1/n sum_r m_r that each process computes,
        1/n sum_r L'(m) dm_r is dL. All processes must compute the same L.
        """
        if self.count == 1:
            return tensor
        return self.sum(tensor) / self.count + (tensor - tensor.detach())

    def any(self, flag: bool) -> bool:
        """Return True in all processes where the flag is true in one."""
        import torch

        if self.count == 1:
            return flag
        one = torch.tensor(int(flag), device="cpu")
        torch.distributed.all_reduce(one, torch.distributed.ReduceOp.MAX, self._quick)
        return bool(one)

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank; they are pickled, so they should be small."""
        import torch

        values = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, value, self._quick)
        return values

    def merge(self, values: Mapping[int, Result]) -> list[Result]:
        """Return the values of all processes in the order of their keys, such as places of images; keys differ."""
        merged = {key: value for part in self.gather(values) for key, value in part.items()}
        return [merged[key] for key in sorted(merged)]

    def broadcast(self, value: Result) -> Result:
        """Return the first process's value in all; it is pickled, so it should be small."""
        import torch

        values = [value]
        if self.count > 1:
            torch.distributed.broadcast_object_list(values, 0, self._patient)
        return values[0]

    def once(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function in the first process alone, such as one that writes, and return its result in all.

        Raises:
            VimoeError: if the function raised in the first process; the others get its error, or the name of a bug.
        """
        outcome: tuple[Any, VimoeError | None] = (None, None)
        if self.first:
            try:
                outcome = (function(*args, **kwargs), None)
            except Exception as error:
                mistake = isinstance(error, VimoeError)
                self.broadcast((None, error if mistake else VimoeError(f"the first process ended by {error!r}")))
                raise
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise failure
        return result

    def first_then_all(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in the first process, and then in the others, which find the files that it has written.

        Raises:
            VimoeError: as `once`.
        """
        made: list[Result] = []
        self.once(lambda: made.append(function(*args)))
        return made[0] if made else function(*args)

    def one_log(self) -> None:
        """Let the first process alone log and warn."""
        if not self.first:
            logging.getLogger("vimoe").setLevel(logging.CRITICAL)
            warnings.simplefilter("ignore")


class Alone(Process):
    """A process that shares its work with no other, and joins no job, whatever started it."""

    def __init__(self) -> None:
        self.rank, self.count, self.first, self.device = 0, 1, True, device()


def joined() -> Process:
    """Return this process of the job that a launcher started, which it joins; or one alone. Raises as `Process`."""
    return Process() if launched() > 1 else Alone()


@functools.cache
def _group(timeout: timedelta) -> Any:
    """Return the group of all processes that talks over CPUs and waits so long, of which a process has one."""
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=timeout)
