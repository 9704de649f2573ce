"""Experts that have one FFN in common, the base, and a small change each.

Axes: R rows that are routed (images or tokens), U tokens of a row, S slots in the order of their experts, D channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from vimoe.config.moe import MoEConfig
from vimoe.moe import ffn
from vimoe.moe.experts import Experts, Role


class SharedBase(Experts):
    """Base class of experts E_i = FFN + change_i, whose changes are zero at the start; see `Experts`.

    With exactly one shared expert S the FFN is S itself, so E_i = S + change_i at every step: S and the experts move
    together, are frozen together, and the layer has no more parameters than S, the router and the changes. Otherwise
    the experts own a copy of the FFN, which they share, and which is trained.

    A subclass adds the parameters of the changes, stacked by expert, and `weights`.

    Attributes:
        own: copy of the FFN; only without a shared expert or with several.
    """

    keeps_function = True

    def __init__(self, dense: nn.Module, config: MoEConfig) -> None:
        super().__init__(dense, config)
        if config.num_shared_experts != 1:
            dense = self.own = ffn.build(dense, ffn.read(dense)).requires_grad_(True)
        # in a tuple, because the layer registers its shared expert; copies of a layer keep the two the same
        self._base = (dense,)

    @property
    def base(self) -> nn.Module:
        """The FFN that all experts change."""
        return self._base[0]

    @property
    def reads(self) -> tuple[nn.Module, ...]:
        """The base, by `forward` and `weights`."""
        return self._base

    @property
    def roles(self) -> dict[str, Role]:
        """Changes belong to one expert each, all but biases are matrices; the experts' own base is shared."""
        return {
            name: Role(matrix=p.ndim > 1 and not name.endswith("bias"), per_expert=not name.startswith("own."))
            for name, p in self.named_parameters()
        }


def rows_of(x_RUD: Tensor, source_S: Tensor | None) -> Tensor:
    """(R, U, D) to (S, U, D): the row of each slot."""
    return x_RUD if source_S is None else x_RUD.index_select(0, source_S)
