"""Several processes train what one process trains: losses, gradients, weights, scores; whatever they share out."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.jobs import TESTS, finish, start
from helpers.shared_losses import everything, of_routers
from helpers.shared_training import CASES, images_of, trained

from vimoe.process import Process

SHORT = {"epochs": 1}
LONG = {"epochs": 17, "double": True}  # of three steps
# of one step; a bias before a batch norm has a gradient of zero, and of its rounding AdamW makes steps by the rate
LONG_OF_SCENES = {"epochs": 50, "double": True, "lr": 5e-4}
OF_IMAGES = sorted(set(CASES) - {"share", "scenes"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    images_of(path)
    return path


def in_job(folder: Path, out: Path, count: int, changes: dict[str, Any], *cases: str) -> None:
    """Lets so many processes train the cases; `out` has a file of each."""
    out.mkdir()
    job = start(count, TESTS / "helpers" / "shared_training.py", folder, out, changes, *cases)
    ended = finish(job, 600)
    assert [status for status, _, _ in ended] == [0] * count, ended
    assert "find_unused_parameters" not in "".join(errors for _, _, errors in ended) or {"frozen", "stopped"} & {*cases}


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    in_job(folder, folder / "two", 2, SHORT, *CASES)
    return folder / "two"


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if k not in ("images_per_second", "layer")} for row in found]


PIXELS = ("val_miou", "val_pixel_accuracy")  # scores by steps: of a pixel whose two best classes are all but equal


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], ours_in: Path, theirs_in: Path, within: float) -> None:
    scale = ours["gradient"].abs().max()
    torch.testing.assert_close(theirs["gradient"] / scale, ours["gradient"] / scale, rtol=0, atol=1e-5)
    assert list(theirs["weights"]) == list(ours["weights"]) and theirs["alarms"] == ours["alarms"]
    apart = [(theirs["weights"][name] - each).abs().flatten().double() for name, each in ours["weights"].items()]
    # a gradient that is 0 but for rounding, such as that of a key's bias, becomes a step of AdamW
    assert torch.cat(apart).quantile(0.98) < within
    for bias, other in zip(ours["bias"], theirs["bias"], strict=True):
        assert (bias is None and other is None) or torch.equal(bias, other)
    for name, rel in (("metrics.csv", 100), ("load.csv", 100), ("health.csv", 1000)):  # logits of such weights too
        if (ours_in / name).exists():
            for row, other in zip(rows(ours_in / name), rows(theirs_in / name), strict=True):
                wide = {key: 1000 if key in PIXELS else rel for key in row}
                gap = {"router_margin": 3000 * row.get("logit_rms", 0)}  # 3% of the scores whose difference it is
                near = {key: max(10, gap.get(key, 0)) * within for key in row}
                assert other == {key: pytest.approx(row[key], rel=wide[key] * within, abs=near[key]) for key in row}


@pytest.mark.parametrize("case", sorted(set(CASES) - {"share"}))
def test_two_train_as_one(folder: Path, two: Path, case: str) -> None:
    ours = trained(folder, folder / case, case, **SHORT)
    theirs = torch.load(two / f"{case}.pt", weights_only=False)
    assert_same(ours, theirs, folder / case, two / case, 1e-5)


def test_two_whose_routers_stop_train_as_one(folder: Path) -> None:
    """After the first of two epochs."""
    longer = {"epochs": 2}
    in_job(folder, folder / "stops", 2, longer, "stopped")
    ours = trained(folder, folder / "stops-one", "stopped", **longer)
    theirs = torch.load(folder / "stops" / "stopped.pt", weights_only=False)
    assert_same(ours, theirs, folder / "stops-one", folder / "stops" / "stopped", 1e-5)
    assert [row["router_gradient"] > 0 for row in rows(folder / "stops" / "stopped" / "health.csv")] == [True, False]


def assert_spread_is_one(folder: Path, parallel: dict[str, int], *cases: str, **changes: Any) -> None:
    """The processes of a mesh train what one process trains: gradients, weights, logs, scores."""
    name = "-".join(f"{dimension}{size}" for dimension, size in {**parallel, **changes}.items())
    changes = {**SHORT, **changes}
    in_job(folder, folder / name, math.prod(parallel.values()), {**changes, "parallel": parallel}, *cases)
    for case in cases:
        ours = trained(folder, folder / f"{name}-one-{case}", case, **changes)
        theirs = torch.load(folder / name / f"{case}.pt", weights_only=False)
        largest = ours["norms"].max()
        torch.testing.assert_close(theirs["norms"] / largest, ours["norms"] / largest, rtol=0, atol=1e-5)
        theirs["gradient"] = ours["gradient"]  # which is in another order of groups
        assert_same(ours, theirs, folder / f"{name}-one-{case}", folder / name / case, 1e-5)
        assert theirs["val"]["loss"] == pytest.approx(ours["val"]["loss"], rel=1e-3), case


def test_two_that_share_the_experts_train_as_one(folder: Path) -> None:
    """Of the nine images of validation the first process has two batches, the other one."""
    assert_spread_is_one(folder, {"expert": 2}, "image", "bias", batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"expert": 2}, {"fsdp": 2}, {"fsdp": 2, "expert": 2}])
def test_any_mesh_trains_as_one(folder: Path, parallel: dict[str, int]) -> None:
    for_scenes = ["scenes"] if math.prod(parallel.values()) == 2 else []  # three images of validation
    assert_spread_is_one(folder, parallel, "token", "image", "rows", "bias", "mixed", "frozen", *for_scenes)


def test_losses_over_each_share_are_others(folder: Path, two: Path) -> None:
    ours = trained(folder, folder / "share", "share", **SHORT)
    theirs = torch.load(two / "share.pt", weights_only=False)
    assert (ours["gradient"] - theirs["gradient"]).abs().max() > 1e-3 * ours["gradient"].abs().max()


@pytest.mark.parametrize(
    ("count", "changes", "cases"),
    [
        pytest.param(2, LONG, ["mixed"], marks=pytest.mark.slow),
        pytest.param(2, LONG, OF_IMAGES, marks=pytest.mark.slow),
        pytest.param(4, LONG, OF_IMAGES, marks=pytest.mark.slow),
        pytest.param(2, LONG_OF_SCENES, ["scenes"], marks=pytest.mark.slow),
        pytest.param(4, LONG_OF_SCENES, ["scenes"], marks=pytest.mark.slow),
    ],
)
def test_fifty_steps_of_several_are_those_of_one(
    folder: Path, tmp_path: Path, count: int, changes: dict[str, Any], cases: list[str]
) -> None:
    """In float64: in float32 the steps of AdamW, and routes at a tie, make more of what is rounding."""
    in_job(folder, tmp_path / "job", count, changes, *cases)
    for case in cases:
        ours = trained(folder, tmp_path / case, case, **changes)
        theirs = torch.load(tmp_path / "job" / f"{case}.pt", weights_only=False)
        assert ours["weights"].keys() == theirs["weights"].keys()
        for name in ("gradient", "last"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-10)
        for name, best in ours["weights"].items():
            torch.testing.assert_close(theirs["weights"][name], best, rtol=0, atol=1e-10, msg=f"{case}, {name}")


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_of_shares_have_the_value_and_the_gradient_of_the_batch(tmp_path: Path, count: int) -> None:
    ended = finish(start(count, TESTS / "helpers" / "shared_losses.py", tmp_path))
    assert [status for status, _, _ in ended] == [0] * count, ended
    expected = everything(Process())
    for rank in range(count):
        found = torch.load(tmp_path / f"{rank}.pt")
        for part, values in expected.items():
            for name, value in values.items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-10, atol=1e-11, msg=name)


def test_losses_of_shares_alone_are_others() -> None:
    """So that the test above can fail: without the other processes, the first share has losses of its own."""

    class Half(Process):
        def __init__(self) -> None:
            self.rank, self.count = 0, 2

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return 2 * tensor

    alone, whole = of_routers("image", Half()), of_routers("image", Process())
    for name in ("balance_loss", "importance_loss", "variance_loss"):
        assert not torch.allclose(alone[name], whole[name], rtol=1e-3)
