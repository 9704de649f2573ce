"""The largest memory of a piece of work, as torch's allocator tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from vimoe.moe import grouped_linear


def largest(work: Callable[[], object]) -> int:
    """Return the bytes of tensors that a call has at its most, above those at its beginning, on a CPU.

    Buffers that a collective operation makes for itself are left out: they differ by the library that sends. Gradients
    of idle experts count as if they were written, which is the most that they can take.

    Args:
        work: function to call once.
    """
    filled = mock.patch.object(grouped_linear, "unwritten_zeros", lambda weight: weight.new_zeros(weight.shape))
    with filled, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    total = most = 0
    made: dict[int, int] = {}  # by address; 0 for a buffer
    for event, sends in sorted(_allocations(profiled), key=lambda pair: pair[0].start_time_ns):
        address, size = event.typed[1].ptr, event.typed[1].alloc_size
        if size > 0:
            total -= made.pop(address, 0)  # which another thread, that of a collective operation, freed unseen
            made[address] = 0 if sends else size
            total += made[address]
        else:
            total -= made.pop(address, -size)  # of before
        most = max(most, total)
    return most


def _allocations(profiled: profile) -> Iterator[tuple[Any, bool]]:
    """Yield each event of memory, and whether a collective operation made it."""
    results: Any = profiled.profiler
    stack = [(node, False) for node in results.kineto_results.experimental_event_tree()]
    while stack:
        node, sends = stack.pop()
        if node.typed[0] == _EventType.Allocation:
            yield node, sends
        stack += [(child, sends or node.name.startswith(("c10d::", "gloo:"))) for child in node.children]
