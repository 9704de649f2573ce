"""Segmentation by the command line: trained, gone on with, evaluated, predicted; and what it says of mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICK, TINY, call, refused
from helpers.kills import logs
from helpers.pictures import roles
from helpers.scene_runs import MOE, SCENES
from helpers.scenery import NAMES, PALETTE, YAML, scene, scenes
from helpers.scenery import mask as scene_mask
from helpers.tiny import config, upcycle, vit
from PIL import Image
from safetensors.torch import load_file

import vimoe
import vimoe.training.loop
from vimoe.cli import main
from vimoe.config.data import DataConfig
from vimoe.config.model import DECODERS, ModelConfig
from vimoe.config.settings import OWN_SETTINGS, SECTIONS, Settings
from vimoe.config.train import TrainConfig
from vimoe.data.loaders import preprocessing
from vimoe.errors import ConfigError
from vimoe.models.decoders import DECODERS as KNOWN_DECODERS
from vimoe.models.upcycling import convert
from vimoe.tasks.base import task_of
from vimoe.tasks.segmentation import Segmentation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"), train=9)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "scenes"
    argv = ["train", "--data.path", str(data), *SCENES, *MOE, "--train.epochs=12", "--train.max_scale=1"]
    assert main([*argv, "--out", str(out)]) == 0
    return out


def test_a_vimoe_learns_scenes_and_its_run_says_how_well(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    assert {"val_miou", "val_pixel_accuracy", "val_loss"} <= set(rows[0])
    assert float(rows[-1][rows[0].index("val_loss")]) < 0.7 * float(rows[1][rows[0].index("val_loss")])
    values = call(capsys, "evaluate", run)
    page = (run / "report.html").read_text().split("</style>", 1)[1]
    figures = {"miou", "per_class_iou", "pixel_accuracy", "loss", "pixels", "images"}
    assert set(values) == {"schema", "command", *figures, "split"} and values["split"] == "test"
    assert values["images"] == 2 and len(values["per_class_iou"]) == 3 and values["miou"] > 0.4
    assert 0.5 < summary["patch_ceiling"] < 1 and f"{100 * summary['patch_ceiling']:.2f}%" in page
    assert summary["classes"] == list(NAMES) and summary["scan"]["train"] == 9
    assert "mean IoU, %" in page and "IoU on validation, %" in page and "top-1" not in page.split("Settings")[0]
    elsewhere = call(capsys, "evaluate", run, "--data.path", data)
    assert elsewhere["miou"] == values["miou"]


def test_the_best_epoch_is_that_of_the_best_mean_iou(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    lines = (run / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("val_miou")
    mious = [float(line.split(",")[column]) for line in lines[1:]]
    assert mious[summary["best_epoch"] - 1] == max(mious) == summary["val"]["miou"]


def test_the_saved_model_is_the_one_that_was_scored(run: Path, data: Path) -> None:
    model = vimoe.load(run / "model")
    settings = Settings(data=DataConfig(path=str(data), task="segmentation", workers=0))
    task = task_of(settings)
    scenes = task.find(settings.data, NAMES)
    score = task.evaluate(model, task.loader(model, scenes, scenes.val)).to_dict()
    expected = json.loads((run / "summary.json").read_text())["val"]
    assert score.pop("per_class_iou") == pytest.approx(expected.pop("per_class_iou"))
    assert score == pytest.approx(expected)


def test_a_killed_training_goes_on_to_the_same_weights(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", "--data.path", str(data), *SCENES, *MOE, "--train.checkpoint_minutes=0"]
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    real, left = vimoe.training.loop._Steps.epoch, 5

    def epoch(self: object, state: object) -> object:
        nonlocal left
        for _ in real(self, state):
            yield
            left -= 1
            if left == 0:
                raise RuntimeError("killed")

    monkeypatch.setattr(vimoe.training.loop._Steps, "epoch", epoch)
    with pytest.raises(RuntimeError, match="killed"):
        main([*argv, "--out", str(tmp_path / "killed")])
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "killed")]) == 0
    first, second = (load_file(tmp_path / out / "model/model.safetensors") for out in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logs(tmp_path / "whole") == logs(tmp_path / "killed")


def test_validation_that_is_split_off_is_listed_and_found_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes(tmp_path / "scenes", train=8, val=0, test=0)
    out = tmp_path / "run"
    call(capsys, "train", "--data.path", tmp_path / "scenes", *SCENES, *MOE, "--data.val_fraction=0.25", "--out", out)
    listed = (out / "validation.txt").read_text().split()
    assert len(listed) == 2 and all((tmp_path / "scenes" / name).exists() for name in listed)
    assert call(capsys, "evaluate", out)["images"] == 2


@pytest.mark.parametrize("palette", [True, False])
def test_predict_writes_masks_overlays_and_areas(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], palette: bool
) -> None:
    if palette:
        run = Path(shutil.copytree(run, tmp_path / "run"))
        config = json.loads((run / "model/config.json").read_text())
        config["vimoe"]["segmentation"]["palette"] = [list(c) for c in PALETTE[:3]]
        (run / "model/config.json").write_text(json.dumps(config))
    files = sorted((data / "images/test").iterdir())
    values = call(capsys, "predict", run, data / "images/test", files[0], "--out", tmp_path / "masks")
    assert [p["file"] for p in values["predictions"]] == [str(f) for f in (*files, files[0])]
    assert len({p["mask"] for p in values["predictions"]}) == 3  # the file that came twice has two
    first = values["predictions"][0]
    image = opened(first["mask"])
    places = np.array(image)
    assert image.mode == "P" and image.size == opened(files[0]).size == opened(first["overlay"]).size
    assert set(np.unique(places)) <= {0, 1, 2}
    assert sum(first["areas"].values()) == pytest.approx(1)
    assert first["areas"] == {NAMES[c]: pytest.approx((places == c).mean()) for c in np.unique(places)}
    if palette:
        assert image.convert("RGB").getpixel((0, 23)) == PALETTE[places[23, 0]]
    assert "mask.png" in main_text(capsys, "predict", run, files[0], "--out", tmp_path / "again")


def test_one_bad_image_leaves_the_masks_of_others(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    shutil.copytree(data / "images" / "test", new)
    good = sorted(new.iterdir())
    (new / "bad.png").write_bytes(b"x")
    found = call(capsys, "predict", run, new, "--out", tmp_path / "masks")["predictions"]
    assert [each["file"] for each in found if "error" in each] == [str(new / "bad.png")]
    assert len([each for each in found if Path(each.get("mask", "none")).is_file()]) == len(good)
    assert "bad.png cannot be read" in main_text(capsys, "predict", run, new, "--out", tmp_path / "masks")
    assert "bad.png cannot be read" in refused(capsys, "predict", run, new / "bad.png", "--out", tmp_path / "masks")
    assert "lies in" in refused(capsys, "predict", run, new, "--out", new / "masks")  # they would be images of the next


def test_long_names_are_predicted_to_names_that_fit(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((data / "images/test").iterdir())
    stems = ["a" * 251, "a" * 236, "ü" * 125, "\U0001f600" * 62, "a" * 250]
    files = [shutil.copy(image, tmp_path / f"{stem}.png") for stem in stems]
    predictions = call(capsys, "predict", run, *files, "--out", tmp_path / "masks")["predictions"]
    written = [Path(p[kind]) for p in predictions for kind in ("mask", "overlay")]
    assert len(set(written)) == 10 and {path.name for path in written} == {
        path.name for path in (tmp_path / "masks").iterdir()
    }
    assert [path.name for path in written[:4:2]] == ["a" * 243 + "-mask.png", "a" * 236 + "-mask.png"]
    assert written[8].name == "a" * 241 + "-2-mask.png"


def opened(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def main_text(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([*map(str, argv)]) == 0
    return capsys.readouterr().out


CHANGES = {
    "min_scale": 1.0, "max_scale": 1.0, "dice_loss": 1.0, "class_weights": "median_frequency", "color_jitter": 0.0,
    "hflip": 0.0, "label_smoothing": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_of_segmentation_changes_the_training(data: Path, tmp_path: Path, name: str) -> None:
    argv = ["train", "--data.path", str(data), *SCENES, "--moe.layers=none", "--train.epochs=2"]
    for out, extra in (("plain", []), ("changed", [f"--train.{name}={CHANGES[name]}"])):
        assert main([*argv, *extra, "--out", str(tmp_path / out)]) == 0
    plain, changed = (load_file(tmp_path / out / "model/model.safetensors") for out in ("plain", "changed"))
    assert any(not torch.equal(plain[key], changed[key]) for key in plain)


@pytest.mark.parametrize("other", ["--data.inference=whole", "--data.flip_test=true"])
def test_evaluate_and_predict_go_over_images_in_another_way_than_the_training_did(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    trained = call(capsys, "evaluate", run)
    assert call(capsys, "evaluate", run, other)["loss"] != trained["loss"]
    images = data / "images/test"
    areas = [
        [p["areas"] for p in call(capsys, "predict", run, images, "--out", tmp_path / name, *extra)["predictions"]]
        for name, extra in (("trained", []), ("other", [other]))
    ]
    assert areas[0] != areas[1]


def test_decoders_are_those_that_there_are(data: Path) -> None:
    assert set(DECODERS) == set(KNOWN_DECODERS)
    model = ModelConfig(
        name="vit_tiny_patch16_224", pretrained=False, img_size=16, decoder="linear4",
        args={"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2},
    )  # fmt: skip
    scenes = Segmentation.find(DataConfig(path=str(data), task="segmentation"))
    assert Segmentation.dense_model(model, scenes).decoder_name == "linear4"


def test_settings_that_another_task_reads_are_refused(data: Path) -> None:
    other = {
        "train": {"mixup": 0.2, "cutmix": 1.0, "auto_augment": "rand-m5", "random_erasing": 0.1, "min_crop": 0.5,
                  "min_scale": 0.4, "max_scale": 3.0, "dice_loss": 1.0, "class_weights": "median_frequency",
                  "oracle_loss": 0.1},
        "data": {"images_per_class": 5, "cache": "memory", "views": 2, "crop_pct": 0.9, "interpolation": "bilinear",
                 "skip_unreadable": True, "inference": "whole", "tasks": 2,
                 "flip_test": True},
        "model": {"decoder": "linear"},
    }  # fmt: skip
    named = {full for names in OWN_SETTINGS.values() for full in names}
    assert named == {f"{section}.{name}" for section, values in other.items() for name in values}
    for task, names in OWN_SETTINGS.items():
        wrong = next(each for each in OWN_SETTINGS if each != task)
        for section, name in (full.split(".") for full in names if full not in OWN_SETTINGS[wrong]):
            sections = {"data": {"task": wrong}}
            sections.setdefault(section, {})[name] = other[section][name]
            with pytest.raises(ConfigError, match=rf"{section}\.{name}=.* expected it with {task} only"):
                Settings(**{each: SECTIONS[each](**values) for each, values in sections.items()})


@pytest.fixture(scope="module")
def dense(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dense"
    assert main(["train", "--data.path", str(data), *SCENES, "--moe.layers=none", "--out", str(out)]) == 0
    return out


GO_ON = [*QUICK, "--data.task=segmentation", "--train.batch_size=3", "--train.lr=1e-9", "--train.warmup_epochs=0"]


def test_a_run_goes_on_from_a_dense_segmenter_decoder_and_all(
    dense: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["train", "--data.path", data, *GO_ON, f"--model.name=local-dir:{dense / 'model'}"]
    was = vimoe.load(dense / "model").state_dict()
    call(capsys, *start, "--moe.layers=none", "--train.epochs=1", "--out", tmp_path / "further")
    call(capsys, *start, *MOE, "--train.epochs=1", "--out", tmp_path / "moe")
    for out in ("further", "moe"):  # hardly trained, so that they have the parent's weights and function
        model = vimoe.load(tmp_path / out / "model")
        now = model.state_dict()
        kept = [name for name in was if name in now and "norm." not in name]
        assert any("decoder" in name for name in kept)
        assert all(torch.allclose(now[name].float(), was[name].float(), atol=1e-4) for name in kept)
    assert len(vimoe.moe.layer.moe_layers(model)) == 1
    start[-1] = f"--model.name=local-dir:{tmp_path / 'moe' / 'model'}"  # which has its layer already
    call(capsys, *start, "--train.epochs=1", "--out", tmp_path / "on")
    now, was = (vimoe.load(tmp_path / out / "model").state_dict() for out in ("on", "moe"))
    kept = [name for name in was if "norm." not in name]
    assert now.keys() == was.keys() and any("experts" in name for name in kept)
    assert all(torch.allclose(now[name].float(), was[name].float(), atol=1e-4) for name in kept)


def test_what_a_run_cannot_go_on_from_is_one_line(
    dense: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "never"
    train = ["train", "--data.path", data, *GO_ON, "--out", out]
    start = f"--model.name=local-dir:{dense / 'model'}"
    vimoe.save(upcycle(vit(), config()), tmp_path / "classifier")
    classifier = f"--model.name=local-dir:{tmp_path / 'classifier'}"
    assert "is a model folder that classifies images" in refused(capsys, *train, classifier)
    assert "expected no other setting of model" in refused(capsys, *train, start, "--model.decoder=linear")
    other = scenes(tmp_path / "other", yaml=YAML.replace("car", "bus"))
    message = refused(capsys, "train", "--data.path", other, *GO_ON, start, "--out", out)
    assert "knows the classes sky, road, car" in message
    photos = roles(tmp_path / "photos")
    classify = ["train", "--data.path", photos, *QUICK, "--train.batch_size=3", start, "--out", out]
    assert "holds a segmenter, ViT and decoder" in refused(capsys, *classify)
    assert not out.exists()


def damaged(root: Path, what: str) -> Path:
    data = scenes(root / "scenes")
    if what == "mask without image":
        (data / "images/train/a000.png").unlink()
    elif what == "image without mask":
        (data / "annotations/train/a000.png").unlink()
    elif what == "sizes":
        scene(data, "train", "a000", scene_mask(0))
        opened(data / "images/train/a000.png").resize((10, 10)).save(data / "images/train/a000.png")
    elif what == "id":
        scene(data, "val", "a100", np.full((24, 32), 5, "uint8"))
    elif what == "one class":
        (data / "classes.yaml").write_text("names: [sky]\n")
    elif what == "colours":
        opened(data / "images/val/a100.png").save(data / "annotations/val/a100.png")
    return data


MISTAKES = {
    "mask without image": "1 mask has no image",
    "image without mask": "1 image has no mask",
    "sizes": "has another size than its image",
    "id": "5",
    "one class": "expected",
    "colours": "palette",
}


@pytest.mark.parametrize("what", MISTAKES)
def test_scenes_that_cannot_be_used_are_one_line_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    message = refused(capsys, "train", "--data.path", damaged(tmp_path, what), *SCENES, "--out", tmp_path / "run")
    assert MISTAKES[what] in message
    assert not (tmp_path / "run").exists()


def test_other_mistakes_are_one_line(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "never"
    photos = roles(tmp_path / "photos")
    train = ["train", "--data.path", data, *SCENES]
    assert "images/ and annotations/" in refused(capsys, "train", "--data.path", photos, *SCENES, "--out", out)
    plain = [arg for arg in SCENES if "task" not in arg]
    assert "--data.task segmentation" in refused(capsys, "train", "--data.path", data, *plain, "--out", out)
    assert "did you mean 'linear'?" in refused(capsys, *train, "--model.decoder=linaer", "--out", out)
    assert "expected as many blocks" in refused(capsys, *train, "--model.decoder=linear4", "--out", out)
    assert "expected a multiple of the patch size 8; set 16 or 24" in refused(
        capsys, *train, "--model.img_size=20", "--out", out
    )
    assert "max_scale=0.1" in refused(capsys, *train, "--train.max_scale=0.1", "--out", out)
    assert "--out masks" in refused(capsys, "predict", run, data / "images/test")
    other = scenes(tmp_path / "other", yaml=YAML.replace("car", "bus"))
    scenes(tmp_path / "alone")
    (tmp_path / "alone/images/test/a200.png").unlink()
    assert "1 mask no image" in refused(capsys, "evaluate", run, "--data.path", tmp_path / "alone")
    assert "expected the model's sky, road, car" in refused(capsys, "evaluate", run, "--data.path", other)
    assert not out.exists()


def test_a_training_of_scenes_needs_no_more_than_trainconfig(data: Path, tmp_path: Path) -> None:
    """The library alone: a model, a task, the loop."""
    settings = Settings(
        model=ModelConfig(name="vit_tiny_patch16_224", pretrained=False, img_size=16,
                          args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
        data=DataConfig(path=str(data), task="segmentation", workers=0),
        train=TrainConfig(epochs=1, batch_size=3, warmup_epochs=0, tensorboard=False),
    )  # fmt: skip
    task = Segmentation(settings)
    scenes_ = task.find(settings.data)
    model = task.dense_model(settings.model, scenes_)
    converted = convert(model, vimoe.MoEConfig(layers="last:1", routing="token"))
    job = task.job(model, scenes_, task.scan(scenes_), preprocessing(model), converted)
    summary = vimoe.training.loop.train(model, job, settings.train, tmp_path)
    assert 0 <= summary["val"]["miou"] <= 1 and summary["train_images"] == 9


BEIT = [
    "--model.name=beit_base_patch16_224", "--model.pretrained=false", "--model.img_size=32",
    '--model.args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}',
]  # fmt: skip


def test_a_vit_of_one_size_is_trained_analysed_and_pruned_on_larger_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = scenes(tmp_path / "scenes", height=40, width=56)
    argv = ["train", "--data.path", data, *[arg for arg in SCENES if arg not in TINY], *BEIT, *MOE]
    out = tmp_path / "run"
    assert "a ViT of one size: expected 'slide'" in refused(capsys, *argv, "--data.inference=whole", "--out", out)
    call(capsys, *argv, "--train.epochs=1", "--train.warmup_epochs=0", "--out", out)
    assert call(capsys, "analyze", out, "--draws", 2)["images"] == 2
    pruned = call(capsys, "prune", out, "--tolerance", 100, "--out", tmp_path / "pruned")
    assert pruned["after"]["images"] == 2 and pruned["after"]["images_per_second"] > 0


def test_no_mask_is_written_over(run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sorted((data / "images/test").iterdir())[0]
    for name in ("a.png", "x/a.png", "a-2.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "p" / name)
    files = [tmp_path / "p" / name for name in ("a.png", "x/a.png", "a-2.png")]
    predictions = call(capsys, "predict", run, *files, "--out", tmp_path / "masks")["predictions"]
    assert len({p["mask"] for p in predictions}) == 3 and all(Path(p["mask"]).is_file() for p in predictions)


@pytest.mark.parametrize(("role", "name"), [("test", "test"), ("val", "validation"), ("", "all")])
def test_other_scenes_need_none_to_train_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], role: str, name: str
) -> None:
    for yaml in (True, False):
        other = tmp_path / f"other-{yaml}"
        scene(other, role, "z001", scene_mask(1))
        if yaml:
            (other / "classes.yaml").write_text(YAML)
        values = call(capsys, "evaluate", run, "--data.path", other)
        assert (values["split"], values["images"]) == (name, 1)
