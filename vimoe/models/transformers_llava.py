"""The LLaVAs of transformers: a vision tower, a projector, and a language model, whose FFNs become mixtures.

The language model is causal, so tokens are routed one by one. They are those of the image, then words.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vimoe.errors import FolderError, SurgeryError
from vimoe.models import transformers_files
from vimoe.models.interface import Backbone
from vimoe.models.transformers_vit import TransformersViT
from vimoe.moe.router import TokenLayout

LANGUAGE_MODEL = "model.language_model"
_LLAVA = ("transformers.models.llava.modeling_llava", "LlavaForConditionalGeneration")


class Llava(TransformersViT):
    """A `LlavaForConditionalGeneration`. Its blocks are those of its language model, and no others.

    It has no `layout`: where each token is routed by itself, a layer does not have to know which ones are of an image.
    Images alone stand for an input where one is made up, as in `count`.
    """

    @classmethod
    def owns(cls, module: nn.Module) -> bool:
        return _LLAVA in [(base.__module__, base.__name__) for base in type(module).__mro__]

    @classmethod
    def create(cls, name: str, **args: Any) -> nn.Module:
        """Raise ConfigError: the verbs of the command line know no words."""
        return Backbone.create.__func__(cls, name, **args)  # type: ignore[attr-defined]

    @property
    def arguments(self) -> dict[str, Any]:
        """Class and config. Raises FolderError for tied embeddings, which a loaded state would untie."""
        if self.vit.config.tie_word_embeddings:
            raise FolderError(
                "tie_word_embeddings=True: expected a LLaVA whose words and lm_head have weights of their own; set it "
                "to False before the model is built"
            )
        return super().arguments

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Names of the language model's blocks."""
        return TransformersViT(self.model, self._named(LANGUAGE_MODEL)).blocks

    def run(self, images: Tensor) -> Any:
        """Run the model on the tokens of each image, and the word of number 0 after them."""
        if not any(module._forward_hooks for module in self.vit.modules()):
            for module in self.vit.modules():  # a copy without hooks lacks those that hand out hidden states
                vars(module).pop("_output_capturing_hooks_installed", None)
        seen = self.vit.get_image_features(images, return_dict=True).pooler_output
        words = torch.zeros(len(images), 1, dtype=torch.long, device=images.device)
        tokens = torch.cat([torch.stack(list(seen)), self.vit.get_input_embeddings()(words)], dim=1)
        return self.vit(inputs_embeds=tokens)

    @property
    def layout(self) -> TokenLayout:
        raise SurgeryError(
            f"{type(self.vit).__name__} is causal: expected routing='token', since a decision for all tokens of a "
            f"text would read later words; set it"
        )

    @property
    def input_size(self) -> tuple[int, int, int]:
        config = self._config
        return (getattr(config, "num_channels", 3), *transformers_files.pair(config.image_size))
