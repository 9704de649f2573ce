"""The models of transformers: its image models, and the FFNs of its language models.

transformers takes seconds to import, so nothing here imports it before one of its models or names is met. A class is
looked up by its name in transformers alone: no code from a folder or the hub is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vimoe.errors import SurgeryError
from vimoe.models import transformers_files
from vimoe.models.interface import Backbone, find_backbone
from vimoe.moe import traced_ffn
from vimoe.moe.grid import Grid
from vimoe.moe.router import TokenLayout
from vimoe.moe.split_ffn import SplitFFN

_BASE = ("transformers.modeling_utils", "PreTrainedModel")
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")  # tokens before the patches
_EMBEDDINGS = re.compile(
    r"(.*\.)?(cls_token|class_embedding|mask_token|distillation_token|register_tokens|pos_embed|"
    r"position_embeddings?(\.weight)?|relative_position_bias_table)"
)
_LAST_NORMS = ("layernorm", "norm", "post_layernorm")
_TUPLES = ("data2vec-vision",)  # types of models whose blocks return (tokens,)


class TransformersViT(Backbone):
    """A model of transformers. Questions that only an image model can answer raise SurgeryError for others."""

    @classmethod
    def owns(cls, module: nn.Module) -> bool:
        """Return True for a PreTrainedModel that is not only around a model of timm."""
        bases = [(base.__module__, base.__name__) for base in type(module).__mro__]
        return _BASE in bases and not hasattr(module, "timm_model")

    @classmethod
    def create(
        cls, name: str, *, pretrained: bool, num_classes: int | None, img_size: int | tuple[int, int] | None,
        any_size: bool, drop_path_rate: float, **args: Any,
    ) -> nn.Module:  # fmt: skip
        changes = {**args, **({"drop_path_rate": drop_path_rate} if drop_path_rate else {})}
        return transformers_files.create(name, pretrained, num_classes, img_size, changes)

    @property
    def arguments(self) -> dict[str, Any]:
        """Class and config, without stochastic depth, which belongs to a training."""
        config = {name: value for name, value in self.vit.config.to_dict().items() if not name.startswith("_")}
        for part in (config, config.get("vision_config", {})):
            rate = part.get("drop_path_rate")
            part.update({} if rate is None else {"drop_path_rate": transformers_files.zero_as(rate)})
        return {"class_name": type(self.vit).__name__, "config": config}

    @classmethod
    def build(cls, **arguments: Any) -> nn.Module:
        """Build a model from `class_name` and `config`.

        Raises:
            FolderError: if transformers has no such model, or the config names code or a model elsewhere.
        """
        return transformers_files.build(**arguments)

    @classmethod
    def rebuild(cls, config: Path) -> nn.Module:
        """Build the model from its config.json; its own config has the names of the classes, as transformers does."""
        model: Any = super().rebuild(config)
        find_backbone(model).set_label_names(model.pretrained_cfg["label_names"])
        return model

    def by_own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file of `save_pretrained`, which may have names of an older version."""
        return transformers_files.by_own_names(self.vit, tensors)

    @property
    def vit_config(self) -> dict[str, Any]:
        """Preprocessing and "label_names" in timm's format; names that are noted nowhere else are the config's."""
        found = super().vit_config
        if found.get("label_names") or not self.classifiers:
            return found
        return {**found, "label_names": transformers_files.label_names(self.vit.config)}

    # ---- blocks

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks in forward order: of an image model's encoder, and of all parts of another model."""
        lists = list(_lists(self.vit, ""))[: 1 if self._takes_images else None]
        return tuple(self._named(name) for each in lists for name in _blocks(self.vit, each))

    def joined(self, name: str) -> SplitFFN | None:
        parent, _, child = name.rpartition(".")
        block = self.model.get_submodule(parent)
        last = block._modules.get("output") if child == "intermediate" else None
        if last is None or traced_ffn.begins(block.get_submodule(child)) != ("dense", "intermediate_act_fn"):
            return None
        end = traced_ffn.ends(last)
        return SplitFFN(block.get_submodule(child), last.get_submodule(end), f"output.{end}") if end else None

    def tokens_of(self, output: Any) -> Tensor:
        tokens: Tensor = output[0] if isinstance(output, tuple) else output
        return tokens

    def output_with(self, tokens: Tensor) -> Any:
        return (tokens,) if self._config.model_type in _TUPLES else tokens

    # ---- tokens and images

    @property
    def _takes_images(self) -> bool:
        return bool(type(self.vit).main_input_name == "pixel_values")

    @property
    def _config(self) -> Any:
        """Config of what encodes the images."""
        return getattr(self.vit.config, "vision_config", None) or self.vit.config

    @property
    def has_images(self) -> bool:
        config = self._config
        return self._takes_images and hasattr(config, "image_size") and not hasattr(config, "num_frames")

    def _of_images(self, remedy: str = "expected routing='token', or a model") -> Any:
        """Return the config. Raises SurgeryError if the model does not compute from images of one size."""
        if not self.has_images:
            given = f"{type(self.vit).main_input_name} and no images"
            given = "videos, or padded patches of images of any size" if self._takes_images else given
            encoder = "" if self._takes_images else ", such as an image encoder (model.vision_model)"
            raise SurgeryError(f"{type(self.vit).__name__} gets {given}: {remedy} of images of one size{encoder}")
        return self._config

    @property
    def layout(self) -> TokenLayout:
        self._of_images()
        named = self.vit.named_parameters()  # before the blocks; after them an attention pool may hold a token too
        stem = takewhile(lambda item: self.block_of(self._named(item[0])) is None, named)
        held = {name.rpartition(".")[2]: p for name, p in stem}
        sizes = [held[name].shape[-2] if held[name].ndim > 1 else 1 for name in _PREFIX if name in held]
        return TokenLayout(sum(sizes), "cls_token" in held or "class_embedding" in held)

    @property
    def drops_patches(self) -> bool:
        return bool(getattr(self._config, "mask_ratio", 0))

    @property
    def num_patches(self) -> int:
        config, (height, width) = self._of_images(), self.patch_size
        patches = (self.input_size[1] // height) * (self.input_size[2] // width)
        return int(patches * (1 - getattr(config, "mask_ratio", 0)))

    @property
    def input_size(self) -> tuple[int, int, int]:
        config = self._of_images("vimoe.upcycle needs none, but plan, count and save expect a model")
        channels = getattr(config, "num_channels", 3)  # models such as BLIP's take no other images
        return (channels, *transformers_files.pair(config.image_size))

    @property
    def patch_size(self) -> tuple[int, int]:
        return transformers_files.pair(self._of_images().patch_size)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        return None if self._config.model_type in transformers_files.ANY_SIZE else self.input_size[1:]

    @property
    def width(self) -> int | None:
        staged = hasattr(self._config, "depths")  # whose stages differ in channels
        return None if staged else getattr(self._config, "hidden_size", None)

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens that the numbered blocks give, after the encoder's last norm."""
        outside = ((n, m) for n, m in self.vit.named_modules() if self.block_of(self._named(n)) is None)
        norm = next((module for n, module in outside if n.rpartition(".")[2] in _LAST_NORMS), nn.Identity())
        return [norm(Grid(channels=-1).tokens(tokens)) for tokens in super().features(images, blocks)]

    # ---- classes

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        return tuple(child for name, child in self.vit.named_children() if name.endswith("classifier"))

    @property
    def num_classes(self) -> int:
        around: int | None = getattr(self.model, "num_classes", None)
        return around if around is not None else self.vit.config.num_labels if self.classifiers else 0

    def set_label_names(self, names: Sequence[str] | None) -> None:
        """Name the classes in the model's config, which the user may change, and nowhere else where they fit it."""
        super().set_label_names(None if transformers_files.set_label_names(self.vit.config, names) else names)

    def new_classifier(self, num_classes: int) -> None:
        super().new_classifier(num_classes)
        self.vit.config.num_labels = self.vit.num_labels = num_classes

    def logits(self, output: Any) -> Tensor:
        """Return the logits of an output; of a model without a classifier its last hidden state."""
        for name in ("logits", "last_hidden_state"):
            found: Tensor | None = getattr(output, name, None)
            if found is not None:
                return found
        return super().logits(output)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters() if self._inside(name) and _EMBEDDINGS.fullmatch(name)}


def _lists(module: nn.Module, path: str) -> Iterator[str]:
    """Yield names of the outermost lists of modules."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield path + name
        else:
            yield from _lists(child, f"{path}{name}.")


def _blocks(vit: nn.Module, name: str) -> Iterator[str]:
    """Yield names of the blocks in a list of blocks, or in one of stages, which hold lists of blocks."""
    for number, child in vit.get_submodule(name).named_children():
        within = [inner for inner, part in child.named_children() if isinstance(part, nn.ModuleList)]
        for inner in within:
            yield from _blocks(vit, f"{name}.{number}.{inner}")
        if not within:
            yield f"{name}.{number}"
