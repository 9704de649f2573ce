"""Settings of a run are described in words."""

from __future__ import annotations

from typing import Any

import pytest

from vimoe.config.moe import EXPERTS, ROUTERS, MoEConfig
from vimoe.report.run_files import describe


def test_what_settings_make_of_a_model_is_said_in_words() -> None:
    def words(fuse: str = "none", **moe: Any) -> str:
        return describe({"model": {"name": "vit"}, "moe": MoEConfig(**moe).to_dict(), "train": {"fuse": fuse}})

    assert words("ewa", layers="all") == "vit, dense, with 8 experts in every block while it was trained (ewa)"
    assert words(layers="none") == "vit, dense"
    assert words(layers="all", num_experts=0, num_shared_experts=2).startswith("vit with a dense FFN of 2 times")
    assert words().endswith("8 experts, 1 shared, 1 chosen for each image")
    assert words(num_shared_experts=0, top_k=2, routing="token").endswith("none shared, 2 chosen for each token")


def test_a_router_and_experts_of_ones_own_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another router may choose another number of experts than top_k."""
    monkeypatch.setitem(ROUTERS, "top-p", "nowhere:TopP")
    monkeypatch.setitem(EXPERTS, "low-rank", "nowhere:LowRank")

    def words(**moe: Any) -> str:
        return describe({"model": {"name": "vit"}, "moe": {**MoEConfig(routing="token").to_dict(), **moe}})

    assert words(router="top-p").endswith("8 experts, 1 shared, chosen by the router 'top-p' for each token")
    assert words(experts="low-rank").endswith("8 'low-rank' experts, 1 shared, 1 chosen for each token")
    old = {name: value for name, value in MoEConfig().to_dict().items() if name not in ("router", "experts")}
    assert describe({"model": {"name": "vit"}, "moe": old}).endswith("8 experts, 1 shared, 1 chosen for each image")
