"""Track tokens: the formula, one frame as without them, classes in any order, and what one frame cannot tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import pictures
from helpers.tiny import randomise, vit
from torch import Tensor

import vimoe
from vimoe.errors import ConfigError
from vimoe.models.prompted import Prompted
from vimoe.models.segmenter import Segmenter
from vimoe.models.tracker import Tracker

CLASSES = 3


def tracking(**args: object) -> Segmenter:
    torch.manual_seed(0)
    backbone = vit(num_classes=0, depth=4, dynamic_img_size=True)
    return Segmenter(backbone, CLASSES, "prompted", decoder_args={"prompt_track": True, **args}).eval()


def frames(model: Segmenter, count: int = 3) -> list[Tensor]:
    return [pictures(model) * (number + 1) for number in range(count)]


@torch.no_grad()
def test_the_token_is_that_of_the_formula() -> None:
    tracker = randomise(Tracker(16), scale=0.3).double().eval()
    features, scores, before = (
        torch.randn(2, *shape).double() for shape in ((16, 3, 4), (CLASSES, 3, 4), (CLASSES, 16))
    )
    got = tracker(features, scores, before)
    layer, attention = tracker.layer, tracker.layer.self_attn
    for video in range(2):
        for c in range(CLASSES):
            weight = scores[video].softmax(0)[c]
            mean = (features[video] * weight).sum((1, 2)) / weight.sum()
            pair = torch.stack([mean, before[video, c]])
            q, k, v = F.linear(pair, attention.in_proj_weight, attention.in_proj_bias).view(2, 3, 8, 2).unbind(1)
            heads = [(q[:, h] @ k[:, h].T / 2**0.5).softmax(1) @ v[:, h] for h in range(8)]
            x = layer.norm1(pair + attention.out_proj(torch.cat(heads, dim=1)))
            x = layer.norm2(x + layer.linear2(layer.linear1(x).clamp(min=0)))
            torch.testing.assert_close(got[video, c], tracker.project(x[1]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_one_frame_and_an_untrained_tracker_are_as_without() -> None:
    model = randomise(tracking(), scale=0.3)
    plain = Segmenter(vit(num_classes=0, depth=4, dynamic_img_size=True), CLASSES, "prompted").eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".tracker." not in name})
    given = frames(model)
    first, second, _ = model.track(given)
    assert torch.equal(first, model(given[0])) and torch.equal(first, plain(given[0]))
    assert (second - plain(given[1])).abs().max() > 0.01
    for scores, images in zip(tracking().track(given), given, strict=True):
        torch.testing.assert_close(scores, tracking()(images), rtol=0, atol=1e-6)


@torch.no_grad()
def test_permuted_prompts_give_permuted_masks_in_all_frames() -> None:
    model, order = randomise(tracking(prompt_width=6), scale=0.3), [2, 0, 1]
    vectors = torch.randn(CLASSES, 6)
    model.decoder.set_prompts(vectors)
    before = [*model.track(frames(model))]
    model.decoder.set_prompts(vectors[order])
    for scores, expected in zip(model.track(frames(model)), before, strict=True):
        torch.testing.assert_close(scores, expected[:, order], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_videos_of_a_batch_do_not_touch() -> None:
    model = randomise(tracking(), scale=0.3)
    given = frames(model)
    both = [*model.track(given)]
    alone = [*model.track([images[:1] for images in given])]
    for scores, expected in zip(alone, both, strict=True):
        torch.testing.assert_close(scores, expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("track", [True, False])
def test_the_second_frame_learns_what_only_the_first_one_shows(track: bool) -> None:
    """A thing is of class 1 or 2. The first frame says which; the second one says only where it is."""
    torch.manual_seed(0)
    decoder = Prompted(4, 1, CLASSES, prompt_attention="none", prompt_track=True)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)

    def clip(count: int) -> tuple[list[Tensor], list[Tensor]]:
        kind, maps, masks = torch.randint(1, 3, (count,)), [], []
        for shown in (True, False):
            place = torch.rand(count, 4, 4) < 0.4
            colour = F.one_hot(kind * shown, 3).float()[:, :, None, None] * place[:, None]
            maps.append(torch.cat([place[:, None].float(), colour], dim=1))
            masks.append(kind[:, None, None] * place)
        return maps, masks

    for _ in range(120):
        maps, masks = clip(32)
        first, tokens = decoder.step([maps[0]])
        second, _ = decoder.step([maps[1]], tokens if track else None)
        loss = sum(F.cross_entropy(scores, mask) for scores, mask in zip((first, second), masks, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    maps, masks = clip(256)
    with torch.no_grad():
        first, tokens = decoder.step([maps[0]])
        second, _ = decoder.step([maps[1]], tokens if track else None)
    right = [
        (scores.argmax(1) == mask)[mask > 0].float().mean() for scores, mask in zip((first, second), masks, strict=True)
    ]
    assert right[0] > 0.95
    assert right[1] > 0.95 if track else right[1] < 0.65


@torch.no_grad()
def test_a_model_folder_has_the_tracker(tmp_path: Path) -> None:
    model = randomise(tracking(), scale=0.3)
    again = vimoe.load(vimoe.save(model, tmp_path / "model")).eval()
    for scores, expected in zip(again.track(frames(model)), model.track(frames(model)), strict=True):
        torch.testing.assert_close(scores, expected)


def test_other_decoders_track_nothing() -> None:
    model = Segmenter(vit(num_classes=0, depth=4), CLASSES, "prompted")
    with pytest.raises(
        ConfigError, match="decoder='prompted' tracks nothing: expected 'prompted' with prompt_track=True"
    ):
        next(model.track(frames(model)))
    with pytest.raises(ConfigError, match="the decoder tracks nothing: expected one with prompt_track=True"):
        model.decoder.step([])
