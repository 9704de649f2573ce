"""Tiny models of transformers, one of every architecture that the tests know, from configs with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers.tiny import randomise
from torch import nn

WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 16, "patch_size": 8}
ENCODER = {**WIDTH, **IMAGES, "num_labels": 3}
TEXT = {**WIDTH, "num_hidden_layers": 1, "vocab_size": 50}
WORDS = {**WIDTH, "num_key_value_heads": 1, "vocab_size": 50, "pad_token_id": 0}
STAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
SAM = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32, "output_channels": 8,
    "image_size": 16, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1],
}  # fmt: skip
PATCHES = {**WIDTH, "patch_size": 8, "num_patches": 16}

# what is special about it: class, class of its config, arguments of the config
VITS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", ENCODER),
    "vit, bare": ("ViTModel", "ViTConfig", ENCODER),
    "deit": ("DeiTForImageClassification", "DeiTConfig", ENCODER),
    "deit, two classifiers": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", ENCODER),
    "beit": ("BeitForImageClassification", "BeitConfig", {**ENCODER, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", ENCODER),
    "dinov2, bare": ("Dinov2Model", "Dinov2Config", ENCODER),
    "dinov2, gated": ("Dinov2ForImageClassification", "Dinov2Config", {**ENCODER, "use_swiglu_ffn": True}),
    "dinov2, registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", ENCODER),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**ENCODER, "num_register_tokens": 4}),
    "dinov3, gated": ("DINOv3ViTModel", "DINOv3ViTConfig", {**ENCODER, "use_gated_mlp": True}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", ENCODER),
    "clip, classifier": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": ENCODER, "text_config": TEXT}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", ENCODER),
    "siglip, classifier": (
        "SiglipForImageClassification", "SiglipConfig", {"vision_config": ENCODER, "text_config": TEXT},
    ),
    "mae": ("ViTMAEModel", "ViTMAEConfig", {**ENCODER, "mask_ratio": 0.5}),
    "swin": ("SwinForImageClassification", "SwinConfig", {**STAGES, "num_labels": 3}),
    "data2vec, split": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", ENCODER),
    "data2vec, split, bare": ("Data2VecVisionModel", "Data2VecVisionConfig", ENCODER),
    "sam": ("SamVisionModel", "SamVisionConfig", SAM),
}  # fmt: skip

# models of which each token is routed by itself: class, class of its config, arguments, inputs
OTHERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", WORDS, "words"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", WORDS, "words"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**WORDS, "head_dim": 8}, "words"),
    "phi": ("PhiForCausalLM", "PhiConfig", WORDS, "words"),
    "phi3, packed": ("Phi3ForCausalLM", "Phi3Config", WORDS, "words"),
    "bert, norm and residual in the second module": ("BertModel", "BertConfig", {**WIDTH, "vocab_size": 50}, "words"),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", PATCHES, "patches"),
    "siglip2, classifier": (
        "Siglip2ForImageClassification", "Siglip2Config", {"vision_config": PATCHES, "text_config": TEXT}, "patches",
    ),
    "videomae, residual in the second module": (
        "VideoMAEModel", "VideoMAEConfig", {**WIDTH, **IMAGES, "num_frames": 2, "tubelet_size": 2}, "video",
    ),
    "clip, both towers": ("CLIPModel", "CLIPConfig", {"vision_config": ENCODER, "text_config": TEXT}, "pair"),
}  # fmt: skip

INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "words": lambda: {"input_ids": torch.randint(1, 50, (2, 7))},
    "patches": lambda: {
        "pixel_values": torch.randn(2, 5, 3 * 8 * 8),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 2),
        "spatial_shapes": torch.tensor([[2, 2]] * 2),
    },
    "video": lambda: {"pixel_values": torch.randn(2, 2, 3, 16, 16)},
    "pair": lambda: {"pixel_values": torch.randn(2, 3, 16, 16), **INPUTS["words"]()},
}


def tiny(class_name: str, config_name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model in eval mode, the same on every call; all of its weights matter."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**arguments))
    return randomise(model).eval()


def vit(name: str, **changes: Any) -> nn.Module:
    class_name, config_name, arguments = VITS[name]
    return tiny(class_name, config_name, {**arguments, **changes})


IMAGE_WORD, IMAGE_TOKENS = 49, 4  # number of the word that stands for a token of an image; tokens of an image


def llava(tower: str = "clip", blocks: int = 4, **changes: Any) -> nn.Module:
    """A tiny LLaVA in eval mode, the same on every call; its language model is a LLaMA with some dropout."""
    import transformers

    _, config_name, arguments = VITS[tower]
    words = transformers.LlamaConfig(**{**WORDS, "num_hidden_layers": blocks, "attention_dropout": 0.1})
    config = {
        "vision_config": getattr(transformers, config_name)(**arguments), "text_config": words,
        "image_token_index": IMAGE_WORD, "image_seq_length": IMAGE_TOKENS,
    }  # fmt: skip
    return tiny("LlavaForConditionalGeneration", "LlavaConfig", {**config, **changes})


def asked(texts: int = 2, words: int = 5, seed: int = 1) -> dict[str, torch.Tensor]:
    """Images, each before a text about it, as a LLaVA takes them; the last text is padded by a word."""
    drawn = torch.Generator().manual_seed(seed)
    text = torch.randint(1, IMAGE_WORD, (texts, words), generator=drawn)
    mask = torch.ones(texts, IMAGE_TOKENS + words, dtype=torch.long)
    mask[-1, -1] = 0
    return {
        "input_ids": torch.cat([torch.full((texts, IMAGE_TOKENS), IMAGE_WORD), text], dim=1),
        "attention_mask": mask,
        "pixel_values": torch.randn(texts, 3, 16, 16, generator=drawn),
    }
