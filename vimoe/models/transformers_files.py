"""A model of transformers built from a name, with its preprocessing and label names, or from its class and config.

A name is a folder that `save_pretrained` wrote, or a model on the hub. Weights are read from safetensors alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import ConfigError, FolderError, beside, first_line, nearest
from vimoe.models.hub import check_answers
from vimoe.models.interface import find_backbone

ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # types of models that take images of any size
_INTERPOLATIONS = {0: "nearest", 2: "bilinear", 3: "bicubic", 1: "lanczos", 4: "box", 5: "hamming"}  # Pillow's numbers
_SAFE: dict[str, Any] = {"trust_remote_code": False}
_NO_CODE = "expected a model of transformers itself, with attn_implementation='sdpa'; take it out"


def create(
    name: str, pretrained: bool, num_classes: int | None, img_size: int | tuple[int, int] | None,
    changes: dict[str, Any],
) -> nn.Module:  # fmt: skip
    """Build a dense model by name.

    Args:
        name: folder, or name on the hub.
        pretrained: load the weights; else the config alone is read.
        num_classes: size of a new classifier; 0 for none, None for the classifier that is there.
        img_size: side, or (height, width), of the images; None for the model's own.
        changes: values of the config that replace those of the folder. Without "dtype" among them, weights are float32
            in whatever type they are stored; without "drop_path_rate" there is no stochastic depth.

    Raises:
        ConfigError: if there is no such model, it has no weights that fit, or a value does not belong to its config.
    """
    library = _library()
    if _is_path(name) and not Path(name).is_dir():
        raise ConfigError(f"model.name='transformers:{name}': no model folder there; {beside(Path(name))}")
    values = _values(Path(name) / "config.json")
    if place := _elsewhere(values):
        raise ConfigError(
            f"model.name='transformers:{name}': the config names another model ({place[:80]!r}, 'backbone'): expected "
            f"none; take it out"
        )
    if "architecture" in values:
        raise ConfigError(
            f"model.name='transformers:{name}': expected a folder of transformers, and it is one of vimoe or timm; use "
            f"local-dir:{name}"
        )
    try:
        check_answers(name)
        settings = {"dtype": "float32", **changes}
        config, _ = library.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **settings, **_SAFE)
        _without_depth(config, changes)
        known = {*config.to_dict(), *config.attribute_map, "num_labels", "attn_implementation"}
        for word in changes:  # transformers would take others, such as "revision", for reading the config alone
            if word not in known:
                raise ConfigError(f"transformers' {name!r} has no setting {word!r}: {nearest(word, known)}")
        if code := _code(config):
            raise ConfigError(f"transformers' {name!r} names code ({code}), which vimoe never runs: {_NO_CODE}")
        return _create(library, name, pretrained, config, num_classes, img_size)
    except OSError as error:
        raise ConfigError(
            f"transformers has no {name!r}: {first_line(error)}; give a folder that save_pretrained wrote with "
            f"safetensors, or a name on the hub"
        ) from error
    except ConfigError:
        raise
    except Exception as error:  # whatever values and files make transformers, safetensors and huggingface_hub raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"transformers could not build {name!r}: {said}; look at model.args and the files") from error


def build(class_name: str, config: dict[str, Any]) -> nn.Module:
    """Build a model, with any weights, from the name of its class in transformers and its config.

    Raises:
        FolderError: if transformers has no such model, or the config names code or a model elsewhere.
    """
    library = _library()
    if place := _elsewhere(config):
        raise FolderError(f"the config names another model ({place[:80]!r}, 'backbone'): expected none; take it out")
    found = getattr(library, str(class_name), None)
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel)):
        raise FolderError(f"class_name={class_name!r}: expected a model of transformers, such as 'ViTModel'")
    model_class: Any = found
    made = model_class.config_class.from_dict(config)
    if code := _code(made):
        raise FolderError(f"the config names code ({code}), which vimoe never runs: {_NO_CODE}")
    model: nn.Module = model_class(made)
    return model


def _values(path: Path) -> dict[str, Any]:
    """Return the values of a file of JSON; nothing for a file that is missing or no object, which others report."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size in a config: one number, or two.

    >>> pair(14), pair([28, 14])
    ((14, 14), (28, 14))
    """
    height, width = size if isinstance(size, Iterable) else (size, size)
    return int(height), int(width)


def _without_depth(config: Any, changes: dict[str, Any]) -> None:
    """Set the rate of stochastic depth to 0 unless it is asked for."""
    if "drop_path_rate" not in changes and getattr(config, "drop_path_rate", None) is not None:
        config.drop_path_rate = zero_as(config.drop_path_rate)


def zero_as(rate: Any) -> Any:
    """Return 0 as a config has a rate: an int or float, which its class may insist on, or a list of a rate by stage.

    >>> zero_as(0.1), zero_as([0.0, 0.1])
    (0.0, [0.0, 0.0])
    """
    return [zero_as(each) for each in rate] if isinstance(rate, (list, tuple)) else type(rate)(0)


def preprocessing(processor: Any) -> dict[str, Any]:
    """Return what an image processor of transformers does, in timm's terms.

    It may resize the shorter side and crop the centre, or bring both sides to a size ("squash").
    """
    found: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0}
    if getattr(processor, "do_normalize", False):
        found |= {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    if (resample := getattr(processor, "resample", None)) is not None:
        found["interpolation"] = _INTERPOLATIONS.get(int(resample), "bicubic")
    size = dict(getattr(processor, "size", None) or {})
    found["crop_mode"] = "center" if size.get("shortest_edge") else "squash"
    height = size.get("shortest_edge") or size.get("height")
    if (crop := _crop(processor)) is not None and height and getattr(processor, "do_resize", True):
        found["crop_pct"] = crop[0] / height
    return found


def label_names(config: Any) -> list[str] | None:
    """Return the names of the classes in a config; None for those that transformers gives where there are none."""
    if not config.id2label:
        return None
    names = [str(label) for _, label in sorted(config.id2label.items(), key=lambda item: int(item[0]))]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def set_label_names(config: Any, names: Sequence[str] | None) -> bool:
    """Write the names of the classes into a config, where there are as many; return True if it has them now."""
    if not names or len(names) != config.num_labels:
        return False
    config.id2label = {i: str(name) for i, name in enumerate(names)}
    config.label2id = {str(name): i for i, name in enumerate(names)}
    return True


def by_own_names(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by the names of a model's state, as transformers finds them.

    Tensors without a place keep their names, and of one with another shape the shape alone is left.
    """
    with _quiet():
        loaded, info = type(model).from_pretrained(
            None, config=model.config, state_dict=tensors, ignore_mismatched_sizes=True, output_loading_info=True
        )
    unfit = {name: torch.empty(shape, device="meta") for name, shape, _ in info["mismatched_keys"]}
    unknown = {name: tensors.get(name, torch.empty(0)) for name in info["unexpected_keys"]}
    found = {name: w for name, w in loaded.state_dict().items() if name not in info["missing_keys"]}
    return {**found, **unfit, **unknown}


