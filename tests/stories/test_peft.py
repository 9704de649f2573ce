"""Adapters of the library peft on the attention of an upcycled model are trained, saved and loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import config, images, randomise, upcycle, vit

import vimoe

peft = pytest.importorskip("peft")


def test_lora_on_attention_is_trained_saved_and_loaded_on_a_model_folder(tmp_path: Path) -> None:
    model = randomise(upcycle(vit(), config()), seed=3).eval()
    vimoe.save(model, tmp_path / "model")
    x, before = images(model), model(images(model)).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["attn.qkv"]))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("attn.qkv.lora" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves one of the two factors, which starts at zero
        adapted(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(vimoe.load(tmp_path / "model"), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(x), adapted(x), rtol=1e-5, atol=1e-5)
    assert (adapted(x) - before).abs().max() > 1e-3
