"""The router "sigmoid": every row goes to the k experts with the largest sigmoid of its score.

Axes: R rows that are routed (images or tokens), N experts.
"""

from __future__ import annotations

from torch import Tensor

from vimoe.moe.top_k import TopKRouter


class SigmoidRouter(TopKRouter):
    """Sigmoid of each score, s_i = 1 / (1 + exp(-w_i x)), and the k best, chosen by s_i + b_i where there is a bias.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), whose gates are s_i / sum_chosen s_j. Here the gate "probability"
    divides by that sum where the gates are to sum to 1 (`MoEConfig.gates_sum_to_one`) and is s_i elsewhere. A weight
    does not fall when another expert's score rises; such gates need fewer samples in theory (arXiv 2405.13997).

    It departs from DeepSeek-V3 in the balance loss, which is of the softmax of the scores as for all routers, and has
    neither groups of experts nor a factor on the gates.
    """

    def probabilities(self, logits_RN: Tensor) -> Tensor:
        """Return (R, N) the sigmoid of each score."""
        return logits_RN.sigmoid()
