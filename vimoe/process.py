"""This process among the processes of a job: its device, what all of them agree on, and which one writes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from vimoe.errors import VimoeError

if TYPE_CHECKING:  # torch takes seconds to import, which the module of progress bars should not
    import torch
    from torch import Tensor

Result = TypeVar("Result")


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


class Process:
    """One of the processes of a job, as `torchrun` or `accelerate launch` starts them, or the only one.

    It is Accelerate's `PartialState` with vimoe's rules: the first process alone writes (files, logs, progress bars),
    and an error in what it does for all ends all. Each method is called by every process of the job, in one order; in
    a job of one process it changes nothing and waits for nobody. To make one joins the job, which waits for the others:
    only a training does. All else asks `device` and `writes`, which a program with processes of its own may call.

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

        # Accelerate takes a process that torchrun started for the only one, where no GPU is there and none is refused
        launched_on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
        # the state is one and the same for all of this process
        self._state = PartialState(cpu=launched_on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
        self.rank, self.count = self._state.process_index, self._state.num_processes
        self.first, self.device = self._state.is_main_process, self._state.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, of the same shape, type and device in each."""
        from accelerate.utils import reduce

        if self.count == 1:
            return tensor
        summed: Tensor = reduce(tensor.to(self.device), "sum").to(tensor.device)
        return summed

    def any(self, flag: bool) -> bool:
        """Return True in all processes where the flag is true in one."""
        import torch

        return bool(self.sum(torch.tensor(int(flag))))

    def broadcast(self, value: Result) -> Result:
        """Return the first process's value in all; it is pickled, so it should be small."""
        from accelerate.utils import broadcast_object_list

        values: list[Result] = broadcast_object_list([value])
        return values[0]

    def once(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call a function in the first process alone, such as one that writes, and return its result in all.

        Raises:
            VimoeError: if the function raised in the first process; the others get its message.
        """
        outcome: tuple[Any, str | None] = (None, None)
        if self.first:
            try:
                outcome = (function(*args, **kwargs), None)
            except Exception as error:
                self.broadcast((None, str(error)))
                raise
        result, failure = self.broadcast(outcome)
        if failure is not None:
            raise VimoeError(failure)
        return result

    def one_log(self) -> None:
        """Let the first process alone log."""
        if not self.first:
            logging.getLogger("vimoe").setLevel(logging.CRITICAL)
