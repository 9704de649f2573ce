"""The tour runs in its time, and claims only what its seeds support."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from vimoe.accounting import Cost
from vimoe.cli import main
from vimoe.demo import compare
from vimoe.evaluate import Score
from vimoe.pruning import Receipt


def arm(*top1: float, images: int = 1000) -> list[Receipt]:
    cost = Cost(params=1, activated_params=1, macs=1, moe_layers=())
    return [Receipt(Score(value, 1.0, 1.0, images), cost, 1.0) for value in top1]


def verdict(ours: list[Receipt], control: list[Receipt], comparisons: int = 1) -> str:
    return compare({"a": ours, "b": control}, "a", "b", comparisons).rpartition(": ")[2]


def test_a_clear_difference_is_told_and_noise_is_not() -> None:
    control = arm(0.80, 0.81, 0.79)
    assert verdict(arm(0.90, 0.911, 0.889), control) == "better"
    assert verdict(arm(0.70, 0.711, 0.689), control) == "worse"
    assert verdict(arm(0.84, 0.79, 0.82), control) == "cannot be told apart"


def test_pairs_of_seeds_are_compared_not_means() -> None:
    """The seeds differ more than the arms; each pair differs by the same."""
    text = compare({"a": arm(0.92, 0.72, 0.822), "b": arm(0.90, 0.70, 0.80)}, "a", "b", 1)
    assert "+2.07 points" in text and text.endswith("better")


def test_more_comparisons_need_a_clearer_difference() -> None:
    ours, control = arm(0.84, 0.828, 0.832), arm(0.80, 0.80, 0.80)
    assert [verdict(ours, control, comparisons) for comparisons in (1, 20)] == ["better", "cannot be told apart"]


def test_seeds_that_agree_by_chance_to_an_image_are_not_certain() -> None:
    assert verdict(arm(0.801, 0.801, 0.801), arm(0.80, 0.80, 0.80)) == "cannot be told apart"


@pytest.mark.slow
def test_the_tour_takes_at_most_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    assert time.perf_counter() - start < 300
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    table = values["table"]
    assert {name: len(group) for name, group in table.items()}.pop("parent") == 1
    assert all(len(group) == 3 for name, group in table.items() if name != "parent")
    activated = [
        table[name][0]["activated_params"] for name in ("dense, second FFN", "ViMoE", "ViMoE, no shared expert")
    ]
    assert max(activated) < 1.01 * min(activated)  # equal but for the routers
    page = Path(values["report"]).read_text()
    assert all(name in page for name in table) and not re.search(r"(src|href)=(?!\"data:)", page)
