"""The study of a small LLaVA: its questions have right answers, and its features are those of the ViT from pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("transformers")
import llava

BIRDS = [["house", "wren"], ["winter", "wren"], ["barn", "swallow"]]


@pytest.fixture
def data(tmp_path: Path) -> llava.Data:
    """Two scenes and three birds."""
    known = [{"cells": [3, 5, -1, 7]}, {"cells": [-1, 2, 2, -1]}, *({"bird": bird} for bird in BIRDS)]
    (tmp_path / "test.json").write_text(json.dumps(known))
    torch.save(torch.randn(5, llava.PATCHES, 24).half(), tmp_path / "test.pt")
    return llava.Data(tmp_path, "test")


def test_questions_have_the_answers_that_images_have(data: llava.Data) -> None:
    for seed in range(20):
        number, there, *left = data.questions(0, np.random.default_rng(seed))
        asked = llava.NUMBERS.index(there.question.split()[3])
        assert number.answer == "three" and (there.answer == "yes") == (asked in (3, 5, 7))
        assert [(each.question, each.answer) for each in left] == [("which digit is left of the five ?", "three")]
        assert len(data.questions(1, np.random.default_rng(seed))) == 2  # nothing is left of anything
        name, family, is_it = data.questions(2, np.random.default_rng(seed))
        assert (name.answer, family.answer) == ("house wren", "wren")
        assert (is_it.answer == "yes") == (is_it.question == "is it a house wren ?")


def test_labels_are_the_answers_alone(data: llava.Data) -> None:
    asked = [llava.Question("", "what bird is this ?", "barn swallow"), llava.Question("", "is it a wren ?", "no")]
    inputs, words = data.inputs([4, 2], asked), {number: word for word, number in data.words.items()}
    spoken = [[words[int(i)] for i in row if i >= 0] for row in inputs["labels"]]
    assert spoken == [["barn", "swallow", llava.END], ["no", llava.END]]
    assert (inputs["input_ids"] == data.words[llava.IMAGE]).sum(1).tolist() == [llava.PATCHES] * 2
    kept = inputs["labels"] >= 0
    assert torch.equal(inputs["labels"][kept], inputs["input_ids"][kept])
    assert torch.equal(inputs["attention_mask"] == 0, inputs["input_ids"] == data.words[llava.PAD])
    assert torch.equal(inputs["pixel_values"], data.features[[4, 2]].float())


@torch.no_grad()
def test_a_llava_gives_the_same_from_pixels_and_from_features(data: llava.Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch14_dinov2", img_size=llava.SIDE, num_classes=0, embed_dim=24, depth=2, num_heads=2
    ).eval()
    for p in vit.parameters():
        p.normal_(std=0.3)
    tower, pixels = llava.converted(vit), torch.randn(2, 3, llava.SIDE, llava.SIDE)
    torch.testing.assert_close(tower(pixels).last_hidden_state, vit.forward_features(pixels), rtol=1e-3, atol=1e-3)
    tower.save_pretrained(tmp_path / "vit")
    model = llava.new_model(data, tmp_path, seed=0).eval()
    inputs = data.inputs([2, 3], [llava.Question("", "what bird is this ?", "wren")] * 2)
    from_pixels = model(**{**inputs, "pixel_values": pixels}).logits
    seen = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    model.model.vision_tower = llava.Features()
    torch.testing.assert_close(model(**{**inputs, "pixel_values": seen}).logits, from_pixels, rtol=1e-4, atol=1e-5)


def test_the_table_pairs_by_seed() -> None:
    tuned, dense = llava.ARMS
    scores = {"0": (0.5, 0.4), "1": (0.7, 0.5)}
    results = {
        seed: {
            tuned: {"loss": 1 + more, "accuracy": {"bird: name": more}},
            dense: {"loss": 1 + less, "accuracy": {"bird: name": less}},
        }
        for seed, (more, less) in scores.items()
    }
    # differences of 10 and 20 points: t(0.975, 1) = 12.706, half = 12.706 * 7.071 / sqrt(2) = 63.5
    lines = llava.table(results).splitlines()
    assert lines[2:] == [
        "| bird: name, % | 60.0 | 45.0 | +15.0 [-48.5, +78.5] |",
        "| loss, nats a word | 1.6000 | 1.4500 | +0.1500 [-0.4853, +0.7853] |",
    ]
