"""The command line from images to a pruned model, and what it says of mistakes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.commands import QUICK, TINY, call, refused
from helpers.pictures import folder, roles
from helpers.slow import one_in

import vimoe.analysis.pruning
import vimoe.experiments.finished_run
import vimoe.training.loop
from vimoe.cli import main
from vimoe.errors import VimoeError
from vimoe.files import written_whole
from vimoe.models.model_folder import load
from vimoe.stopping import stopping
from vimoe.tasks.classification_predictions import predict
from vimoe.verbs import VERBS


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return roles(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "photos"
    assert main(["train", "--data.path", str(photos), *TINY, *QUICK, "--moe.layers=all", "--out", str(out)]) == 0
    return out


def test_from_images_to_a_pruned_model(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score = call(capsys, "evaluate", run)
    assert score["split"] == "test" and score["images"] == 9 and score["top1"] > 0.6

    predictions = call(capsys, "predict", run, photos / "test" / "red", "--top=2")["predictions"]
    assert len(predictions) == 3 and {len(p["classes"]) for p in predictions} == {2}

    found = call(capsys, "analyze", run, "--draws=3", "--probe=true")
    assert found["draws"] == 3 and "Each expert alone" in (run / "report.html").read_text("utf-8")
    assert all(len(layer["probe"]["right"]) == layer["num_experts"] for layer in found["layers"])
    assert (run / "figures" / "examples-blocks.1.mlp.png").exists()
    assert [layer["name"] for layer in found["layers"]] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert json.loads((run / "routing.json").read_text())["base"]["images"] == 9

    receipt = call(capsys, "prune", run, "--out", tmp_path / "pruned", "--tolerance=100")
    assert receipt["kept"] == [] and len(receipt["steps"]) == 2 and "text" not in receipt
    assert receipt["before"]["activated_params"] > receipt["after"]["activated_params"] == receipt["after"]["params"]
    again = call(capsys, "evaluate", tmp_path / "pruned")
    assert again["top1"] == receipt["after"]["top1"] and receipt["before"]["top1"] == score["top1"]

    assert (tmp_path / "pruned" / "routing-before-pruning.json").exists()
    assert not (tmp_path / "pruned" / "routing.json").exists()  # the evidence was of another model
    assert "no MoE layer" in refused(capsys, "prune", tmp_path / "pruned", "--out", tmp_path / "twice")

    for folder_, files in ((run, ["metrics.csv", "load.csv"]), (tmp_path / "pruned", [])):
        for name in ["config.yaml", "summary.json", "report.html", "model/config.json", "figures", *files]:
            assert (folder_ / name).exists(), name


def test_options_of_routing_are_flags_and_a_recovery_starts_from_trained_routers(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--moe.router_noise=1", "--moe.expert_dropout=0.2", "--moe.bias_update_rate=0", "--train.epochs=4",
        "--train.router_warmup_epochs=2", "--train.expert_weight_decay=0.1", "--train.early_stopping=1",
        "--train.lr=0", "--train.min_lr=0",
    ]  # fmt: skip
    flags = [*TINY, *QUICK, "--moe.layers=all", *options, "--out", tmp_path / "run"]
    trained = call(capsys, "train", "--data.path", photos, *flags)
    assert trained["epochs"] == 2 and trained["stopped_early"] and trained["best_epoch"] == 1
    assert "2 epochs in" in (page := (tmp_path / "run" / "report.html").read_text()) and "stopped early" in page
    layer = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["vimoe"]["layers"]["blocks.0.mlp"]
    assert (layer["router_noise"], layer["expert_dropout"]) == (1, 0.2)
    for epochs, trained_epochs in ((1, 1), (3, 2)):  # one is less than the routers' warm-up was
        prune = ["prune", tmp_path / "run", "--tolerance=-1", f"--recover={epochs}", "--out", tmp_path / str(epochs)]
        assert call(capsys, *prune)["recovery_epochs"] == trained_epochs
    said = refused(capsys, "train", "--data.path", photos, *flags[:-1], tmp_path / "other", "--train.epochs=1")
    assert "train.router_warmup_epochs=2 of train.epochs=1: expected at most as many; lower it" in said
    assert "expert_dropout=2" in refused(capsys, "train", *flags[:-1], tmp_path / "other", "--moe.expert_dropout=2")


def test_what_matters_is_kept_with_its_experts_and_recovered(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = ["prune", run, "--tolerance=-1", "--recover=2", "--out", tmp_path / "kept"]
    kept = call(capsys, *prune)
    assert [step["experts"] for step in kept["kept"]] == [8, 8] and not kept["steps"]
    assert kept["recovery_epochs"] == 2 and kept["recovery_lr"] == pytest.approx(3e-4)  # a tenth of QUICK's
    assert kept["recovered"]["loss"] != kept["after"]["loss"] == kept["before"]["loss"]
    assert call(capsys, "evaluate", tmp_path / "kept")["loss"] == kept["recovered"]["loss"]
    assert len((tmp_path / "kept" / "metrics.csv").read_text().splitlines()) == 3


def test_experts_are_dropped_where_it_is_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run whose layers stay, because making one dense is given a price."""
    monkeypatch.setattr(vimoe.analysis.pruning._Greedy, "layers", lambda *_: ())
    for experts in ("false", "true"):
        out = tmp_path / experts
        found = call(capsys, "prune", run, "--tolerance=9", f"--experts={experts}", "--out", out)
        assert [step["expert"] is not None for step in found["steps"]] == [True] * 14 * (experts == "true")
        assert call(capsys, "evaluate", out)["loss"] == pytest.approx(found["after"]["loss"])


