"""Scores of predictions read what the classifier reads, are judged on other images, and survive a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import images, vit
from sklearn.metrics import roc_auc_score

from vimoe.analysis.trust import Seen, Trust, auroc, fit_trust, in_words, observed, see
from vimoe.errors import FolderError

CHANCE = {"correct", "max_probability", "auroc_difference", "fitted_on", "judged_on", "right"}


def seen(number: int, seed: int) -> Seen:
    """Three classes; features are the logits of a better model, and three numbers that say nothing."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (number,), generator=random)
    truth = 2 * torch.eye(3)[labels] + torch.randn(number, 3, generator=random)
    logits = truth + 2 * torch.randn(number, 3, generator=random)
    features = torch.cat([truth, torch.randn(number, 3, generator=random)], dim=1)
    return Seen(logits, features, labels)


def test_what_is_observed_is_the_classifier_s_input() -> None:
    model = vit()
    x = images(model, 4)
    logits, features = observed(model, x)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x))
        torch.testing.assert_close(model.get_classifier()(features), logits)
        torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
    found = see(model, [(x, torch.tensor([0, 1, 2, 3])), (x[:2], torch.tensor([4, 0]))])
    torch.testing.assert_close(found.features, torch.cat([features, features[:2]]))
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 0] and not model.get_classifier()._forward_pre_hooks


def test_correctness_is_judged_on_images_that_it_was_not_fitted_on() -> None:
    train, validation = seen(400, 1).features, seen(300, 2)
    trust, facts = fit_trust(train, validation)
    assert facts["fitted_on"] == facts["judged_on"] == 150 and set(facts) >= CHANCE
    odd = validation.part(1)
    with torch.no_grad():
        ours = trust.correctness(odd.logits, odd.features)
    assert facts["correct"]["auroc"] == pytest.approx(roc_auc_score(odd.right, ours))
    plain = odd.logits.softmax(dim=1).amax(dim=1)
    assert facts["max_probability"]["auroc"] == pytest.approx(roc_auc_score(odd.right, plain))
    gap = facts["auroc_difference"]
    assert gap["low"] < gap["value"] < gap["high"]
    assert gap["value"] == pytest.approx(facts["correct"]["auroc"] - facts["max_probability"]["auroc"])
    labels = validation.labels.clone()  # of the judged half: they change no score
    labels[1::2] = (labels[1::2] + 1) % 3
    again, _ = fit_trust(train, validation._replace(labels=labels))
    assert all(torch.equal(a, b) for a, b in zip(trust.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.01, 0.2, "tells more"), (-0.1, 0.1, "is not shown to tell more or less"), (-0.2, -0.1, "tells less")],
)
def test_the_words_follow_the_interval(low: float, high: float, word: str) -> None:
    facts = {"train_images": 100, "validation_images": 60, "fitted_on": 30, "judged_on": 30}
    facts |= {name: {"auroc": 0.8, "ece": 0.1} for name in ("correct", "max_probability")}
    text = in_words({**facts, "auroc_difference": {"value": (low + high) / 2, "low": low, "high": high}})
    assert word in text and "60 validation images" in text and text.count("\n") == 2


def test_validation_without_mistakes_leaves_familiarity_alone(tmp_path: Path) -> None:
    validation = seen(40, 2)
    trust, facts = fit_trust(seen(100, 1).features, validation._replace(labels=validation.logits.argmax(dim=1)))
    assert (
        trust.correctness is None
        and not set(facts) & CHANCE
        and "no score of how likely a class is right: valid" in in_words(facts)
    )
    trust.save(tmp_path / "trust.safetensors")
    (scores,) = Trust.load(tmp_path / "trust.safetensors").of(validation.logits[:1], validation.features[:1])
    assert list(scores) == ["familiarity"]


def test_a_file_holds_both_scores(tmp_path: Path) -> None:
    path, new = tmp_path / "trust.safetensors", seen(9, 3)
    trust, _ = fit_trust(seen(100, 1).features, seen(80, 2))
    trust.save(path)
    assert Trust.load(path).of(new.logits, new.features) == trust.of(new.logits, new.features)
    assert all(set(scores) == {"familiarity", "correct"} for scores in trust.of(new.logits, new.features))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(FolderError, match=r"trust.safetensors cannot be read .*: expected what vimoe trust wrote"):
        Trust.load(path)


def test_the_auroc_counts_ties_half() -> None:
    random = np.random.default_rng(0)
    scores, positive = random.integers(5, size=60).astype(float), random.random(60) < 0.4
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert auroc(np.ones(4), np.array([True, False, True, False])) == 0.5
