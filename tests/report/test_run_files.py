"""Settings of a run are described in words."""

from __future__ import annotations

from typing import Any

from vimoe.config.moe import MoEConfig
from vimoe.report.run_files import describe


def test_what_settings_make_of_a_model_is_said_in_words() -> None:
    def words(**moe: Any) -> str:
        return describe({"model": {"name": "vit"}, "moe": MoEConfig(**moe).to_dict()})

    assert words(layers="none") == "vit, dense"
    assert words(layers="all", num_experts=0, num_shared_experts=2).startswith("vit with a dense FFN of 2 times")
    assert words(num_shared_experts=0, top_k=2, routing="token").endswith("none shared, 2 chosen for each token")
