"""Peak of a step whose weights are divided: a walk over its stages, with what FSDP2 holds beside the step itself.

Groups of weights are gathered together: what is outside of blocks, each block, and where experts are spread (e > 1) the
experts of each layer apart. W is what this device has of a group once it is gathered, G its gradients then, of f
shards.

    forward    a group is gathered into one buffer (W) and copied from it (W again). The copy is freed after the group;
               the buffer stays until the next group's is full. What is outside of blocks stays gathered.
    backward   the buffer of the next group is filled while one is computed, and freed when it has been copied.
    after it   the copy is freed; the gradients (G) are copied into a buffer (G again), whose reduction leaves G / f;
               the buffer stays until the next group's gradients are there.

With f = 1 there is no buffer of weights, and all else is the same. Experts that are divided along another axis than the
first are put together from their buffer in a second one (W once more, for a moment). They keep the tokens that they got
until their backward pass, and have them twice more when these come and when the outputs go. The gradient of a weight of
theirs is there twice for a moment, since it is divided by e.

The order of these events is that of torch's `fully_shard` with its defaults. Each rule was read in its code and checked
against the memory of real steps, which `tests/training/test_gathering.py` does again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vimoe.config.parallel import ParallelConfig
from vimoe.training.footprint import Footprint
from vimoe.training.stages import Moment, Stage

Key = tuple[str, bool]  # of a group: its block, and whether it is of the experts alone
OUTSIDE: Key = ("", False)


@dataclass(frozen=True)
class Group:
    """Bytes of weights that are gathered together, on one device.

    Attributes:
        weights: all of them.
        dense, expert: gradients of dense weights, and of experts over all devices along `expert`.
        gradients: both, on this device.
    """

    weights: float
    dense: int
    expert: int
    gradients: float


def spread_peak(found: Footprint, mesh: ParallelConfig) -> float:
    """Return the largest sum of all that a step makes and gathers on a device of a mesh that spreads weights."""
    return max(_Walk(found, mesh).moments())


class _Walk:
    """Weights, buffers, tokens and gradients that are there from stage to stage, in the order of a step."""

    def __init__(self, found: Footprint, mesh: ParallelConfig) -> None:
        self.stages, self.shards, self.spread = found.stages, mesh.fsdp, mesh.expert
        self.groups = _groups(found, mesh.expert)
        self.tokens = _by_block(found)
        self.returning = {stage.block for stage in found.stages if stage.phase == "backward" and stage.experts}
        self.largest = {each.name: each.largest_expert for each in found.weights}
        self.earlier = 0.0  # gradients of earlier steps, apart from those of this one until the backward pass is over
        if found.accumulates:
            self.earlier = found.sum("trained_dense") / mesh.fsdp
            self.earlier += found.sum("trained_expert") / (mesh.fsdp * mesh.expert)
        self.gathered: list[Key] = []
        self.forward: list[Key] = []  # groups in the order in which the forward pass left them
        self.buffer = self.ahead = self.reducing = self.received = 0.0
        self.next: Key | None = None  # whose weights are in `ahead`
        self.reduced = [0, 0]  # gradients of dense weights and of experts that are divided already

    def moments(self) -> Iterator[float]:
        """Yield bytes at all moments at which they can be largest."""
        for stage in self.stages:
            yield from self._enter(stage)
            yield self._largest(stage, stage.moments) + self._passing(stage)

    def _passing(self, stage: Stage) -> float:
        """Return what is there for a moment where experts are spread: copies of tokens, or of a weight's gradient."""
        if not stage.experts or self.spread == 1:
            return 0
        gradient = self.largest[stage.block] / self.spread if stage.phase == "backward" else 0
        return max(2 * self.tokens[stage.block], gradient)

    def _enter(self, stage: Stage) -> Iterator[float]:
        needed = [] if stage.phase == "update" else [OUTSIDE]
        if stage.block:
            needed += [(stage.block, experts) for experts in (False, True)[: 1 + stage.experts]]
        needed = [key for key in needed if key in self.groups]
        if stage.phase != "forward":
            self.buffer = 0
        for key in reversed([key for key in self.gathered if key not in needed]):
            yield from self._leave(key, stage)
        for key in needed:
            if key not in self.gathered:
                yield from self._gather(key, stage)
        if stage.experts and self.spread > 1 and stage.phase == "forward" and stage.block in self.returning:
            self.received += self.tokens[stage.block]
        if stage.phase == "update":
            self.reducing = self.ahead = self.earlier = 0

    def _gather(self, key: Key, stage: Stage) -> Iterator[float]:
        size = self.groups[key].weights
        if self.shards > 1:
            self.ahead = size if key == self.next else self.ahead + size
            yield self._at(stage)
            self.buffer = 0
        self.gathered.append(key)
        yield self._at(stage) + size * (self.shards > 1 and _of_experts(key))
        if self.shards > 1:
            self.buffer, self.ahead, self.next = (size if stage.phase == "forward" else 0), 0, None
            if stage.phase == "backward":
                self._prefetch(key)

    def _prefetch(self, key: Key) -> None:
        before = self.forward[: self.forward.index(key)]
        if before and before[-1] not in self.gathered:
            self.next = before[-1]
            self.ahead = self.groups[self.next].weights

    def _leave(self, key: Key, stage: Stage) -> Iterator[float]:
        group = self.groups[key]
        self.gathered.remove(key)
        if stage.phase == "forward":
            self.forward.append(key)
            return
        if _of_experts(key):
            self.received -= self.tokens[key[0]]
        if group.gradients:
            self.reducing = group.gradients
            yield self._at(stage)
            self.reduced[0] += group.dense
            self.reduced[1] += group.expert

    def _at(self, stage: Stage) -> float:
        """Return the bytes at the beginning of a stage, with what is gathered now."""
        return self._largest(stage, (stage.start,))

    def _largest(self, stage: Stage, moments: tuple[Moment, ...]) -> float:
        """Return the largest sum at some moments of a stage, with what is gathered now."""
        held = sum(self.groups[key].weights for key in self.gathered)
        held += self.buffer + self.ahead + self.reducing + self.received + self.earlier
        return held + max(other + self._shared(dense, expert) for other, dense, expert in moments)

    def _shared(self, dense: int, expert: int) -> float:
        """Return the bytes of gradients on this device: its share, and the whole of those that are not divided yet."""
        done_dense, done_expert = self.reduced
        whole = dense - done_dense + (expert - done_expert) / self.spread
        return whole + (done_dense + done_expert / self.spread) / self.shards


def _of_experts(key: Key) -> bool:
    return key[1]


def _by_block(found: Footprint) -> dict[str, int]:
    """Return the bytes of the tokens that experts get, by the block that they lie in."""
    blocks = [each.name for each in found.weights if each.name]
    return {
        block: each.bytes for each in found.exchanges for block in blocks if f"{each.layer}.".startswith(f"{block}.")
    }


def _groups(found: Footprint, spread: int) -> dict[Key, Group]:
    groups = dict[Key, Group]()
    for each in found.weights:
        dense, expert = each.trained_dense, each.trained_expert
        if spread > 1 and each.expert:
            groups[each.name, False] = Group(each.dense, dense, 0, dense)
            groups[each.name, True] = Group(each.expert / spread, 0, expert, expert / spread)
        else:
            groups[each.name, False] = Group(each.dense + each.expert, dense, expert, dense + expert)
    return groups
