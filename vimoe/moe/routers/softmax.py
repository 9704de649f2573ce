"""The router "softmax": every row goes to the k experts with the largest probability."""

from __future__ import annotations

from vimoe.moe.top_k import TopKRouter


class SoftmaxRouter(TopKRouter):
    """Softmax over the scores of all experts, and the k best: Shazeer et al., 2017 (arXiv 1701.06538).

    Softmax comes before top-k, as in V-MoE (arXiv 2106.05974), so that a single gate has a gradient.
    """

    @property
    def blind(self) -> bool:
        """True if its gates are constant, such as the only one that is always 1."""
        return bool(self.gate.blind(self.slots, constant=max(self.config.pools) == 1))
