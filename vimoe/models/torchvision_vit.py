"""The ViTs of torchvision: vit_*, swin_* and swin_v2_*.

Axes: B images, P patches, T tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn
from torchvision.models import (
    SwinTransformer,
    VisionTransformer,
    WeightsEnum,
    get_model_builder,
    get_model_weights,
    list_models,
)
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.vision_transformer import Encoder, interpolate_embeddings

from vimoe.errors import ConfigError, first_line, nearest
from vimoe.models.interface import Backbone, function_of
from vimoe.models.torchvision_narrow import NARROWED
from vimoe.moe.router import TokenLayout

_FORWARDS = VisionTransformer.forward, Encoder.forward  # of which it is known what they read
_BUILT = (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError)  # raised for odd arguments


class TorchvisionViT(Backbone):
    """A ViT or a Swin of torchvision. Blocks of a Swin are those of all its stages, and the mergers in between.

    `model.name` is "torchvision:vit_b_16", or "torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1" for other weights than the
    default. Preprocessing and label names are those of the weights.
    """

    models = (VisionTransformer, SwinTransformer)
    narrowed = NARROWED

    @property
    def _is_swin(self) -> bool:
        return isinstance(self.vit, SwinTransformer)

    # ---- which models, and how they are built

    @classmethod
    def create(
        cls, name: str, *, pretrained: bool, num_classes: int | None, img_size: int | tuple[int, int] | None,
        any_size: bool, drop_path_rate: float, **args: Any,
    ) -> nn.Module:  # fmt: skip
        architecture, _, tag = name.partition(".")
        known = list_models(include=["vit_*", "swin_*"])
        if architecture not in known:
            raise ConfigError(f"model.name='torchvision:{name}': no such ViT there; {nearest(architecture, known)}")
        tags = get_model_weights(architecture)
        if tag and tag not in tags.__members__:
            raise ConfigError(f"model.name='torchvision:{name}': no such weights; {nearest(tag, tags.__members__)}")
        weights = tags[tag or "DEFAULT"]
        config = _preprocessing(weights)
        names = weights.meta["categories"]
        classes = len(names) if num_classes is None else num_classes
        side = _side(img_size) or config["input_size"][1]
        given = {"image_size": side, **args} if architecture.startswith("vit_") else args
        try:
            model: Any = get_model_builder(architecture)(weights=None, num_classes=max(classes, 1), **given)
        except _BUILT as error:
            raise ConfigError(
                f"torchvision could not build {name!r}: {first_line(error)}; look at model.img_size and model.args"
            ) from error
        _set_stochastic_depth(model, name, drop_path_rate)
        if classes == 0:
            _remove_head(model)
        if pretrained:
            _load(model, weights, name)
        kept = {"label_names": names} if pretrained and classes == len(names) else {}
        model.pretrained_cfg = {**config, "input_size": (3, side, side), **kept}
        return model

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `build`, read off the modules; a Swin does not tell its `mlp_ratio`, which is 4 in all names."""
        vit = self.vit
        if not self._is_swin:
            block = vit.encoder.layers[0]
            names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "dropout", "attention_dropout")
            own = {name: getattr(vit, name) for name in (*names, "representation_size")}
            sizes = {"num_layers": len(vit.encoder.layers), "num_heads": block.num_heads}
            return {"kind": "vit", **sizes, **own, "num_classes": self._outputs}
        stem, stages = vit.features[0][0], vit.features[1::2]
        attention, depth = stages[0][0].attn, stages[-1][-1].stochastic_depth.p
        return {
            "kind": "swin_v2" if isinstance(stages[0][0], SwinTransformerBlockV2) else "swin",
            "patch_size": list(stem.kernel_size),
            "embed_dim": stem.out_channels,
            "depths": [len(stage) for stage in stages],
            "num_heads": [stage[0].attn.num_heads for stage in stages],
            "window_size": list(attention.window_size),
            "dropout": attention.dropout,
            "attention_dropout": attention.attention_dropout,
            "stochastic_depth_prob": depth,
            "num_classes": self._outputs,
        }

    @classmethod
    def build(cls, **arguments: Any) -> nn.Module:
        kind, classes = arguments.pop("kind"), arguments.pop("num_classes")
        made = {
            "vit": (VisionTransformer, {}),
            "swin": (SwinTransformer, {}),
            "swin_v2": (SwinTransformer, {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}),
        }
        vit, parts = made[kind]
        model = vit(num_classes=max(classes, 1), **parts, **arguments)
        if classes == 0:
            _remove_head(model)
        return model

    # ---- blocks

    @property
    def holder(self) -> str:  # type: ignore[override]
        return "features" if self._is_swin else "encoder.layers"

    @property
    def blocks(self) -> tuple[str, ...]:
        if not self._is_swin:
            return super().blocks
        stem, *parts = self.vit.features.named_children()
        inside = (
            [f"{name}.{block}" for block, _ in part.named_children()] if isinstance(part, nn.Sequential) else [name]
            for name, part in parts
        )
        return tuple(self._named(f"features.{name}") for names in inside for name in names)

    @property
    def read_tokens(self) -> int | None:
        """1, the class token; None for a Swin."""
        known = not self._is_swin and (function_of(self.vit), function_of(self.vit.encoder)) == _FORWARDS
        return 1 if known else None

    @property
    def after_blocks(self) -> tuple[nn.Module, ...]:
        return () if self._is_swin else (self.vit.encoder.ln,)

    # ---- tokens and images

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(0, False) if self._is_swin else TokenLayout(1, True)

    @property
    def num_patches(self) -> int:
        _, height, width = self.input_size
        return (height // self.patch_size[0]) * (width // self.patch_size[1])

    @property
    def input_size(self) -> tuple[int, int, int]:
        if not self._is_swin:
            return 3, self.vit.image_size, self.vit.image_size
        version_2 = isinstance(self.vit.features[1][0], SwinTransformerBlockV2)
        side = 256 if version_2 else 224  # what all of torchvision's names were trained on
        channels, height, width = self.vit_config.get("input_size", (3, side, side))
        return channels, height, width

    @property
    def patch_size(self) -> tuple[int, int]:
        if self._is_swin:
            height, width = self.vit.features[0][0].kernel_size
            return height, width
        return self.vit.patch_size, self.vit.patch_size

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return None if self._is_swin else self.input_size[1:]

    @property
    def width(self) -> int | None:
        return None if self._is_swin else self.vit.hidden_dim

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        return [self.vit.encoder.ln(tokens) for tokens in super().features(images, blocks)]

    # ---- classes and parameters

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        return (self.vit.head if self._is_swin else getattr(self.vit.heads, "head", self.vit.heads),)

    @property
    def num_classes(self) -> int:
        around: int | None = getattr(self.model, "num_classes", None) if self.path else None
        return self._outputs if around is None else around

    @property
    def _outputs(self) -> int:
        """Number of logits of the classifier, which users replace: torchvision's own `num_classes` stays as it was."""
        linear = [module for module in self.classifiers[0].modules() if isinstance(module, nn.Linear)][-1:]
        return linear[0].out_features if linear else getattr(self.vit, "num_classes", 0)

    def no_weight_decay(self) -> set[str]:
        """Names of the class token, of positions and biases of positions, and of Swin v2's temperatures."""
        ends = ("class_token", "pos_embedding", "relative_position_bias_table", "logit_scale")
        return {self._named(name) for name, _ in self.vit.named_parameters() if name.endswith(ends)}


def _side(img_size: int | tuple[int, int] | None) -> int | None:
    """Return the side of square images, which alone these ViTs take."""
    sides = {img_size} if isinstance(img_size, int) else set(img_size or ())
    if len(sides) > 1:
        raise ConfigError(f"img_size={img_size} for a ViT of torchvision: expected a square; use one side")
    return sides.pop() if sides else None


def _preprocessing(weights: WeightsEnum) -> dict[str, Any]:
    """Return the preprocessing of weights in timm's terms."""
    transforms: Any = weights.transforms()
    (crop,), (resized,) = transforms.crop_size, transforms.resize_size
    fraction = crop / resized
    if math.floor(crop / fraction) != resized:  # timm resizes to this number
        fraction = math.nextafter(fraction, 0)
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(transforms.mean),
        "std": tuple(transforms.std),
        "crop_pct": fraction,
        "interpolation": transforms.interpolation.value,
    }


