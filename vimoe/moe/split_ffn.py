"""An FFN that two modules of a block share: the first holds fc1 and the activation, the second fc2 and what follows.

transformers has such pairs (BertIntermediate and BertOutput), and what follows may be a dropout, a norm and the
block's residual. None of it has to be known: surgery puts a layer in the place of the first module, and nn.Identity in
that of fc2 inside of the second, which goes on with its dropout, norm and residual.
"""

from __future__ import annotations

from torch import Tensor, nn

from vimoe.moe.ffn import KINDS, Kind


class SplitFFN(nn.Module):
    """fc2(act(fc1(x))), seen as one module; its parts may stand in a model at the same time.

    Args:
        first: module that computes act(fc1(x)), with these parts as `dense` and `intermediate_act_fn`.
        last: fc2.
        end: name of fc2 in the block that holds the first module, such as "output.dense".
    """

    def __init__(self, first: nn.Module, last: nn.Module, end: str) -> None:
        super().__init__()
        self.first, self.last, self.end = first, last, end
        self.training = first.training

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        y: Tensor = self.last(self.first(x))
        return y


KINDS[SplitFFN] = Kind(fc1=("first.dense",), fc2="last", act="first.intermediate_act_fn")
