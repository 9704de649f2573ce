"""The family "llava": the FFNs of a LLaVA's language model become mixtures, whose tokens are routed one by one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.tiny import layers, perturb_experts
from helpers.tiny_transformers import IMAGE_TOKENS, asked, llava
from torch import nn

import vimoe
from vimoe.config import ModelConfig
from vimoe.errors import ConfigError, FolderError, SurgeryError
from vimoe.models.create import create
from vimoe.models.interface import find_backbone
from vimoe.models.upcycling import sites

CONFIG = vimoe.MoEConfig(layers="every:2", num_experts=4, top_k=2, num_shared_experts=0, routing="token")
D, F, N = 16, 32, 4


def mixture(dense: nn.Module, **changes: object) -> nn.Module:
    return vimoe.upcycle(copy.deepcopy(dense), vimoe.MoEConfig(**{**CONFIG.to_dict(), **changes}))


@pytest.mark.parametrize("tower", ["clip", "dinov2, bare"])
@torch.no_grad()
def test_the_language_model_is_upcycled_and_keeps_its_function(tower: str) -> None:
    dense, x = llava(tower), asked()
    model = mixture(dense)
    blocks = [f"model.language_model.layers.{i}" for i in range(4)]
    assert find_backbone(dense).family == "llava" and list(find_backbone(dense).blocks) == blocks
    assert [site.name for site in sites(dense)] == [f"{block}.mlp" for block in blocks]
    with vimoe.record(model) as routings:
        logits = model(**x).logits
    torch.testing.assert_close(logits, dense(**x).logits, rtol=1e-4, atol=1e-5)
    assert [each.layer for each in routings] == [f"{blocks[1]}.mlp", f"{blocks[3]}.mlp"]
    assert all(each.experts.shape == (x["input_ids"].numel(), 2) for each in routings)  # images' tokens and words
    perturb_experts(model)
    assert (model(**x).logits - dense(**x).logits).abs().max() > 0.01
    back = vimoe.densify(model, how="merge")
    assert len(sites(back)) == 4 and not layers(back)


@torch.no_grad()
def test_it_is_densified_to_the_parent_while_experts_are_copies() -> None:
    dense, x = llava(), asked()
    back = vimoe.densify(mixture(dense), how="merge")
    assert all(torch.equal(back.state_dict()[name], w) for name, w in dense.state_dict().items())
    assert torch.equal(back(**x).logits, dense(**x).logits)


@torch.no_grad()
def test_no_token_depends_on_later_words() -> None:
    model, x = perturb_experts(mixture(llava())), asked()
    changed = {**x, "input_ids": x["input_ids"].clone()}
    changed["input_ids"][:, -2] = x["input_ids"][:, -2] % 40 + 1
    before, after = model(**x).logits, model(**changed).logits
    torch.testing.assert_close(after[:, :-2], before[:, :-2], rtol=1e-5, atol=1e-6)
    assert (after[:, -2] - before[:, -2]).abs().max() > 1e-3


@torch.no_grad()
def test_generate_gives_the_most_probable_words_one_by_one() -> None:
    model, x = perturb_experts(mixture(llava())), {name: value[:1] for name, value in asked().items()}
    made = model.generate(**x, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    logits = model(input_ids=made, pixel_values=x["pixel_values"]).logits
    assert torch.equal(made[0, -4:], logits[0, -5:-1].argmax(dim=-1))


def test_the_count_is_the_formula() -> None:
    dense = llava()
    before, after = vimoe.count(dense), vimoe.count(mixture(dense))
    ffn, tokens = 3 * D * F, IMAGE_TOKENS + 1
    assert after.params - before.params == 2 * ((N - 1) * ffn + N * D)
    assert after.activated_params - before.activated_params == 2 * (ffn + N * D)
    assert after.macs - before.macs == 2 * tokens * (ffn + N * D)
    assert before.params == before.activated_params == sum(p.numel() for p in dense.parameters())
    planned = vimoe.plan(dense, CONFIG)
    assert (planned.dense, planned.moe) == (before, after) and planned.start is None
    with torch.no_grad():
        dense(**asked())  # transformers puts hooks into a model that has run, and notes that it did
    assert vimoe.count(dense) == before


def test_the_change_of_a_start_is_measured_on_images() -> None:
    changed = vimoe.plan(llava(), vimoe.MoEConfig(**{**CONFIG.to_dict(), "init": "noise"})).start
    assert changed is not None and changed.change is not None and 0 < changed.change < 1


@torch.no_grad()
def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    dense, x = llava(), asked()
    for place, model in {"dense": dense, "sparse": perturb_experts(mixture(dense))}.items():
        again = vimoe.load(vimoe.save(model, tmp_path / place))
        assert type(again) is type(model) and torch.equal(again(**x).logits, model(**x).logits)
        assert len(layers(again)) == len(layers(model))
        assert all(torch.equal(again.state_dict()[name], w) for name, w in model.state_dict().items())


def test_tied_embeddings_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="tie_word_embeddings=True: expected .* of their own; set it to False"):
        vimoe.save(llava(tie_word_embeddings=True), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_what_would_read_later_words_is_refused() -> None:
    dense = llava()
    state = {name: w.clone() for name, w in dense.state_dict().items()}
    with pytest.raises(SurgeryError, match="LlavaForConditionalGeneration is causal: expected routing='token'"):
        vimoe.upcycle(dense, vimoe.MoEConfig(layers="every:2", num_experts=4))
    for router in ("expert_choice", "soft"):
        with pytest.raises(SurgeryError, match=f"router='{router}' compares the tokens"):
            mixture(dense, router=router, top_k=1)
    assert not layers(dense) and all(torch.equal(dense.state_dict()[name], w) for name, w in state.items())


def test_no_llava_is_built_by_name() -> None:
    with pytest.raises(ConfigError, match="Llava builds no models by name; use vimoe.upcycle in Python"):
        create(ModelConfig(name="llava:some/where"))


def test_the_vision_tower_is_still_a_model_of_its_own() -> None:
    model = llava()
    vimoe.upcycle(model.model.vision_tower, vimoe.MoEConfig(layers="last:1", num_experts=4))
    assert [name for name, m in model.named_modules() if isinstance(m, vimoe.MoE)] == [
        "model.vision_tower.encoder.layers.1.mlp"
    ]
