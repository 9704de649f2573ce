"""The start "split" against EMoE's formula: pieces of one FFN, each with a gate of 1, and the bias once."""

from __future__ import annotations

import copy
from pathlib import Path

import helpers.kinds  # noqa: F401  it registers kinds of experts
import pytest
import torch
import torch.nn.functional as F
from helpers.layers import FFNS, assert_agrees, tokens
from helpers.tiny import config, images, layers, perturb_experts, randomise, upcycle, vit
from timm.layers import Mlp
from torch import Tensor, nn

import vimoe
from vimoe.config.moe import ROUTERS
from vimoe.moe import ffn, ffn_weights
from vimoe.moe.router import TokenLayout
from vimoe.moe.routers.softmax import SoftmaxRouter

N = 4
WITHOUT_NORM = [name for name in FFNS if "norm" not in name]


def split(**settings: object) -> vimoe.MoEConfig:
    return config(**{"init": "split", "num_shared_experts": 0, "gate": "choice", "routing": "token", **settings})


def started(dense: nn.Module, **settings: object) -> vimoe.MoE:
    torch.manual_seed(0)
    layer = vimoe.MoE(dense, split(**settings), TokenLayout(0, False))
    layer.start()
    return layer


def units_of(layer: vimoe.MoE, weights: dict[str, Tensor]) -> list[list[int]]:
    """Numbers of the parent's hidden units that each expert got, found by their rows of the first matrix."""
    hidden = layer.experts.kind.hidden
    rows = [layer.experts.weights(e)["fc1.weight"][:hidden] for e in range(N)]
    return [[int((weights["fc1.weight"] - row).abs().sum(1).argmin()) for row in each] for each in rows]


def emoe(
    x: Tensor, weights: dict[str, Tensor], units: list[list[int]], k: int, gated: bool, act: nn.Module
) -> Tensor:  # fmt: skip
    """The reference: sum over the k chosen pieces of W_e h_e, plus the bias, for tokens (M, D)."""
    pre = F.linear(x, weights["fc1.weight"], weights.get("fc1.bias"))
    half = pre.shape[1] // 2
    hidden = act(pre[:, :half]) * pre[:, half:] if gated else act(pre)
    keys = torch.stack([weights["fc1.weight"][each].mean(0) for each in units])
    y = torch.zeros_like(x)
    for m, chosen in enumerate((x @ keys.T).topk(k).indices.tolist()):
        for e in chosen:
            y[m] += weights["fc2.weight"][:, units[e]] @ hidden[m, units[e]]
    return y + weights["fc2.bias"] if "fc2.bias" in weights else y