def test_all_layers_are_merged_where_it_is_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "merged"
    found = call(capsys, "prune", run, "--merge_all=true", "--recover=1", "--out", out)
    assert [step["how"] for step in found["steps"]] == ["merge", "merge"] and not found["kept"]
    assert found["tolerance"] is None and not found["after"]["moe_layers"] and found["recovered"]
    page = (out / "report.html").read_text()
    assert "Every MoE layer was made dense" in page and "whatever it costs" in page and "tolerance of" not in page
    assert call(capsys, "evaluate", out)["loss"] == pytest.approx(found["recovered"]["loss"])
    monkeypatch.setattr(vimoe.experiments.finished_run, "analyze", lambda *_, **__: pytest.fail("it analysed"))
    for option in ("--experts=true", "--tolerance=1"):
        words = refused(capsys, "prune", run, "--merge_all=true", option, "--out", tmp_path / "no")
        assert "with merge_all=True: expected" in words and not (tmp_path / "no").exists()


def test_reports_of_one_run_and_of_several(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").unlink()
    assert Path(call(capsys, "report", run)["report"]) == run / "report.html" and (run / "report.html").exists()
    out = tmp_path / "both.html"
    assert call(capsys, "report", run, run, "--out", out) == {"schema": 1, "command": "report", "report": str(out)}
    assert "<table" in out.read_text()
    assert "--out is required" in refused(capsys, "report", run, run)
    assert "with one run: its page is report.html in it" in refused(capsys, "report", run, "--out", out)
    assert "nowhere: no such run" in refused(capsys, "report", run, "nowhere", "--out", out)


def test_a_run_can_be_repeated_from_its_config_and_started_from(run: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = (json.loads((p / "summary.json").read_text()) for p in (run, tmp_path / "again"))
    assert first["val"] == again["val"]
    assert (run / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()


def test_a_dense_run_is_a_start_for_another(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data.path", photos, *QUICK]
    dense = call(capsys, "train", *common, *TINY, "--moe.layers=none", "--out", tmp_path / "dense")
    start = f"--model.name=local-dir:{tmp_path / 'dense' / 'model'}"
    frozen = ["--train.lr=0", "--train.min_lr=0", "--moe.layers=all"]
    upcycled = call(capsys, "train", *common, start, *frozen, "--out", tmp_path / "moe")
    assert upcycled["val"] == pytest.approx(dense["val"], rel=1e-4)  # nothing is lost by upcycling


def test_a_split_off_validation_is_written_and_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = folder(tmp_path / "photos", 20)
    trained = call(capsys, "train", "--data.path", photos, *TINY, *QUICK, "--out", tmp_path / "run")
    listed = (tmp_path / "run" / "validation.txt").read_text().splitlines()
    assert len(listed) == trained["val"]["images"] == 6
    folder(photos, 30)  # images that came later are not for deciding
    score = call(capsys, "evaluate", tmp_path / "run")
    assert score["split"] == "validation" and score["images"] == 6
    assert score["top1"] == pytest.approx(trained["val"]["top1"])
    elsewhere = call(capsys, "evaluate", tmp_path / "run", "--data.path", folder(tmp_path / "more", 2))
    assert elsewhere["images"] == 6 and elsewhere["split"] == "all"


@pytest.mark.parametrize("batch", one_in(2, [["--train.batch_size=999"], []]))
def test_a_small_folder_trains_with_a_smaller_batch_that_is_noted(
    photos: Path, tmp_path: Path, batch: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--train.epochs=1", "--train.tensorboard=false", "--train.warmup_epochs=0", *batch]
    call(capsys, "train", "--data.path", photos, *TINY, *flags, "--out", tmp_path / "run")
    asked = 999 if batch else 64
    said = f"train.batch_size={asked} is lowered to 24, of 24 training images"
    assert [record.getMessage() for record in caplog.records].count(said) == 1
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "batch_size: 24\n" in settings and "precision: 'no'\n" in settings  # what was used, with auto resolved
    call(capsys, "analyze", tmp_path / "run", "--draws=1")
    call(capsys, "prune", tmp_path / "run", "--recover=1", "--out", tmp_path / "pruned")


def test_count_is_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model.name=vit_small_patch14_dinov2", "--model.img_size=224", "--model.num_classes=1000"]
    values = call(capsys, "count", *model, "--moe.layers=last:2")
    assert values["dense"]["params"] / 1e6 == pytest.approx(22.01, rel=0.005)
    assert values["moe"]["macs"] / 1e9 == pytest.approx(6.73, rel=0.005)
    assert values["moe"]["layers"] == ["blocks.10.mlp", "blocks.11.mlp"]
    assert main(["plan", *model]) == 0
    assert "blocks.11.mlp: Mlp -> 8 experts" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [*VERBS])
def test_help_says_what_a_verb_does_within_a_second(verb: str) -> None:
    for _ in range(3):  # once of three times: the machine may be busy
        start = time.perf_counter()
        shown = subprocess.run([sys.executable, "-m", "vimoe.cli", verb, "--help"], capture_output=True, text=True)
        if (seconds := time.perf_counter() - start) < 1:
            break
    assert shown.returncode == 0 and f"Example: vimoe {verb}" in " ".join(shown.stdout.split())
    assert seconds < 1


MISTAKES = {
    "count --moe.layer all": "unknown option --moe.layer: did you mean '--moe.layers'?",
    "count --moe.layers lsat:2": "did you mean 'last:N'?",
    "count --moe.layers last:99": "expected at most 12",
    "count --moe.layers blocks.3.mpl": "did you mean 'blocks.3.mlp'?",
    "count --model.name vit_smal_patch14_dinov2": "did you mean 'vit_small_patch14_dinov2'?",
    "count --model.name vit_small_patch14_dinov2.lvd142": "did you mean 'vit_small_patch14_dinov2.lvd142m'?",
    "count --model.name hf-hbu:x/y": "did you mean 'hf-hub'?",
    "count --model.name local-dir:nowhere": "no model folder there",
    "count --model.name resnet18": "no FFN was found",
    "train --data.interpolation bicubc --out never": "did you mean 'bicubic'?",
    "count --moe.num_experts x": "moe.num_experts=x: expected a whole number",
    "count --moe.num_experts -1": "num_experts=-1: expected a whole number of at least 0",
    "count --moe.top_k 9": "top_k=9: expected at most num_experts=8",
    "count --moe.routing imgae": "did you mean 'image'?",
    "count --model.img_sise 32": "did you mean '--model.img_size'?",
    "count --config nowhere.yaml": "nowhere.yaml",
    "train --config frozen-trunc --out never": "did you mean 'frozen-trunk'?",
    "train --config nonsense --out never": "known: ade20k, frozen-trunk, imagenet-1k, recommended, small-data",
    "count more": "unknown option more",
    "trian": "did you mean 'train'?",
    "train --train.stages [head,nonsense,experts] --out never": "stages='nonsense' names no FFN: known: all, moe",
    "train --data.path nowhere": "--out is required",
    "train --data.path nowhere --out never": "data.path='nowhere': no such folder",
    "train --out never": "data.path is empty",
    "evaluate nowhere": "nowhere: no such run",
    "predict": "required: run, images",
    "prune nowhere --out never": "nowhere: no such run",
    "demo --task singing": "invalid choice: 'singing' (choose from ",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert MISTAKES[words] in refused(capsys, *words.split())
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_mistakes_with_files(run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.yaml"
    for text, expected in {
        "moe:\n  layer: all\n": "unknown option moe.layer: did you mean 'moe.layers'?",
        "moo:\n  layers: all\n": "unknown option moo.layers: did you mean 'moe.layers'?",
        "moe: [": "expected a YAML file of sections and settings",
        "- moe": "expected a YAML file of sections and settings",
        "train: {epochs: 7}\nmoe: {}\ntrain: {batch_size: 4}": "'train' is repeated in lines 1 and 3",
        "moe: {layers: all, top_k: 1, layers: none}": "'layers' is repeated",
    }.items():
        config.write_text(text)
        assert expected in refused(capsys, "count", "--config", config)
    config.write_text("train: {precision: no}")
    said = refused(capsys, "train", "--config", config, "--out", tmp_path / "a")
    assert "train.precision=False: expected one of auto, no, bf16, fp16; put 'no' in quotes" in said
    train = ["train", "--data.path", photos, *TINY, *QUICK]
    assert "already exists" in refused(capsys, *train, "--out", run)
    assert "auto_augment='rnd-m9'" in refused(capsys, *train, "--train.auto_augment=rnd-m9", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    start = f"--model.name=local-dir:{run / 'model'}"
    assert "which has MoE layers already" in refused(capsys, "count", start, "--moe.num_experts=99")
    assert "did you mean" in refused(capsys, "predict", run, photos / "test" / "red" / "00.png")
    (tmp_path / "no.png").write_bytes(b"no image")
    assert "no.png cannot be read as an image" in refused(capsys, "predict", run, tmp_path / "no.png")
    assert "has no config.yaml" in refused(capsys, "evaluate", tmp_path)


def test_an_unreadable_image_in_a_worker_is_one_line_too(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = folder(tmp_path / "bad", 3)
    train = ["train", "--data.path", bad, *TINY, *QUICK, "--data.workers=1", "--train.batch_size=4"]
    call(capsys, *train, "--out", tmp_path / "run")
    (bad / "red" / "001.png").write_bytes(b"no image")
    assert "001.png cannot be read as an image" in refused(capsys, "evaluate", tmp_path / "run", "--data.path", bad)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.crop_pct=-1", "expected 0.1 to 1"),
        ("--data.std=[0,0,0]", "expected values above 0"),
        ("--data.mean=[123.675,116.28,103.53]", "expected values in 0..1; divide by 255"),
        ("--data.mean=[0.5,0.5]", "expected three values, of red, green and blue"),
        ("--train.seed=-1", "expected a whole number from 0 to 4294967295"),
        ("--model.num_classes=7", "the data has 3 classes"),
        ('--model.args={"num_classes": 5}', "expected it as model.num_classes"),
        ('--model.args={"patch_size": 8, "in_chans": 1}', "takes 1 channels: expected 3"),
        ('--model.args={"patch_size": 0}', "timm could not build"),
        (
            '--model.args={"patch_size": 64}',
            "model.img_size=16: expected a multiple of the patch size 64; set 64 or more",
        ),
    ],
)
def test_settings_that_cannot_be_leave_nothing_behind(
    photos: Path, tmp_path: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--data.path", photos, *TINY, *QUICK, option]
    assert message in refused(capsys, *train, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_did_not_finish_says_so(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    train = ["train", "--data.path", str(photos), *TINY, *QUICK, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("vimoe.training.state.Best.offer", interrupt)
        assert main(train) == 130
    assert capsys.readouterr().err.endswith("vimoe: interrupted\n")
    assert "its training did not finish" in refused(capsys, "evaluate", tmp_path / "run")
    assert "holds an unfinished run: go on with --resume" in refused(capsys, *train)


@pytest.mark.parametrize("what", ["", "layer", "model"])
def test_the_help_of_bench_says_of_which_it_is(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *what.split(), "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: vimoe bench {what or 'layer|model'} [" in shown
    assert f"Example: vimoe bench {what or 'layer'}" in shown and ("bench model --help" in shown) == (not what)


def test_sigterm_ends_a_verb_as_ctrl_c_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While features or decoded images are written, that is gigabytes of a file that nothing would find again."""

    def verb(*_: object) -> None:
        with written_whole(tmp_path / "features.npy") as file:
            file.write(b"half")
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(VERBS, "analyze", verb)
    assert main(["analyze"]) == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "vimoe: interrupted\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, VimoeError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_that_a_library_turned_into_another_error_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    def verb(*_: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        raise error("look at the arguments") if error is not KeyboardInterrupt else error

    monkeypatch.setitem(VERBS, "analyze", verb)
    assert main(["analyze"]) == 128 + number
    assert capsys.readouterr().err == "vimoe: interrupted\n"


def test_an_interrupt_that_was_lost_stops_the_training_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is raised in a destructor is printed by Python, and the verb goes on."""

    def verb(*_: object) -> tuple[str, dict[str, object]]:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with stopping() as stop:
            return "", {"signal": stop.signal}

    seen = []
    monkeypatch.setitem(VERBS, "analyze", lambda *given: seen.append(verb(*given)) or seen[-1])
    assert main(["analyze"]) == 0 and seen[0][1] == {"signal": signal.SIGTERM}
    with stopping() as stop:
        assert stop.signal is None  # of a verb that has ended


def test_damaged_files_of_a_run_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, verb in [
        ("metrics.csv", "epoch\n1\n", "analyze"),
        ("summary.json", "{", "analyze"),
        ("routing.json", "{}", "prune"),
        ("config.yaml", "moe: 3\n", "evaluate"),
    ]:
        copy = tmp_path / name
        shutil.copytree(run, copy)
        (copy / name).write_text(text)
        out = ["--out", tmp_path / "out"] if verb == "prune" else []
        assert str(copy) in refused(capsys, verb, copy, *out)
        assert not (tmp_path / "out").exists()


def test_a_run_in_the_data_folder_is_refused(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures and examples would be images of the next training."""
    out = photos / "runs" / "first"
    before = sorted(photos.rglob("*"))
    said = refused(capsys, "train", "--data.path", photos, *TINY, *QUICK, "--out", out)
    assert f"--out {out} lies in {photos}" in said and "name one beside it" in said
    assert f"--out {out} lies in {photos}" in refused(capsys, "prune", run, "--out", out)
    monkeypatch.chdir(photos)
    assert "--out run lies in ." in refused(capsys, "train", "--data.path=.", *TINY, *QUICK, "--out=run")
    assert sorted(photos.rglob("*")) == before


def test_a_run_in_what_the_data_folder_links_to_is_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "linked").mkdir()
    for name in ("blue", "red"):
        (tmp_path / "linked" / name).symlink_to(photos / "train" / name)
    out = photos / "train" / "red" / "run"
    said = refused(capsys, "train", "--data.path", tmp_path / "linked", *TINY, *QUICK, "--out", out)
    assert "lies in" in said and not out.exists()


def test_messages_show_names_with_line_ends_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no\ufffdrun: no such run" in refused(capsys, "evaluate", "no\nrun")
    assert "x\ufffdy.png: no such file" in refused(capsys, "predict", run, "x\u2028y.png")


def test_a_yaml_file_of_empty_sections_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.yaml"
    flags = [*TINY, "--moe.layers=all"]
    plain = call(capsys, "count", *flags)
    for text in ("moe:\n#  layers: all\n", "", "model: {}\nmoe:\n"):
        config.write_text(text)
        assert text == "" or call(capsys, "count", "--config", config, *flags) == plain
    config.write_text("moe: {top_k: x}")
    assert refused(capsys, "count", "--config", config).startswith("vimoe: moe.top_k=x: expected")


def test_a_folder_where_a_training_was_killed_before_it_began_may_be_used(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for name in (".vimoe-lock", ".vimoe-locked-by"):
        out.mkdir(exist_ok=True), (out / name).write_text("")
    (out / ".vimoe-tmp-proof").mkdir()
    call(capsys, "train", "--data.path", photos, *TINY, *QUICK, "--train.epochs=1", "--moe.layers=none", "--out", out)
    assert not list(out.glob(".vimoe*"))


def test_one_bad_image_leaves_the_predictions_of_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = folder(tmp_path / "new", images=20)
    (new / "red" / "003.png").write_bytes(b"x")
    for workers in (0, 2):
        found = predict(load(run / "model"), sorted(new.rglob("*.png")), workers=workers)
        assert len(found) == 60
        assert [Path(each["file"]) for each in found if "error" in each] == [new / "red" / "003.png"]
    found = call(capsys, "predict", run, new)["predictions"]
    (bad,) = [each for each in found if "error" in each]
    assert "classes" not in bad and "no known image format" in bad["error"]
    assert main(["predict", str(run), str(new)]) == 0
    printed = capsys.readouterr()
    assert f"{new / 'red' / '003.png'} cannot be read as an image" in printed.out and printed.out.count("\n") == 60
    assert "003.png cannot be read" in refused(capsys, "predict", run, new / "red" / "003.png")
    (new / "red" / "004.png").write_bytes(b"")
    both = [new / "red" / "003.png", new / "red" / "004.png"]
    assert "none of 2 images can be read" in refused(capsys, "predict", run, *both)


def test_a_pruned_run_needs_no_figures_and_appears_whole(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    call(capsys, "analyze", copy, "--draws=1")
    shutil.rmtree(copy / "figures")
    out = tmp_path / "pruned"
    with monkeypatch.context() as patch:
        patch.setattr(vimoe.experiments.finished_run, "receipts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["prune", str(copy), "--out", str(out)])
        patch.setattr(vimoe.experiments.finished_run, "receipts", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["prune", str(copy), "--out", str(out)]) == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    (tmp_path / "real").mkdir(), (tmp_path / "link").symlink_to(tmp_path / "real")  # of a large disk
    call(capsys, "prune", copy, "--out", tmp_path / "link", "--tolerance=9")
    assert (tmp_path / "real" / "summary.json").exists()
    shutil.rmtree(tmp_path / "real")
    (tmp_path / "link").unlink()
    with monkeypatch.context() as patch:
        out.mkdir(), patch.chdir(out)
        assert "is the working directory" in refused(capsys, "prune", copy, "--out=.")
    out.rmdir()
    out.mkdir()  # an empty folder may be given; what is put there meanwhile stays
    with monkeypatch.context() as patch:
        real = vimoe.experiments.finished_run.receipts
        patch.setattr(
            vimoe.experiments.finished_run, "receipts", lambda *args: [(out / "mine").touch(), real(*args)][1]
        )
        assert "--out" in refused(capsys, "prune", copy, "--out", out, "--tolerance=9")
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    assert call(capsys, "prune", copy, "--out", out, "--tolerance=9")["out"] == str(out)
    assert (out / "summary.json").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["copy", "pruned"]
    assert "is finished" in refused(capsys, "train", "--resume", out)


def test_a_run_of_several_processes_is_recovered_by_one_or_refused_at_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    settings = (copy / "config.yaml").read_text("utf-8")
    assert settings.count("    expert: 1\n") == settings.count("\n  precision: ") == 1
    prune = ["prune", copy, "--recover=1", "--tolerance=-1", "--out", tmp_path / "out"]
    (copy / "config.yaml").write_text(settings.replace("    expert: 1\n", "    expert: 2\n"), "utf-8")
    assert call(capsys, *prune)["recovery_epochs"] == 1
    monkeypatch.setattr(vimoe.experiments.finished_run, "prune", None)
    (copy / "config.yaml").write_text(re.sub("\n  precision: .*", "\n  precision: fp16", settings), "utf-8")
    assert "expected a GPU" in refused(capsys, *prune[:-1], tmp_path / "again")


def test_a_pruning_that_is_stopped_while_it_recovers_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not say how to go on with what is gone."""
    real = vimoe.training.loop.auxiliary_losses
    monkeypatch.setattr(
        vimoe.training.loop, "auxiliary_losses", lambda *args: [os.kill(os.getpid(), signal.SIGTERM), real(*args)][1]
    )
    prune = ["prune", str(run), "--recover=1", "--tolerance=-1", "--out", str(tmp_path / "out")]
    assert main(prune) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == "vimoe: interrupted" and not list(tmp_path.iterdir())


def test_an_empty_path_is_no_working_directory(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what a shell makes of a variable that is not set."""
    monkeypatch.chdir(run)
    for words in (
        ["evaluate", ""], ["predict", "", photos], ["predict", run, ""], ["train", "--resume", ""], ["report", ""],
    ):  # fmt: skip
        assert "an empty path: expected" in refused(capsys, *words)
    assert "data.path is empty" in refused(capsys, "evaluate", run, "--data.path", "")
    assert f"{run / 'config.yaml'} is a file: expected a run folder; name {run}" in refused(
        capsys, "evaluate", run / "config.yaml"
    )


def test_a_run_of_digits_is_scored_on_digits_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--data.path=digits", *TINY, *QUICK, "--train.epochs=1", "--data.images_per_class=8"]
    call(capsys, *train, "--moe.layers=none", "--out", tmp_path / "digits")
    whole = call(capsys, "evaluate", tmp_path / "digits")
    assert call(capsys, "evaluate", tmp_path / "digits", "--data.path=digits") == whole and whole["split"] == "test"
    assert "no class '0' in the class map" in refused(capsys, "evaluate", run, "--data.path=digits")


VERBS_THAT_WRITE = {
    "train": ["train", "--data.path=PHOTOS", *TINY, *QUICK, "--out=OUT"],
    "train with TensorBoard": ["train", "--data.path=PHOTOS", *TINY, *QUICK, "--train.tensorboard=true", "--out=OUT"],
    "analyze": ["analyze", "RUN", "--draws=1"],
    "diagnose": ["diagnose", "RUN"],
    "prune": ["prune", "RUN", "--tolerance=9", "--out=OUT"],
    "prune and recover": ["prune", "RUN", "--tolerance=9", "--recover=1", "--out=OUT"],
    "report": ["report", "RUN"],
    "report of two": ["report", "RUN", "RUN", "--out=OUT"],
    "demo": ["demo", "--out=OUT"],
}


@pytest.mark.parametrize("words", VERBS_THAT_WRITE)
@pytest.mark.parametrize("largest", one_in(3, [500, 0, 8_000]))
def test_a_file_that_cannot_be_written_is_one_line(
    words: str, largest: int, run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files may have so many bytes and no more, which is as a full disk is; what was there is as it was."""
    shutil.copytree(run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    argv = [
        word.replace("PHOTOS", str(photos)).replace("RUN", str(tmp_path / "run")).replace("OUT", str(tmp_path / "out"))
        for word in VERBS_THAT_WRITE[words]
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    capsys.readouterr()
    try:
        status = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and error.startswith("vimoe: ") and "make room" in error
    for path, content in before.items():
        assert path.read_bytes() == content or json.loads(path.read_text()), path  # whole, if new
    assert not list(tmp_path.rglob(".vimoe-*"))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_standard_output_that_is_full_is_one_line(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["plan", *TINY, "--moe.layers=all", *options]) == 2
    assert capsys.readouterr().err == "vimoe: a file or folder cannot be used (No space left on device); make room\n"


def test_an_error_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["count", "--moe.layers=lst", "--json"]) == 2
    assert "did you mean" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


def test_a_preset_is_a_file_whose_settings_flags_override() -> None:
    from vimoe.config.command_line import PRESETS, Parser

    assert set(PRESETS) == {"frozen-trunk", "small-data", "recommended", "imagenet-1k", "ade20k"}
    for form in (["--config", "frozen-trunk"], ["--config=frozen-trunk"]):
        parser = Parser(prog="test")
        parser.add_sections("model", "moe", "train")
        settings = parser.settings(parser.parse_args([*form, "--train.epochs", "7"]))
        assert settings.train.train_only == "moe"
        assert settings.train.epochs == 7


@pytest.mark.parametrize("name", ["frozen-trunk", "small-data"])
def test_a_file_of_the_users_goes_before_a_preset_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from vimoe.config.command_line import Parser

    monkeypatch.chdir(tmp_path)
    Path(name).write_text("train:\n  epochs: 3\n")
    parser = Parser(prog="test")
    parser.add_sections("model", "moe", "train")
    settings = parser.settings(parser.parse_args(["--config", name]))
    assert (settings.train.epochs, settings.train.early_stopping) == (3, None)


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a line for each step in place of one every half minute."""
    monkeypatch.setattr("vimoe.terminal.EVERY", 0.0)
    caplog.set_level("INFO", "vimoe")
    run = tmp_path / "run"
    small = ["--data.workers=0", "--train.batch_size=2", "--train.epochs=1", "--train.tensorboard=false"]
    data = ["--data.path", str(photos), "--data.cache=disk"]
    assert main(["train", *data, *TINY, *small, "--train.precision=no", "--moe.layers=all", "--out", str(run)]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert main(["prune", str(run), "--out", str(tmp_path / "pruned"), "--tolerance=100"]) == 0
    said = {record.getMessage().partition(":")[0] for record in caplog.records if record.name == "vimoe.terminal"}
    assert said >= {
        "scanning images", "decoding images", "epoch 1/1", "evaluating", "observing the routing",
        "overruling the routing", "pruning layers", "scoring on test for the receipt, 1 of 2",
        "scoring on test for the receipt, 2 of 2",
    }  # fmt: skip
