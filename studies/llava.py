"""MoE-Tuning (MoE-LLaVA, arXiv 2401.15947) end to end, small: a LLaVA that answers templated questions about images.

    python studies/llava.py prepare BIRDS VIT --out runs/llava      # once: features of the frozen ViT
    python studies/llava.py train --out runs/llava --seeds 3        # I, II, then III with experts, and dense

BIRDS is a folder with train/CLASS/ and test/CLASS/, named as in CUB-200-2011 ("Baltimore_Oriole"); VIT a timm folder of
DINOv2's ViT-S/14. The language model is a LLaMA of 4 blocks, trained here from random weights on the questions alone;
its words are those of the templates. Half of the questions are about birds: their name, their family (the last word of
the name), and whether they are of a given kind. The other half are about scenes of one to four handwritten digits of
scikit-learn in a 2 x 2 grid: their number, whether a given digit is there, and which digit is left of a given one.

Stage III is trained twice from the same stage II, for equal steps: with experts, and dense with the FFNs that they
replace. Killed, the same command goes on, to the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vimoe
from vimoe.study.paired import interval
from vimoe.training.moe_tuning import Stage, moe_tune, token_loads

SIDE, PATCHES = 84, 36  # pixels of an image, and patches of 14 pixels in it
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCENES = {"train": 2000, "test": 200}
BIRDS = {"train": 24, "test": 4}  # images of a class, at most
SPECIAL = PAD, END, IMAGE = "<pad>", "<end>", "<image>"
WORDS = (
    "what", "bird", "is", "this", "?", "kind", "of", "it", "a", "yes", "no", "how", "many", "digits", "are", "there",
    "which", "digit", "left", "the",
)  # fmt: skip
BATCH = 32
FIRST = (  # the language model on words alone, since no pretrained one is at hand; then I and II
    Stage(part="language_model", steps=60, lr=2e-3),
    Stage(part="projector", steps=30, lr=1e-3),
    Stage(part="language_model", steps=400, lr=2e-3),
)
ARMS = {
    "MoE-tuned": Stage(part="experts", steps=120, lr=1e-3),
    "dense, the same FFNs": Stage(part="every:2", steps=120, lr=1e-3),
}
MOE = vimoe.MoEConfig(layers="every:2", num_experts=4, top_k=2, num_shared_experts=0, routing="token")


def scene(rng: np.random.Generator, digits: np.ndarray, labels: np.ndarray) -> tuple[Image.Image, list[int]]:
    """Return a scene, and the digit in each cell of its grid, row by row; -1 where there is none."""
    cells, half = [-1] * 4, SIDE // 2
    canvas = Image.new("L", (SIDE, SIDE), int(rng.integers(0, 60)))
    for cell in rng.permutation(4)[: rng.integers(1, 5)]:
        at = int(rng.integers(len(digits)))
        cells[cell], side = int(labels[at]), int(rng.integers(28, half))
        ink = Image.fromarray((digits[at] / 16 * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        free = half - side
        corner = (half * (cell % 2) + int(rng.integers(free + 1)), half * (cell // 2) + int(rng.integers(free + 1)))
        canvas.paste(Image.new("L", ink.size, 255), corner, ink)
    return canvas.convert("RGB"), cells


def scenes(role: str) -> tuple[list[Image.Image], list[list[int]]]:
    """Return the scenes of a role, "train" or "test", which show different handwritten digits."""
    data, rng = load_digits(), np.random.default_rng(len(role))
    at = np.random.default_rng(0).permutation(1797)
    at = at[:1300] if role == "train" else at[1300:]
    made = [scene(rng, data.images[at], data.target[at]) for _ in range(SCENES[role])]
    return [image for image, _ in made], [cells for _, cells in made]


def converted(vit: nn.Module) -> nn.Module:
    """Return transformers' Dinov2Model with the weights of timm's DINOv2: a LLaVA holds models of transformers."""
    state, width = vit.state_dict(), vit.embed_dim
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "encoder.layer.": "blocks.",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        image_size=SIDE,
        patch_size=14,
        use_mask_token=False,
    )
    model = Dinov2Model(config).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        theirs = name
        for new, old in names.items():
            theirs = theirs.replace(new, old)
        for part, letter in enumerate("qkv"):
            if f"attention.{letter}_proj" in theirs:
                joined = state[theirs.replace(f"attention.{letter}_proj", "attn.qkv")]
                weights[name] = joined[part * width : (part + 1) * width]
        if name not in weights:
            weights[name] = state[theirs].reshape(tensor.shape)
    model.load_state_dict(weights)
    return model


def normalised(images: list[Image.Image]) -> Tensor:
    """Return images as the ViT takes them, (B, 3, SIDE, SIDE)."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(each)[:, None, None] for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (pixels - mean) / std


