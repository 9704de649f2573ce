"""Frames of a video are alike: intervals over sequences are what one frame of each would give, and cover."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.known_scenes import batches, known
from helpers.scenery import YAML, mask, scene, scenes

import vimoe
from vimoe.analysis.dependence import Dependence, agreement, dependence, dependence_of_units, exchanges
from vimoe.analysis.evidence import Evidence
from vimoe.analysis.expert_usage import activated_pairs, effective_number
from vimoe.analysis.intervals import Interval, mean_intervals, numbered, over, pair_interval
from vimoe.config.data import DataConfig
from vimoe.data.legends import read_legend
from vimoe.data.masks import Legend
from vimoe.data.scenes import load_scenes
from vimoe.errors import ConfigError, DataError
from vimoe.report.routing_section import _interval_meaning
from vimoe.tasks.segmentation_job import fingerprint

VIDEOS, FRAMES, UNITS, CLASSES, EXPERTS = 12, 7, 10, 3, 4
OF = np.repeat(np.arange(VIDEOS), FRAMES)  # the video of each image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ends(found: Interval) -> list[float]:
    return [found.value, found.low, found.high]


def width(found: Interval) -> float:
    return found.high - found.low


def one_frame_each() -> tuple[np.ndarray, np.ndarray]:
    """Of each video (S, U) classes and (S, U, 1) experts that follow them in part."""
    labels = rng(1).integers(0, CLASSES, (VIDEOS, UNITS))
    experts = np.where(rng(2).random(labels.shape) < 0.5, labels, rng(3).integers(0, EXPERTS, labels.shape))
    return labels, experts[..., None]


def test_frames_that_are_equal_give_the_interval_of_one_of_them() -> None:
    """For all that has an interval; over images it would be narrower."""
    values, (labels, experts) = rng().normal(size=(VIDEOS, 2)), one_frame_each()
    counts = np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in experts])
    favourite = counts.argmax(axis=1)
    single = (favourite[:, None] == np.arange(EXPERTS)).astype(int)

    def found(images: np.ndarray, sequences: np.ndarray | None) -> dict[str, Interval]:
        first, second = mean_intervals(values[images], sequences=sequences)
        alike = agreement([favourite[images], labels[images][:, 0]], sequences=sequences)
        return {
            "first": first,
            "second": second,
            "effective": effective_number(counts[images], sequences=sequences),
            "pairs": activated_pairs([counts[images]], sequences=sequences)[0],
            "units": dependence_of_units(labels[images], experts[images], CLASSES, EXPERTS, 0, sequences),
            "several": dependence(labels[images][:, 0], counts[images], permutations=50, sequences=sequences),
            "one": dependence(labels[images][:, 0], single[images], permutations=50, sequences=sequences),
            "agreement": Interval(*(float(alike[key][0, 1]) for key in ("value", "low", "high"))),
        }

    one, by_video, by_image = found(np.arange(VIDEOS), np.arange(VIDEOS)), found(OF, OF), found(OF, None)
    for name in one:
        assert ends(by_video[name]) == pytest.approx(ends(one[name])), name
    for name in ("units", "several", "one"):
        assert by_video[name].p == one[name].p, name
    for name, interval in by_video.items():
        assert width(interval) > 1.3 * width(by_image[name]), name


@pytest.mark.parametrize("kind", ["one expert", "several experts", "two layers"])
def test_videos_with_an_expert_of_their_own_are_chance(kind: str) -> None:
    """Class and expert are of the video, and independent: frames must not prove them again and again."""
    found = []
    for seed in range(40):
        of = np.repeat(np.arange(20), 9)
        labels, expert = rng(seed).integers(0, 4, (2, 20))[:, of]
        if kind == "two layers":
            layers = agreement([labels, expert], seed, of)
            found.append(Dependence(*(float(layers[k][0, 1]) for k in ("value", "low", "high")), p=1, nats=0))
        else:
            counts = np.eye(4, dtype=int)[expert] * (1 if kind == "one expert" else 3)
            found.append(dependence(labels, counts, seed, 100, of))
    assert abs(np.mean([each.value for each in found])) < 0.05 and sum(each.low > 0 for each in found) <= 8
    assert sum(each.p <= 0.05 for each in found) <= 6


def test_each_image_for_itself_is_no_sequence() -> None:
    """Sequences of one image give what images give."""
    values, (labels, experts) = rng().normal(size=(VIDEOS, 2)), one_frame_each()
    alone = np.arange(VIDEOS)
    partners = np.stack([rng(s).permutation(VIDEOS) for s in range(2)], axis=1)
    assert mean_intervals(values) == mean_intervals(values, 0, alone)
    assert ends(pair_interval(values, partners)) == pytest.approx(ends(pair_interval(values, partners, 0, alone)))
    plain = dependence_of_units(labels, experts, CLASSES, EXPERTS)
    assert plain == dependence_of_units(labels, experts, CLASSES, EXPERTS, 0, alone)


def test_intervals_over_sequences_cover_and_those_over_frames_do_not() -> None:
    """A change is of the video, with a little of the frame; videos have 3 to 12 frames."""
    covered, naive = [], []
    for seed in range(200):
        draw = rng(seed)
        of = np.repeat(np.arange(30), draw.integers(3, 13, 30))
        values = (draw.normal(size=30)[of] + 0.3 * draw.normal(size=len(of)) + 0.5)[:, None]
        for kept, sequences in ((covered, of), (naive, None)):
            (found,) = mean_intervals(values, seed, sequences)
            kept.append(found.low <= 0.5 <= found.high)
    assert 0.88 <= np.mean(covered) <= 0.98 and np.mean(naive) < 0.7


def test_intervals_of_permutations_cover_over_sequences() -> None:
    covered, naive = [], []
    for seed in range(200):
        draw = rng(1000 + seed)
        of = np.repeat(np.arange(25), 4)
        partners = np.stack([draw.permutation(100) for _ in range(5)], axis=1)
        takes, gives = draw.exponential(size=(2, 25)) - 1
        values = takes[of][:, None] + gives[of[partners]] + 0.5
        for kept, sequences in ((covered, of), (naive, None)):
            found = pair_interval(values, partners, seed, sequences)
            kept.append(found.low <= 0.5 <= found.high)
    assert 0.88 <= np.mean(covered) <= 1 and np.mean(naive) < 0.75


def test_pairs_within_a_sequence_are_no_more_in_the_samples_than_in_the_data() -> None:
    """A sixth of the pairs is within a sequence and changes nothing; a product of weights would make it more."""
    partners = np.stack([(np.arange(24) + shift) % 24 for shift in range(0, 24, 4)], axis=1)
    values = np.broadcast_to([0.0, 1, 1, 1, 1, 1], (24, 6))
    found = pair_interval(values, partners, 0, np.repeat(np.arange(6), 4))
    assert found.value == pytest.approx(5 / 6) and 0.7 < found.low < 5 / 6 < found.high


def test_experts_that_follow_the_video_but_not_its_classes_are_chance() -> None:
    """Frame by frame they look specialised, as often as there are frames."""
    by_image, by_video = [], []
    for seed in range(30):
        draw = rng(seed)
        common, expert = draw.integers(0, CLASSES, VIDEOS), draw.integers(0, EXPERTS, VIDEOS)
        shape = (VIDEOS * FRAMES, UNITS)
        labels = np.where(draw.random(shape) < 0.7, common[OF][:, None], draw.integers(0, CLASSES, shape))
        experts = np.broadcast_to(expert[OF][:, None, None], (*shape, 1))
        for kept, sequences in ((by_image, None), (by_video, OF)):
            kept.append(dependence_of_units(labels, experts, CLASSES, EXPERTS, seed, sequences))
    assert np.mean([found.p <= 0.05 for found in by_video]) <= 0.2
    assert np.mean([found.p <= 0.05 for found in by_image]) > 0.8
    assert abs(np.mean([found.value for found in by_video])) < 0.03 < np.mean([found.value for found in by_image])


def test_sequences_exchange_decisions_frame_by_frame() -> None:
    of = np.array([1, 0, 1, 2, 1, 0, 2])  # mixed, and of 2, 3 and 2 frames
    for donors in exchanges(of, 20, rng()):
        for video in range(3):
            givers = set(of[donors[of == video]])
            assert len(givers) == 1
            frames = np.flatnonzero(of == givers.pop())
            mine = donors[of == video]
            assert mine.tolist() == [frames[i % len(frames)] for i in range(len(mine))]
    equal = np.repeat(np.arange(5), 3)
    assert all(sorted(donors) == list(range(15)) for donors in exchanges(equal, 20, rng()))


def test_of_few_sequences_intervals_are_over_images_and_say_so() -> None:
    sequences, count = numbered(["b", "a", "b", "c", "d", "e"])
    assert sequences.tolist() == [0, 1, 0, 2, 3, 4] and count == 5 and over(count) == "over 5 sequences of images"
    assert numbered(["a", "b", "b", "c", "d"]) == (None, 4)
    assert over(4) == "over single frames of 4 sequences, and so too narrow" and "1 sequence," in over(1)
    assert numbered(None) == (None, None) and over(None) == "over images"
    assert "what other images" in _interval_meaning(None) and "what other videos" in _interval_meaning(5)
    assert "nothing of other videos" in _interval_meaning(4)


CAMVID = Path(__file__).parents[2] / "studies/camvid/classes.yaml"


def test_camvids_legend_tells_its_videos() -> None:
    names = ["0001TP_006690", "0001TP_006720", "0006R0_f00930", "0016E5_00390", "Seq05VD_f00000"]
    assert read_legend(CAMVID).sequences(names) == ["0001TP", "0001TP", "0006R0", "0016E5", "Seq05VD"]


def test_an_image_whose_name_tells_no_video_is_for_itself() -> None:
    legend = Legend(("a", "b"), (0, 1), sequence=r"(.+)_\d+$")
    assert legend.sequences(["aachen/aachen_000000_000019", "cat"]) == ["aachen/aachen_000000", "cat"]
    assert legend.sequences([]) == [] and Legend(("a", "b"), (0, 1)).sequences(["v_1"]) is None


def test_an_expression_that_is_found_nowhere_is_one_line(tmp_path: Path) -> None:
    root = scenes(tmp_path, yaml=YAML + "sequence: '(.+)-'\n")
    with pytest.raises(DataError, match=r"^sequence is '\(\.\+\)-', which matches no image's name, such as 'a000'"):
        load_scenes(DataConfig(path=str(root)))


def test_validation_has_its_sequences(tmp_path: Path) -> None:
    root = scenes(tmp_path, val=3)
    plain = load_scenes(DataConfig(path=str(root)))
    (root / "classes.yaml").write_text(YAML + "sequence: '(a10[01])|(?:b)'\n")
    found = load_scenes(DataConfig(path=str(root)))
    assert plain.sequences is None and found.sequences == ("a100", "a101", "a102")
    assert fingerprint(found) == fingerprint(plain)  # a training goes on when its legend learns of videos


def test_a_split_goes_by_the_videos_of_the_legend(tmp_path: Path) -> None:
    """The frame's number comes first, which no guess would find."""
    for i in range(40):
        scene(tmp_path, "train", f"{i:03d}_{'abcdefgh'[i % 8]}", mask(i))
    (tmp_path / "classes.yaml").write_text(YAML + "sequence: '_(.)$'\n")
    found = load_scenes(DataConfig(path=str(tmp_path), val_fraction=0.25))
    assert len(found.val) == 10 and len(set(found.sequences)) == 2
    assert not set(found.sequences) & {image.stem[-1] for image, _ in found.train}


