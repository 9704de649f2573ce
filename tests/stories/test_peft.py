"""Adapters of the library peft on the attention of an upcycled model are trained, saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import config, randomise, upcycle, vit
from helpers.tiny_transformers import vit as of_transformers

import vimoe
from vimoe.models.interface import find_backbone, logits_of

peft = pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft asks
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_lora_on_attention_is_trained_saved_and_loaded_on_a_model_folder(tmp_path: Path, library: str) -> None:
    parent, target = (vit(), "attn.qkv") if library == "timm" else (of_transformers("dinov2"), "q_proj")
    model = randomise(upcycle(parent, config()), seed=3).eval()
    vimoe.save(model, tmp_path / "model")
    x = torch.randn(3, *find_backbone(model).input_size, generator=torch.Generator().manual_seed(1))
    before = logits_of(model, x).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(f"{target}.lora" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves one of the two factors, which starts at zero
        logits_of(adapted, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(vimoe.load(tmp_path / "model"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(again, x), logits_of(adapted, x), rtol=1e-5, atol=1e-5)
    assert (logits_of(adapted, x) - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()  # an upcycled model again, which is a model folder of its own
    torch.testing.assert_close(logits_of(vimoe.load(vimoe.save(merged, tmp_path / "merged")), x), logits_of(again, x))
