"""MoE-Tuning: a stage trains what it names alone, a kill changes no bit, and experts start as the FFNs of stage II."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.slow import one_in
from helpers.tiny import layers
from helpers.tiny_transformers import IMAGE_TOKENS, IMAGE_WORD, asked, llava
from torch import Tensor, nn

import vimoe
from vimoe.errors import ConfigError, FolderError, VimoeError
from vimoe.training.moe_tuning import Stage, _rate, moe_tune, token_loads

CONFIG = vimoe.MoEConfig(layers="every:2", num_experts=4, top_k=2, num_shared_experts=0, routing="token")
STAGES = [
    Stage(part="projector", steps=3, lr=1e-2),
    Stage(part="language_model", steps=4, lr=1e-2),
    Stage(part="experts", steps=5, lr=1e-2),
]
SPARSE = ("model.language_model.layers.1.mlp", "model.language_model.layers.3.mlp")


def batch(stage: int, step: int) -> dict[str, Tensor]:
    """Two texts, other ones in each step; the first words of a text are no labels."""
    found = asked(seed=10 * stage + step)
    labels = found["input_ids"].clone()
    labels[:, : IMAGE_TOKENS + 2] = -100
    return {**found, "labels": labels.masked_fill(found["attention_mask"] == 0, -100)}


def tuned(out: Path, stages: list[Stage] = STAGES, **changes: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = llava()
    return model, moe_tune(model, stages, **{"batch": batch, "out": out, "config": CONFIG, "save_every": 2, **changes})


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that both have and that are equal."""
    return [name for name, w in one.items() if name in other and torch.equal(w, other[name])]


def test_the_last_stage_starts_with_the_logits_of_the_stage_before(tmp_path: Path) -> None:
    dense, _ = tuned(tmp_path / "dense", STAGES[:2])
    sparse, _ = tuned(tmp_path / "sparse", [*STAGES[:2], replace(STAGES[2], lr=0.0)])
    x = asked(4)
    with torch.no_grad():
        torch.testing.assert_close(sparse(**x).logits, dense(**x).logits, rtol=1e-4, atol=1e-5)
        assert (llava()(**x).logits - dense(**x).logits).abs().max() > 0.1  # they are not those of the beginning
    parts = dict(zip(SPARSE, layers(sparse), strict=True))
    for name, layer in parts.items():
        mlp = dense.get_submodule(name)
        for fc1, fc2 in zip(layer.experts.fc1.weight, layer.experts.fc2.weight, strict=True):
            assert torch.equal(fc1, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            assert torch.equal(fc2, mlp.down_proj.weight)


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("projector", ("model.multi_modal_projector.",)),
        ("language_model", ("model.multi_modal_projector.", "model.language_model.", "lm_head.")),
        ("experts", tuple(f"{name}.{part}." for name in SPARSE for part in ("experts", "router"))),
        ("every:2", tuple(f"{name}." for name in SPARSE)),
    ],
)
def test_only_what_a_stage_names_has_gradients_and_changes(part: str, trained: tuple[str, ...], tmp_path: Path) -> None:
    before, _ = tuned(tmp_path / "still", [Stage(part=part, steps=1, lr=0.0)])
    after, _ = tuned(tmp_path / "moved", [Stage(part=part, steps=1, lr=1e-2)])
    named = {name for name in after.state_dict() if name.startswith(trained)}
    assert named == {name for name, p in after.named_parameters() if p.requires_grad}
    assert set(equal(before.state_dict(), after.state_dict())) == set(after.state_dict()) - named
    assert named


@pytest.mark.parametrize(("in_stage", "at_step"), one_in(3, [(1, 3), (0, 1), (1, 0), (2, 0), (2, 3), (2, 4)]))
def test_a_killed_training_goes_on_to_the_same_bits(in_stage: int, at_step: int, tmp_path: Path) -> None:
    """In any stage, at its first step, before and after its first checkpoint; it does no finished step again."""
    whole, rows = tuned(tmp_path / "whole")
    seen: list[tuple[int, int]] = []

    def killed(stage: int, step: int) -> dict[str, Tensor]:
        if (stage, step) == (in_stage, at_step):
            raise KeyboardInterrupt
        return batch(stage, step)

    def noted(stage: int, step: int) -> dict[str, Tensor]:
        seen.append((stage, step))
        return batch(stage, step)

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "killed", batch=killed)
    torch.randn(7)  # another state of the generator
    resumed, again = tuned(tmp_path / "killed", batch=noted)
    assert again == rows and seen[0] == (in_stage, at_step - at_step % 2)
    assert equal(whole.state_dict(), resumed.state_dict()) == list(whole.state_dict()) == list(resumed.state_dict())


