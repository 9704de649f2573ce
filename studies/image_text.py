"""Experts by kind of token in image-text models: which part to scale, text, vision or both, by equal steps and seeds.

    python studies/image_text.py --model local-dir:dinov2 --data cub100 --out runs/image_text

VL-MoE's ablation (arXiv 2303.07226) in form, small: images of birds with captions of their classes ("a photo of a barn
swallow"), on features of a pretrained ViT that are computed once. There are two models, and four arms of either.

"towers" is a CLIP, trained with its loss on batches of different classes. Its image tower is the ViT, of which the last
FFN is trained, whose class token alone is read: that is frozen until then, and computed once. Its text tower is one of
transformers with two blocks that begins with random weights. MoE layers are these FFNs.

"fused" is a multiway encoder of three blocks with random weights: attention over a caption's words and five tokens of
the image, and V-FFN and T-FFN in the first two blocks. The arms make them V-experts and T-experts by `moe.groups`; the
last block has one FFN for both, as in VL-MoE. It scores pairs, and learns to tell the caption from three others.

Some classes are held out of training. Figures are the share of test images whose best caption is right: `seen` among
the captions of the trained classes, `unseen` among those of the others (chance is 1 / classes). Differences to "none"
are paired by seed: classes, batches and first weights are those of the seed. Every cell is a file, and those that are
there are not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import vimoe
from vimoe.files import write_json
from vimoe.study.paired import interval

ARMS = ("none", "text", "vision", "both")
TEMPLATES = ("a photo of a {}", "a bird called {}", "this is a {}", "a close photo of one {}", "the {} , a bird")
WIDTH, EXPERTS, BALANCE = 64, 4, 0.01
PAD, END = 0, 1


class Captions:
    """Captions as numbers of words, the vocabulary of which is that of the class names and templates."""

    def __init__(self, classes: list[str]) -> None:
        self.names = [name.replace("_", " ").lower() for name in classes]
        words = sorted({word for text in (*self.names, *TEMPLATES) for word in text.split()} - {"{}"})
        self.number = {word: index for index, word in enumerate(words, start=2)}
        longest = max(len(self(name, text)) for name in range(len(classes)) for text in range(len(TEMPLATES)))
        self.length, self.words = longest, len(words) + 2

    def __call__(self, name: int, template: int) -> list[int]:
        words = TEMPLATES[template].format(self.names[name]).split()
        return [*(self.number[word] for word in words), END]

    def of(self, classes: list[int], templates: list[int]) -> Tensor:
        """Return (M, L) the captions, each with its class and template, filled up with PAD."""
        rows = [self(*each) for each in zip(classes, templates, strict=True)]
        return torch.tensor([row + [PAD] * (self.length - len(row)) for row in rows])


class Towers(nn.Module):
    """A CLIP on the class token that the last FFN of a ViT gets."""

    def __init__(self, vit: nn.Module, captions: Captions, arm: str) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=captions.words, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=captions.length, projection_dim=WIDTH,
            pad_token_id=PAD, bos_token_id=PAD, eos_token_id=END,
        )  # fmt: skip
        self.text = CLIPTextModelWithProjection(config)
        self.project = nn.Linear(vit.num_features, WIDTH, bias=False)
        nn.init.normal_(self.project.weight, std=vit.num_features**-0.5)
        self.scale = nn.Parameter(torch.tensor(14.0).log())
        moe = {"num_experts": EXPERTS, "routing": "token", "gate": "choice"}
        if arm in ("vision", "both"):
            vimoe.upcycle(vit, vimoe.MoEConfig(layers="last:1", **moe))
        if arm in ("text", "both"):
            vimoe.upcycle(self.text.text_model, vimoe.MoEConfig(layers="all", **moe))
        last = vit.blocks[-1]
        self.image, self.norm = nn.Sequential(last.norm2, last.mlp, last.ls2), vit.norm

    def of_images(self, features: Tensor) -> Tensor:
        return F.normalize(self.project(self.norm(features + self.image(features))[:, 0]), dim=1)

    def of_captions(self, words: Tensor) -> Tensor:
        return F.normalize(self.text(input_ids=words, attention_mask=(words != PAD).long()).text_embeds, dim=1)

    def scores(self, features: Tensor, words: Tensor) -> Tensor:
        """Return (B, M) the score of each image with each caption."""
        return self.scale.exp() * self.of_images(features) @ self.of_captions(words).T

    def loss(self, features: Tensor, words: Tensor) -> Tensor:
        """Return CLIP's loss: the mean of both ways to tell pairs."""
        scores, own = self.scores(features, words), torch.arange(len(words))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