def _load(model: nn.Module, weights: WeightsEnum, name: str) -> None:
    """Load pretrained weights, but for a classifier of another size; positions are brought to the size of the image."""
    try:
        state: dict[str, Any] = dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(
            f"the weights of 'torchvision:{name}' cannot be had: {first_line(error)}; use --model.pretrained false"
        ) from error
    try:
        if isinstance(model, VisionTransformer):
            state = dict(interpolate_embeddings(model.image_size, model.patch_size, state))
        own = model.state_dict()
        new = [each for each in own if each.startswith("head") and own[each].shape != state.get(each, own[each]).shape]
        fitting = {each: tensor for each, tensor in state.items() if each in own and each not in new}
        model.load_state_dict({**{each: own[each] for each in new}, **fitting})
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the weights of 'torchvision:{name}' do not fit the model: {first_line(error)}; look at model.args"
        ) from error


def _set_stochastic_depth(model: nn.Module, name: str, rate: float) -> None:
    """Let the rate rise linearly over a Swin's blocks, as torchvision does; its names have rates of their own."""
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "stochastic_depth")]
    if rate and not blocks:
        raise ConfigError(f"model.drop_path_rate={rate} of 'torchvision:{name}', which has none: expected 0")
    for number, block in enumerate(blocks):
        block.stochastic_depth.p = rate * number / max(len(blocks) - 1, 1)


def _remove_head(model: Any) -> None:
    """Leave the pooled features in the place of logits."""
    part = model.heads if isinstance(model, VisionTransformer) else model
    part.head, model.num_classes = nn.Identity(), 0
