"""Masked autoencoding (He et al., arXiv 2111.06377) on a folder of images: a backbone if none can be downloaded.

    python studies/pretrain_mae.py photos/ --out runs/mae --name vit_tiny_patch16_224 --img_size 224 --epochs 400

The autoencoder is transformers' ViTMAE in the shape of the timm model; OUT/model is that timm model with the trained
encoder, for `--model.name local-dir:OUT/model`. OUT/metrics.csv has a row an epoch. Killed, the same command goes on
from the last whole epoch in OUT/checkpoints, to the same weights on the same machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import vimoe
from vimoe.config.train import Precision, TrainConfig
from vimoe.data.image_files import list_images
from vimoe.data.loaders import decoded_for_training, preprocessing, train_loader
from vimoe.data.order import Shuffled, mix, seed_everything
from vimoe.files import write_json
from vimoe.models.precision import resolve
from vimoe.process import Process
from vimoe.run_folder import versions
from vimoe.training import checkpoint


@dataclass(frozen=True)
class Settings:
    """Settings of a pretraining; batch_size, lr and betas as in the paper, for a small batch."""

    images: str
    name: str = "vit_tiny_patch16_224"
    img_size: int = 224
    args: dict[str, Any] = field(default_factory=dict)
    epochs: int = 400
    warmup_epochs: int = 20
    batch_size: int = 64
    lr: float = 1.5e-3  # the paper's 1.5e-4 is for a batch of 256 and long training
    weight_decay: float = 0.05
    mask_ratio: float = 0.75
    min_crop: float = 0.2
    decoder_dim: int = 128
    decoder_depth: int = 2
    seed: int = 0


def autoencoder(vit: nn.Module, settings: Settings) -> ViTMAEForPreTraining:
    """Return transformers' masked autoencoder with an encoder of the shape of a plain timm ViT."""
    block: Any = vit.blocks[0]
    heads = max(1, settings.decoder_dim // 32)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=vit.embed_dim,
            num_hidden_layers=len(vit.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            layer_norm_eps=vit.norm.eps,
            image_size=settings.img_size,
            patch_size=vit.patch_embed.patch_size[0],
            decoder_hidden_size=settings.decoder_dim,
            decoder_num_hidden_layers=settings.decoder_depth,
            decoder_num_attention_heads=heads,
            decoder_intermediate_size=4 * settings.decoder_dim,
            mask_ratio=settings.mask_ratio,
            norm_pix_loss=True,
        )
    )
    _place(model)
    return model


def _place(model: ViTMAEForPreTraining) -> None:
    """Give encoder and decoder their fixed position embeddings.

    Of a new model transformers 5.23 leaves them 0 (its `post_init` passes over the encoder's, as the projection beside
    them is initialised already, and clears the decoder's), and a ViT that knows no positions learns nothing from masks.
    """
    embeddings = model.vit.embeddings
    embeddings.patch_embeddings.projection._is_hf_initialized = False
    embeddings.initialize_weights()
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    for fixed in (embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert fixed.std() > 0.1, "position embeddings are not set"


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's weights of a ViTMAE by timm's names, with queries, keys and values in one matrix."""
    renamed = {}
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layers": "blocks",
        "attention.o_proj": "attn.proj",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "layernorm": "norm",
    }
    for name, value in state.items():
        if not name.startswith("vit.") or any(f".{part}_proj." in name for part in "kv"):
            continue
        if ".q_proj." in name:
            value = torch.cat([state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("attention.q_proj", "attn.qkv")
        name = name.removeprefix("vit.")
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def pretrain(settings: Settings, out: Path, precision: Precision) -> dict[str, Any]:
    """Train, write OUT/model, and return the cost."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", asdict(settings))
    seed_everything(settings.seed)
    vit = timm.create_model(settings.name, pretrained=False, img_size=settings.img_size, num_classes=0, **settings.args)
    model = autoencoder(vit, settings)
    device = Process().device
    model.to(device)
    files = list_images([settings.images])
    config = resolve(
        TrainConfig(
            batch_size=settings.batch_size, min_crop=settings.min_crop, seed=settings.seed, precision=precision
        ),
        vit,
    )  # fmt: skip
    prepared = preprocessing(vit)
    samples = decoded_for_training([(file, 0) for file in files], prepared, config, "memory")
    loader = train_loader(samples, prepared, config, 0)
    order = loader.sampler
    assert isinstance(order, Shuffled)
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and (p.ndim > 1) == decayed], "weight_decay": wd}
        for decayed, wd in ((True, settings.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    schedule = CosineLRScheduler(
        optimizer, settings.epochs + 1, warmup_t=settings.warmup_epochs, warmup_prefix=False, warmup_lr_init=0.0
    )
    state = {"epoch": 0, "seconds": 0.0, "rows": []} | (checkpoint.read(out) or {})
    if state["epoch"]:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(state["epoch"] + 1, settings.epochs + 1):
        start = time.perf_counter()
        order.start(epoch)
        schedule.step(epoch)
        losses = []
        for step, (images, _) in enumerate(loader):
            seed_everything(mix(settings.seed, epoch, step))
            images = images.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(images).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        state["seconds"] += time.perf_counter() - start
        state["rows"].append({"epoch": epoch, "loss": float(torch.stack(losses).mean()), "seconds": state["seconds"]})
        if not math.isfinite(state["rows"][-1]["loss"]):
            raise SystemExit(f"the loss is {state['rows'][-1]['loss']} in epoch {epoch}: lower lr")
        if epoch % 10 == 0 or epoch == settings.epochs:
            state |= {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.write(out, state)
            with (out / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, state["rows"][0])
                writer.writeheader()
                writer.writerows(state["rows"])
            print(
                f"epoch {epoch} of {settings.epochs}: {state['rows'][-1]['loss']:.4f}, {state['seconds']:.0f} s",
                flush=True,
            )
    vit.load_state_dict(encoder_weights({name: value.cpu() for name, value in model.state_dict().items()}))
    vimoe.save(vit, out / "model", overwrite=True)
    cost = {
        "seconds": state["seconds"],
        "loss": state["rows"][-1]["loss"],
        "images": len(files),
        "versions": versions(),
    }
    write_json(out / "summary.json", {**asdict(settings), **cost, "precision": config.precision, "device": device.type})
    return cost


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="folder of images, searched through")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--precision", choices=["auto", "no", "bf16"], default="auto")
    for name, value in asdict(Settings(images="")).items():
        if name != "images":
            parser.add_argument(f"--{name}", type=json.loads if name == "args" else type(value), default=value)
    args = vars(parser.parse_args())
    out, precision = args.pop("out"), args.pop("precision")
    print(json.dumps(pretrain(Settings(**args), out, precision)))


if __name__ == "__main__":
    main()
