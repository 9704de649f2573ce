r"""Routers that an oracle teaches against learnt and random ones, and scores of trust, over seeds.

    python studies/oracle_and_trust.py --model local-dir:dinov2 --data cub100 --img_size 112 --seeds 0 1 2 3 4 5 6 \
        --other streets=ccp59/images/test --other roads=camvid/images/test --out results.json

The trunk before the last block is frozen and runs once, on images as they are evaluated, so there is no augmentation.
Seeds are of the router, the classifier, the order of images and the networks of familiarity. Digits of scikit-learn and
uniform noise are other images beside those that are named. Arms:

    learnt    the router learns by the task loss
    random    rows that are never trained
    oracle    `train.oracle_loss` 1; half of the images teach, until the router is frozen at half of the epochs
    lessons   the same without freezing: half of the images train experts to the end
    half      its control: a learnt router, the same half of the images, and lessons of no weight
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import vimoe
from vimoe.analysis.trust import Seen, auroc, fit_trust, see
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.config.settings import Settings
from vimoe.config.train import TrainConfig
from vimoe.data.image_files import list_images
from vimoe.data.loaders import preprocessing
from vimoe.data.order import Shuffled
from vimoe.files import write_json
from vimoe.metrics.base import evaluate
from vimoe.metrics.calibration import calibration_gaps
from vimoe.models.upcycling import convert, sites
from vimoe.moe.layer import moe_layers
from vimoe.study.paired import interval
from vimoe.tasks.base import task_class
from vimoe.tasks.cached_features import Entries, entries_of
from vimoe.tasks.classification_job import fingerprint
from vimoe.training.job import Job
from vimoe.training.loop import train
from vimoe.training.oracle import Oracle

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of moe and train
    "learnt": ({}, {}),
    "random": ({"router": "random"}, {}),
    "oracle": ({}, {"oracle_loss": 1.0, "router_freeze_epochs": "half"}),
    "lessons": ({}, {"oracle_loss": 1.0}),
    "half": ({}, {"oracle_loss": 1e-9}),  # the images that teach train nothing else, and now nothing at all
}
CONTROLS = {"random": "learnt", "oracle": "learnt", "lessons": "half", "half": "learnt"}
STRANGE = 300  # digits and noise images


class Kept(Dataset):
    """Pairs (features, label) of the training images by the keys of `Shuffled`."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(self.entries.features[key[0]])), self.entries.labels[key[0]]


