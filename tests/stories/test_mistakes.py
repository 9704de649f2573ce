"""What can be wrong with a finished run, with images and options: one line with the remedy, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import QUICK, TINY, refused
from helpers.pickles import PICKLE
from helpers.pictures import folder, roles

from vimoe.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a finished ViMoE run of them with routing.json, and a dense one."""
    root = tmp_path_factory.mktemp("runs")
    photos = roles(root / "photos", val=0)
    for name, layers in (("run", "all"), ("dense", "none")):
        train = ["train", "--data.path", str(photos), *TINY, *QUICK, f"--moe.layers={layers}"]
        assert main([*train, "--train.epochs=1", "--out", str(root / name)]) == 0
    assert main(["analyze", str(root / "run"), "--draws=1"]) == 0
    return root


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda root: (root / "run" / name).write_text(change((root / "run" / name).read_text()))


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "run" / name).write_bytes(content)


def drop(name: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        path = root / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def truncate(name: str) -> Callable[[Path], None]:
    def cut(root: Path) -> None:
        path = root / "run" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def jsoned(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def alter(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return edit(name, alter)


def nothing(_root: Path) -> None:
    pass


WEIGHTS, CONFIG = "model/model.safetensors", "model/config.json"
DAMAGE = {
    "weights cut off": (truncate(WEIGHTS), "evaluate run", "expected a whole safetensors file"),
    "weights missing": (drop(WEIGHTS), "evaluate run", "has no model.safetensors"),
    "weights missing, to be exported": (drop(WEIGHTS), "export run", "has no model.safetensors"),
    "weights a pickle": (put(WEIGHTS, PICKLE), "evaluate run", "expected a whole safetensors file"),
    "weights empty": (put(WEIGHTS, b""), "predict run photos", "expected a whole safetensors file"),
    "model config missing": (drop(CONFIG), "evaluate run", "has no config.json"),
    "model config no JSON": (put(CONFIG, b"{"), "evaluate run", "config.json"),
    "model of a newer version": (
        jsoned(CONFIG, lambda c: c["vimoe"].update(format=99)), "evaluate run", "99",
    ),
    "model with another layer": (
        jsoned(CONFIG, lambda c: c["vimoe"]["layers"].update({"blocks.7.mlp": c["vimoe"]["layers"]["blocks.0.mlp"]})),
        "evaluate run", "blocks.7.mlp",
    ),
    "model with other experts": (
        jsoned(CONFIG, lambda c: c["vimoe"]["layers"]["blocks.0.mlp"].update(num_experts=5)),
        "evaluate run", "does not fit config.json",
    ),
    "model with an unknown setting": (
        jsoned(CONFIG, lambda c: c["vimoe"]["layers"]["blocks.0.mlp"].update(top_c=1)), "evaluate run", "top_c",
    ),
    "model of no known architecture": (
        jsoned(CONFIG, lambda c: c.update(architecture="vit_from_mars")), "evaluate run", "vit_from_mars",
    ),
    "model missing": (drop("model"), "evaluate run", "run has no model/"),
    "settings missing": (drop("config.yaml"), "analyze run", "has no config.yaml"),
    "settings no YAML": (put("config.yaml", b"a: ["), "analyze run", "config.yaml cannot be read"),
    "settings unknown": (edit("config.yaml", lambda t: t.replace("top_k", "top_c")), "prune run --out out", "top_c"),
    "settings of a wrong kind": (
        edit("config.yaml", lambda t: t.replace("top_k: 1", "top_k: one")), "prune run --out out", "top_k",
    ),
    "settings binary": (put("config.yaml", b"\xff\xfe\x00"), "evaluate run", "config.yaml cannot be read"),
    "evidence no JSON": (put("routing.json", b"{"), "prune run --out out", "run analyze again"),
    "evidence incomplete": (
        jsoned("routing.json", lambda r: r["layers"][0].pop("gate_mass")), "prune run --out out", "run analyze again",
    ),
    "evidence of another model": (
        jsoned("routing.json", lambda r: r["layers"][0].update(num_experts=3)), "prune run --out out",
        "run analyze on this model",
    ),
    "evidence unreadable in the report": (put("routing.json", b"[]"), "report run", "routing.json"),
    "summary no JSON": (put("summary.json", b"no"), "report run", "summary.json"),
    "summary of something else": (
        put("summary.json", b'{"a": 1}'), "report run", "summary.json is damaged (it has neither",
    ),
    "summary of something else, side by side": (
        put("summary.json", b'{"a": 1}'), "report run dense --out x.html", "summary.json is damaged (it has neither",
    ),
    "metrics of other columns": (
        put("metrics.csv", b"epoch,a\n1,2\n"), "report run", "metrics.csv has no column 'train_l",
    ),
    "metrics of other columns, side by side": (
        put("metrics.csv", b"epoch,val_loss\n1,2\n"), "report run dense --out x.html",
        "metrics.csv has no column 'train_loss'",
    ),
    "metrics empty": (put("metrics.csv", b""), "report run", "metrics.csv has no column 'epoch'"),
    "loads of other columns": (put("load.csv", b"epoch,layer\n"), "report run", "load.csv has no column 'expert'"),
    "evidence of something else, side by side": (
        put("routing.json", b'{"a": 1}'), "report run dense --out x.html", "routing.json",
    ),
    "metrics no table": (put("metrics.csv", b"epoch\nx\n"), "report run", "metrics.csv"),
    "validation image gone": (
        edit("validation.txt", lambda t: t + "train/red/gone.png\n"), "analyze run", "validation images are missing",
    ),
    "data gone": (lambda root: shutil.rmtree(root / "photos"), "analyze run", "no such folder"),
    "a class that the model does not know": (
        lambda root: folder(root / "photos" / "test", 1, ("violet",)), "evaluate run", "no class 'violet'",
    ),
    "a test image that is none": (
        lambda root: (root / "photos/test/red/000.png").write_bytes(b"<html>"), "evaluate run", "000.png",
    ),
    "a run that is a file": (lambda root: (root / "file").write_text("x"), "evaluate file", "file is a file"),
    "no run at all": (nothing, "analyze photos", "has no config.yaml"),
    "a misspelt run": (nothing, "analyze runn", "did you mean"),
    "analysis of a dense run": (nothing, "analyze dense", "the model has no MoE layer"),
    "pruning of a dense run": (nothing, "prune dense --out out", "the model has no MoE layer"),
    "diagnosis of a dense run": (nothing, "diagnose dense", "the model has no MoE layer"),
    "diagnosis of a run that did not finish": (drop("model"), "diagnose run", "run has no model/"),
    "diagnosis on one image": (nothing, "diagnose run --overrule 1", "overrule=1: expected at least 2"),
    "diagnosis without permutations": (nothing, "diagnose run --draws 0", "draws=0: expected at least 1"),
    "diagnosis by evidence without interventions": (
        jsoned("routing.json", lambda r: [layer.update(permuted=None) for layer in r["layers"]]), "diagnose run",
        "the evidence has no interventions",
    ),
    "diagnosis by evidence of another model": (
        jsoned("routing.json", lambda r: r["layers"][0].update(num_experts=3)), "diagnose run",
        "run analyze on this model",
    ),
    "diagnosis by evidence of other images": (
        jsoned("routing.json", lambda r: r["base"].update(images=99)), "diagnose run", "expected the same images",
    ),
    "diagnosis unreadable in the report": (
        lambda root: (root / "run" / "diagnosis.json").write_text("[]"), "report run", "diagnosis.json",
    ),
    "no draws": (nothing, "analyze run --draws 0", "draws=0: expected at least 1"),
    "fewer images than none": (nothing, "analyze run --overrule -5", "overrule=-5: expected 0 for none"),
    "draws that are no number": (nothing, "analyze run --draws many", "draws=many"),
    "a tolerance that is none": (nothing, "prune run --out out --tolerance nan", "tolerance=nan: expected"),
    "a tolerance that is a word": (nothing, "prune run --out out --tolerance small", "tolerance=small"),
    "recovery of less than no epochs": (nothing, "prune run --out out --recover -1", "recover=-1: expected a number"),
    "recovery that goes back": (nothing, "prune run --out out --recover 1 --recover_lr -1", "lr=-1"),
    "pruning without out": (nothing, "prune run", "--out is required"),
    "pruning into a run": (nothing, "prune run --out dense", "already exists"),
    "pruning into a file": (nothing, "prune run --out dense/config.yaml", "already exists"),
    "pruning below a file": (nothing, "prune run --out dense/config.yaml/x", "cannot be created"),
    "side by side without out": (nothing, "report run dense", "--out is required"),
    "side by side with nothing": (nothing, "report run nowhere --out x.html", "nowhere: no such run"),
    "a report into no folder": (nothing, "report run dense --out no/where/x.html", "no/where: no such folder"),
    "no report at all": (nothing, "report", "required: runs"),
    "evaluation of nothing": (nothing, "evaluate run --data.path nowhere", "data.path='nowhere': no such folder"),
    "evaluation of no image": (nothing, "evaluate run --data.path dense/model", "no image in any class"),
    "windows over photos": (nothing, "evaluate run --data.inference slide", "data.inference='slide' with data.task="),
    "mirrored photos": (nothing, "predict run photos/test/red --data.flip_test true", "flip_test=True with data.task="),
    "predictions of none": (nothing, "predict run photos/test/red --top 0", "--top 0: expected at least 1"),
    "predictions for no image": (nothing, "predict run dense/model", "holds no image"),
    "resuming what is finished": (nothing, "train --resume run", "is finished"),
    "resuming nothing": (nothing, "train --resume nowhere", "no such run"),
    "resuming with settings": (nothing, "train --resume run --train.epochs 9", "--train.epochs with --resume"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_is_said_in_one_line(
    what: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words, said = DAMAGE[what]
    root = tmp_path / "root"
    shutil.copytree(runs, root)
    settings = (root / "run" / "config.yaml").read_text()
    (root / "run" / "config.yaml").write_text(settings.replace(str(runs), str(root)))
    damage(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    monkeypatch.chdir(root)
    assert said in refused(capsys, *words.split())
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before  # also no pickle was run


def test_all_verbs_are_among_them() -> None:
    assert len(DAMAGE) >= 50
    assert {words.split()[0] for _, words, _ in DAMAGE.values()} >= {
        "evaluate",
        "predict",
        "analyze",
        "diagnose",
        "prune",
        "export",
        "report",
    }
