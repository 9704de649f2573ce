"""Settings of the dense ViT to start from, and the families of ViTs by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from vimoe.config.checks import bounded, check_fields, one_of
from vimoe.config.registry import Registry
from vimoe.errors import ConfigError

FAMILIES = Registry(
    "family",
    {
        "timm": "vimoe.models.timm_vit:TimmViT",
        "torchvision": "vimoe.models.torchvision_vit:TorchvisionViT",
        "transformers": "vimoe.models.transformers_vit:TransformersViT",
        "llava": "vimoe.models.transformers_llava:Llava",
    },
)
Read = Literal["auto", "all"]
DECODERS = ("linear", "linear4", "upernet", "prompted")
PromptAttention = Literal["none", "last", "levels"]
DECODER_ARGS = {"prompted": ("prompts", "prompt_mlp", "prompt_attention")}  # settings that only one decoder reads


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dense ViT to start from.

    Args:
        name: timm model name; "local-dir:FOLDER" or "hf-hub:USER/REPO" for weights in timm's format, or a model folder
            of vimoe; or "FAMILY:NAME" for a model of another family in FAMILIES. "torchvision:vit_b_16" has a name of
            torchvision, "transformers:FOLDER" a folder or hub repository in transformers' format.
        pretrained: load the pretrained weights of this name (`plan` and `count` never do).
        img_size: side of the square input image in pixels; by default the model's own.
        num_classes: number of outputs of the classifier; `train` takes it from the data.
        drop_path_rate: rate of stochastic depth in training.
        decoder: decoder for segmentation: "linear" on the last layer (the default), "linear4" on the last four, as in
            DINOv2, "upernet", or "prompted", a mask for each class vector.
        prompts: safetensors file with a vector for each class by its name, for the decoder "prompted"; by default its
            vectors are learnt.
        prompt_mlp: let the vectors pass a hidden layer; else a linear map (prompted).
        prompt_attention: dense attention of patches to the prompts on no level ("none"), on the "last" block, or on
            four "levels" of the ViT (prompted).
        read: "auto" to compute in the last block only the tokens that the head reads, which changes no output; "all" to
            compute all tokens.
        args: further arguments of timm.create_model, such as {patch_size: 8, depth: 6}, or of the family's `create`.

    Raises:
        ConfigError: if a value is not one of these.
    """

    name: str = "vit_small_patch14_dinov2"
    pretrained: bool = True
    img_size: int | None = bounded(None, 1)
    num_classes: int | None = bounded(None, 1)
    drop_path_rate: float = bounded(0.0, 0, 0.99)
    decoder: str | None = one_of(None, DECODERS)
    prompts: str | None = None
    prompt_mlp: bool = True
    prompt_attention: PromptAttention = "levels"
    read: Read = "auto"
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.args, dict):
            raise ConfigError(f"args={self.args!r}: expected arguments by name, such as {{patch_size: 8}}")
        for decoder, names in DECODER_ARGS.items():
            for name in names if decoder != self.decoder else ():
                if (value := getattr(self, name)) != getattr(ModelConfig, name):
                    raise ConfigError(
                        f"model.{name}={value!r} with model.decoder={self.decoder or 'linear'!r}: expected it with "
                        f"model.decoder={decoder} only; set it, or leave {name} out"
                    )
        for name in ("img_size", "num_classes", "drop_path_rate", "pretrained"):
            if name in self.args:
                raise ConfigError(f"model.args has {name!r}: expected it as model.{name}; move it there")

    @property
    def decoder_args(self) -> dict[str, Any]:
        """Arguments of the decoder, by name, that are no files."""
        names = DECODER_ARGS.get(self.decoder or "", ())
        return {name: getattr(self, name) for name in names if name != "prompts"}

    @property
    def family(self) -> tuple[str, str]:
        """Return the name of the family and the name within it: ("timm", "vit_tiny_patch16_224").

        >>> ModelConfig(name="local-dir:runs/dense/model").family
        ('timm', 'local-dir:runs/dense/model')
        """
        family, colon, name = self.name.partition(":")
        return (family, name) if colon and family in FAMILIES else ("timm", self.name)
