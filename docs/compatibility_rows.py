"""The architectures of docs/compatibility.md: rows of the table, each of which builds a model small and at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vimoe.models.interface import find_backbone

Inputs = tuple[Tensor, ...]


class Architecture(NamedTuple):
    """A row of the table.

    Attributes:
        library: library of the model.
        name: its name there, or that of its class.
        family: name of the library's own module, or configuration, that describes it and its likes.
        build: function that builds it small, with random weights.
        given: function that makes the arguments of its forward for two images; by default images of its own size.
        inductor: also compile it by inductor, which takes a minute.
    """

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module]
    given: Callable[[], Inputs] | None = None
    inductor: bool = False

    @property
    def key(self) -> str:
        """Name in the file of findings."""
        return f"{self.library}/{self.name}"

    def inputs(self, model: nn.Module) -> Inputs:
        """Return the arguments of the forward, two images or texts."""
        return self.given() if self.given else (torch.randn(2, *find_backbone(model).input_size),)


def _images(side: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(2, 3, side, side),)


def _timm(name: str, size: int | None = None, inductor: bool = False, **args: Any) -> Architecture:
    """Make a row of timm; `size` is the side of the images of a model that takes any."""
    import timm

    def build() -> nn.Module:
        return timm.create_model(name, num_classes=5, **args)

    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    return Architecture("timm", name, family, build, _images(size) if size else None, inductor)


_PLAIN: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
_OF_14 = {**_PLAIN, "img_size": 28}
_STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
_WINDOWS: dict[str, Any] = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2)}
_TIMM = (
    _timm("vit_tiny_patch16_224", **_PLAIN, inductor=True),
    _timm("vit_small_patch14_dinov2", **_OF_14),
    _timm("vit_small_patch14_reg4_dinov2", **_OF_14),
    _timm("vit_giant_patch14_dinov2", **_OF_14),
    _timm("vit_base_patch16_siglip_224", **_PLAIN),
    _timm("vit_base_patch16_clip_224", **_PLAIN),
    _timm("vit_little_patch16_reg4_gap_256", **_PLAIN),
    _timm("vit_small_patch16_18x2_224", **_PLAIN),
    _timm("vit_relpos_small_patch16_224", **_PLAIN),
    _timm("flexivit_small", **_PLAIN),
    _timm("vit_base_patch16_sapiens2", **_PLAIN, num_kv_heads=(2, 1)),
    _timm("vit_small_patch16_lingbot", **_PLAIN),
    _timm("vit_small_patch16_rope_mixed_224", **_PLAIN),
    _timm("vit_medium_patch16_rope_reg1_gap_256", **_PLAIN),
    _timm("vit_pe_core_tiny_patch16_384", **_PLAIN),
    _timm("vit_small_patch16_dinov3", **_PLAIN),
    _timm("vit_small_plus_patch16_dinov3", **_PLAIN),
    _timm("aimv2_large_patch14_224", **_OF_14),
    _timm("deit_tiny_patch16_224", **_PLAIN),
    _timm("deit_tiny_distilled_patch16_224", **_PLAIN),
    _timm("deit3_small_patch16_224", **_PLAIN),
    _timm("beit_base_patch16_224", **_PLAIN),
    _timm("beitv2_base_patch16_224", **_PLAIN),
    _timm("beit3_base_patch16_224", **_PLAIN),
    _timm("eva02_tiny_patch14_224", **_OF_14),
    _timm("eva02_base_patch14_224", **_OF_14),
    _timm("eva02_enormous_patch14_clip_224", **_OF_14, mlp_ratio=2),
    _timm("deepseek_vit_412m", **_OF_14),
    _timm("qwen3_vit_88m", **_PLAIN),
    _timm("gemma4_vit_167m", **_PLAIN),
    _timm("cait_xxs24_224", **_PLAIN),
    _timm("convit_tiny", **_PLAIN, local_up_to_layer=1),
    _timm("xcit_nano_12_p16_224", **_PLAIN, cls_attn_layers=1),
    _timm("tnt_s_patch16_224", img_size=32, depth=2, embed_dim=24, inner_dim=8, num_heads_outer=2, num_heads_inner=2),
    _timm("crossvit_tiny_240", depth=[[1, 1, 0]], embed_dim=[16, 24], num_heads=[2, 2]),
    _timm("coat_lite_tiny", img_size=64),
    _timm("coat_tiny", img_size=64),
    _timm("pit_ti_224", img_size=64),
    _timm("volo_d1_224", img_size=64),
    _timm("samvit_base_patch16_224", **_PLAIN | {"global_attn_indexes": (1,), "window_size": 2, "img_size": 64}),
    _timm("naflexvit_base_patch16_gap", size=32, depth=2, embed_dim=24, num_heads=2),
    _timm("swin_tiny_patch4_window7_224", **_WINDOWS),
    _timm("swinv2_tiny_window8_256", **_WINDOWS),
    _timm("swinv2_cr_tiny_224", **_WINDOWS),
    _timm("hiera_tiny_224", img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1)),
    _timm("sam2_hiera_tiny", size=64, embed_dim=24, stages=(1, 1, 1, 1)),
    _timm("mvitv2_tiny", img_size=64),
    _timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
    _timm("twins_pcpvt_small", img_size=64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 20, 32), num_heads=(1, 2, 4, 8)),
    _timm("twins_svt_small", img_size=64, depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    _timm("nest_tiny_jx", img_size=64),
    _timm("davit_tiny", size=64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 1, 2, 2)),
    _timm("gcvit_xxtiny", img_size=64),
    _timm("focalnet_tiny_srf", size=64),
    _timm("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1), embed_dim=(32, 32)),
    _timm("maxxvit_rmlp_nano_rw_256", img_size=64, depths=(1, 1), embed_dim=(64, 64)),
    _timm("coatnet_pico_rw_224", img_size=64, depths=(1, 1, 1, 1), embed_dim=(32, 32, 32, 32)),
    _timm("mobilevit_xxs", size=64),
    _timm("mobilevitv2_050", size=64),
    _timm("edgenext_xx_small", size=64, depths=(1, 1, 1, 2)),
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
    _timm("convnext_tiny", size=64, **_STAGES),
    _timm("convnext_zepto_rms", size=64, **_STAGES),
    _timm("convnextv2_atto", **_STAGES),
    _timm("inception_next_atto", size=64, depths=(1, 1, 1, 1)),
    _timm("poolformer_s12", size=64),
    _timm("caformer_s18", size=64),
    _timm("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(16, 24, 24, 24), hidden_sizes=(4, 6, 6, 6), size=64),
    _timm("csatv2", size=64),
    _timm("mixer_s32_224", img_size=64),
    _timm("gmixer_12_224", img_size=32),
    _timm("resmlp_12_224", img_size=32),
    _timm("gmlp_ti16_224", img_size=32),
)


def _torchvision(name: str, inductor: bool = False, **args: Any) -> Architecture:
    """Make a row of torchvision from one of its classes: its names take no sizes."""

    def build() -> nn.Module:
        from vimoe.models.torchvision_vit import TorchvisionViT

        return TorchvisionViT.build(num_classes=5, **args)

    size = None if args["kind"] == "vit" else 32
    return Architecture("torchvision", name, args["kind"], build, _images(size) if size else None, inductor)


_VIT: dict[str, Any] = {"kind": "vit", "image_size": 32, "num_layers": 2, "num_heads": 2, "hidden_dim": 24}
_SWIN: dict[str, Any] = {"patch_size": [4, 4], "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}
_TORCHVISION = (
    _torchvision("vit_b_16", **_VIT, patch_size=16, mlp_dim=48, inductor=True),
    _torchvision("vit_b_32", **_VIT, patch_size=32, mlp_dim=48),
    _torchvision("swin_t", kind="swin", **_SWIN, window_size=[4, 4]),
    _torchvision("swin_v2_t", kind="swin_v2", **_SWIN, window_size=[4, 4]),
)


def _transformers(
    model: str, config: str, nested: str = "", given: Callable[[], Inputs] | None = None, inductor: bool = False,
    **changes: Any,
) -> Architecture:  # fmt: skip
    """Make a row of transformers from a class and a small configuration.

    Args:
        model: name of the class of the model.
        config: name of the class of its configuration.
        nested: name of the argument of the model's configuration that is a configuration of its vision part.
        given: function that makes the arguments of its forward, if these are no images.
        inductor: also compile it by inductor.
        changes: further arguments of the configuration; None for one of `_SMALL` that it has not.
    """

    def build() -> nn.Module:
        import transformers

        values = {name: value for name, value in {**_SMALL, **changes}.items() if value is not None}
        arguments = {nested: values} if nested else values
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**arguments))
        return built

    return Architecture("transformers", model, config.removesuffix("Config"), build, given, inductor)


def _words() -> Inputs:
    return (torch.randint(1, 50, (2, 7)),)


def _patches() -> Inputs:
    """Return padded patches of two images, a mask of them, and the number of rows and columns of each image."""
    mask = torch.tensor([[1, 1, 1, 1, 0]] * 2)
    return torch.randn(2, 5, 3 * 16 * 16), mask, torch.tensor([[2, 2]] * 2)


def _video() -> Inputs:
    return (torch.randn(2, 2, 3, 32, 32),)


_SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 16, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_labels": 5,
}  # fmt: skip
_STAGED: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4,
    "num_attention_heads": None, "num_hidden_layers": None,
}  # fmt: skip
_TEXT: dict[str, Any] = {"image_size": None, "patch_size": None, "vocab_size": 50, "num_labels": None}
_OF_PATCHES: dict[str, Any] = {"image_size": None, "num_patches": 16}
_LLM: dict[str, Any] = {**_TEXT, "num_key_value_heads": 1, "pad_token_id": 0}
_TRANSFORMERS = (
    _transformers("ViTForImageClassification", "ViTConfig"),
    _transformers("DeiTForImageClassification", "DeiTConfig"),
    _transformers("BeitForImageClassification", "BeitConfig"),
    _transformers("Dinov2ForImageClassification", "Dinov2Config", inductor=True),
    _transformers("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
    _transformers("DINOv3ViTModel", "DINOv3ViTConfig"),
    _transformers("CLIPForImageClassification", "CLIPConfig", "vision_config"),
    _transformers("CLIPVisionModel", "CLIPVisionConfig"),
    _transformers("SiglipForImageClassification", "SiglipConfig", "vision_config"),
    _transformers("SiglipVisionModel", "SiglipVisionConfig"),
    _transformers("Siglip2ForImageClassification", "Siglip2Config", "vision_config", _patches, **_OF_PATCHES),
    _transformers("Siglip2VisionModel", "Siglip2VisionConfig", given=_patches, **_OF_PATCHES),
    _transformers("Aimv2VisionModel", "Aimv2VisionConfig"),
    _transformers("BlipVisionModel", "BlipVisionConfig"),
    _transformers("IJepaModel", "IJepaConfig"),
    _transformers("ViTMAEModel", "ViTMAEConfig"),
    _transformers("Data2VecVisionForImageClassification", "Data2VecVisionConfig"),
    _transformers("SwinForImageClassification", "SwinConfig", **_STAGED),
    _transformers("SamVisionModel", "SamVisionConfig", mlp_dim=48, window_size=2, global_attn_indexes=[1]),
    _transformers("VideoMAEModel", "VideoMAEConfig", given=_video, num_frames=2, tubelet_size=2),
    _transformers("LlamaForCausalLM", "LlamaConfig", given=_words, **_LLM),
    _transformers("Qwen3ForCausalLM", "Qwen3Config", given=_words, **_LLM, head_dim=8),
    _transformers("Phi3ForCausalLM", "Phi3Config", given=_words, **_LLM),
    _transformers("BertModel", "BertConfig", given=_words, **_TEXT),
)

ARCHITECTURES: tuple[Architecture, ...] = (*_TIMM, *_TORCHVISION, *_TRANSFORMERS)