@torch.no_grad()
def prepare(birds: Path, vit: Path, out: Path) -> None:
    """Write the ViT as transformers has it, and for each role the features and what is known of each image."""
    out.mkdir(parents=True, exist_ok=True)
    dense = timm.create_model(f"local-dir:{vit}", pretrained=True, img_size=SIDE, num_classes=0).eval()
    model = converted(dense)
    probe = torch.randn(2, 3, SIDE, SIDE)
    found = model(probe).last_hidden_state
    torch.testing.assert_close(found, dense.forward_features(probe), rtol=1e-3, atol=1e-3)
    model.save_pretrained(out / "vit")
    for role in SCENES:
        images, cells = scenes(role)
        known: list[dict[str, Any]] = [{"cells": each} for each in cells]
        for folder in sorted((birds / role).iterdir()):
            for file in sorted(folder.iterdir())[: BIRDS[role]]:
                images.append(Image.open(file).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
                known.append({"bird": folder.name.lower().split("_")})
        features = []
        for start in range(0, len(images), 64):
            pixels = normalised(images[start : start + 64])
            with torch.autocast("cpu", torch.bfloat16):
                seen = model(pixels, output_hidden_states=True)
            features.append(seen.hidden_states[-2][:, 1:].half())
            print(f"{role}: {start + len(pixels)} of {len(images)}", flush=True)
        torch.save(torch.cat(features), out / f"{role}.pt")
        (out / f"{role}.json").write_text(json.dumps(known), encoding="utf-8")


# ---- questions


@dataclass(frozen=True)
class Question:
    """A question about an image: words of the question and of the answer, by kind."""

    kind: str
    question: str
    answer: str


def of_bird(bird: list[str], rng: np.random.Generator, others: list[list[str]]) -> list[Question]:
    """Return a question of each kind about a bird; half of the other kinds that are asked for are its relatives."""
    relatives = [other for other in others if other[-1] == bird[-1] and other != bird]
    strangers = [other for other in others if other != bird]
    pool = relatives if relatives and rng.random() < 0.5 else strangers
    right = rng.random() < 0.5
    asked = bird if right else pool[rng.integers(len(pool))]
    return [
        Question("bird: name", "what bird is this ?", " ".join(bird)),
        Question("bird: family", "what kind of bird is it ?", bird[-1]),
        Question("bird: is it", f"is it a {' '.join(asked)} ?", "yes" if right else "no"),
    ]


def of_scene(cells: list[int], rng: np.random.Generator) -> list[Question]:
    """Return a question of each kind about a scene, of those that have one answer."""
    there = [digit for digit in cells if digit >= 0]
    absent = [digit for digit in range(10) if digit not in there]
    right = rng.random() < 0.5
    asked = int(rng.choice(there if right else absent))
    found = [
        Question("scene: number", "how many digits are there ?", NUMBERS[len(there)]),
        Question("scene: is there", f"is there a {NUMBERS[asked]} ?", "yes" if right else "no"),
    ]
    pairs = [(cells[i], cells[i + 1]) for i in (0, 2) if min(cells[i], cells[i + 1]) >= 0]
    pairs = [pair for pair in pairs if there.count(pair[1]) == 1]
    if pairs:
        left, of = pairs[rng.integers(len(pairs))]
        found.append(Question("scene: left of", f"which digit is left of the {NUMBERS[of]} ?", NUMBERS[left]))
    return found


class Data:
    """Images of a role, as features of the frozen ViT, with questions about them."""

    def __init__(self, out: Path, role: str) -> None:
        self.features = torch.load(out / f"{role}.pt", weights_only=True)
        self.known = json.loads((out / f"{role}.json").read_text(encoding="utf-8"))
        self.names = sorted({tuple(each["bird"]) for each in self.known if "bird" in each})
        self.others = [list(name) for name in self.names]
        scenes = [i for i, each in enumerate(self.known) if "cells" in each]
        self.halves = scenes, [i for i, each in enumerate(self.known) if "bird" in each]
        words = [*SPECIAL, *sorted({*WORDS, *NUMBERS, *(word for name in self.names for word in name)})]
        self.words = {word: number for number, word in enumerate(words)}

    def questions(self, image: int, rng: np.random.Generator) -> list[Question]:
        """Return a question of each kind about an image."""
        known = self.known[image]
        return of_bird(known["bird"], rng, self.others) if "bird" in known else of_scene(known["cells"], rng)

    def inputs(self, images: list[int], asked: list[Question], seen: bool = True) -> dict[str, Tensor]:
        """Return arguments of the LLaVA's forward; the labels are the words of the answers and the end."""
        texts = [[self.words[word] for word in each.question.split()] for each in asked]
        answers = [[self.words[word] for word in (*each.answer.split(), END)] for each in asked]
        front = [self.words[IMAGE]] * (PATCHES if seen else 0)
        long = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True)) + len(front)
        ids = torch.full((len(asked), long), self.words[PAD])
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            whole = [*front, *text, *answer]
            ids[row, : len(whole)], mask[row, : len(whole)] = torch.tensor(whole), 1
            labels[row, len(whole) - len(answer) : len(whole)] = torch.tensor(answer)
        found = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {**found, "pixel_values": self.features[images].float()} if seen else found

    def batch(self, seed: int, stage: int, step: int) -> dict[str, Tensor]:
        """Return the batch of a step: half scenes, half birds, and one question about each; stage 0 has no images."""
        rng = np.random.default_rng((seed, stage, step))
        images = [int(i) for half in self.halves for i in rng.choice(half, BATCH // 2, replace=False)]
        asked = []
        for image in images:
            found = self.questions(image, rng)
            asked.append(found[rng.integers(len(found))])
        return self.inputs(images, asked, seen=stage > 0)

    def all_questions(self) -> Iterator[tuple[list[int], list[Question]]]:
        """Yield batches of all images, each with a question of each kind; the same on every call."""
        rng = np.random.default_rng(0)
        pairs = [(image, each) for image in range(len(self.known)) for each in self.questions(image, rng)]
        for start in range(0, len(pairs), 200):
            images, asked = zip(*pairs[start : start + 200], strict=True)
            yield list(images), list(asked)


# ---- the model


class Features(nn.Module):
    """The place of a frozen vision tower, for features that it gave before: they are its second last hidden state."""

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(B, P, D) features to the tower's output, with zeros for the class token, which a LLaVA leaves out."""
        hidden = F.pad(pixel_values, (0, 0, 1, 0))
        return BaseModelOutputWithPooling(hidden_states=(hidden, hidden))


def new_model(data: Data, out: Path, seed: int) -> LlavaForConditionalGeneration:
    """Return a LLaVA of the pretrained ViT, with a new projector and a new language model."""
    tower = Dinov2Model.from_pretrained(out / "vit")
    torch.manual_seed(seed)
    words = LlamaConfig(
        vocab_size=len(data.words), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=data.words[PAD], eos_token_id=data.words[END], bos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower.config, text_config=words, image_token_index=data.words[IMAGE], image_seq_length=PATCHES
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


@torch.no_grad()
def measured(model: nn.Module, data: Data) -> dict[str, Any]:
    """Return the share of right answers by kind, the loss in nats a word, and of a mixture the loads by kind of token.

    An answer is right if each of its words, and its end, is the most probable one after the right words before: so it
    is what greedy decoding gives.
    """
    right: dict[str, list[bool]] = {}
    losses, loads = [], {}
    for images, asked in data.all_questions():
        inputs = data.inputs(images, asked)
        labels = inputs.pop("labels")[:, 1:]
        with vimoe.record(model) as routings:
            logits = model(**inputs).logits[:, :-1]
        counted = labels != -100
        for question, good in zip(asked, ((logits.argmax(-1) == labels) | ~counted).all(1).tolist(), strict=True):
            right.setdefault(question.kind, []).append(good)
        losses.append(F.cross_entropy(logits[counted], labels[counted], reduction="none"))
        for layer, found in token_loads(
            routings, inputs["input_ids"], data.words[IMAGE], inputs["attention_mask"]
        ).items():
            for kind, load in found.items():
                held = loads.setdefault(layer, {})
                held[kind] = held.get(kind, 0) + load
    return {
        "accuracy": {kind: float(np.mean(each)) for kind, each in right.items()},
        "loss": float(torch.cat(losses).mean()),
        "loads": {layer: {k: (v / v.sum()).tolist() for k, v in each.items()} for layer, each in loads.items()},
    }


def run(out: Path, seed: int, times: int = 1) -> dict[str, Any]:
    """Train all stages with one seed, and return what `measured` does of stage II and of each arm of stage III.

    Args:
        out: folder that `prepare` wrote.
        seed: seed of new weights, batches and routers.
        times: number that the steps of all stages are multiplied by.
    """
    train, test = Data(out, "train"), Data(out, "test")
    assert train.words == test.words
    model = new_model(train, out, seed)
    tower, model.model.vision_tower = model.model.vision_tower, Features()
    first = [replace(stage, steps=times * stage.steps) for stage in FIRST]
    moe_tune(model, first, lambda stage, step: train.batch(seed, stage, step), out / f"{seed}-first", seed=seed)
    found = {"stage II": measured(model, test)}
    for arm, short in ARMS.items():
        stage = replace(short, steps=times * short.steps)
        tuned, folder = copy.deepcopy(model), out / f"{seed}-{arm.replace(', ', '-').replace(' ', '-')}"
        moe_tune(tuned, [stage], lambda _, step: train.batch(seed, len(FIRST), step), folder, MOE, seed=seed)
        found[arm] = measured(tuned, test)
        print(f"seed {seed}, {arm}: {found[arm]['loss']:.4f} {found[arm]['accuracy']}", flush=True)
        tuned.model.vision_tower = copy.deepcopy(tower)
        vimoe.save(tuned, folder / "model", overwrite=True)
    return found


@torch.no_grad()
def ask(out: Path, model: Path, image: Path, question: str) -> str:
    """Return the answer of a tuned model, from pixels, by transformers' own `generate`."""
    words, llava = Data(out, "test").words, vimoe.load(model)
    pixels = normalised([Image.open(image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)])
    ids = torch.tensor([[words[IMAGE]] * PATCHES + [words[word] for word in question.split()]])
    made = llava.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=8, do_sample=False
    )
    names = {number: word for word, number in words.items()}
    return " ".join(names[int(number)] for number in made[0, ids.shape[1] :] if int(number) != words[END])


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the scores of stage III as Markdown: means over seeds, and paired differences with 95% intervals.

    Args:
        results: what `run` returns, by seed.
    """
    tuned, dense = ARMS
    rows = ["| | " + f"{tuned} | {dense} | difference |", "|---|---|---|---|"]
    kinds = list(next(iter(results.values()))[tuned]["accuracy"])
    for kind in (*kinds, None):
        of = [
            [found[arm]["loss"] if kind is None else 100 * found[arm]["accuracy"][kind] for found in results.values()]
            for arm in (tuned, dense)
        ]
        change = interval([a - b for a, b in zip(*of, strict=True)])
        form = ".4f" if kind is None else ".1f"
        means = [f"{sum(values) / len(values):{form}}" for values in of]
        ends = f"{change.value:+{form}} [{change.low:+{form}}, {change.high:+{form}}]"
        rows.append(f"| {kind or 'loss, nats a word'}{', %' * (kind is not None)} | {' | '.join(means)} | {ends} |")
    return "\n".join(rows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, places in {"prepare": ("birds", "vit"), "train": (), "ask": ("model", "image", "question")}.items():
        sub = verbs.add_parser(verb)
        for place in places:
            sub.add_argument(place, type=str if place == "question" else Path)
        sub.add_argument("--out", type=Path, required=True)
        if verb == "train":
            sub.add_argument("--seeds", type=int, default=3)
            sub.add_argument("--times", type=int, default=1, help="number that all steps are multiplied by")
    args = parser.parse_args()
    if args.verb == "prepare":
        prepare(args.birds, args.vit, args.out)
    elif args.verb == "ask":
        print(ask(args.out, args.model, args.image, args.question))
    else:
        results = {str(seed): run(args.out, seed, args.times) for seed in range(args.seeds)}
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table(results))


if __name__ == "__main__":
    main()