def _create(
    library: Any, name: str, pretrained: bool, config: Any, num_classes: int | None,
    img_size: int | tuple[int, int] | None,
) -> nn.Module:  # fmt: skip
    classifies = type(config) in library.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if num_classes and not classifies:
        raise ConfigError(f"transformers has no image classifier of type {config.model_type!r}: expected such as 'vit'")
    auto = library.AutoModelForImageClassification if classifies else library.AutoModel
    new_head = num_classes is not None and num_classes != config.num_labels
    if new_head:
        config.num_labels = num_classes
    seen = getattr(config, "vision_config", None) or config
    processor = _processor(library, name) if hasattr(seen, "image_size") else None
    if img_size is None and seen.model_type in ANY_SIZE:  # they are made for more pixels than they are used with
        img_size = _crop(processor)
    wanted = None if img_size is None or pair(img_size) == pair(seen.image_size) else pair(img_size)
    if pretrained:
        model = _load(auto, name, config)
        model = model if wanted is None else _resized(model, wanted)
    else:
        if wanted is not None:
            seen.image_size = _side(wanted)
        model = auto.from_config(config, **_SAFE)
    model.config._name_or_path = ""  # a model folder is the same wherever it came from
    model.pretrained_cfg = {
        **({} if processor is None else preprocessing(processor)),
        **(_origin(name) if pretrained else {}),
    }
    return model


def _origin(name: str) -> dict[str, str]:
    """Return where weights come from in timm's words: "hf_hub_id", and "license" as the model card's header has it."""
    found = {} if _is_path(name) else {"hf_hub_id": name}
    card = _file(name, "README.md")
    header = re.match(r"---\n(.*?)\n---", Path(card).read_text(encoding="utf-8"), re.S) if card else None
    licence = re.search(r"^license: *([\w.-]+) *$", header[1], re.M) if header else None
    return found | ({"license": licence[1]} if licence else {})


def _load(auto: Any, name: str, config: Any) -> Any:
    """Load weights. Raises ConfigError if more than the classifier is missing or of another shape."""
    _check_files(name)
    with _quiet():
        model, info = auto.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, output_loading_info=True, use_safetensors=True, **_SAFE
        )
    new = find_backbone(model).head()
    odd = sorted({str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]} - new)
    odd += sorted(set(info["missing_keys"]) - new)
    if odd:
        raise ConfigError(
            f"the weights of {name!r} do not fit its config in {odd[0]}: expected all but a classifier; look at "
            f"model.args, or use --model.pretrained false"
        )
    return model


