"""The ViTs of timm, vimoe's native family."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data.model_config import resolve_input_data_config
from timm.layers import GatedMlp, GlobalResponseNormMlp, PatchDropout, RelPosMlp
from timm.models import (
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    fastvit,
    gemma4_vit,
    get_model_input_config,
    levit,
    pvt_v2,
    repvit,
    swiftformer,
    swin_transformer_v2_cr,
    tiny_vit,
    visformer,
    vitamin,
)
from timm.models._hub import save_config_for_hf  # what timm.models.save_for_hf calls for its config.json
from timm.models._manipulate import group_with_matcher
from timm.models.csatv2 import SpatialAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vimoe.errors import ConfigError, FolderError, SurgeryError, first_line
from vimoe.models.hub import check_answers
from vimoe.models.interface import Backbone, function_of
from vimoe.models.timm_narrow import NARROWED, TOKENWISE
from vimoe.moe.router import TokenLayout

_BUILT = (RuntimeError, TypeError, AssertionError, ValueError, ArithmeticError)  # what timm raises for odd arguments

_FORWARDS = tuple((vit.forward, vit.forward_features) for vit in (VisionTransformer, Eva))  # known what they read
_HEADS = tuple((vit.forward_head, vit.pool) for vit in (VisionTransformer, Eva))

_HOLDERS = ("blocks", "layers", "stages", "levels", "transformers", "network", "encoder.blocks")
_BATCH_NORM = "whose batch norms see all tokens of a batch"
_NEIGHBOURS = "whose convolutions see a token's neighbours"
_NORM_FIRST = "which has a norm before its first matrix"
_REFUSED: dict[type[nn.Module], str] = {
    GatedMlp: "whose gate sees all tokens of an image",
    GlobalResponseNormMlp: "whose norm is over all tokens of an image",
    efficientformer.ConvMlpWithNorm: _BATCH_NORM,
    efficientformer_v2.ConvMlpWithNorm: _NEIGHBOURS,
    efficientvit_msra.ConvMlp: _BATCH_NORM,
    fastvit.ConvMlp: _NEIGHBOURS,
    gemma4_vit.Gemma4GatedMlp: "whose matrices may clip what they get and give",
    levit.LevitMlp: _BATCH_NORM,
    pvt_v2.MlpWithDepthwiseConv: _NEIGHBOURS,
    repvit.RepVitMlp: _BATCH_NORM,
    swiftformer.Mlp: _BATCH_NORM,
    tiny_vit.NormMlp: _NORM_FIRST,
    visformer.SpatialMlp: _NEIGHBOURS,
    vitamin.GeGluMlp: _NORM_FIRST,
}


class TimmViT(Backbone):
    """A model of timm. Any of its models is known; questions that only a plain ViT can answer raise SurgeryError.

    The blocks of a hierarchical model are its stages, or those in a list of blocks that stands for a stage and is never
    called itself (twins). Its FFNs get all tokens of an image, in any number.
    """

    # they map coordinates to biases of the heads, or a map of one channel
    skipped = (RelPosMlp, swin_transformer_v2_cr.WindowMultiHeadAttention, SpatialAttention)
    refused = _REFUSED
    narrowed = NARROWED
    tokenwise = TOKENWISE

    def __init__(self, model: nn.Module, path: str = "") -> None:
        super().__init__(model, path)
        self.holder = next((name for name in _HOLDERS if _has(self.vit, name)), "blocks")

    def skips(self, name: str, module: nn.Module) -> bool:
        """Return True also for the FFN of a mixer that maps the tokens of a channel: its rows are no tokens."""
        return super().skips(name, module) or name.endswith(".mlp_tokens")

    @classmethod
    def owns(cls, module: nn.Module) -> bool:
        return all(hasattr(type(module), name) for name in ("forward_features", "get_classifier"))

    @classmethod
    def create(
        cls, name: str, *, pretrained: bool, num_classes: int | None, img_size: int | tuple[int, int] | None,
        any_size: bool, drop_path_rate: float, **args: Any,
    ) -> nn.Module:  # fmt: skip
        wanted = {"img_size": img_size, "num_classes": num_classes, **args}
        given = {"drop_path_rate": drop_path_rate, **{key: value for key, value in wanted.items() if value is not None}}
        if not any_size:
            return cls._sized(cls._create(name, pretrained, given))
        try:
            return cls._sized(cls._create(name, pretrained, {**given, "dynamic_img_size": True}))
        except ConfigError as error:
            if "unexpected keyword argument 'dynamic_img_size'" not in str(error):
                raise
        return cls._create(name, pretrained, given)  # BEiT, whose relative positions are of one size

    @staticmethod
    def _sized(vit: Any) -> nn.Module:
        """Note the size of the ViT's images as that of its data: of one that takes any size, timm would use another."""
        if hasattr(vit, "pretrained_cfg"):
            vit.pretrained_cfg = {**vit.pretrained_cfg, "input_size": get_model_input_config(vit)["input_size"]}
        model: nn.Module = vit
        return model

    @staticmethod
    def _create(name: str, pretrained: bool, given: dict[str, Any]) -> nn.Module:
        elsewhere = given.keys() & {"cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"}
        try:
            if pretrained and not elsewhere and (repo := getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)):
                check_answers(repo)
            return timm.create_model(name, pretrained=pretrained, **given)
        except OSError as error:
            raise ConfigError(
                f"the weights of {name!r} cannot be had: {first_line(error)}; use --model.pretrained false, "
                f"or --model.name local-dir:FOLDER"
            ) from error
        except (*_BUILT, SafetensorError, UnpicklingError) as error:
            raise ConfigError(
                f"timm could not build {name!r}: {first_line(error)}; look at the arguments {sorted(given)}"
            ) from error

    def write_config(
        self, path: Path, label_names: Sequence[str] | None, preprocessing: dict[str, Any] | None,
        model_args: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        if not hasattr(self.vit, "pretrained_cfg"):
            raise FolderError(
                f"{type(self.vit).__name__} was not built by timm.create_model, which notes how to rebuild it"
            )
        model_config = {"label_names": list(label_names)} if label_names else {}
        save_config_for_hf(self.vit, str(path), model_config, model_args, self._of_its_size(preprocessing or {}))

    @classmethod
    def rebuild(cls, config: Path) -> nn.Module:
        try:
            return timm.create_model(f"local-dir:{config.parent}", pretrained=False)
        except (KeyError, *_BUILT) as error:
            raise FolderError(
                f"timm cannot build the backbone of {config}: {first_line(error)}; "
                f"at save, pass model_args={{...}} with the arguments that timm.create_model was given"
            ) from error

    def block_of(self, name: str) -> str | None:
        """Return the first numbered module on the way to one that is no list of modules."""
        prefix = self._named("")
        steps = accumulate(name.removeprefix(prefix).split(".")[:-1], lambda outer, inner: f"{outer}.{inner}")
        numbered = (step for step in steps if name.startswith(prefix) and step.rpartition(".")[2].isdecimal())
        return next((prefix + step for step in numbered if not self._is_list(step)), None)

    @property
    def blocks(self) -> tuple[str, ...]:
        inside = (
            [f"{name}.{child}" for child, _ in self.model.get_submodule(name).named_children()]
            if self._is_list(name.removeprefix(self._named("")))
            else [name]
            for name in super().blocks
        )
        return tuple(name for names in inside for name in names)

    def _is_list(self, name: str) -> bool:
        """True for a module of the ViT that holds others and is never called itself."""
        return isinstance(self.vit.get_submodule(name), nn.ModuleList)

    @property
    def read_tokens(self) -> int | None:
        vit = self.vit
        names = ("forward", "forward_features", "forward_head", "pool")
        forward, features, head, pool = (function_of(vit, name) for name in names)
        if (forward, features) not in _FORWARDS:
            return None
        if head is VisionTransformerDistilled.forward_head:
            return 2
        known = (head, pool) in _HEADS and vit.attn_pool is None
        return 1 if known and vit.global_pool == "token" else None

    @property
    def after_blocks(self) -> tuple[nn.Module, ...]:
        return (self.vit.norm,)

    @property
    def drops_patches(self) -> bool:
        return any(isinstance(module, PatchDropout) and module.prob for module in self.vit.modules())

    @property
    def layout(self) -> TokenLayout:
        if isinstance(self.vit, NaFlexVit):
            raise SurgeryError(
                "NaFlexVit pads its tokens and hides which: expected a ViT of fixed size; use its vit_* twin"
            )
        if not hasattr(self.vit, "num_prefix_tokens"):
            if not any("_token" in name for name, _ in self.vit.named_parameters(recurse=False)):
                return TokenLayout(0, False)
            raise SurgeryError(
                f"{type(self.vit).__name__} does not say which tokens are no patches (num_prefix_tokens): "
                f"expected a plain ViT of timm (vit_*, deit*)"
            )
        return TokenLayout(self.vit.num_prefix_tokens, getattr(self.vit, "cls_token", None) is not None)

    @property
    def _patch_embed(self) -> Any:
        return getattr(self.vit, "patch_embed", None)

    @property
    def num_patches(self) -> int:
        patches: int | None = getattr(self._patch_embed, "num_patches", None)
        if patches is None:
            raise SurgeryError(
                f"{type(self.vit).__name__} does not say how many patches it makes: expected a plain ViT of timm"
            )
        return patches

    @property
    def input_size(self) -> tuple[int, int, int]:
        channels, height, width = get_model_input_config(self.vit)["input_size"]
        if not hasattr(self.vit, "_traits"):  # not built by timm.create_model, which notes the size
            height, width = getattr(self._patch_embed, "img_size", None) or (height, width)
        return channels, height, width

    @property
    def patch_size(self) -> tuple[int, int]:
        height, width = self._patch_embed.patch_size
        return int(height), int(width)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        fixed = getattr(self._patch_embed, "strict_img_size", False)
        return tuple(self._patch_embed.img_size) if fixed else None

    @property
    def width(self) -> int | None:
        """Width of the tokens; None for a hierarchical model, whose stages have widths of their own."""
        widths = {getattr(self.vit, name, None) for name in ("embed_dim", "num_features")}
        return widths.pop() if len(widths) == 1 else None

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        found: list[Tensor] = self.vit.forward_intermediates(
            images, indices=list(blocks), norm=True, output_fmt="NLC", intermediates_only=True
        )
        return found

    def data_config(self, given: dict[str, Any]) -> dict[str, Any]:
        return resolve_input_data_config(self.vit, self._of_its_size(given))

    def _of_its_size(self, given: dict[str, Any]) -> dict[str, Any]:
        """Add the size that the ViT was built for, where timm would take that of the weights; it takes any size.

        A size that somebody noted in the model's data config since holds before both.
        """
        config = self.vit_config
        try:
            weights: Any = timm.get_pretrained_cfg(".".join(filter(None, map(config.get, ("architecture", "tag")))))
        except RuntimeError:  # they are not registered
            weights = None
        size = config.get("input_size")
        noted = weights is not None and size is not None and tuple(size) != tuple(weights.input_size)
        return given if noted else {"input_size": self.input_size, **given}

    @property
    def vit_config(self) -> dict[str, Any]:
        """Preprocessing and "label_names"; timm's own may be names by the number of the class."""
        found = super().vit_config
        names = found.get("label_names")
        return {**found, "label_names": list(names.values())} if isinstance(names, dict) else found

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        head = self.vit.get_classifier()
        return head if isinstance(head, tuple) else (head,)

    def new_classifier(self, num_classes: int) -> None:
        self.vit.reset_classifier(num_classes)  # also of a ViT that has none yet
        super().new_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        patterns = self.vit.no_weight_decay() if hasattr(self.vit, "no_weight_decay") else ()
        names = [name for name, _ in self.vit.named_parameters()]
        return {self._named(name) for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}

    def layer_numbers(self) -> dict[str, int]:
        """Depth of each parameter as timm's `group_matcher` has it: the last norm belongs to the last block."""
        if not hasattr(self.vit, "group_matcher"):
            return super().layer_numbers()
        prefix = self._named("")
        # what lies outside of the ViT gets a name that no pattern matches, and so is of the last layer
        names = {
            n.removeprefix(prefix) if n.startswith(prefix) else f" {n}": n for n, _ in self.model.named_parameters()
        }
        numbers = group_with_matcher(names.items(), self.vit.group_matcher(coarse=False), reverse=True)
        return {names[name]: number for name, number in numbers.items()}


def _has(module: Any, name: str) -> bool:
    """Return True if there is a part of this name."""
    for step in name.split("."):
        module = getattr(module, step, None)
    return module is not None
