"""The ViT interface: all that the package asks of a model, answered by the family of the ViT in it.

A family is one class and one entry: a subclass of `Backbone` in `vimoe.config.model.FAMILIES`. timm's ViTs are the
family "timm" (`vimoe.models.timm_vit`). No other module reads attributes that only one library's models have.

Axes: B images, P patches, T tokens (patches and prefix tokens), D channels.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config
from torch import Tensor, nn

from vimoe.config.model import FAMILIES
from vimoe.errors import ConfigError, FolderError, SurgeryError, VimoeError, counted, expect
from vimoe.files import read_text, write_json
from vimoe.moe.router import TokenLayout
from vimoe.moe.split_ffn import SplitFFN


class Backbone:
    """A model and the ViT in it: the base class of all families.

    A family defines `models`, `holder`, `layout`, `num_patches`, `input_size`, `width` and `classifiers`; for
    `model.name` also `create`, and for model folders `arguments` and `build`. All other answers follow from these, and
    a family overrides those that do not fit. `create` and `build` are class methods, `logits` and `features` methods,
    the others properties or plain attributes. A block takes tokens (B, T, D) as its first argument and returns tokens
    (B, T, D); a family whose blocks return more has `tokens_of` and `output_with`, and one whose FFNs are spread over
    two modules `joined`.

    An instance of this base class stands for a model of no family. It answers what any module can. Any other question
    raises SurgeryError with one line that says so.

    Args:
        model: the ViT, or a module around it such as `vimoe.models.segmenter.Segmenter`. A module around it may define
            `num_classes`, and `read_blocks`: numbers of the blocks whose output it reads.
        path: name of the ViT in the model; "" for the model itself.

    Attributes:
        vit: the ViT.
        models: classes of the family's ViTs.
        holder: name of the module in the ViT whose children are its blocks, in forward order.
        skipped: classes of modules that are no FFN and have none inside, though they look like one.
        refused: for each class that stands in a block for an FFN and is none, the reason why experts could not be such.
        embeddings: names, in the ViT, of position embeddings and tokens that a module inside of it holds.
        narrowed: for each class of a block or a part of it that can do with less, its subclass that computes the first
            tokens alone (`vimoe.models.reading`).
        tokenwise: classes of the library's modules, beside torch's own, which give a token the same whatever other
            tokens there are.
    """

    models: tuple[type[nn.Module], ...] = ()
    holder: str = "blocks"
    skipped: tuple[type[nn.Module], ...] = ()
    refused: Mapping[type[nn.Module], str] = {}
    embeddings: tuple[str, ...] = ()
    narrowed: Mapping[type[nn.Module], type[nn.Module]] = {}
    tokenwise: frozenset[type[nn.Module]] = frozenset()

    def __init__(self, model: nn.Module, path: str = "") -> None:
        self.model, self.path = model, path
        self.vit: Any = model.get_submodule(path)

    # ---- which models, and how they are built

    @classmethod
    def owns(cls, module: nn.Module) -> bool:
        """Return True if the module is a ViT of this family, and not only around one; by default by its class."""
        return isinstance(module, cls.models)

    @classmethod
    def create(
        cls, name: str, *, pretrained: bool, num_classes: int | None, img_size: int | tuple[int, int] | None,
        any_size: bool, drop_path_rate: float, **args: Any,
    ) -> nn.Module:  # fmt: skip
        """Build the dense ViT that "FAMILY:NAME" in `model.name` asks for.

        Args:
            name: name within the family.
            pretrained: load the weights that belong to the name.
            num_classes: size of the classifier; 0 for none, None for the family's default.
            img_size: side, or (height, width), of the images in pixels; None for the family's default.
            any_size: let the ViT take images of other sizes too, if it can (segmentation).
            drop_path_rate: stochastic depth while training.
            args: `model.args`.

        Raises:
            ConfigError: if the name is unknown, weights cannot be loaded, or arguments do not fit.
        """
        raise ConfigError(f"model.name={name!r}: {cls.__name__} builds no models by name; use vimoe.upcycle in Python")

    @property
    def family(self) -> str | None:
        """Name of the family; None for a model of no family."""
        return next((name for name in FAMILIES if FAMILIES.find(name) is type(self)), None)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `build`, as JSON knows them, which config.json notes."""
        raise self._unanswered("arguments")

    @classmethod
    def build(cls, **arguments: Any) -> nn.Module:
        """Build the dense ViT, with any weights, from its `arguments`."""
        raise FolderError(f"{cls.__name__} has no 'build': expected a family that rebuilds its models")

    def write_config(
        self, path: Path, label_names: Sequence[str] | None, preprocessing: dict[str, Any] | None,
        model_args: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        """Write config.json of a model folder: what `rebuild` needs, preprocessing and label names in timm's format.

        Args:
            path: file to write.
            label_names: name of each class; by default those that the model came with.
            preprocessing: values of `data_config`; by default the model's own.
            model_args: arguments of `build` that replace the model's own.

        Raises:
            VimoeError: if JSON cannot hold the arguments.
        """
        names = list(label_names) if label_names else self.vit_config.get("label_names")
        origin = {key: self.vit_config[key] for key in ("hf_hub_id", "license") if self.vit_config.get(key)}
        values = {
            "architecture": type(self.vit).__name__,
            "num_classes": self.num_classes,
            **({"label_names": names} if names else {}),
            "pretrained_cfg": {**self.data_config(preprocessing or {}), **origin},
            "vimoe": {"family": self.family, "arguments": {**self.arguments, **(model_args or {})}},
        }
        try:
            json.dumps(values)
        except TypeError as error:
            raise FolderError(f"arguments of {type(self.vit).__name__}: {error}; pass model_args={{...}}") from error
        write_json(path, values)

    @classmethod
    def rebuild(cls, config: Path) -> nn.Module:
        """Build the dense ViT from its config.json, with weights still to be loaded.

        Raises:
            FolderError: if it does not fit.
        """
        values = json.loads(read_text(config))
        try:
            model: Any = cls.build(**values["vimoe"]["arguments"])
            model.pretrained_cfg = {**values["pretrained_cfg"], "label_names": values.get("label_names")}
        except Exception as error:  # whatever odd values make a library raise
            said = " ".join((str(error) or type(error).__name__).split())[:300]
            raise FolderError(f"{config}: {cls.__name__} cannot build the backbone: {said}") from error
        return model

    def by_own_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint file by the names of the model's state; by default as they are."""
        return tensors

    # ---- blocks

    @property
    def blocks(self) -> tuple[str, ...]:
        """Module names of the blocks in the model, in forward order."""
        found = self.vit
        for step in self.holder.split("."):
            found = getattr(found, step, None)
        return tuple(self._named(f"{self.holder}.{name}") for name, _ in found.named_children()) if found else ()

    def skips(self, name: str, module: nn.Module) -> bool:
        """Return True for a module that is no FFN and has none inside; by default by its class, not by its name."""
        return isinstance(module, self.skipped)

    def block_of(self, name: str) -> str | None:
        """Return the name of the block that a module lies in ("blocks.3" for "blocks.3.mlp"), None outside of all.

        In a model of no family a module outside of all counts as a block of its own.
        """
        own = name if self.family is None else None
        return next((block for block in self.blocks if name.startswith(f"{block}.")), own)

    def joined(self, name: str) -> SplitFFN | None:
        """Return the FFN that begins in a module, by its name in the model, and ends in another one of its block.

        By default None: FFNs are whole modules.
        """
        return None

    def tokens_of(self, output: Any) -> Tensor:
        """Return the tokens in what a block returns, if that is no tensor itself."""
        tokens: Tensor = output
        return tokens

    def output_with(self, tokens: Tensor) -> Any:
        """Return what a block that gives these tokens returns: the inverse of `tokens_of`."""
        return tokens

    @property
    def read_blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks whose output the module around the ViT reads, beside the next block."""
        return tuple(getattr(self.model, "read_blocks", ()))

    @property
    def drops_patches(self) -> bool:
        """True if training leaves patches out at random."""
        return False

    @property
    def read_tokens(self) -> int | None:
        """Number of tokens, the first ones, that the ViT's own forward reads after the last block; None for all."""
        return None

    @property
    def after_blocks(self) -> tuple[nn.Module, ...]:
        """Modules that get all tokens after the last block and what is around it, so that their hooks see them."""
        return ()

    # ---- tokens and images

    @property
    def has_images(self) -> bool:
        """True if the model computes from images of one size, so that `layout` and `input_size` are known."""
        return self.family is not None

    @property
    def layout(self) -> TokenLayout:
        """Number of tokens before the patches, and if the first of them is a class token."""
        raise self._unanswered("layout")

    def layout_of(self, tokens: int) -> TokenLayout:
        """Return the layout of what an FFN gets that gets so many tokens of an image.

        By default an FFN gets all tokens, or the patches alone, or the class token alone. In a ViT without prefix
        tokens it gets patches, or what has become of them, in any number.

        Raises:
            SurgeryError: if it is not known which token is which.
        """
        layout = self.layout
        if layout.num_prefix_tokens == 0:
            return layout
        if tokens == 1 and layout.class_token:
            return TokenLayout(1, True)
        others = tokens - self.num_patches
        if others not in (0, layout.num_prefix_tokens):
            raise SurgeryError(
                f"{tokens} tokens: expected {self.num_patches} patches and {layout.num_prefix_tokens} others "
                f"(num_prefix_tokens), so that the router knows which is which; leave the block out of layers"
            )
        return layout if others else TokenLayout(0, False)

    @property
    def num_patches(self) -> int:
        """Number P of patches of an image of `input_size`."""
        raise self._unanswered("num_patches")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that the ViT was made for."""
        raise self._unanswered("input_size")

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels; by default of square patches that cover the image."""
        _, height, width = self.input_size
        side = round((height * width / self.num_patches) ** 0.5)
        return side, side

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) of the only images that the ViT takes; None if it takes others too."""
        return self.input_size[1:]

    @property
    def width(self) -> int | None:
        """Number D of channels of a token; None where the model does not say."""
        return None

    def features(self, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Patch tokens (B, P, D) that the numbered blocks give for images; by default as they leave the block.

        A family whose ViT has a norm after its last block applies it here, to all of them.
        """
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for number in blocks:
                block = self.model.get_submodule(self.blocks[number])
                hook = block.register_forward_hook(lambda _b, _x, y, n=number: kept.update({n: self.tokens_of(y)}))
                stack.callback(hook.remove)
            self.vit(images)
        return [kept[number][:, self.layout.num_prefix_tokens :] for number in blocks]

    def run(self, images: Tensor) -> Any:
        """Run the model on images alone, (B, channels, height, width); by default as its only argument."""
        return self.model(images)

    def data_config(self, given: dict[str, Any]) -> dict[str, Any]:
        """Preprocessing in timm's terms: input_size, mean, std, crop_pct, crop_mode, interpolation.

        Args:
            given: values by these names, which hold before the model's own.

        Raises:
            ValueError: if values do not fit the model.
        """
        return resolve_data_config({**given, "input_size": self.input_size}, pretrained_cfg=self.vit_config)

    @property
    def vit_config(self) -> dict[str, Any]:
        """Preprocessing and "label_names" that came with the weights, in timm's format; empty where none did."""
        found: dict[str, Any] = getattr(self.vit, "pretrained_cfg", {})
        return found

    # ---- classes

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        """Modules of the ViT that make logits: one, two in distilled DeiT, none in a ViT without classes."""
        raise self._unanswered("classifiers")

    @property
    def num_classes(self) -> int:
        """Number of classes of the logits; 0 for a ViT without a classifier."""
        for module in (self.model, self.vit):
            classes: int | None = getattr(module, "num_classes", None)
            if classes is not None:
                return classes
        widths = [getattr(classifier, "out_features", None) for classifier in self.classifiers]
        if None in widths:
            raise self._unanswered("num_classes")
        return int(widths[0] or 0) if widths else 0

    def new_classifier(self, num_classes: int) -> None:
        """Give the ViT another number of classes, in place: a new, random last matrix in each of its classifiers.

        Raises:
            SurgeryError: if it has no classifier with a matrix.
        """
        names = {module: name for name, module in self.vit.named_modules()}
        for old in self.last_matrices():
            new = nn.Linear(old.in_features, num_classes, old.bias is not None, old.weight.device, old.weight.dtype)
            nn.init.trunc_normal_(new.weight, std=0.02)
            if new.bias is not None:
                nn.init.zeros_(new.bias)
            self.vit.set_submodule(names[old], new)
        if hasattr(self.vit, "num_classes"):
            self.vit.num_classes = num_classes
        self.vit.pretrained_cfg = {**self.vit_config, "label_names": None}

    def last_matrices(self) -> list[nn.Linear]:
        """Return the last matrix of each classifier, which has a row for each class.

        Raises:
            SurgeryError: if the ViT has no classifier with a matrix.
        """
        last = [[m for m in head.modules() if isinstance(m, nn.Linear)][-1:] for head in self.classifiers]
        if not last or not all(last):
            raise SurgeryError(f"{type(self.vit).__name__} has no classifier: expected one; save a model that has")
        return [matrix for (matrix,) in last]

    def set_label_names(self, names: Sequence[str] | None) -> None:
        """Name the classes; None for numbers."""
        self.vit.pretrained_cfg = {**self.vit_config, "label_names": list(names) if names else None}

    @property
    def label_names(self) -> list[str]:
        """Names of the classes, or their numbers where the model came without names.

        Raises:
            VimoeError: if there are names for another number of classes.
        """
        names, classes = self.vit_config.get("label_names"), self.num_classes
        if names and len(names) != classes:
            raise VimoeError(
                f"the model has {counted(classes, 'class', 'classes')} and {counted(len(names), 'label name')}: "
                f"expected a name for each"
            )
        return list(names) if names else [str(i) for i in range(classes)]

    def logits(self, output: Any) -> Tensor:
        """Return the logits in an output of the model that is no tensor, such as a ModelOutput."""
        raise VimoeError(
            f"{type(self.model).__name__} gives a {type(output).__name__}: expected a tensor of logits, or a family "
            f"whose 'logits' reads it"
        )

    # ---- parameters

    def head(self) -> set[str]:
        """Names of parameters and buffers that are new on a pretrained ViT: its classifiers', and all outside of it."""
        new = {id(t) for module in self.classifiers for t in module.state_dict(keep_vars=True).values()}
        state = self.model.state_dict(keep_vars=True)
        return {name for name, tensor in state.items() if id(tensor) in new or not self._inside(name)}

    def no_weight_decay(self) -> set[str]:
        """Names of matrices that get no weight decay: by default `embeddings`, and what the ViT holds itself."""
        own = [name for name, _ in self.vit.named_parameters(recurse=False)]
        return {self._named(name) for name in (*own, *self.embeddings)}

    def layer_numbers(self) -> dict[str, int]:
        """Depth of each parameter by name, for layer-wise rates as in BEiT (arXiv 2106.08254).

        0 is the stem (all before the blocks), i + 1 block i and what stands between it and the next one. The last one
        is all after the blocks and outside the ViT.
        """
        depths = {block: number for number, block in enumerate(self.blocks, 1)}
        last, numbers, now = len(depths) + 1, {}, 0
        for name, _ in self.model.named_parameters():
            if (block := self.block_of(name)) is not None:
                numbers[name] = depths[block]
                now = last if depths[block] == last - 1 else depths[block]
            else:
                numbers[name] = now if self._inside(name) else last
        return numbers

    # ---- names

    def _named(self, name: str) -> str:
        """Name in the model of what has this name in the ViT."""
        return f"{self.path}.{name}" if self.path else name

    def _inside(self, name: str) -> bool:
        """True if a parameter of the model belongs to the ViT."""
        return not self.path or name.startswith(f"{self.path}.")

    def check_known(self, question: str) -> None:
        """Raise SurgeryError for a model of no family; `question` is what the family would answer."""
        if self.family is None:
            raise self._unanswered(question)

    def _unanswered(self, question: str) -> SurgeryError:
        """The error for a question that nobody answers for this model."""
        if self.family is None:
            return SurgeryError(
                f"no family knows {type(self.model).__name__}: expected a ViT of {', '.join(FAMILIES)}, or a family of "
                f"your own that answers '{question}' (vimoe.models.interface.Backbone); with routing='token' also name "
                f"modules in layers"
            )
        return SurgeryError(
            f"the family {self.family!r} does not answer {question!r}: expected it of {type(self).__name__}; add it"
        )


