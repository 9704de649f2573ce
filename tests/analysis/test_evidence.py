"""Evidence shows itself: in a notebook, as text, and as figures on axes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.pruned import effect, evidence
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vimoe.analysis.evidence import Calibrated, Evidence
from vimoe.errors import ConfigError


@pytest.fixture
def found() -> Evidence:
    made = evidence(effect(0.25, 0.125), effect(-0.5))
    return replace(made, layers=(made.layers[0], replace(made.layers[1], name="blocks.<b>.mlp")))


def test_a_notebook_shows_a_table(found: Evidence) -> None:
    page = found._repr_html_()
    assert page.count("<tr>") == 3 and "+0.2500 [+0.1250, +0.3750]" in page and "blocks.&lt;b&gt;.mlp" in page
    assert "<b>" not in page


def test_text_has_a_line_a_layer(found: Evidence) -> None:
    first, second = (line for line in str(found).splitlines() if line.startswith("blocks."))
    assert first.split()[0] == "blocks.0.mlp" and first.endswith("shared")
    assert "-0.5000 [-0.5000, -0.5000]" in second and "1 of 16 routes" in str(found)


def test_what_was_not_measured_is_left_out(found: Evidence) -> None:
    layers = tuple(replace(layer, permuted=None, frozen=None, dense={}, experts=()) for layer in found.layers)
    bare = replace(found, layers=layers, overruled_images=0)
    assert "nats on" not in str(bare) and "[" not in str(bare).splitlines()[2]
    assert bare._repr_html_().count("<td></td>") == 6


def test_figures_go_on_axes_of_yours(found: Evidence) -> None:
    axis = Figure().subplots()
    assert found.plot_heatmap("blocks.0.mlp", axis) is axis
    assert np.array_equal(axis.images[0].get_array(), np.full((5, 4), 0.25))
    assert isinstance(found.plot_heatmap("blocks.0.mlp"), Axes)
    assert [axis.get_title() for axis in found.plot_heatmaps().axes[:2]] == ["blocks.0.mlp", "blocks.<b>.mlp"]
    assert [axis.get_xlabel() for axis in found.plot_effects().axes] == ["change of the loss, nats"]
    with pytest.raises(ConfigError, match=r"layer='blocks.7.mlp': expected one of blocks.0.mlp"):
        found.plot_heatmap("blocks.7.mlp")


def test_older_files_say_once_how_many_draws_there_were(found: Evidence) -> None:
    values = found.to_dict()
    for layer in values["layers"]:
        del layer["draws"]
    assert [layer.draws for layer in Evidence.from_dict(values).layers] == [20, 20]
    again = Evidence.from_dict(replace(found, layers=(replace(found.layers[0], draws=7),)).to_dict())
    assert again.draws == 20 and again.layers[0].draws == 7


def test_files_without_calibrated_changes_are_read(found: Evidence) -> None:
    """As older ones are, and those of a segmenter; text and notebook have no line for what is not there."""
    change = replace(found.layers[0].permuted, calibrated=Calibrated(0.125, 0.0, 0.25, 1.5, 1.25))
    new = replace(found, layers=(replace(found.layers[0], permuted=change), found.layers[1]))
    lines = str(new).splitlines()
    assert lines[2].startswith("blocks.0.mlp") and lines[3].split() == ["calibrated", *str(change.calibrated).split()]
    assert lines[3].index("+0.1250") == lines[2].index("+0.5000") and lines[4].startswith("blocks.<b>.mlp")
    assert "the untouched one has 1.50" in str(new) and new._repr_html_().count("<tr>") == 4
    values = new.to_dict()
    assert values["layers"][0]["permuted"]["calibrated"] == {
        "value": 0.125, "low": 0.0, "high": 0.25, "temperature_before": 1.5, "temperature_after": 1.25,
    }  # fmt: skip
    assert Evidence.from_dict(values).layers[0].permuted == change
    for layer in values["layers"]:
        for each in (layer["permuted"], layer["frozen"], *layer["dense"].values(), *layer["experts"]):
            del each["calibrated"]
    old = Evidence.from_dict(values)
    assert old.layers[0].permuted == found.layers[0].permuted and str(old) == str(found)
    assert "alibrated" not in str(old)