def test_a_segmenter_is_analysed_by_video() -> None:
    """Every image four times: what analysis gives by video is wider than by image, and the estimates are the same."""
    images, masks = (torch.cat(each).repeat_interleave(4, 0) for each in zip(*batches(12), strict=True))
    loader, videos = [(images, masks)], [f"video {i // 4}" for i in range(48)]
    plain, by_video = (vimoe.analyze(known(), loader, draws=3, sequences=each) for each in (None, videos))
    assert (plain.sequences, by_video.sequences, by_video.overruled_sequences) == (None, 12, 12)
    assert "over 12 sequences of images" in str(by_video) and "sequences" not in str(plain)
    (one,), (other,) = plain.layers, by_video.layers
    pairs = [(one.experts[e].loss, other.experts[e].loss) for e in range(3)]
    pairs += [(one.frozen.loss, other.frozen.loss)]
    assert one.permuted.loss.value == other.permuted.loss.value and one.permuted.loss != other.permuted.loss
    pairs += [(one.effective_experts, other.effective_experts), (plain.pairs[0], by_video.pairs[0])]
    for narrow, wide in pairs:
        assert wide.value == pytest.approx(narrow.value) and width(wide) >= 1.2 * width(narrow)
    again = Evidence.from_dict(json.loads(json.dumps(by_video.to_dict())))
    assert str(again) == str(by_video)
    old = {key: value for key, value in plain.to_dict().items() if "sequences" not in key}
    assert str(Evidence.from_dict(old)) == str(plain)  # written before there were sequences