def find_backbone(model: nn.Module) -> Backbone:
    """Return the outermost ViT in a model that a family owns, the latest entry asked first; else a plain `Backbone`.

    Example:
        >>> import timm
        >>> backbone = find_backbone(timm.create_model("vit_tiny_patch16_224", depth=2))
        >>> backbone.family, backbone.blocks, backbone.layout.num_prefix_tokens, backbone.num_patches
        ('timm', ('blocks.0', 'blocks.1'), 1, 196)
    """
    families = [FAMILIES.find(name) for name in reversed(FAMILIES)]
    for path, module in model.named_modules():
        for family in families:
            if family.owns(module):
                found: Backbone = family(model, path)
                return found
    return Backbone(model)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits for images; the family extracts them if the output is no tensor."""
    output = model(images)
    return output if isinstance(output, Tensor) else find_backbone(model).logits(output)


def function_of(module: nn.Module, name: str = "forward") -> Any:
    """Return the function of a module's method, to know it by; None without one.

    Of a forward around which Accelerate's wrapper has put an autocast it is the function inside.
    """
    method = getattr(module, name, None)
    function: Any = getattr(method, "__func__", method)
    wrapper = type(getattr(function, "__wrapped__", None))  # others' may do with the inside whatever they like
    if wrapper.__module__.startswith("accelerate."):
        function = inspect.unwrap(function)
    return getattr(function, "__func__", function)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of torch.compile's module, DataParallel or DistributedDataParallel.

    Raises:
        VimoeError: if it is no module.
    """
    expect("model", model, nn.Module, "build one, such as by timm.create_model")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrapped(model.module)
    compiled: Any = getattr(model, "_orig_mod", None)
    return model if compiled is None else unwrapped(compiled)


def label_names(model: nn.Module) -> list[str]:
    """Return the names of a model's classes, or their numbers where it has none.

    Raises:
        VimoeError: if there are names for another number of classes.
    """
    return find_backbone(model).label_names
