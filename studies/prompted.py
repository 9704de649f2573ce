"""Prompted segmentation over a frozen ViT: the parts of the decoder one by one, against linear decoders.

    python studies/prompted.py --model local-dir:dinov2 --data camvid --out prompted --size 252 336

All arms train a decoder on the same features of whole images, which the ViT computes once, in the same steps and in the
same order of images. Each arm's rate is the one of RATES whose mean IoU on validation is best with the first seed. Test
is scored at the masks' own size, after the rates are chosen, by the weights of the last step. Cells that are there
already (`--out`/cells) are not run again. `--every N` scores every Nth test image, since the next frame looks alike.

The arms are RefSAM's ablation (arXiv 2307.00997, table of the dense attention) in form: the MLP alone, dense attention
alone, hierarchical attention alone, and the MLP with each. "drawn" has vectors that are drawn at random and stay.

"clips" and "tracked" are trained on clips of three successive frames, so a step has three times as many images. Both
see the same ones; "tracked" carries track tokens from frame to frame, also over the whole of each video in scoring. In
"tracked, a tenth" and "tracked, a hundredth" the tracker has this part of the rate of the rest.
Frames whose names differ after the last "_" alone are of one video.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.data.images import open_image
from vimoe.data.loaders import preprocessing
from vimoe.data.scenes import Scene, Scenes, load_scenes
from vimoe.errors import VimoeError
from vimoe.files import read_text, write_json
from vimoe.metrics.segmentation import ContourCounts, SceneCounts, pixel_loss
from vimoe.models.create import create_segmenter
from vimoe.models.decoders import DECODERS
from vimoe.models.interface import find_backbone
from vimoe.models.segmenter import Segmenter
from vimoe.study.paired import interval

RATES = (1e-3, 3e-3, 1e-2)
DRAWN = 256  # width of vectors that are drawn
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "linear4": ("linear4", {}),
    "MLP": ("prompted", {"prompt_attention": "none"}),
    "dense attention": ("prompted", {"prompt_mlp": False, "prompt_attention": "last"}),
    "hierarchical": ("prompted", {"prompt_mlp": False}),
    "MLP + dense attention": ("prompted", {"prompt_attention": "last"}),
    "MLP + hierarchical, drawn": ("prompted", {"prompt_width": DRAWN}),
    "MLP + hierarchical": ("prompted", {}),
    "clips": ("prompted", {}),
    "tracked": ("prompted", {"prompt_track": True}),
    "tracked, a tenth": ("prompted", {"prompt_track": True}),
    "tracked, a hundredth": ("prompted", {"prompt_track": True}),
}
OF_TRACKER = {"clips": 1.0, "tracked": 1.0, "tracked, a tenth": 0.1, "tracked, a hundredth": 0.01}  # its rate, by arm
ON_CLIPS, CLIP = tuple(OF_TRACKER), 3  # arms, and frames of a clip


@dataclass(frozen=True)
class Features:
    """What the frozen ViT gives for scenes, and their masks.

    Attributes:
        maps: (images, D, h, w) float16 of each block that a decoder reads, by its number.
        masks: mask (H, W) int64 of each image at its own size.
        small: (images, H / 2, W / 2) masks to train on, of the size of half the resized images.
        videos: numbers of the images of each video, in their order.
    """

    maps: dict[int, Tensor]
    masks: list[Tensor]
    small: Tensor
    videos: list[list[int]]

    @property
    def clips(self) -> Tensor:
        """(clips, CLIP) numbers of successive images."""
        return torch.tensor([video[i : i + CLIP] for video in self.videos for i in range(len(video) - CLIP + 1)])


def features(model: Segmenter, scenes: Sequence[Scene], data: Scenes, blocks: Sequence[int]) -> Features:
    """Run the ViT once over whole images, resized to the model's crop."""
    prepared, size = preprocessing(model), model.crop
    mean, std = (torch.tensor(prepared[key])[:, None, None] for key in ("mean", "std"))
    grid = model.grid(*size)
    kept: dict[int, list[Tensor]] = {number: [] for number in blocks}
    masks, small = [], []
    for image, mask in scenes:
        pixels = resize(pil_to_tensor(open_image(image)), list(size), antialias=True) / 255
        with torch.no_grad():
            tokens = find_backbone(model.backbone).features(((pixels - mean) / std)[None], blocks)
        for number, each in zip(blocks, tokens, strict=True):
            kept[number].append(each[0].T.unflatten(1, grid).half())
        masks.append(torch.from_numpy(np.array(data.legend.read(mask))).long())
        half = [side // 2 for side in size]
        small.append(F.interpolate(masks[-1][None, None].float(), half, mode="nearest-exact")[0, 0].long())
    maps = {number: torch.stack(each) for number, each in kept.items()}
    return Features(maps, masks, torch.stack(small), videos(scenes))


def videos(scenes: Sequence[Scene]) -> list[list[int]]:
    """Return the numbers of the images of each video."""
    found: dict[str, list[int]] = {}
    for number in sorted(range(len(scenes)), key=lambda number: str(scenes[number][0])):
        found.setdefault(str(scenes[number][0]).rpartition("_")[0], []).append(number)
    return list(found.values())


def cached(path: Path, model: Segmenter, scenes: Sequence[Scene], data: Scenes, blocks: Sequence[int]) -> Features:
    """Return the features of a file, after they were computed and written where it is missing."""
    if not path.exists():
        made = features(model, scenes, data, blocks)
        masks = {f"mask {number}": mask.to(torch.uint8) for number, mask in enumerate(made.masks)}
        maps = {f"block {number}": each for number, each in made.maps.items()}
        save_file({**masks, **maps, "small": made.small.to(torch.uint8)}, path)
    found = load_file(path)
    masks = [found[f"mask {number}"].long() for number in range(len(scenes))]
    maps = {number: found[f"block {number}"] for number in blocks}
    return Features(maps, masks, found["small"].long(), videos(scenes))


def new_decoder(arm: str, dim: int, depth: int, classes: int, seed: int) -> nn.Module:
    """Return the fresh decoder of an arm and seed."""
    torch.manual_seed(seed)
    name, args = ARMS[arm]
    decoder: Any = DECODERS[name](dim, depth, classes, **args)
    if "prompt_width" in args:
        decoder.set_prompts(torch.randn(classes, DRAWN, generator=torch.Generator().manual_seed(seed)))
    return decoder


def scores(decoder: Any, found: Features, rows: Tensor, size: Sequence[int]) -> Tensor:
    """Return the scores (images, classes, *size) of some of the images, each by itself."""
    return on_pixels(decoder(maps_of(decoder, found, rows)), size)


def scores_of_clips(decoder: Any, found: Features, rows: Tensor, size: Sequence[int]) -> Iterator[Tensor]:
    """Yield the scores (clips, classes, *size) of the frames of some clips (clips, frames), tracked if it tracks."""
    tokens = None
    for frame in rows.T:
        if decoder.tracker is None:
            yield scores(decoder, found, frame, size)
        else:
            patches, tokens = decoder.step(maps_of(decoder, found, frame), tokens)
            yield on_pixels(patches, size)


def maps_of(decoder: Any, found: Features, rows: Tensor) -> list[Tensor]:
    """Return the maps that a decoder reads of some of the images."""
    return [found.maps[number][rows].float() for number in decoder.blocks]


def on_pixels(patches: Tensor, size: Sequence[int]) -> Tensor:
    """Return the scores of patches at pixels."""
    return F.interpolate(patches, list(size), mode="bilinear", align_corners=False)


def groups(decoder: nn.Module, rate: float, of_tracker: float) -> list[dict[str, Any]]:
    """Return the parameters for an optimiser; the tracker's have this part of the rate."""
    tracker = list(tracker.parameters()) if (tracker := getattr(decoder, "tracker", None)) is not None else []
    known = {id(p) for p in tracker}
    rest = [p for p in decoder.parameters() if id(p) not in known]
    return [{"params": rest, "lr": rate}, *([{"params": tracker, "lr": of_tracker * rate}] if tracker else [])]


def train(
    decoder: nn.Module, found: Features, rate: float, steps: int, batch: int, seed: int, clips: bool,
    of_tracker: float = 1.0,
) -> None:  # fmt: skip
    """Train in bfloat16, by AdamW with a cosine from the rate to 0; the order of images follows from the seed alone.

    Args:
        decoder: decoder to be trained.
        found: features and masks.
        rate: peak of the learning rate.
        steps: number of steps.
        batch: images of a step, or clips.
        seed: of their order.
        clips: train on clips, with the mean loss of their frames.
        of_tracker: part of the rate that the tracker has.
    """
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(groups(decoder, rate, of_tracker), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    units, size = found.clips if clips else torch.arange(len(found.masks)), found.small.shape[1:]
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(units), generator=draw)
        rows, order = units[order[:batch]], order[batch:]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if clips:
                frames = zip(scores_of_clips(decoder, found, rows, size), rows.T, strict=True)
                loss = torch.stack([pixel_loss(each, found.small[frame]) for each, frame in frames]).mean()
            else:
                loss = pixel_loss(scores(decoder, found, rows, size), found.small[rows])
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def score(decoder: Any, found: Features, counts: SceneCounts, every: int = 1) -> dict[str, Any]:
    """Return the score at the size of the masks of every Nth image, as JSON knows it."""
    decoder.eval()
    tracks = getattr(decoder, "tracker", None) is not None
    for video in found.videos:
        tokens = None
        for number in video:
            if number % every and not tracks:
                continue
            maps = maps_of(decoder, found, torch.tensor([number]))
            if tracks:
                patches, tokens = decoder.step(maps, tokens)
            else:
                patches = decoder(maps)
            if number % every == 0:
                mask = found.masks[number]
                counts.add(on_pixels(patches, mask.shape), mask[None])
    return counts.score().to_dict()


@torch.no_grad()
def weighed(decoder: Any, found: Features) -> float | None:
    """Return how many prompts a patch weighs: exp of the entropy of its weights, a mean over patches and levels.

    It is C for equal weights, with which dense attention adds the same to all patches; None without attention.
    """
    numbers = []
    for number, level, attend in zip(decoder.blocks, decoder.levels, decoder.attention, strict=False):
        x = level(found.maps[number].float())
        weights = attend.weights(x, decoder.prompts_of_classes().expand(len(x), -1, -1))
        numbers.append(float((-(weights * weights.log()).sum(dim=1)).exp().mean()))
    return float(np.mean(numbers)) if numbers else None


def table(cells: dict[str, list[dict[str, Any]]], facts: dict[str, list[str]], control: str) -> str:
    """Return means over seeds, and paired differences to the control with Student intervals, as Markdown.

    Args:
        cells: scores on test by arm, in the order of the seeds.
        facts: parameters, rate, and prompts that a patch weighs, by arm.
        control: arm that the others are compared with.
    """
    lines = [
        f"| decoder | parameters | rate | prompts of a patch | mean IoU | J | F | mean IoU beyond {control} |",
        "|---" * 8 + "|",
    ]
    for arm, seeds in cells.items():
        means = [f"{100 * np.mean([each[name] for each in seeds]):.2f}" for name in ("miou", "j", "f")]
        beyond = interval([100 * (a["miou"] - b["miou"]) for a, b in zip(seeds, cells[control], strict=True)])
        shown = "" if arm == control else f"{beyond.value:+.2f} [{beyond.low:+.2f}, {beyond.high:+.2f}]"
        lines.append(f"| {arm} | {' | '.join([*facts[arm], *means, shown])} |")
    return "\n".join(lines)


def by_class(cells: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> str:
    """Return J and F of each class, means over seeds, as Markdown."""
    lines = ["| class | " + " | ".join(f"{arm}: J / F" for arm in cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for c, name in enumerate(names):
        shown = []
        for seeds in cells.values():
            there = [(each["per_class_j"][c], each["per_class_f"][c]) for each in seeds]
            shown.append("" if None in there[0] else " / ".join(f"{100 * each:.1f}" for each in np.mean(there, axis=0)))
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def study(args: argparse.Namespace) -> str:
    """Run the cells that are missing, and return the tables."""
    data = load_scenes(DataConfig(path=args.data, task="segmentation"))
    classes = len(data.classes)
    model = create_segmenter(ModelConfig(name=args.model), classes, "linear4", crop=tuple(args.size)).eval()
    vit = find_backbone(model)
    dim, depth = int(vit.width or 0), len(vit.blocks)
    fresh = {arm: new_decoder(arm, dim, depth, classes, 0) for arm in args.arms}
    blocks = sorted({number for decoder in fresh.values() for number in decoder.blocks})
    began = time.perf_counter()
    roles = {"train": data.train, "val": data.val, "test": data.test}
    folder: Path = args.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    files = {role: args.out / f"{role} {len(scenes)}.safetensors" for role, scenes in roles.items()}
    found = {role: cached(files[role], model, scenes, data, blocks) for role, scenes in roles.items()}
    print(f"features of {sum(map(len, roles.values()))} images: {time.perf_counter() - began:.0f} s", flush=True)

    def trained(arm: str, rate: float, seed: int) -> nn.Module:
        path = folder / f"{arm}, {rate:g}, {seed}.safetensors"
        decoder = new_decoder(arm, dim, depth, classes, seed)
        if path.exists():
            decoder.load_state_dict(load_file(path))
        else:
            began = time.perf_counter()
            clips, of_tracker = arm in ON_CLIPS, OF_TRACKER.get(arm, 1.0)
            train(decoder.train(), found["train"], rate, args.steps, args.batch, seed, clips, of_tracker)
            save_file(decoder.state_dict(), path)
            print(f"{path.stem}: {time.perf_counter() - began:.0f} s", flush=True)
        return decoder

    def scored(arm: str, rate: float, seed: int, role: str) -> dict[str, Any]:
        path = folder / f"{arm}, {rate:g}, {seed}, {role}.json"
        if not path.exists():
            counts, every = (ContourCounts(classes), args.every) if role == "test" else (SceneCounts(classes), 1)
            write_json(path, score(trained(arm, rate, seed), found[role], counts, every))
        values: dict[str, Any] = json.loads(read_text(path))
        return values

    first, *_ = range(args.seeds)
    rates = {arm: max(RATES, key=lambda rate, arm=arm: scored(arm, rate, first, "val")["miou"]) for arm in args.arms}
    cells: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):
        for arm in args.arms:
            cells[arm].append(scored(arm, rates[arm], seed, "test"))
    facts = {}
    for arm, rate in rates.items():
        decoder = trained(arm, rate, first).eval()
        number = weighed(decoder, found["val"]) if ARMS[arm][0] == "prompted" else None
        params = sum(p.numel() for p in decoder.parameters())
        facts[arm] = [f"{params:,}", f"{rate:g}", "" if number is None else f"{number:.2f}"]
    shown = {arm: cells[arm] for arm in (args.control, args.arms[-1])}
    return f"{table(cells, facts, args.control)}\n\n{by_class(shown, data.classes)}"


def main(argv: list[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as model.name, a dense ViT")
    parser.add_argument("--data", required=True, help="as data.path, with test")
    parser.add_argument("--out", type=Path, required=True, help="folder for cells and the table")
    parser.add_argument("--size", type=int, nargs=2, default=[252, 336], help="height and width that images get")
    parser.add_argument("--arms", nargs="+", default=[arm for arm in ARMS if arm not in ON_CLIPS], choices=ARMS)
    parser.add_argument("--control", default="linear4", choices=ARMS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="score every Nth test image")
    args = parser.parse_args(argv)
    try:
        found = study(args)
    except VimoeError as error:
        raise SystemExit(f"prompted: {error}") from None
    (args.out / "table.md").write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