@pytest.mark.parametrize("k", [1, 2, N])
@pytest.mark.parametrize("dense", WITHOUT_NORM)
def test_it_computes_what_emoe_does(dense: str, k: int) -> None:
    parent = randomise(FFNS[dense]()).double()
    weights = {name: w.detach().clone() for name, w in ffn.read(parent).items()}
    layer, x = started(copy.deepcopy(parent), top_k=k).double(), tokens().double()
    units = units_of(layer, weights)
    assert sorted(sum(units, [])) == list(range(12)) and {len(each) for each in units} == {3}
    exact = {name: w.requires_grad_() for name, w in weights.items()}
    expected = emoe(x.flatten(0, 1), exact, units, k, layer.experts.kind.gated, layer.experts.act)
    y = layer(x)
    torch.testing.assert_close(y.flatten(0, 1), expected, rtol=1e-9, atol=1e-9)
    y.square().sum().backward()
    expected.square().sum().backward()
    last = layer.experts.fc2.weight.grad * k  # experts hold k W_e
    for e in range(N):
        torch.testing.assert_close(last[e], exact["fc2.weight"].grad[:, units[e]], rtol=1e-9, atol=1e-9)
        first = exact["fc1.weight"].grad[units[e]]  # of a gated FFN the gate's half, which comes first
        torch.testing.assert_close(layer.experts.fc1.weight.grad[e][:3], first, rtol=1e-9, atol=1e-9)
    if k == N:
        torch.testing.assert_close(y, parent(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dense", ["mlp", "swiglu"])
def test_narrow_experts_agree_with_the_loop(dense: str) -> None:
    layer = randomise(started(randomise(FFNS[dense]()), top_k=2, gate="probability"))
    assert_agrees(layer.double(), tokens().double())


@pytest.mark.parametrize("gated", [False, True])
def test_like_units_come_together_and_the_router_has_their_means(gated: bool) -> None:
    """Units point in one of four directions, in turns; of a gated FFN the gate's rows do, whose values are noise."""
    name = "swiglu" if gated else "mlp"
    parent = FFNS[name]()
    directions = torch.eye(8)[:N].repeat(3, 1)
    with torch.no_grad():
        rows = directions * torch.arange(1, 13)[:, None] + 0.01 * torch.randn(12, 8)
        (parent.fc1_g if gated else parent.fc1).weight.copy_(rows)
    layer = started(parent, top_k=2)
    found = []
    for e in range(N):
        own = layer.experts.weights(e)["fc1.weight"][:3]
        units = [int((rows - row).abs().sum(1).argmin()) for row in own]
        assert len({unit % N for unit in units}) == 1
        torch.testing.assert_close(layer.router.weight[e], rows[units].mean(0))
        found.append(units[0] % N)
    assert sorted(found) == list(range(N))


@pytest.mark.parametrize("family", ["vit", "dinov2, packed SwiGLU", "dinov3, SwiGLU"])
@torch.no_grad()
def test_with_all_chosen_the_function_is_kept_and_joining_gives_the_parent_back(family: str) -> None:
    parent = vit(family)
    x = images(parent)
    model = upcycle(copy.deepcopy(parent), split(top_k=N))
    torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-4)
    assert layers(model)[0].densify_methods == ("join", "whole")
    dense = vimoe.densify(model, how="join")
    torch.testing.assert_close(dense(x), parent(x), rtol=1e-4, atol=1e-4)
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in parent.named_parameters()}
    for site in ("blocks.0.mlp", "blocks.1.mlp"):  # the same units, in another order
        modules = [each.get_submodule(site) for each in (parent, dense)]
        was, now = (ffn_weights.hidden_units(ffn.read(each), ffn.describe(each).gated) for each in modules)
        nearest = torch.cdist(now.double(), was.double()).min(dim=1)
        assert nearest.values.max() < 1e-5 and sorted(nearest.indices.tolist()) == list(range(len(was)))


@pytest.mark.parametrize("gate", ["choice", "probability"])
@pytest.mark.parametrize("k", [2, N])
@torch.no_grad()
def test_its_pieces_as_a_whole_are_the_parent_and_what_they_learn_stays(k: int, gate: str) -> None:
    parent = vit()
    x = images(parent)
    model = upcycle(copy.deepcopy(parent), split(top_k=k, gate=gate))
    torch.testing.assert_close(vimoe.densify(copy.deepcopy(model), how="whole")(x), parent(x), rtol=1e-4, atol=1e-4)
    layer = randomise(layers(model)[0])
    kind, found = layer.experts.kind, layer.dense("whole", torch.tensor([0.4, 0.3, 0.2, 0.1]))
    h = torch.randn(7, 24)
    expected = 0
    for e, mass in enumerate((0.4, 0.3, 0.2, 0.1)):
        own = layer.experts.weights(e)
        expected = expected + ffn.hidden(kind, own, h) @ own["fc2.weight"].T / k + mass * own["fc2.bias"]
    torch.testing.assert_close(found(h), expected, rtol=1e-4, atol=1e-4)


