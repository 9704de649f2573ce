"""What is pushed to the hub is loaded from there again, by revision; each refusal is one line with its remedy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.stand_in_hub import TOKEN, Hub, stand_in_hub
from helpers.tiny import config, images, perturb_experts, randomise, upcycle, vit
from helpers.tiny_transformers import ENCODER, tiny
from huggingface_hub import ModelCard, constants
from torch import nn

import vimoe
from vimoe.config.model import ModelConfig
from vimoe.errors import FolderError, VimoeError
from vimoe.models.create import create
from vimoe.models.hub import check_answers
from vimoe.models.model_card import model_card
from vimoe.models.segmenter import Segmenter

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's LFS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with stand_in_hub(monkeypatch, tmp_path / "cache") as served:
        yield served


def trained() -> nn.Module:
    return randomise(upcycle(vit(), config(layers="last:1")), seed=3).eval()


def test_a_pushed_model_is_loaded_again_by_revision(hub: Hub, tmp_path: Path) -> None:
    first, second, side = trained(), perturb_experts(trained()), randomise(trained(), seed=7)
    url = vimoe.push_to_hub(first, "me/vit", token=TOKEN, commit_message="first")
    vimoe.push_to_hub(second, "me/vit", token=TOKEN)
    vimoe.push_to_hub(side, "me/vit", token=TOKEN, revision="side")
    assert url.startswith(f"{hub.url}/me/vit/commit/") and hub.messages[0] == "first"
    for model, revision in ((first, url.rpartition("/")[2]), (second, None), (second, "main"), (side, "side")):
        again = vimoe.load("me/vit", revision=revision)
        assert all(torch.equal(again.state_dict()[name], w) for name, w in model.state_dict().items())
        torch.testing.assert_close(again(images(model)), model(images(model)), rtol=1e-5, atol=1e-5)
    assert vimoe.load("hf-hub:me/vit", cache_dir=tmp_path / "other").num_classes == 5
    assert (tmp_path / "other" / "models--me--vit").is_dir()


def test_nothing_but_config_and_weights_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    vimoe.push_to_hub(trained(), "me/vit", token=TOKEN)
    files = hub.repos["me/vit"][hub.heads["me/vit", "main"]]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    hub.commit("me/vit", "main", {**files, "evil.py": b"raise SystemExit", "pytorch_model.bin": b"x"})
    vimoe.load("me/vit")
    got = {path.name for path in (tmp_path / "cache").glob("models--me--vit/snapshots/*/*")}
    assert got == {"config.json", "model.safetensors"}


def test_a_folder_of_the_name_wins(hub: Hub, tmp_path: Path) -> None:
    vimoe.push_to_hub(trained(), "me/vit", token=TOKEN)
    local = perturb_experts(trained())
    vimoe.save(local, tmp_path / "me" / "vit")
    asked = len(hub.asked)
    name = next(name for name, _ in local.named_parameters() if "experts" in name)
    assert torch.equal(vimoe.load("me/vit").get_parameter(name), local.get_parameter(name))
    assert len(hub.asked) == asked
    with pytest.raises(FolderError, match="revision='v1' with the folder me/vit"):
        vimoe.load("me/vit", revision="v1")
    assert not torch.equal(vimoe.load("hf-hub:me/vit").get_parameter(name), local.get_parameter(name))


def test_private_and_gated_repositories_need_a_token(hub: Hub) -> None:
    vimoe.push_to_hub(trained(), "me/private", token=TOKEN, private=True)
    vimoe.push_to_hub(trained(), "me/gated", token=TOKEN)
    hub.gated.add("me/gated")
    for name, message in (("me/private", "no such repository.*token="), ("me/gated", "gated.*token=")):
        with pytest.raises(FolderError, match=message) as error:
            vimoe.load(name)
        assert "\n" not in str(error.value)
        assert vimoe.load(name, token=TOKEN).num_classes == 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("me/none", {}, "me/none is no folder here, and the hub shows no such repository; check the name"),
        ("me/vit", {"revision": "v9"}, "no revision 'v9'"),
        ("hf-hub:me/none", {}, "me/none: the hub shows no such repository"),
        ("hf-hub:a--b..", {}, "takes no such name"),
        ("no/such/folder", {}, "has no config.json"),
    ],
)
def test_what_is_not_there_is_one_line(hub: Hub, name: str, options: dict, message: str) -> None:
    hub.repos["me/vit"] = {}
    hub.commit("me/vit", "main", {})
    with pytest.raises(FolderError, match=message) as error:
        vimoe.load(name, **options)
    assert "\n" not in str(error.value)


def test_a_repository_that_is_no_model_folder_is_one_line(hub: Hub) -> None:
    hub.repos["me/vit"] = {}
    hub.commit("me/vit", "main", {"README.md": b"# nothing"})
    with pytest.raises(FolderError, match="has no config.json"):
        vimoe.load("me/vit")


def test_without_a_network_or_a_token_it_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FolderError, match="status 401.*pass token=") as error:
        vimoe.push_to_hub(trained(), "me/vit")
    assert "\n" not in str(error.value)
    with pytest.raises(FolderError, match="expected USER/REPO"):
        vimoe.push_to_hub(trained(), "vit")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    for call in (lambda: vimoe.load("me/vit"), lambda: vimoe.push_to_hub(trained(), "me/vit", token=TOKEN)):
        with pytest.raises(FolderError, match="cannot be reached.*network") as error:
            call()
        assert "\n" not in str(error.value)


def test_the_card_has_the_header_and_the_figures_of_the_model() -> None:
    model = trained()
    model.pretrained_cfg = {**dict(model.pretrained_cfg), "hf_hub_id": "timm/parent", "license": "mit"}
    card, cost = ModelCard(model_card(model, "me/vit")), vimoe.count(model)
    header = card.data.to_dict()
    assert header["library_name"] == "vimoe" and header["pipeline_tag"] == "image-classification"
    assert header["base_model"] == "timm/parent" and header["license"] == "mit"
    assert "mixture-of-experts" in header["tags"]
    for figure in (cost.params, cost.activated_params, cost.macs):
        assert f"{figure:,}" in card.text
    assert "(L = 1)" in card.text and "| `blocks.1.mlp` | 4 | 1 | 1 | image | softmax | ffn |" in card.text
    scratch = ModelCard(model_card(vimoe.densify(model), "me/vit", pretrained=False))
    assert "base_model" not in scratch.data.to_dict() and "license" not in scratch.data.to_dict()
    assert "weights: unknown" in scratch.text and "MoE" not in scratch.text
    segmenter = ModelCard(model_card(Segmenter(vit(num_classes=0), 3), "me/seg"))
    assert segmenter.data.pipeline_tag == "image-segmentation" and "into 3 classes" in segmenter.text


@pytest.mark.parametrize("from_hub", [True, False])
def test_the_card_names_a_parent_of_transformers_and_its_licence(hub: Hub, tmp_path: Path, from_hub: bool) -> None:
    """A folder may have the model card that its maker wrote; the name of a folder is nobody's."""
    made = tiny("ViTForImageClassification", "ViTConfig", {**ENCODER, "num_labels": 3})
    made.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\nlicense: mit\n")
    hub.repos["them/vit"] = {}
    hub.commit("them/vit", "main", {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()})
    name = "them/vit" if from_hub else str(tmp_path / "theirs")
    model = upcycle(create(ModelConfig(name=f"transformers:{name}")), config(layers="last:1"))
    for each in (model, vimoe.load(vimoe.save(model, tmp_path / "m"))):
        card = ModelCard(model_card(each, "me/vit"))
        assert card.data.license == "cc-by-nc-4.0"
        assert card.data.to_dict().get("base_model") == ("them/vit" if from_hub else None)
    scratch = create(ModelConfig(name=f"transformers:{name}", pretrained=False))
    assert "license" not in ModelCard(model_card(scratch, "me/vit")).data.to_dict()


def test_the_lines_on_the_card_load_the_model(hub: Hub) -> None:
    model = trained()
    vimoe.push_to_hub(model, "me/vit", token=TOKEN)
    card = hub.repos["me/vit"][hub.heads["me/vit", "main"]]["README.md"].decode()
    code = card.partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 3
    names = {"images": images(model)}
    exec(code, names)
    torch.testing.assert_close(names["logits"], model(names["images"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "transformers:me/vit", "hf-hub:me/vit"])
def test_a_name_without_a_network_is_refused_in_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(VimoeError, match="cannot be reached") as error:
        create(ModelConfig(name=name, pretrained=True, num_classes=5))
    assert sum(waits) <= 3 and "\n" not in str(error.value)


def test_a_hub_that_refuses_or_is_slow_is_left_to_its_client(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_answers("me/none")  # it answers, with whatever status
    assert hub.asked
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        check_answers("me/none")


def test_weights_that_are_kept_need_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vimoe.push_to_hub(trained(), "me/vit", token=TOKEN)
    vimoe.load("me/vit")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check_answers("me/vit")
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 cannot be reached"):
        check_answers("me/other")