def _check_files(name: str) -> None:
    """Raise ConfigError for weights that transformers would unpickle though safetensors are asked for."""
    if _file(name, "adapter_config.json"):
        raise ConfigError(f"{name!r} holds an adapter: expected a whole model; merge it and save the model")
    if index := _file(name, "model.safetensors.index.json"):
        shards = {str(shard) for shard in json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()}
        if odd := sorted(each for each in shards if not each.endswith(".safetensors") or Path(each).name != each):
            raise ConfigError(
                f"the weights of {name!r} are in {odd[0]}: expected safetensors alone, beside their index; save them "
                f"again"
            )


def _file(name: str, file: str) -> str | None:
    """Return the path of a file of a folder or hub repository; None where there is none."""
    asked = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found: str | None = _library().utils.cached_file(name, file, **asked)
    return found


def _elsewhere(values: Any) -> str | None:
    """Return the name of a backbone at any depth of a config, which transformers would look up on the hub."""
    if not isinstance(values, dict):
        return None
    named = values.get("backbone")
    return str(named) if named else next(filter(None, map(_elsewhere, values.values())), None)


def _code(config: Any) -> str | None:
    """Return the code that a config names: classes beside it, or a kernel on the hub for its attention or experts."""
    parts = (config, *(getattr(config, part, None) for part in config.sub_configs))
    names = ("_attn_implementation", "_experts_implementation")
    used = (str(getattr(part, name, "")) for part in parts for name in names)
    classes = (f"auto_map {str(part.auto_map)[:80]}" for part in parts if getattr(part, "auto_map", None))
    return next(classes, None) or next((each for each in used if "/" in each), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers report nothing about weights inside the `with` block: what does not fit is said by an error."""
    logging = _library().utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _resized(model: Any, size: tuple[int, int]) -> Any:
    """Return the model for images of another size, with position embeddings as its own code interpolates them."""
    config = type(model.config).from_dict(model.config.to_dict())
    (getattr(config, "vision_config", None) or config).image_size = _side(size)
    config._attn_implementation = model.config._attn_implementation  # which its values do not hold
    new = type(model)(config).to(model.dtype)
    weights, wanted = dict(model.state_dict()), new.state_dict()
    for key in [key for key, tensor in wanted.items() if weights[key].shape != tensor.shape]:
        weights[key] = _interpolated(model, key, wanted[key], size)
    new.load_state_dict(weights)
    return new.train(model.training)


@torch.no_grad()
def _interpolated(model: Any, key: str, like: Tensor, size: tuple[int, int]) -> Tensor:
    """Return position embeddings for images of a size. Raises ConfigError for another parameter."""
    embeddings = model.get_submodule(key.removesuffix(".weight").rpartition(".")[0])
    if "position_embedding" not in key or not hasattr(embeddings, "interpolate_pos_encoding"):
        seen = getattr(model.config, "vision_config", None) or model.config
        raise ConfigError(
            f"img_size={size}: {key} is made for images of {pair(seen.image_size)}: expected these; leave img_size out"
        )
    tokens = like.new_empty(1, *like.shape[-2:])
    found: Tensor = embeddings.interpolate_pos_encoding(tokens, *size)
    return found.reshape(like.shape)


def _side(size: tuple[int, int]) -> Any:
    """Return a size as configs have it: one number for a square."""
    return size[0] if size[0] == size[1] else size


def _processor(library: Any, name: str) -> Any:
    """Return the image processor that belongs to a name; None where there is none.

    Raises:
        ConfigError: if there is one that cannot be read: other preprocessing than the weights' own is a silent loss.
    """
    file = _file(name, "preprocessor_config.json") or _file(name, "processor_config.json")
    if file is None:
        return None
    try:
        processor = library.AutoImageProcessor.from_pretrained(name, **_SAFE)
        preprocessing(processor)
    except Exception as error:  # whatever odd values make transformers raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"the preprocessing of {name!r} cannot be read ({said}): expected that of an image processor; correct or "
            f"remove {Path(file).name}"
        ) from error
    return processor


def _crop(processor: Any) -> tuple[int, int] | None:
    """Return (height, width) of the images that a processor hands over; None if it is not fixed."""
    cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = dict(cropped or getattr(processor, "size", None) or {})
    return (size["height"], size["width"]) if size.get("height") and size.get("width") else None


def _is_path(name: str) -> bool:
    """Return True for a name that can be no name on the hub, which is NAME or USER/NAME."""
    return Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "models of transformers need transformers, which is not installed: pip install 'vimoe[transformers]'"
        ) from error
    return transformers