def test_it_has_no_new_parameters_but_the_routers_rows() -> None:
    dense, cost = vimoe.count(vit()), vimoe.count(upcycle(vit(), split(top_k=2)))
    weights, biases, rows = 2 * 24 * 96, 96 + 24, N * 24
    assert cost.params == dense.params + 2 * (rows + (N - 1) * 24)  # each expert has the output bias
    idle = 2 * (weights // 2 + 96 // 2 + 2 * 24)
    assert cost.activated_params == cost.params - idle
    assert biases and cost.macs == dense.macs + 2 * 5 * (rows - weights // 2)


@pytest.mark.parametrize("kept", [None, [3, 0, 1]])
@torch.no_grad()
def test_a_folder_keeps_it_also_without_some_experts(kept: list[int] | None, tmp_path: Path) -> None:
    model = perturb_experts(upcycle(vit(), split(top_k=2)))
    for layer in layers(model) if kept else ():
        layer.keep_experts(kept)
    vimoe.save(model, tmp_path / "m")
    again = vimoe.load(tmp_path / "m")
    assert torch.equal(again(images(model)), model(images(model)))
    found = layers(again)[0]
    assert (found.config.init, found.config.expert_width, found.experts.kind.hidden) == ("split", 24, 24)
    assert found.config.num_experts == len(kept or range(N))
    joined = vimoe.densify(model, how="join")
    assert joined.blocks[0].mlp.fc1.out_features == 96
    vimoe.save(joined, tmp_path / "dense")
    assert torch.equal(vimoe.load(tmp_path / "dense")(images(model)), joined(images(model)))


class Frozen(SoftmaxRouter):
    """A router whose rows follow from images."""

    needs_images = True


class Fixed(SoftmaxRouter):
    """A router whose rows are a buffer, which nothing may change."""

    def __init__(self, dim: int, config: vimoe.MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__(dim, config, layout, like)
        rows = self.weight.detach()
        del self.weight
        self.register_buffer("weight", rows)


class Projected(SoftmaxRouter):
    """A router whose rows are compared with other things than the input."""

    def __init__(self, dim: int, config: vimoe.MoEConfig, layout: TokenLayout, like: Tensor) -> None:
        super().__init__(dim, config, layout, like)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, dim // 2))


@pytest.mark.parametrize("kind", [Frozen, Fixed, Projected])
@pytest.mark.parametrize("init", ["split", "cluster"])
def test_a_router_without_rows_to_set_is_refused(init: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "odd", kind)
    model = vit()
    with pytest.raises(vimoe.VimoeError, match=f"init='{init}' with router='odd'.*use router='softmax'"):
        vimoe.plan(model, split(init=init, router="odd"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_shared_experts": 1}, "num_shared_experts=1 with init='split'.*expected 0; set it, or use init='copy'"),
        ({"combine": "sum"}, "combine='sum' with init='split'.*expected 'mix'; set it, or use init='copy'"),
        ({"num_experts": 5}, "num_experts=5 with init='split' of an FFN with 96 hidden units.*use such as 4"),
        ({"expert_width": 48}, "expert_width=48 with init='split' of 96 hidden units among 4 experts: expected 24"),
        ({"experts": "low_rank"}, "init='split' with experts='low_rank'"),
    ],
)
@pytest.mark.parametrize("verb", [vimoe.upcycle, vimoe.plan])
def test_what_does_not_go_with_it_is_refused_in_one_line(settings: dict, message: str, verb: object) -> None:
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(vimoe.VimoeError, match=message) as error:
        verb(model, split(**settings))
    assert "\n" not in str(error.value) and not layers(model)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_norm_between_the_matrices_is_refused() -> None:
    with pytest.raises(vimoe.VimoeError, match="LayerNorm over all of them.*leave out expert_width, and init='split'"):
        vimoe.MoE(Mlp(8, 12, norm_layer=nn.LayerNorm), split(), TokenLayout(0, False))


def test_the_width_may_be_given() -> None:
    assert layers(upcycle(vit(), split(expert_width=24, top_k=2)))[0].experts.kind.hidden == 24


def test_it_is_analysed_and_pruned() -> None:
    model = perturb_experts(upcycle(vit(), split(top_k=2)))
    x = images(model, 12)
    loader = [(x, model(x).argmax(1).detach())]
    evidence = vimoe.analyze(model, loader, draws=2)
    assert [set(layer.dense) for layer in evidence.layers] == [{"join", "whole"}] * 2
    experts = vimoe.prune(copy.deepcopy(model), evidence, loader, tolerance=-100.0, experts=True)
    assert experts.steps == () and all(step.how in ("join", "whole") for step in experts.kept)
    done = vimoe.prune(model, evidence, loader, tolerance=100.0)
    assert all(step.how in ("join", "whole") for step in done.steps) and len(done.steps) == 2 and str(done)
    assert not layers(model) and model.blocks[0].mlp.fc1.out_features == 96