def test_the_half_that_is_drawn_shares_no_video_with_the_half_that_orders() -> None:
    images, masks = (torch.cat(each).repeat_interleave(4, 0) for each in zip(*batches(12), strict=True))
    evidence = vimoe.analyze(known(), [(images, masks)], overrule=0, sequences=[i // 4 for i in range(48)])
    assert "All intervals are over 12 sequences of images" in str(
        evidence
    )  # and none of overruling, since there was none
    assert (evidence.layers[0].drawn % 4 == 0).all() and evidence.layers[0].drawn.sum() == 48 * 15 // 2


def test_pruning_by_video_asks_for_more() -> None:
    """The change is noise by video: over images its upper bound is lower."""
    model, loader = known(), batches(12)
    evidence = vimoe.analyze(model, loader, draws=2, sequences=[i // 2 for i in range(12)])
    pruned = {
        key: vimoe.prune(known(), evidence, loader, sequences=names)
        for key, names in {"image": None, "video": [i // 2 for i in range(12)], "few": [0] * 12}.items()
    }
    bounds = {key: done.kept[0].change.loss for key, done in pruned.items()}
    assert bounds["few"] == bounds["image"] != bounds["video"]
    assert str(pruned["video"]).endswith("intervals are over 6 sequences of images")
    assert str(pruned["few"]).endswith("intervals are over single frames of 1 sequence, and so too narrow")
    assert "intervals" not in str(pruned["image"])
    assert "over 6 sequences" in str(vimoe.prune(known(), evidence, tolerance=-100))


def test_not_as_many_sequences_as_images_is_one_line() -> None:
    with pytest.raises(ConfigError, match="^3 sequences of 12 images: expected one for each image$"):
        vimoe.analyze(known(), batches(), sequences=["a", "b", "c"])
    evidence = vimoe.analyze(known(), batches(), draws=1)
    with pytest.raises(ConfigError, match="^3 sequences of 12 images: expected one for each image$"):
        vimoe.prune(known(), evidence, batches(), sequences=["a", "b", "c"])