def test_padding_has_no_say_in_how_even_the_loads_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the loss nor in the bias, which moves after each step."""
    seen: dict[str, list[vimoe.Routing]] = {"balance_loss": [], "update_bias": []}
    for name, given in seen.items():
        real = getattr(vimoe.training.moe_tuning, name)

        def noted(*args: Any, real: Any = real, given: list[vimoe.Routing] = given) -> Any:
            given.extend(args[-1])
            return real(*args)

        monkeypatch.setattr(vimoe.training.moe_tuning, name, noted)
    model, _ = tuned(tmp_path, config=replace(CONFIG, bias_update_rate=0.5))
    words = int(asked()["attention_mask"].sum())
    for given in seen.values():
        assert [len(routing.experts) for routing in given] == [words] * 2 * STAGES[-1].steps
    assert all(layer.router.choice_bias.abs().max() > 0 for layer in layers(model))


def test_the_bias_stays_where_experts_are_not_trained(tmp_path: Path) -> None:
    experts, projector = Stage(part="experts", steps=1, lr=0.0), Stage(part="projector", steps=2, lr=0.0)
    config = replace(CONFIG, bias_update_rate=0.5)
    one, _ = tuned(tmp_path / "one", [experts], config=config)
    both, _ = tuned(tmp_path / "both", [experts, projector], config=config)
    for layer, other in zip(layers(one), layers(both), strict=True):
        assert torch.equal(layer.router.choice_bias, other.router.choice_bias)


def test_checkpoints_come_after_a_step_at_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_every=0: expected"):
        tuned(tmp_path, save_every=0)


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    whole, rows = tuned(tmp_path / "run")

    def none(stage: int, step: int) -> dict[str, Tensor]:
        raise AssertionError

    again, same = tuned(tmp_path / "run", batch=none)
    assert same == rows and equal(whole.state_dict(), again.state_dict()) == list(whole.state_dict())
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("projector", 2), ("projector", 3), ("language_model", 2), ("language_model", 4), ("experts", 2),
        ("experts", 4), ("experts", 5),
    ]  # fmt: skip
    assert all((row["balance"] > 0) == (row["stage"] == "experts") for row in rows)
    assert not again.training and not whole.training


def test_the_balance_loss_trains_the_routers(tmp_path: Path) -> None:
    """In the first step it alone does, since the experts are still alike."""
    stage = [Stage(part="experts", steps=1, lr=1e-2)]
    still, _ = tuned(tmp_path / "still", [replace(stage[0], lr=0.0)])
    with_loss, _ = tuned(tmp_path / "with", stage, balance=1.0)
    for layer, before in zip(layers(with_loss), layers(still), strict=True):
        assert (layer.router.weight - before.router.weight).abs().max() > 1e-3


def test_another_seed_draws_other_routers(tmp_path: Path) -> None:
    stage = [Stage(part="experts", steps=1, lr=0.0)]
    one, other = (tuned(tmp_path / str(seed), stage, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(layers(one)[0].router.weight, layers(other)[0].router.weight)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    tuned(tmp_path / "run", STAGES[:1])
    with pytest.raises(FolderError, match="other settings: expected the same to go on"):
        tuned(tmp_path / "run", STAGES[:1], seed=1)
    with pytest.raises(ConfigError, match="a stage of 'experts' without config: expected a MoEConfig"):
        tuned(tmp_path / "none", config=None)
    with pytest.raises(ConfigError, match="has MoE layers already: expected a dense one"):
        moe_tune(vimoe.upcycle(llava(), CONFIG), STAGES, batch, tmp_path / "sparse", CONFIG)
    with pytest.raises(ConfigError, match="steps=0"):
        Stage(part="projector", steps=0)
    with pytest.raises(ConfigError, match="part='every:two': expected one of projector, language_model, all, moe"):
        Stage(part="every:two")
    broken = {**batch(0, 0), "pixel_values": torch.full((2, 3, 16, 16), torch.inf)}
    with pytest.raises(VimoeError, match="the loss is nan before step 2 of stage 'projector': lower its lr"):
        tuned(tmp_path / "nan", STAGES[:1], batch=lambda _stage, _step: broken)
    assert not (tmp_path / "nan" / "checkpoints").exists()


def test_the_rate_rises_over_three_percent_of_the_steps_and_falls_as_a_cosine() -> None:
    stage = Stage(part="projector", steps=100, lr=1.0)
    rates = [_rate(stage, step) for step in range(100)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[3] < 1 and 0 < rates[-1] < 1e-3
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[51] == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_loads_of_images_and_words_are_apart_and_padding_is_not_counted() -> None:
    model, x = vimoe.upcycle(llava(), CONFIG), asked(3)
    with vimoe.record(model) as routings:
        model(**x)
    found = token_loads(routings, x["input_ids"], IMAGE_WORD, x["attention_mask"])
    assert list(found) == list(SPARSE)
    for routing in routings:
        expected = {"image": [0] * 4, "text": [0] * 4}
        for row, chosen in enumerate(routing.experts.tolist()):
            text, place = divmod(row, 9)
            if (text, place) != (2, 8):
                for expert in chosen:
                    expected["image" if place < IMAGE_TOKENS else "text"][expert] += 1
        assert {kind: load.tolist() for kind, load in found[routing.layer].items()} == expected
    everything = token_loads(routings, x["input_ids"], IMAGE_WORD)
    assert all(torch.equal(sum(everything[each.layer].values()), each.load) for each in routings)
    with pytest.raises(VimoeError, match="routed 27 rows: expected one for each of 18 tokens"):
        token_loads(routings, x["input_ids"][:2], IMAGE_WORD)
