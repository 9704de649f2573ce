"""The pretraining script trains, goes on, and leaves an encoder that timm computes as transformers did."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from helpers.pictures import folder

pytest.importorskip("transformers")
import pretrain_mae as mae  # noqa: E402

SHAPE = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY = {"img_size": 16, "args": SHAPE, "warmup_epochs": 1, "batch_size": 8, "decoder_dim": 32, "decoder_depth": 1}


def test_timm_computes_what_the_trained_encoder_did() -> None:
    settings = mae.Settings(images="", **{**TINY, "mask_ratio": 0.0})
    vit = timm.create_model(settings.name, img_size=16, num_classes=0, **SHAPE).eval()
    model = mae.autoencoder(vit, settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        vit.load_state_dict(mae.encoder_weights(model.state_dict()))  # strict: nothing is missing, nothing left over
        images = torch.randn(3, 3, 16, 16)
        noise = torch.arange(4).expand(3, 4).float()  # with no patch masked, it would only put them in another order
        expected = model.vit(images, noise=noise).last_hidden_state
        assert torch.allclose(vit.forward_features(images), expected, atol=1e-5)


def test_a_new_autoencoder_knows_positions() -> None:
    """transformers 5.23 leaves them 0, with which masks teach nothing."""
    settings = mae.Settings(images="", **TINY)
    model = mae.autoencoder(timm.create_model(settings.name, img_size=16, num_classes=0, **SHAPE), settings)
    for fixed in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        patches = fixed[0, 1:]
        assert (torch.cdist(patches, patches) + torch.eye(len(patches))).min() > 0.5  # no two alike


def test_it_learns_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    images = folder(tmp_path / "photos", 8)
    whole = mae.Settings(images=str(images), epochs=30, **TINY)
    mae.pretrain(whole, tmp_path / "whole", "no")
    rows = [line.split(",") for line in (tmp_path / "whole/metrics.csv").read_text().splitlines()[1:]]
    assert float(rows[-1][1]) < 0.9 * float(rows[0][1])

    written = []
    real = mae.checkpoint.write

    def write(out: Path, state: dict) -> None:
        real(out, state)
        written.append(state["epoch"])
        if state["epoch"] == 20:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mae.checkpoint, "write", write)
        with pytest.raises(KeyboardInterrupt):
            mae.pretrain(whole, tmp_path / "killed", "no")
    mae.pretrain(whole, tmp_path / "killed", "no")
    assert written == [10, 20]
    first, second = (timm.create_model(f"local-dir:{tmp_path / out / 'model'}", pretrained=True)
                     for out in ("whole", "killed"))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
