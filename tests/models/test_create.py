"""Names are refused without torch, and none is that timm has."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from helpers.tiny import FAMILIES, vit

import vimoe
from vimoe.config.layers import Layers
from vimoe.config.model import ModelConfig
from vimoe.errors import ConfigError, VimoeError
from vimoe.models.create import create, create_without_weights
from vimoe.models.interface import find_backbone
from vimoe.models.names import FFN_NAME, check_layer_names, check_name
from vimoe.models.segmenter import Segmenter
from vimoe.models.upcycling import sites


def test_no_name_that_timm_has_is_refused() -> None:
    names = [*timm.list_models(), *timm.list_models(pretrained=True), "vit_small_patch16_224_dino"]  # a deprecated one
    assert len(names) > 2000
    for name in names:
        check_name(ModelConfig(name=name))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_of_no_ffn_is_refused(family: str) -> None:
    model = vit(family)
    names = [site.name for site in sites(model)] + [site.name for site in sites(Segmenter(vit(num_classes=0), 3))]
    assert names and all(FFN_NAME.fullmatch(name) for name in names)


def test_names_of_other_kinds_of_models_are_not_refused() -> None:
    """They are refused later, for what they are."""
    names = (
        "swinv2_cr_tiny_224", "cait_xxs24_224", "convnext_tiny", "efficientformer_l1", "xcit_nano_12_p8_224",
        "mixer_s32_224", "resmlp_12_224", "nest_tiny_jx", "csatv2", "mobilevitv2_050",
    )  # fmt: skip
    for name in names:
        assert all(FFN_NAME.fullmatch(site.name) for site in sites(create_without_weights(ModelConfig(name=name))))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("vit_tiny_patch16_224.augreg_in21k", 12), ("vit_large_patch14_dinov2", 24), ("deit3_small_patch16_224", 12),
     ("eva02_tiny_patch14_224", 12), ("beit_base_patch16_224", 12), ("naflexvit_base_patch16_gap", 12),
     ("cait_xxs24_224", 24), ("mixer_s16_224", None)],
)  # fmt: skip
def test_blocks_are_counted_as_timm_builds_them(name: str, blocks: int | None) -> None:
    config = ModelConfig(name=name)
    names = [name for name, _ in create_without_weights(config).named_modules()]
    assert blocks is None or {n for n in names if re.fullmatch(r"blocks\.\d+", n)} == {
        f"blocks.{number}" for number in range(blocks)
    }
    check_layer_names(config, Layers.parse(f"blocks.{(blocks or 12) - 1}.mlp"), Layers.parse("last:1"))
    for wrong in (f"blocks.{blocks}.mlp", f"last:{(blocks or 0) + 1}", [blocks]) if blocks else ():
        with pytest.raises(VimoeError, match="names no FFN|expected at most|no block"):
            check_layer_names(config, Layers.parse(wrong))
    check_layer_names(ModelConfig(name=name, args={"depth": 90}), Layers.parse("blocks.77.mlp"))


def test_what_the_text_has_but_timm_does_not_build_is_refused_by_timm() -> None:
    for name in ("checkpoint_filter_fn", "vit_tiny_patch16_224.lvd142m"):  # a helper, and a tag of another model
        check_name(ModelConfig(name=name))
        with pytest.raises(ConfigError, match=f"timm could not build {name!r}"):
            create(ModelConfig(name=name, pretrained=False))


MISSPELT = [
    "count --model.name vit_smal_patch16_224",
    "plan --model.name vit_small_patch14_dinov2.lvd142",
    "plan --moe.layers blocks.1.mpl",
    "train --data.path . --model.name vit_smal_patch16_224 --out never",
    "train --data.path . --moe.layers blocks.1.mpl --out never",
    "train --data.path . --train.lrr 1 --out never",
    "bench model --moe.layers blocks.1.mpl",
    "train --data.path . --model.name vit_tiny_patch16_224 --moe.layers blocks.77.mlp --out never",
    "plan --model.name vit_tiny_patch16_224 --moe.layers last:13", "plan --moe.layers [-13]",
    "train --data.path . --moe.layers last:1 --train.train_only blocks.12.mlp --out never",
    "train --data.path nowhere --out never", "train --data.path . --out /dev/null", "train --resume nowhere",
    "train --data.task segmentation --data.path nowhere --out never",
    "evaluate nowhere", "predict nowhere .", "analyze nowhere", "diagnose nowhere", "explore nowhere",
    "export nowhere --out never", "prune nowhere --out never", "report nowhere",
]  # fmt: skip


def test_a_misspelt_name_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """Which takes seconds."""
    code = (
        "import json, sys; from vimoe.cli import main\n"
        "statuses = [main(words.split()) for words in json.loads(sys.argv[1])]\n"
        "print(json.dumps([statuses, [name for name in ('torch', 'timm', 'sklearn') if name in sys.modules]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(MISSPELT)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[2] * len(MISSPELT), []]
    assert done.stderr.count("\n") == len(MISSPELT)


def test_a_vit_of_any_size_gets_images_of_the_size_that_is_asked_for() -> None:
    model = create(ModelConfig(name="test_vit", pretrained=False, img_size=32))  # its own size is 160
    assert find_backbone(model).data_config({})["input_size"] == (3, 32, 32) == find_backbone(model).input_size


def test_a_folder_without_its_source_is_told_with_it(tmp_path: Path) -> None:
    timm.models.save_for_hf(vit(), str(tmp_path / "dense"), safe_serialization=True)
    vimoe.save(vit(), tmp_path / "run" / "model")
    (tmp_path / "other").mkdir()
    for given, meant in {
        "dense": "local-dir:{}/dense", "run": "local-dir:{}/run/model", hugging_face(tmp_path / "hf", "ViT"): None,
        "local-dir:run": "local-dir:{}/run/model", "hf": "transformers:{}/hf",
    }.items():  # fmt: skip
        source, colon, folder = given.rpartition(":")
        settings = ModelConfig(name=f"{source}{colon}{tmp_path / folder}")
        if meant is None:
            check_name(settings)
            continue
        with pytest.raises(ConfigError, match=re.escape(f"did you mean '{meant.format(tmp_path)}'?")):
            check_name(settings)
    with pytest.raises(ConfigError, match="timm has no such model; known: "):
        check_name(ModelConfig(name=str(tmp_path / "other")))


def hugging_face(path: Path, name: str) -> str:
    import transformers

    shape: dict = {"vit": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 24, "patch_size": 8}}
    config = getattr(transformers, f"{name}Config")(**shape.get(name.lower(), {"depths": [1], "num_heads": [2]}))
    getattr(transformers, f"{name}Model")(config).save_pretrained(path)
    return f"transformers:{path}"


SIZES = {
    ("vit_small_patch14_dinov2", 60): "multiple of the patch size 14; set 56 or 70",
    ("vit_small_patch14_dinov2", 10): "multiple of the patch size 14; set 14 or more",
    ("swin_tiny_patch4_window7_224", 226): "multiple of the patch size 4; set 224 or 228",
    ("mvitv2_tiny", 226): None,  # patches overlap, and edges are padded
    ("ViT", 20): "multiple of the patch size 8; set 16 or 24",
    ("Swin", 226): None,  # padded, unlike timm's
}


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_images_whose_edges_no_patch_would_see_are_refused(name: str, size: int, tmp_path: Path) -> None:
    place = hugging_face(tmp_path, name) if name in ("ViT", "Swin") else name
    settings, said = ModelConfig(name=place, pretrained=False, img_size=size), SIZES[name, size]
    if said is None:
        create_without_weights(settings)
        return
    with pytest.raises(ConfigError, match=f"^model.img_size={size}: expected a {said}$"):
        create_without_weights(settings)


def test_images_smaller_than_a_patch_are_told_where_weights_would_not_fit(tmp_path: Path) -> None:
    timm.models.save_for_hf(vit(img_size=32, patch_size=16), str(tmp_path), safe_serialization=True)
    with pytest.raises(
        ConfigError, match=r"model.img_size=10: expected a multiple of the patch size 16; set 16 or mor"
    ):
        create(ModelConfig(name=f"local-dir:{tmp_path}", img_size=10))


@pytest.mark.parametrize(
    "args", [{"dynamic_img_pad": True}, {"dynamic_img_pad": True, "dynamic_img_size": True}], ids=str
)
def test_a_model_that_pads_takes_any_size(args: dict) -> None:
    create_without_weights(ModelConfig(name="test_vit", pretrained=False, img_size=50, args=args))
