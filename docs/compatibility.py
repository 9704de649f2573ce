"""Write docs/compatibility.md: what holds for each architecture once it is upcycled. Run it from anywhere.

Each row of `ARCHITECTURES` is built small, with random weights, and upcycled with 4 experts and token routing in all of
its blocks; then each probe of `PROBES` is tried. Findings are kept in docs/compatibility.json, of which the page is
made.

    python docs/compatibility.py                    probe what the file does not have yet, and write the page
    python docs/compatibility.py swin clip          probe again the rows with one of these words, and no others
    python docs/compatibility.py --all --quick      probe all again, but keep what is known of compile and export

A finding is "yes", "no" with the reason, or "unknown" with the error. "no" is what vimoe, the library or the dense
model itself refuses; "unknown" is a failure that nobody has explained.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vimoe
from vimoe.errors import VimoeError, first_line
from vimoe.models.interface import find_backbone, logits_of

PAGE, FOUND = Path(__file__).with_suffix(".md"), Path(__file__).with_suffix(".json")
EXPERTS = 4
Builder = Callable[[], nn.Module]


class Architecture(NamedTuple):
    """A row of the table.

    Attributes:
        library: library of the model.
        name: its name there, or that of its class.
        build: function that builds it small, with random weights.
        layers: FFNs that are replaced.
        size: height and width of the images, where the model takes others than its own.
    """

    library: str
    name: str
    build: Builder
    layers: str = "all"
    size: int | None = None

    @property
    def key(self) -> str:
        """Name in the file of findings."""
        return f"{self.library}/{self.name}"


# ---- the architectures


def _timm(name: str, layers: str = "all", size: int | None = None, **args: Any) -> Architecture:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=5, **args)

    return Architecture("timm", name, build, layers, size)


_PLAIN: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
_TIMM = (
    _timm("vit_tiny_patch16_224", **_PLAIN),
    _timm("vit_small_patch14_dinov2", **_PLAIN | {"img_size": 28}),
    _timm("vit_small_patch14_reg4_dinov2", **_PLAIN | {"img_size": 28}),
    _timm("vit_giant_patch14_dinov2", **_PLAIN | {"img_size": 28}),
    _timm("vit_base_patch16_siglip_224", **_PLAIN),
    _timm("vit_base_patch16_clip_224", **_PLAIN),
    _timm("vit_little_patch16_reg4_gap_256", **_PLAIN),
    _timm("vit_small_patch16_18x2_224", **_PLAIN),
    _timm("vit_relpos_small_patch16_224", **_PLAIN),
    _timm("vit_medium_patch16_rope_reg1_gap_256", **_PLAIN),
    _timm("vit_pe_core_tiny_patch16_384", **_PLAIN),
    _timm("vit_small_patch16_dinov3", **_PLAIN),
    _timm("vit_small_plus_patch16_dinov3", **_PLAIN),
    _timm("aimv2_large_patch14_224", **_PLAIN | {"img_size": 28}),
    _timm("deit_tiny_patch16_224", **_PLAIN),
    _timm("deit_tiny_distilled_patch16_224", **_PLAIN),
    _timm("deit3_small_patch16_224", **_PLAIN),
    _timm("beit_base_patch16_224", **_PLAIN),
    _timm("beit3_base_patch16_224", **_PLAIN),
    _timm("eva02_tiny_patch14_224", **_PLAIN | {"img_size": 28}),
    _timm("eva02_base_patch14_224", **_PLAIN | {"img_size": 28}),
    _timm("deepseek_vit_412m", **_PLAIN | {"img_size": 28}),
    _timm("qwen3_vit_88m", **_PLAIN),
    _timm("gemma4_vit_167m", **_PLAIN),
    _timm("cait_xxs24_224", **_PLAIN),
    _timm("convit_tiny", **_PLAIN | {"local_up_to_layer": 1}),
    _timm("xcit_nano_12_p16_224", **_PLAIN),
    _timm("tnt_s_patch16_224"),
    _timm("crossvit_tiny_240"),
    _timm("coat_lite_tiny"),
    _timm("coat_tiny"),
    _timm("pit_ti_224"),
    _timm("volo_d1_224"),
    _timm("samvit_base_patch16_224", **_PLAIN | {"global_attn_indexes": (1,), "window_size": 2, "img_size": 64}),
    _timm("naflexvit_base_patch16_gap", depth=2, embed_dim=24, num_heads=2),
    _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=16, depths=(1, 2, 1, 1)),
    _timm("swinv2_tiny_window8_256", img_size=64, window_size=2, embed_dim=24, depths=(1, 2, 1, 1)),
    _timm("swinv2_cr_tiny_224", img_size=64, window_size=2, embed_dim=24, depths=(1, 2, 1, 1)),
    _timm("hiera_tiny_224", embed_dim=24, stages=(1, 1, 1, 1)),
    _timm("sam2_hiera_tiny", embed_dim=24, stages=(1, 1, 1, 1), size=224),
    _timm("mvitv2_tiny"),
    _timm("pvt_v2_b0"),
    _timm("twins_pcpvt_small", depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    _timm("twins_svt_small", depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    _timm("nest_tiny_jx"),
    _timm("davit_tiny", size=64),
    _timm("gcvit_xxtiny"),
    _timm("focalnet_tiny_srf", size=64),
    _timm("maxvit_rmlp_pico_rw_256"),
    _timm("maxxvit_rmlp_nano_rw_256"),
    _timm("coatnet_pico_rw_224"),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050", size=64),
    _timm("edgenext_xx_small", size=64),
    _timm("nextvit_small", size=64),
    _timm("efficientformer_l1"),
    _timm("efficientformerv2_s0"),
    _timm("efficientvit_m0"),
    _timm("tiny_vit_5m_224"),
    _timm("levit_128s"),
    _timm("visformer_tiny"),
    _timm("vitamin_small_224"),
    _timm("fastvit_t8"),
    _timm("repvit_m0_9"),
    _timm("swiftformer_xs"),
    _timm("convnext_zepto_rms", size=64),
    _timm("convnext_tiny", size=64, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    _timm("convnextv2_atto"),
    _timm("inception_next_atto", size=64),
    _timm("poolformer_s12", size=64),
    _timm("caformer_s18", size=64),
    _timm("sequencer2d_s"),
    _timm("csatv2", size=128),
    _timm("mixer_s32_224", img_size=64),
    _timm("gmixer_12_224", img_size=32),
    _timm("resmlp_12_224", img_size=32),
    _timm("gmlp_ti16_224", img_size=32),
)


def _torchvision(name: str, **args: Any) -> Architecture:
    """Build one of torchvision's classes small: its names take no sizes."""

    def build() -> nn.Module:
        from vimoe.models.torchvision_vit import TorchvisionViT

        return TorchvisionViT.build(num_classes=5, **args)

    return Architecture("torchvision", name, build)


