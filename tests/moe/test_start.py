"""Narrow experts: parts of the dense FFN, in what they compute and in all that reads their width."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from helpers import kinds
from helpers.commands import QUICK, TINY, call
from helpers.layers import FFNS, assert_agrees, tokens
from helpers.pages import Reader
from helpers.pictures import roles
from helpers.tiny import config, images, layers, perturb_experts, randomise, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.analysis.expert_similarity import compare_experts
from vimoe.config.moe import STARTS
from vimoe.moe import ffn
from vimoe.moe.packed import can_pack
from vimoe.moe.router import TokenLayout

WIDTH, PARTS, N = 24, 4, 8  # of 96 hidden units


def narrow(**settings: object) -> vimoe.MoEConfig:
    return config(**{"expert_width": WIDTH, "num_experts": N, "top_k": N, "gate": "choice", **settings})


def part(weights: dict[str, Tensor], x: Tensor, e: int, width: int, gated: bool, act: nn.Module) -> Tensor:
    """The reference: what expert e computes of tokens (M, D), where m experts share the hidden units."""
    hidden = weights["fc2.weight"].shape[1]
    m = hidden // width
    units = range(e % m * width, (e % m + 1) * width)
    first = x @ weights["fc1.weight"].T + weights["fc1.bias"]
    first = act(first[:, :hidden]) * first[:, hidden:] if gated else act(first)
    return m * first[:, units] @ weights["fc2.weight"][:, units].T + weights["fc2.bias"]


@pytest.mark.parametrize("dense", ["mlp", "glu, gate last", "glu, gate first", "swiglu"])
@torch.no_grad()
def test_expert_e_is_a_part_of_the_ffn(dense: str) -> None:
    parent, x = randomise(FFNS[dense]()).double(), tokens().double().flatten(0, 1)
    weights = {name: w.clone() for name, w in ffn.read(parent).items()}
    layer = vimoe.MoE(copy.deepcopy(parent), config(expert_width=4, num_experts=6), TokenLayout(0, False))
    outputs = []
    for e in range(6):
        load = torch.zeros(6, dtype=torch.long)
        load[e] = len(x)
        y = layer.experts(x[:, None], None, load)[:, 0]
        expected = part(weights, x, e, 4, layer.experts.kind.gated, layer.experts.act)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        outputs.append(y)
    torch.testing.assert_close(sum(outputs) / 6, parent(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shared", "routing"), [(0, "token"), (1, "token"), (2, "token"), (1, "image")])
@pytest.mark.parametrize("family", ["vit", "dinov2, packed SwiGLU", "dinov3, SwiGLU"])
@torch.no_grad()
def test_with_all_chosen_in_equal_parts_the_function_is_kept(family: str, shared: int, routing: str) -> None:
    parent = vit(family)
    width = ffn.describe(parent.blocks[0].mlp).hidden // PARTS
    settings = narrow(num_shared_experts=shared, expert_width=width, routing=routing)
    model = upcycle(copy.deepcopy(parent), settings)
    x = images(parent)
    torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-4)
    fewer = upcycle(copy.deepcopy(parent), narrow(num_shared_experts=shared, top_k=3, expert_width=width))
    assert not torch.allclose(fewer(x), parent(x), atol=1e-3)
    assert layers(model)[0].experts.kind.hidden == width


@pytest.mark.parametrize("shared", [0, 1])
def test_narrow_experts_agree_with_the_loop(shared: int) -> None:
    settings = config(expert_width=4, num_experts=6, top_k=2, routing="token", num_shared_experts=shared)
    layer = randomise(vimoe.MoE(randomise(FFNS["swiglu"]()), settings, TokenLayout(0, False)))
    assert_agrees(layer.double(), tokens().double())


def test_all_that_reads_the_width_reads_that_of_the_experts() -> None:
    dense, model = vimoe.count(vit()), upcycle(vit(), narrow(top_k=2))
    layer, cost = layers(model)[0], vimoe.count(model)
    expert = 2 * 24 * WIDTH + WIDTH + 24
    assert layer.experts.macs == 2 * 24 * WIDTH and layer.experts.kind.hidden == WIDTH
    assert cost.params == dense.params + 2 * N * (expert + 24)
    assert cost.activated_params == dense.params + 2 * (2 * expert + N * 24)
    assert cost.macs == dense.macs + 2 * (5 * 2 * layer.experts.macs + N * 24)
    assert vimoe.plan(vit(), narrow(top_k=2)).moe == cost
    found = compare_experts(perturb_experts(model).eval().blocks[0].mlp, torch.randn(2, 5, 24))
    assert found.num_experts == N and found.neuron_similarity is not None


@pytest.mark.parametrize("kept", [None, [6, 1, 2]])
@torch.no_grad()
def test_folders_copies_and_types_keep_narrow_experts(kept: list[int] | None, tmp_path: Path) -> None:
    model = perturb_experts(upcycle(vit(), narrow(top_k=2)))
    for layer in layers(model) if kept else ():
        layer.keep_experts(kept)
    x = images(model)
    y = model(x)
    vimoe.save(model, tmp_path / "m")
    assert torch.equal(vimoe.load(tmp_path / "m")(x), y)
    assert torch.equal(copy.deepcopy(model)(x), y)
    torch.testing.assert_close(copy.deepcopy(model).double()(x.double()), y.double(), rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()).isfinite().all()
    dense = vimoe.densify(model, how="join")
    width = 96 + WIDTH * len(kept or range(N))
    assert dense.blocks[0].mlp.fc1.out_features == -(-width // 96) * 96  # filled up, so that a folder can note it
    vimoe.save(dense, tmp_path / "dense")
    assert torch.equal(vimoe.load(tmp_path / "dense")(x), dense(x))


@pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this build of torch packs nothing")
@torch.no_grad()
def test_optimised_they_compute_the_same() -> None:
    model = perturb_experts(upcycle(vit("dinov3, SwiGLU"), narrow(top_k=2, routing="token")))
    expected = model(images(model))
    torch.testing.assert_close(vimoe.optimize(model)(images(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_width": 25}, "expert_width=25 of an FFN with 96 hidden units.*divides them; use such as 24"),
        ({"expert_width": 192}, "expert_width=192 of an FFN with 96 hidden units.*use such as 96"),
        ({"num_experts": 6, "top_k": 1}, "num_experts=6 with experts of 24 of 96 .*a multiple of 4.*num_experts=8"),
        ({"experts": "low_rank"}, "expert_width=24 with experts='low_rank'.*such as 'ffn'; leave it out"),
    ],
)
@pytest.mark.parametrize("verb", [vimoe.upcycle, vimoe.plan])
def test_what_cannot_be_parted_is_refused_in_one_line(settings: dict, message: str, verb: object) -> None:
    assert "low_rank" in kinds.EXPERTS
    model = vit()
    with pytest.raises(vimoe.VimoeError, match=message) as error:
        verb(model, narrow(**settings))
    assert "\n" not in str(error.value) and not layers(model)


def test_a_norm_over_the_hidden_units_is_refused() -> None:
    dense = Mlp(8, 12, norm_layer=nn.LayerNorm)
    with pytest.raises(vimoe.VimoeError, match="experts of 4 of the 12 hidden units of an FFN with a LayerNorm"):
        vimoe.MoE(dense, config(expert_width=4, num_experts=3), TokenLayout(0, False))
    assert vimoe.MoE(dense, config(expert_width=12), TokenLayout(0, False)).experts.kind.hidden == 12


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"calibration_images": 9}, "calibration_images=9 with init='copy' and router='softmax': expected a start or"),
        ({"router_gradient": "dense", "num_experts": 2, "top_k": 2}, "'dense' with all 2 experts chosen: expected"),
    ],
    ids=["images", "router gradient"],
)
def test_what_a_new_layer_would_not_read_is_refused(settings: dict, text: str) -> None:
    with pytest.raises(vimoe.VimoeError, match=text):
        vimoe.MoE(Mlp(8, 12), config(**settings), TokenLayout(0, False)).check_start()


def test_a_pruned_layer_may_have_all_its_experts_chosen(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=2)
    vimoe.upcycle(model, config(layers="last:1", num_experts=3, top_k=2, router_gradient="dense"))
    layers(model)[0].keep_experts([0, 2])
    vimoe.save(model, tmp_path / "model")
    assert layers(vimoe.load(tmp_path / "model"))[0].config.num_experts == 2


@pytest.mark.parametrize(
    ("flags", "methods"),
    [
        (["--moe.init=drop", "--moe.expert_width=24", "--moe.num_experts=4", "--moe.top_k=2"], {"shared", "join"}),
        (
            ["--moe.init=cluster", "--moe.num_experts=3", "--moe.calibration_images=9", "--moe.routing=token"],
            {"shared", "merge", "matched"},
        ),
    ],
    ids=["narrow, drop", "cluster"],
)
def test_all_verbs_know_narrow_experts_and_starts(
    flags: list[str], methods: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", ["--data.path", roles(tmp_path / "photos"), "--train.epochs=1"]
    call(capsys, "train", *TINY, *QUICK, *data, "--moe.layers=last:1", *flags, "--out", run)
    (layer,) = call(capsys, "analyze", run, "--draws=2")["layers"]
    assert set(layer["dense"]) == methods
    assert ("experts side by side" in Reader(run / "report.html").text) == ("join" in methods)
    pruned = call(capsys, "prune", run, "--out", tmp_path / "pruned", "--tolerance=100")
    assert [step["how"] in methods for step in pruned["steps"]] == [True]
    assert not layers(vimoe.load(tmp_path / "pruned" / "model"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init", list(STARTS))
def test_every_start_has_finite_outputs_and_gradients_in_the_type_of_the_model(init: str, dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    alone = {"num_shared_experts": 0, "gate": "choice"} if init == "split" else {}
    given = [(images(model, 8).to(dtype), torch.zeros(8, dtype=torch.long))]
    vimoe.upcycle(model, config(init=init, top_k=2, **alone), given)
    y = model(given[0][0])
    y.square().sum().backward()
    assert y.dtype == dtype and y.isfinite().all()
    for name, p in model.named_parameters():
        assert p.dtype == dtype and p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()), name
