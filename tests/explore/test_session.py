"""What a session says of a run, against the model itself."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.explored import explored
from helpers.pictures import picture
from PIL import Image

from vimoe.data.images import open_image
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError, VimoeError
from vimoe.explore.overrule import OTHERS, SHARED
from vimoe.explore.session import NEAREST, Session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    found = Session(explored(tmp_path_factory.mktemp("image")))
    yield found
    found.close()


def content(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] | None = None) -> bytes:
    out, made = io.BytesIO(), picture(colour, 0)
    (made.resize(size) if size else made).save(out, "PNG")
    return out.getvalue()


def test_the_state_is_plain_and_has_every_layer_image_and_expert(session: Session) -> None:
    state = json.loads(json.dumps(session.state()))
    assert [layer["experts"] for layer in state["layers"]] == [4] * len(session.layers)
    assert len(state["images"]) == len(session.run.data.val)
    assert {image["label"] for image in state["images"]} == {"blue", "green", "red"}
    for name, seen in state["seen_most"].items():
        assert sorted(i for ids in seen for i in ids) == list(range(len(state["images"])))  # one expert an image
        for expert, ids in enumerate(seen):
            assert all(int(session.routes[name][i].experts[0, 0]) == expert for i in ids)


def test_a_look_is_the_model_s_own_prediction_and_routes(session: Session) -> None:
    found = session.look(2, {})
    assert found["overruled"] is None and len(found["nearest"]) == min(NEAREST, len(session.files) - 1)
    assert 2 not in found["nearest"]
    here, there = found["plain"]["prediction"]["classes"], session.predicted[2]["classes"]  # in a batch of one, of all
    assert [each["name"] for each in here] == [each["name"] for each in there]
    assert [each["probability"] for each in here] == pytest.approx([each["probability"] for each in there], abs=1e-6)
    for name, own in found["plain"]["layers"].items():
        routing, ((expert, gate),) = session.routes[name][2], own["chosen"]
        assert expert == routing.experts[0, 0] and gate == pytest.approx(float(routing.gates[0, 0]), abs=1e-6)


def test_a_file_of_the_user_is_looked_at_and_overruled(session: Session) -> None:
    name = list(session.layers)[-1]
    found = session.look(content(), {name: "expert 3"})
    assert found["overruled"]["layers"][name]["chosen"][0][0] == 3
    assert found["plain"]["layers"] == session.look(content(), {})["plain"]["layers"]
    shared = session.look(content(), dict.fromkeys(session.layers, SHARED))["overruled"]
    assert all(layer["chosen"] == [] for layer in shared["layers"].values())
    assert session.look(content(), {name: OTHERS})["overruled"]["layers"][name]["chosen"]


@pytest.mark.parametrize("damaged", [b"hello", b"\x89PNG\r\n\x1a\n" + b"0" * 50, b"GIF89a<script>alert(1)</script>"])
def test_a_file_that_is_no_image_is_told_in_one_line(session: Session, damaged: bytes) -> None:
    with pytest.raises(VimoeError, match="this file cannot be read") as raised:
        session.look(damaged, {})
    assert "\n" not in str(raised.value) and "/" not in str(raised.value)


def test_images_that_are_not_there_are_refused(session: Session) -> None:
    with pytest.raises(VimoeError, match="image 99: expected 0 to"):
        session.look(99, {})


def test_tokens_have_a_map(tmp_path: Path) -> None:
    session = Session(explored(tmp_path, "token"), images=2)
    assert len(session.files) == 2
    first, *_, last = session.look(0, {})["plain"]["layers"].values()
    rows = first["map"]
    assert len(rows) == len(rows[0]) and all(0 <= expert < 4 for row in rows for expert in row)
    seen = Image.open(io.BytesIO(b64decode(session.look(0, {})["seen"].partition(",")[2])))
    assert seen.size == tuple(preprocessing(session.model)["input_size"][1:])  # the crop that the map lies over
    assert last["map"] == []  # of the class token alone
    name = next(iter(session.layers))
    exchanged = session.look(0, {name: OTHERS})["overruled"]["layers"][name]["map"]
    flat = torch.tensor(rows).flatten()
    assert torch.tensor(exchanged).numel() == flat.numel()
    session.close()
    assert not session.files[0].exists()


def test_scenes_have_a_mask_and_a_map(tmp_path: Path) -> None:
    session = Session(explored(tmp_path, "scenes"))
    name, state = next(iter(session.layers)), session.state()
    found = session.look(0, {name: SHARED})
    assert found["plain"]["prediction"]["picture"].startswith("data:image/jpeg;base64,")
    assert found["overruled"]["prediction"]["areas"] and state["images"][0]["label"] is None
    assert found["plain"]["prediction"]["areas"].keys() <= state["colours"].keys()
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in state["colours"].values())
    rows = found["plain"]["layers"][name]["map"]
    assert len(rows) < len(rows[0])  # as wide as the scenes are
    assert {expert for row in found["overruled"]["layers"][name]["map"] for expert in row} == {-1}  # none has a share
    session.close()


def test_a_map_lies_over_the_image_that_was_padded(tmp_path: Path) -> None:
    session = Session(explored(tmp_path, "scenes"))
    patch_h, patch_w = session.model.patch_size
    height, width = 2 * patch_h - 1, 40 * patch_w + 3  # whose rows no ratio of sides tells
    of_layer = session.look(content(size=(width, height)), {})["plain"]["layers"][next(iter(session.layers))]
    rows = of_layer["map"]
    assert (len(rows), len(rows[0])) == (2, 41)
    assert of_layer["extent"] == pytest.approx([41 * patch_w / width, 2 * patch_h / height])
    session.close()


def test_a_photograph_is_segmented_at_a_size_that_takes_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vimoe.explore.session.LONGEST", 40)
    session = Session(explored(tmp_path, "scenes"))
    assert all(max(open_image(file).size) <= 40 for file in session.files)
    found = session.look(content(size=(4000, 3000)), {})
    shown = Image.open(io.BytesIO(b64decode(found["plain"]["prediction"]["picture"].partition(",")[2])))
    assert shown.size == Image.open(io.BytesIO(b64decode(found["seen"].partition(",")[2]))).size == (40, 30)
    session.close()


def test_a_dense_run_has_nothing_to_explore(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no MoE layer"):
        Session(explored(tmp_path, "dense"))