class Study:
    """Data, and features of all images before the last block."""

    def __init__(self, settings: Settings, others: Mapping[str, Sequence[Any]]) -> None:
        self.settings, self.kind = settings, task_class(settings)
        self.data = self.kind.find(settings.data)
        model = self.dense()
        changed = [site.name for site in settings.moe.selection.select(sites(model))]
        prepared, batch = preprocessing(model, settings.data), settings.train.batch_size
        images = {role: getattr(self.data, role) for role in ("train", "val", "test")}
        images |= {name: tuple((each, 0) for each in found) for name, found in others.items()}
        self.others = tuple(others)
        self.entries = {
            name: entries_of(model, changed, samples, prepared, batch, 0) for name, samples in images.items()
        }

    def dense(self) -> nn.Module:
        """Return the dense model with a fresh classifier."""
        model: nn.Module = self.kind.dense_model(self.settings.model, self.data)
        return model

    def trained(self, arm: str, seed: int) -> nn.Module:
        """Return the model of an arm with the best epoch's weights."""
        moe, changes = ARMS[arm]
        config = replace(self.settings.train, seed=seed)
        config = replace(config, **{k: config.epochs // 2 if v == "half" else v for k, v in changes.items()})
        set_seed(seed)
        model = self.dense()
        layers = convert(model, replace(self.settings.moe, **moe))
        entries = self.entries["train"]
        loader = DataLoader(
            Kept(entries), config.batch_size, sampler=Shuffled(len(entries.labels), seed), drop_last=True
        )
        job = Job(
            loader,
            [str(number) for number in range(len(entries.labels))],
            fingerprint(self.data),
            prepare=lambda features, labels: (features.float(), labels),
            loss=lambda logits, labels: F.cross_entropy(logits.float(), labels, label_smoothing=0.1),
            evaluate=lambda each: evaluate(each, self.entries["val"]),
            forward=entries.cut.rest,
        )
        with tempfile.TemporaryDirectory() as out:
            train(model, job, config, Path(out), layers)
        return model

    def regret(self, model: nn.Module, images: int) -> dict[str, float]:
        """Return mean losses on test beyond those of the best expert of each image: of the router, and of chance."""
        (name,) = moe_layers(model)
        oracle, router, random = Oracle(model, self.entries["test"].cut.rest, 1.0), [], []
        for entry, labels in self.entries["test"]:
            if images <= 0:
                break
            features = entry.inputs.float()
            _, losses = oracle.tried(name, features, labels)
            with torch.no_grad(), vimoe.record(model.eval()) as routings:
                entry.cut.rest(model, features)
            best = losses.amin(dim=1)
            router.append(losses.gather(1, routings[0].experts)[:, 0] - best)
            random.append(losses.mean(dim=1) - best)
            images -= len(labels)
        return {"regret": float(torch.cat(router).mean()), "regret_of_chance": float(torch.cat(random).mean())}

    def trust(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Return the AUROC of test images against each kind of other images, and of right against wrong classes."""
        seen = {name: see(model, entries) for name, entries in self.entries.items()}
        fitted, facts = fit_trust(seen["train"].features, seen["val"], seed)
        base = F.normalize(seen["train"].features)

        @torch.no_grad()
        def scores(each: Seen) -> dict[str, Tensor]:
            return {
                "familiarity": -fitted.familiarity.error(each.features),
                "max_probability": each.logits.softmax(dim=1).amax(dim=1),
                "energy": each.logits.logsumexp(dim=1),
                "nearest": (F.normalize(each.features) @ base.T).amax(dim=1),
            }

        test, strange = scores(seen["test"]), {}
        for name in self.others:
            other = scores(seen[name])
            right = np.repeat([True, False], [len(test["energy"]), len(other["energy"])])
            strange[name] = {key: auroc(torch.cat([test[key], other[key]]).numpy(), right) for key in test}
        right = seen["test"].right
        found = {"max_probability": test["max_probability"]}
        if fitted.correctness is not None:
            with torch.no_grad():
                found["correct"] = fitted.correctness(seen["test"].logits, seen["test"].features)
        judged = {
            name: {
                "auroc": auroc(score.numpy(), right.numpy()),
                "ece": float(calibration_gaps(score, right).abs().sum()) / len(right),
            }
            for name, score in found.items()
        }
        return {"strange": strange, "right": judged, "validation": facts}


def other_images(named: Sequence[str]) -> dict[str, list[Any]]:
    """Return images that the model knows nothing of: those of NAME=FOLDER, digits and noise."""
    random = np.random.default_rng(0)
    digits = [Image.fromarray((each * 15.9).astype(np.uint8)).convert("RGB") for each in load_digits().images[:STRANGE]]
    noise = [Image.fromarray(random.integers(256, size=(112, 112, 3), dtype=np.uint8)) for _ in range(STRANGE)]
    folders = dict(each.split("=", 1) for each in named)
    return {**{name: list(list_images([path])) for name, path in folders.items()}, "digits": digits, "noise": noise}


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Return the tables of the study as Markdown: means over seeds, and 95% Student intervals of paired differences."""
    arms = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for arm in ARMS}
    arms = {arm: found for arm, found in arms.items() if found}
    lines = ["| router | control | top-1, % | beyond it | loss | regret, nats | beyond it |", "|---" * 7 + "|"]
    for arm, found in arms.items():
        top1, loss, regret = (np.mean([r[key] for r in found.values()]) for key in ("top1", "loss", "regret"))
        control, beyond = CONTROLS.get(arm, ""), {"top1": "", "regret": ""}
        pairs = [(r, arms[control][seed]) for seed, r in found.items() if seed in arms.get(control, ())]
        for key, digits, scale in (("top1", 2, 100), ("regret", 3, 1)) if pairs else ():
            gap = interval([scale * (one[key] - other[key]) for one, other in pairs])
            beyond[key] = f"{gap.value:+.{digits}f} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]"
        row = (arm, control, f"{100 * top1:.2f}", beyond["top1"], f"{loss:.3f}", f"{regret:.3f}", beyond["regret"])
        lines.append(f"| {' | '.join(row)} |")
    trusts = [r["trust"] for r in results if "trust" in r]
    if trusts:
        keys = list(next(iter(trusts[0]["strange"].values())))
        lines += ["", f"| test against | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
        for name in trusts[0]["strange"]:
            cells = [_spread([each["strange"][name][key] for each in trusts]) for key in keys]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += ["", "| right against wrong, on test | AUROC | calibration error |", "|---|---|---|"]
        for name in trusts[0]["right"]:
            auc, ece = (_spread([each["right"][name][key] for each in trusts]) for key in ("auroc", "ece"))
            lines.append(f"| {name} | {auc} | {ece} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main(argv: list[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as model.name")
    parser.add_argument("--data", required=True, help="as data.path")
    parser.add_argument("--img_size", type=int)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=TrainConfig.oracle_temperature)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(7)))
    parser.add_argument("--regret_images", type=int, default=1000, help="test images that go to all experts")
    parser.add_argument("--other", action="append", default=[], help="NAME=FOLDER of images of another kind")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results, which grows")
    args = parser.parse_args(argv)
    settings = Settings(
        model=ModelConfig(name=args.model, img_size=args.img_size),
        moe=MoEConfig(layers="last:1", num_experts=args.experts, gate="choice"),
        data=DataConfig(path=args.data, val_fraction=0.2, cache="features", workers=0),
        train=TrainConfig(
            epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, train_only="last:1", precision=args.precision,
            tensorboard=False,
        ),
    )  # fmt: skip
    study, results = Study(settings, other_images(args.other)), []
    for seed in args.seeds:
        for arm in args.arms:
            ARMS[arm][1].update({"oracle_temperature": args.temperature} if "oracle_loss" in ARMS[arm][1] else {})
            model = study.trained(arm, seed)
            score = evaluate(model, study.entries["test"]).to_dict()
            result = {"arm": arm, "seed": seed, **score, **study.regret(model, args.regret_images)}
            if arm == "learnt":
                result["trust"] = study.trust(model, seed)
            results.append(result)
            print({key: value for key, value in result.items() if key != "trust"}, flush=True)
            write_json(args.out, results)
    print(tables(results))


if __name__ == "__main__":
    main()