_VIT: dict[str, Any] = {"kind": "vit", "image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 24}
_SWIN: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}
_TORCHVISION = (
    _torchvision("vit_b_16", **_VIT, patch_size=16, mlp_dim=48),
    _torchvision("vit_b_32", **_VIT, patch_size=32, mlp_dim=48),
    _torchvision("swin_t", kind="swin", **_SWIN, window_size=[7, 7]),
    _torchvision("swin_v2_t", kind="swin_v2", **_SWIN, window_size=[8, 8]),
)


def _transformers(model: str, config: str, nested: str = "", **more: Any) -> Architecture:
    """Build a class of transformers from a small configuration.

    Args:
        model: name of the class of the model.
        config: name of the class of its configuration.
        nested: name of the argument of the model's configuration that is a configuration of its vision part.
        more: further arguments of the configuration; None for one of `_SMALL` that it has not.
    """

    def build() -> nn.Module:
        import transformers

        values = {name: value for name, value in {**_SMALL, **more}.items() if value is not None}
        given = {nested: values} if nested else values
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**given))
        return built

    return Architecture("transformers", model, build)


_SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 16, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_labels": 5,
}  # fmt: skip
_TRANSFORMERS = (
    _transformers("ViTForImageClassification", "ViTConfig"),
    _transformers("DeiTForImageClassification", "DeiTConfig"),
    _transformers("BeitForImageClassification", "BeitConfig"),
    _transformers("Dinov2ForImageClassification", "Dinov2Config"),
    _transformers("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
    _transformers("DINOv3ViTModel", "DINOv3ViTConfig"),
    _transformers("CLIPForImageClassification", "CLIPConfig", "vision_config"),
    _transformers("CLIPVisionModel", "CLIPVisionConfig"),
    _transformers("SiglipForImageClassification", "SiglipConfig", "vision_config"),
    _transformers("SiglipVisionModel", "SiglipVisionConfig"),
    _transformers("Siglip2ForImageClassification", "Siglip2Config", "vision_config"),
    _transformers("Siglip2VisionModel", "Siglip2VisionConfig"),
    _transformers("ViTMAEModel", "ViTMAEConfig", mask_ratio=0.0),
    _transformers("Data2VecVisionForImageClassification", "Data2VecVisionConfig"),
    _transformers("SwinForImageClassification", "SwinConfig", image_size=64, patch_size=4, embed_dim=16,
                  depths=[1, 2], num_heads=[1, 2], window_size=4, num_attention_heads=None, num_hidden_layers=None),
    _transformers("SamVisionModel", "SamVisionConfig", mlp_dim=48, window_size=2, global_attn_indexes=[1]),
)  # fmt: skip


ARCHITECTURES: tuple[Architecture, ...] = (*_TIMM, *_TORCHVISION, *_TRANSFORMERS)


# ---- the probes


@dataclass(frozen=True)
class Subject:
    """An architecture that is probed.

    Attributes:
        parent: dense model in eval mode.
        model: the same one, upcycled with token routing.
        x: two images.
        layers: FFNs that were replaced.
    """

    parent: nn.Module
    model: nn.Module
    x: Tensor
    layers: str


def identity(on: Subject) -> None:
    """The upcycled model computes what its parent did."""
    with torch.no_grad():
        _same(logits_of(on.model, on.x), logits_of(on.parent, on.x))


def backward(on: Subject) -> None:
    """Gradients of all that is no FFN are the parent's, and each layer has gradients."""
    _same_gradients(_gradients(on.model, on.x), _gradients(on.parent, on.x))


def checkpointing(on: Subject) -> None:
    """The library's own switch for gradient checkpointing changes no gradient."""
    parent, model = copy.deepcopy(on.parent), copy.deepcopy(on.model)
    _switch(parent)
    _switch(model)
    _gradients(parent, on.x)
    _same_gradients(_gradients(model, on.x), _gradients(on.model, on.x))


def compiles(on: Subject) -> None:
    """It compiles, forward and backward, without a graph break."""

    def compiled(model: nn.Module) -> dict[str, Tensor]:
        torch._dynamo.reset()
        made = copy.deepcopy(model)
        made.compile(backend="aot_eager", fullgraph=True)
        return _gradients(made, on.x)

    _unless_the_parent_fails(compiled, on)


def bfloat16(on: Subject) -> None:
    """In bfloat16 it computes what its parent does in bfloat16."""
    parent, model = (copy.deepcopy(each).bfloat16() for each in (on.parent, on.model))
    with torch.no_grad():
        expected = logits_of(parent, on.x.bfloat16())
        _same(logits_of(model, on.x.bfloat16()), expected, 0.05)


def saving(on: Subject) -> None:
    """A model folder brings it back."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loaded = vimoe.load(vimoe.save(on.model, Path(folder) / "model"))
        _same(logits_of(loaded, on.x), logits_of(on.model, on.x), 1e-6)


def exports(on: Subject) -> None:
    """torch.export takes it, and the program computes the same for other images."""

    def exported(model: nn.Module) -> None:
        with torch.no_grad():
            program = torch.export.export(model, (on.x,), strict=False).module()
            _same(_logits(model, program(on.x.flip(0))), logits_of(model, on.x.flip(0)))

    _unless_the_parent_fails(exported, on)


def image_routing(on: Subject) -> None:
    """With one decision for an image, too, it computes what its parent did."""
    config = vimoe.MoEConfig(layers=on.layers, num_experts=EXPERTS, routing="image")
    model = vimoe.upcycle(copy.deepcopy(on.parent), config)
    with torch.no_grad():
        _same(logits_of(model, on.x), logits_of(on.parent, on.x))


PROBES: dict[str, Callable[[Subject], None]] = {
    "identity": identity,
    "backward": backward,
    "checkpointing": checkpointing,
    "compile": compiles,
    "bfloat16": bfloat16,
    "save, load": saving,
    "export": exports,
    "image routing": image_routing,
}
SLOW = ("compile", "export")


class Refused(Exception):
    """What is not there for the dense model either."""


def _gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each parameter that has one."""
    model.zero_grad()
    logits_of(model, x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    layers = {name.partition(".experts.")[0] + "." for name in found if ".experts." in name}
    assert layers, "no gradient reaches an expert"
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        if name in found:
            difference = float((found[name] - gradient).abs().max())
            assert difference <= 1e-3 * largest, f"the gradient of {name} differs by {difference / largest:.1e}"
        else:
            assert name.startswith(tuple(layers)), f"{name} has no gradient"
    assert all(gradient.isfinite().all() for gradient in found.values()), "a gradient is not finite"


def _same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} in place of {tuple(expected.shape)}"
    assert expected.isfinite().all(), "the parent's output is not finite"
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"outputs differ by {difference:.1e}"


def _logits(model: nn.Module, output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else find_backbone(model).logits(output)


def _switch(model: Any) -> None:
    """Switch gradient checkpointing on as the library does."""
    if hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
        except AssertionError as error:
            raise Refused(f"timm: {first_line(error)}") from error
    elif getattr(model, "supports_gradient_checkpointing", False):
        model.train()  # the library asks for it; dropouts are 0
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        raise Refused("the library has no switch for it")


def _unless_the_parent_fails(probe: Callable[[nn.Module], object], on: Subject) -> None:
    """Run a probe; if it fails, and for the parent too, say so."""
    try:
        probe(on.model)
    except Exception:
        try:
            probe(on.parent)
        except Exception as error:
            raise Refused(f"nor can it be done with the dense model ({type(error).__name__})") from error
        raise


def subject(of: Architecture) -> Subject:
    """Build an architecture and upcycle it.

    Raises:
        SurgeryError: if it cannot be.
    """
    torch.manual_seed(0)
    parent = of.build().eval()
    with torch.no_grad():
        for p in parent.parameters():  # a LayerScale of 1e-5, or a head of zeros, would hide mistakes
            p.add_(torch.randn_like(p) * 0.02)
    channels, height, width = find_backbone(parent).input_size
    if of.size:
        height = width = of.size
    x = torch.randn(2, channels, height, width)
    config = vimoe.MoEConfig(layers=of.layers, num_experts=EXPERTS, routing="token")
    return Subject(parent, vimoe.upcycle(copy.deepcopy(parent), config), x, of.layers)


def probe(of: Architecture, wanted: Iterable[str] = PROBES) -> dict[str, str]:
    """Return the finding of each of these probes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: list[Subject] = []
        refusal = _finding(lambda: made.append(subject(of)))
        if not made:
            return dict.fromkeys(wanted, refusal)
        return {name: _finding(lambda name=name: PROBES[name](made[0])) for name in wanted}  # type: ignore[misc]


def _finding(action: Callable[[], object]) -> str:
    try:
        action()
    except (VimoeError, Refused) as error:
        return f"no: {first_line(error)}"
    except Exception as error:
        return f"unknown: {type(error).__name__}: {first_line(error)[:160]}"
    return "yes"


# ---- the page

HEAD = """# What holds for which architecture

Made by `python docs/compatibility.py`, which builds each architecture small with random weights, upcycles all of its
FFNs into 4 experts with token routing, and tries what the columns say. Nothing here was measured on a trained model.

- **identity**: the upcycled model computes what the dense one did. **backward**: gradients of all that is no FFN are
  the dense model's. **checkpointing**: the library's own switch changes no gradient.
- **compile**: `torch.compile(fullgraph=True)`, forward and backward, up to the graphs (backend "aot_eager").
  **bfloat16**: as the dense model in bfloat16. **save, load**: a model folder brings it back.
- **export**: `torch.export.export`, run on other images. **image routing**: one decision for an image.

"no" has its reason below the table; "not probed" was left out for its time; "unknown" is a failure that nobody has
explained.
"""


def page(found: dict[str, dict[str, str]]) -> str:
    """Return the page as Markdown."""
    parts, found = [HEAD], {each.key: found.get(each.key, {}) for each in ARCHITECTURES}
    libraries = dict.fromkeys(each.library for each in ARCHITECTURES)
    holds = sum(all(found[each.key].get(name) == "yes" for name in PROBES) for each in ARCHITECTURES)
    parts.append(f"\n{len(ARCHITECTURES)} architectures; all columns hold for {holds}.\n")
    for library in libraries:
        rows = [each for each in ARCHITECTURES if each.library == library]
        parts.append(f"\n## {library}\n\n| architecture | {' | '.join(PROBES)} |\n|{'---|' * (1 + len(PROBES))}\n")
        for each in rows:
            cells = [found[each.key].get(name, "not probed").partition(":")[0] for name in PROBES]
            parts.append(f"| {each.name} | {' | '.join(cells)} |\n")
        parts += ["\n", *(f"- {line}\n" for each in rows for line in reasons(each, found[each.key]))]
    return "".join(parts)


def reasons(of: Architecture, found: dict[str, str]) -> Iterator[str]:
    """Yield a line for each reason why something does not hold, with the columns that it is about."""
    if of.layers != "all":
        yield f"**{of.name}**: of its FFNs, `{of.layers}`."
    why: dict[str, list[str]] = {}
    for name, value in found.items():
        if value != "yes":
            why.setdefault(value, []).append(name)
    for value, columns in why.items():
        said = "all columns" if len(columns) == len(found) else ", ".join(columns)
        yield f"**{of.name}**, {said}: {value}."


def read() -> dict[str, dict[str, str]]:
    """Return the findings in the file."""
    found: dict[str, dict[str, str]] = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    return found


def main(arguments: list[str]) -> None:
    """Probe, and write the file and the page."""
    parser = argparse.ArgumentParser(description="Write docs/compatibility.md.")
    parser.add_argument("words", nargs="*", help="probe again the rows whose names have one of these words")
    parser.add_argument("--all", action="store_true", help="probe all rows again")
    parser.add_argument("--quick", action="store_true", help="keep what is known of compile and export")
    given = parser.parse_args(arguments)
    found = read()
    for each in ARCHITECTURES:
        again = given.all or any(re.search(word, each.key) for word in given.words)
        known = found.get(each.key, {})
        wanted = [name for name in PROBES if (again or name not in known) and not (given.quick and name in SLOW)]
        if not wanted or (given.words and not again):
            continue
        new = {**known, **probe(each, wanted)}
        found[each.key] = {name: new[name] for name in PROBES if name in new}
        print(each.key, found[each.key], flush=True)
        kept = {one.key: found[one.key] for one in ARCHITECTURES if one.key in found}
        FOUND.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(found), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