class Fused(nn.Module):
    """A multiway encoder of words (kind 0) and image tokens (kind 1), which scores pairs."""

    def __init__(self, features: int, captions: Captions, arm: str) -> None:
        super().__init__()
        self.words = nn.Embedding(captions.words, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(captions.length + 5, WIDTH))
        self.project = nn.Linear(features, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, 4, qkv_bias=True) for _ in range(3)))
        self.norm, self.score = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)
        groups = [EXPERTS if arm in (kind, "both") else 1 for kind in ("text", "vision")]
        config = vimoe.MoEConfig(
            layers=["blocks.0.mlp", "blocks.1.mlp"], num_experts=sum(groups), groups=groups, routing="token",
            num_shared_experts=0, combine="sum", gate="choice",
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that routers of a pool with one expert have nothing to learn
            vimoe.upcycle(self, config)
        self.kinds = torch.arange(captions.length + 5) >= captions.length

    def scores(self, features: Tensor, words: Tensor) -> Tensor:
        """Return (B, M) the score of each image with captions (M, L) of all, or (B, M, L) of its own."""
        words = words.expand(len(features), *words.shape[-2:])
        many = words.shape[1]
        text = self.words(words.flatten(0, 1))
        image = self.project(features).repeat_interleave(many, dim=0)
        with vimoe.token_kinds(self, self.kinds.long()):
            tokens = self.blocks(torch.cat([text, image], dim=1) + self.places)
        return self.score(self.norm(tokens[:, text.shape[1]])).view(-1, many)  # of the image's class token

    def loss(self, features: Tensor, words: Tensor) -> Tensor:
        """Return the cross-entropy of each caption among three others of the batch."""
        rows = torch.arange(len(words))
        others = torch.stack([rows.roll(shift) for shift in range(4)], dim=1)
        return F.cross_entropy(self.scores(features, words[others]), torch.zeros_like(rows))


@torch.no_grad()
def features_of(name: str, data: Path, size: int, file: Path) -> dict[str, Tensor]:
    """Return, and keep in a file, features and classes of both splits.

    "towers" is the class token that the last FFN gets, before its norm; "fused" the class token and means of 2 x 2
    parts of the image after the last block.
    """
    if file.exists():
        return torch.load(file, weights_only=True)
    vit = timm.create_model(name, pretrained=True, img_size=size, num_classes=0).eval()
    transform = create_transform(**{**resolve_data_config(model=vit), "input_size": (3, size, size), "crop_pct": 1.0})
    found: dict[str, Tensor] = {}
    for split in ("train", "test"):
        images, parts, labels = ImageFolder(data / split, transform), ([], []), []
        for batch, classes in torch.utils.data.DataLoader(images, 64):
            with torch.autocast("cpu", torch.bfloat16):
                x = vit._pos_embed(vit.patch_embed(batch))
                for block in vit.blocks[:-1]:
                    x = block(x)
                last = vit.blocks[-1]
                x = x + last.ls1(last.attn(last.norm1(x)))
                y = vit.norm(x + last.ls2(last.mlp(last.norm2(x))))
            side = size // 14
            patches = y[:, 1:].float().mT.unflatten(2, (side, side))
            pooled = torch.cat([y[:, :1].float(), F.adaptive_avg_pool2d(patches, 2).flatten(2).mT], dim=1)
            for kept, part in zip(parts, (x[:, :1], pooled), strict=True):
                kept.append(part.float())
            labels.append(classes)
        both = (torch.cat(part) for part in parts)
        found |= {f"{split}_{model}": part for model, part in zip(("towers", "fused"), both, strict=True)}
        found[f"{split}_labels"] = torch.cat(labels)
    torch.save(found, file)
    return found


def batches(labels: Tensor, classes: list[int], size: int, draw: torch.Generator) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield images and classes of batches, in which every class is there once at most."""
    places = {c: (labels == c).nonzero()[:, 0] for c in classes}
    while True:
        chosen = [classes[i] for i in torch.randperm(len(classes), generator=draw)[:size].tolist()]
        images = [places[c][torch.randint(len(places[c]), (), generator=draw)] for c in chosen]
        yield torch.stack(images), chosen


@torch.no_grad()
def accuracy(model: Towers | Fused, x: Tensor, labels: Tensor, classes: list[int], captions: Captions, n: int) -> float:
    """Return the share of images of some classes, n of each, whose own caption scores highest among theirs."""
    words = captions.of(classes, [0] * len(classes))
    images = torch.cat([(labels == c).nonzero()[:n, 0] for c in classes])
    right = 0
    for part in images.split(16 if isinstance(model, Fused) else 128):
        best = model.scores(x[part], words).argmax(dim=1)
        right += int((torch.tensor(classes)[best] == labels[part]).sum())
    return right / len(images)


def cell(args: argparse.Namespace, data: dict[str, Tensor], names: list[str], kind: str, arm: str, seed: int) -> dict:
    """Train a model, and return its figures."""
    torch.manual_seed(seed)
    captions, draw = Captions(names), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=draw).tolist()
    seen, unseen = sorted(order[: -args.unseen]), sorted(order[-args.unseen :])
    train, test = data[f"train_{kind}"], data[f"test_{kind}"]
    if kind == "towers":
        vit = timm.create_model(args.model, pretrained=True, img_size=args.img_size, num_classes=0)
        torch.manual_seed(seed)
        model: Towers | Fused = Towers(vit, captions, arm)
    else:
        model = Fused(train.shape[2], captions, arm)
    torch.manual_seed(seed)  # so that dropout and routers have no part in what follows
    pretrained = [p for name, p in model.named_parameters() if kind == "towers" and name.startswith(("image", "norm"))]
    others = [p for p in model.parameters() if all(p is not q for q in pretrained)]
    groups = [{"params": pretrained, "lr": args.lr / 20}, {"params": others, "lr": args.lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.05)
    steps = args.steps if kind == "towers" else 2 * args.steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], steps)
    size, start, losses = args.batch if kind == "towers" else args.batch // 2, time.perf_counter(), list[float]()
    for images, chosen in itertools.islice(batches(data["train_labels"], seen, size, draw), steps):
        templates = torch.randint(len(TEMPLATES), (size,), generator=draw).tolist()
        with vimoe.record(model) as routings:
            loss = model.loss(train[images], captions.of(chosen, templates))
        losses.append(loss.item())
        loss = loss + (BALANCE * vimoe.balance_loss(routings) if routings else 0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    figures = {
        name: accuracy(model, test, data["test_labels"], classes, captions, args.images)
        for name, classes in (("seen", seen), ("unseen", unseen))
    }
    loads = {each.layer: each.load.tolist() for each in routings}
    return {
        "model": kind, "arm": arm, "seed": seed, **figures, "loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": time.perf_counter() - start, "parameters": sum(p.numel() for p in model.parameters()), "load": loads,
    }  # fmt: skip


def main() -> None:
    """Train the cells that are missing, and print a table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="timm's name of a ViT with patches of 14 pixels")
    parser.add_argument("--data", required=True, type=Path, help="folder with train/ and test/ of class folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for features and cells")
    parser.add_argument("--kinds", nargs="+", default=["towers", "fused"], choices=["towers", "fused"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=300, help="of towers; fused models take twice as many")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="that of pretrained blocks is a twentieth of it")
    parser.add_argument("--img_size", type=int, default=84)
    parser.add_argument("--unseen", type=int, default=20, help="number of classes that are held out")
    parser.add_argument("--images", type=int, default=10, help="test images of a class, at most")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = ImageFolder(args.data / "train").classes
    data = features_of(args.model, args.data, args.img_size, args.out / f"features_{args.img_size}.pt")
    found: dict[tuple[str, str], list[dict]] = {}
    for seed, kind, arm in itertools.product(range(args.seeds), args.kinds, args.arms):
        file = args.out / f"{kind}_{arm}_{seed}.json"
        if not file.exists():
            write_json(file, cell(args, data, names, kind, arm, seed))
            print(file.read_text(encoding="utf-8").split('"load"')[0], flush=True)
        found.setdefault((kind, arm), []).append(json.loads(file.read_text(encoding="utf-8")))
    print("| model | scaled | parameters | seen, % | to none | unseen, % | to none |\n|---|---|---|---|---|---|---|")
    for (kind, arm), cells in found.items():
        row = [kind, arm, f"{cells[0]['parameters'] / 1e6:.2f} M"]
        for name in ("seen", "unseen"):
            values = [100 * each[name] for each in cells]
            row.append(f"{sum(values) / len(values):.1f}")
            change = interval([v - 100 * none[name] for v, none in zip(values, found[kind, "none"], strict=True)])
            row.append("–" if arm == "none" else f"{change.value:+.1f} ({change.low:+.1f} to {change.high:+.1f})")
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
