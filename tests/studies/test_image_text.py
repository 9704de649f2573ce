"""The study of image-text models: captions and batches are what it says, and all arms of a seed begin alike."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.tiny import vit

import vimoe

pytest.importorskip("transformers")

from image_text import ARMS, END, PAD, Captions, Fused, Towers, accuracy, batches

CLASSES = ["Barn_Swallow", "Tree_Swallow", "Black_footed_Albatross", "Gray_Catbird", "Herring_Gull"]


def test_captions_are_words_of_their_class_and_template() -> None:
    captions = Captions(CLASSES)
    words = {number: word for word, number in captions.number.items()}
    row = captions.of([2, 0], [0, 1]).tolist()
    assert [words[i] for i in row[0][: row[0].index(END)]] == ["a", "photo", "of", "a", "black", "footed", "albatross"]
    assert [words[i] for i in row[1][: row[1].index(END)]] == ["a", "bird", "called", "barn", "swallow"]
    assert row[1][row[1].index(END) + 1 :] == [PAD] * 3 and max(map(max, row)) < captions.words


def test_a_batch_has_every_class_once_and_images_of_it() -> None:
    labels = torch.arange(40) % 5
    draw = torch.Generator().manual_seed(0)
    for images, classes in itertools.islice(batches(labels, [0, 2, 4], 2, draw), 20):
        assert labels[images].tolist() == classes and len(set(classes)) == 2 and not set(classes) & {1, 3}


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_of_towers_begin_with_the_same_scores(arm: str) -> None:
    found = []
    for each in ("none", arm):
        torch.manual_seed(3)
        model = Towers(vit("dinov2"), Captions(CLASSES), each).eval()
        found.append(model.scores(torch.randn(4, 1, 24, generator=torch.Generator().manual_seed(0)), words()))
        layers = [name for name, part in model.named_modules() if isinstance(part, vimoe.MoE)]
        assert len(layers) == {"none": 0, "text": 2, "vision": 1, "both": 3}[each]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def words() -> torch.Tensor:
    return Captions(CLASSES).of(list(range(5)), [0] * 5)


@pytest.mark.parametrize("arm", ARMS)
def test_all_arms_of_fused_models_begin_with_the_same_scores_and_learn(arm: str) -> None:
    features, found = torch.randn(5, 5, 24, generator=torch.Generator().manual_seed(0)), []
    for each in ("none", arm):
        torch.manual_seed(3)
        model = Fused(24, Captions(CLASSES), each)
        found.append(model.eval().scores(features, words()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    pools = {"none": (1, 1), "text": (4, 1), "vision": (1, 4), "both": (4, 4)}[arm]
    assert model.blocks[0].mlp.config.groups == pools
    optimizer, before = torch.optim.Adam(model.parameters(), 1e-3), float(model.loss(features, words()).detach())
    for _ in range(10):
        optimizer.zero_grad()
        model.loss(features, words()).backward()
        optimizer.step()
    assert float(model.loss(features, words()).detach()) < 0.9 * before


def test_accuracy_is_the_share_of_images_whose_own_caption_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    captions, labels = Captions(CLASSES), torch.tensor([1, 1, 3, 3, 0, 1])

    class Told:
        def scores(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
            return x

    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert accuracy(Told(), x, labels, [1, 3], captions, 2) == 0.75
    assert accuracy(Told(), x, labels, [1, 3], captions, 3) == 0.8
