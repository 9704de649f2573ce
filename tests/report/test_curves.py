"""Curves show the rows of metrics.csv and load.csv."""

from __future__ import annotations

from pathlib import Path

from vimoe.report.curves import curves, loads


def test_curves_of_one_run_and_of_several(tmp_path: Path) -> None:
    paths = {}
    for name, top1 in (("one", 0.5), ("two", 0.7)):
        paths[name] = tmp_path / f"{name}.csv"
        paths[name].write_text(f"epoch,train_loss,val_loss,val_top1\n1,2,3,0.25\n2,1,2,{top1}\n")
    left, right = curves(paths["one"]).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2, 1], [3, 2]]
    left, right = curves(paths).axes
    assert [line.get_label() for line in left.lines] == ["one", "two"]
    assert [list(line.get_ydata()) for line in right.lines] == [[25, 50], [25, 70]]


def test_a_run_whose_epochs_were_not_validated_yet_has_its_loss_in_training_alone(tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.csv" for name in ("begun", "over")}
    paths["begun"].write_text("epoch,train_loss\n1,2\n2,1\n")
    paths["over"].write_text("epoch,train_loss,val_loss,val_top1\n1,2,3,0.25\n2,1,,\n3,1,2,0.5\n")
    left, right = curves(paths["begun"]).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2, 1]] and not right.lines
    left, right = curves(paths).axes
    assert [line.get_label() for line in left.lines] == ["over"]
    assert [list(line.get_xdata()) for line in right.lines] == [[1, 3]]


def test_one_epoch_has_one_tick(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,train_loss,val_loss,val_top1\n1,2,3,0.25\n")
    (tmp_path / "load.csv").write_text("epoch,layer,expert,share\n1,blocks.0.mlp,0,1\n")
    for figure in (curves(tmp_path / "metrics.csv"), loads(tmp_path / "load.csv")):
        for axis in figure.axes:
            low, high = axis.get_xlim()
            assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


def test_loads_have_a_panel_a_layer_and_a_line_an_expert(tmp_path: Path) -> None:
    rows = [f"{epoch},blocks.{layer}.mlp,{expert},0.5" for epoch in (1, 2) for layer in range(7) for expert in (0, 1)]
    (tmp_path / "load.csv").write_text("\n".join(["epoch,layer,expert,share", *rows]))
    axes = loads(tmp_path / "load.csv").axes
    assert [len(axis.lines) for axis in axes if axis.axison] == [2] * 7
