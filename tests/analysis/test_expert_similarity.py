"""How alike experts are, on layers whose answers are known."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable

import pytest
import torch
from helpers.numbers import numbers
from helpers.tiny import config, randomise
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

import vimoe
from vimoe.analysis import expert_similarity, expert_weights
from vimoe.analysis.expert_similarity import compare_experts, distances
from vimoe.moe import ffn
from vimoe.moe.router import TokenLayout

DIM, HIDDEN, EXPERTS = 8, 12, 4
ABOUT = 1e-5
FFNS = {
    "mlp": lambda: Mlp(DIM, HIDDEN),
    "mlp, norm": lambda: Mlp(DIM, HIDDEN, norm_layer=nn.LayerNorm),
    "glu": lambda: GluMlp(DIM, 2 * HIDDEN, norm_layer=nn.LayerNorm),
    "swiglu": lambda: SwiGLU(DIM, HIDDEN, bias=False),
}
SIMILARITIES = ("weight_similarity", "output_similarity", "neuron_similarity", "matched_neuron_similarity")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def moe(dense: nn.Module | None = None, **settings: object) -> vimoe.MoE:
    """A layer whose experts are copies, as right after upcycling; images are routed by their first token."""
    return vimoe.MoE(randomise(dense or Mlp(DIM, HIDDEN)), config(**settings), TokenLayout(1, True))


def tokens(batch: int = 3, length: int = 5, dim: int = DIM) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1))


def set_experts(layer: vimoe.MoE, **values: Tensor) -> vimoe.MoE:
    """All weights of the experts: those named fc1_weight and so on as given, all others zero."""
    for name, stacked in layer.experts.named_parameters():
        stacked.data = values.get(name.replace(".", "_"), torch.zeros_like(stacked)).expand_as(stacked).clone()
    return layer


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("dense", FFNS)
def test_copies_are_alike_and_what_needs_a_difference_is_undefined(dense: str, routing: str) -> None:
    found = compare_experts(moe(FFNS[dense](), routing=routing, num_experts=6), tokens())  # 6 w / 6 is not always w
    assert [getattr(found, name) for name in SIMILARITIES] == pytest.approx([1, 1, 1, 1], abs=ABOUT)
    assert found.deviation_similarity is None
    assert found.deviation_directions is None
    assert found.score_norm_correlation is None
    assert found.top1_has_largest_norm is None
    assert found.router_expert_correlation is None
    assert (found.num_experts, found.chance) == (6, 1 / 6)


def test_one_expert_is_compared_with_nothing() -> None:
    found = compare_experts(moe(num_experts=1), tokens()).to_dict()
    defined = {name for name, value in found.items() if value is not None}
    assert defined == {"num_experts", "chance", "active_neurons", "weights", "parent"}
    assert [found["weights"][name] for name in ("tau", "rho", "rho_parent", "matched")] == [None, None, 1, 1]
    each = {name for part in found["weights"]["matrices"].values() for name, value in part.items() if value is not None}
    assert each == {"parent"}


@pytest.mark.parametrize("broken", ["weights", "tokens"])
def test_what_has_diverged_is_undefined_and_raises_nothing(broken: str) -> None:
    layer, x = randomise(moe()), tokens()
    if broken == "weights":
        layer.experts.fc1.weight.data[:] = torch.nan
    else:
        x[:] = torch.inf
    found = compare_experts(layer, x)
    assert found.output_similarity is found.top1_has_largest_norm is found.score_norm_correlation is None
    assert (found.weight_similarity is None) == (found.neuron_similarity is None) == (broken == "weights")
    json.dumps(found.to_dict(), allow_nan=False)


def test_experts_that_share_no_weight_and_no_output_channel_are_orthogonal() -> None:
    """Expert e has hidden unit e alone, which writes to channel e alone."""
    eye = torch.eye(EXPERTS, HIDDEN)  # expert, hidden unit
    layer = set_experts(
        moe(Mlp(DIM, HIDDEN, act_layer=nn.ReLU)),
        fc1_bias=eye,
        fc2_weight=torch.einsum("ef,ed->edf", eye, torch.eye(EXPERTS, DIM)),
    )
    found = compare_experts(layer, tokens())
    assert found.weight_similarity == pytest.approx(0, abs=ABOUT)
    assert found.output_similarity == pytest.approx(0, abs=ABOUT)
    assert found.deviation_similarity == pytest.approx(-1 / (EXPERTS - 1), abs=ABOUT)
    assert found.deviation_directions == pytest.approx(EXPERTS - 1, abs=ABOUT)
    assert found.active_neurons == pytest.approx(1 / HIDDEN)
    assert found.score_norm_correlation is found.top1_has_largest_norm is None  # all outputs have norm 1
    assert found.router_expert_correlation is None  # all pairs are equally similar


def test_opposite_experts() -> None:
    layer = set_experts(moe(num_experts=2), fc2_bias=torch.tensor([[1.0], [-1.0]]) * torch.arange(DIM))
    found = compare_experts(layer, tokens())
    assert (found.weight_similarity, found.deviation_similarity, found.output_similarity) == pytest.approx((-1, -1, -1))
    assert found.deviation_directions == pytest.approx(1)
    assert found.router_expert_correlation is None  # one pair correlates with nothing
    assert found.neuron_similarity is found.active_neurons is None  # no neuron says anything


@pytest.mark.parametrize(
    ("moves", "similarity", "directions"),
    [
        ([[1, 0], [1, 0], [-1, 0], [-1, 0]], -1 / 3, 1),  # two against two, as equal in length as independent moves
        ([[1, 0], [-1, 0], [0, 1], [0, -1]], -1 / 3, 2),
        ([[4, 0], [0, 0], [0, 0], [0, 0]], 0, 1),  # one alone: (N - 4) / N
    ],
)
def test_deviations_from_a_parent(moves: list[list[float]], similarity: float, directions: float) -> None:
    layer = moe()
    layer.experts.fc2.weight.data[:, :2, 3] += torch.tensor(moves)
    found = compare_experts(layer, tokens())
    assert found.weight_similarity > 0.5  # the parent hides how they moved
    assert found.deviation_similarity == pytest.approx(similarity, abs=1e-4)
    assert found.deviation_directions == pytest.approx(directions, abs=1e-4)


def test_independent_moves_have_as_many_directions_as_there_can_be() -> None:
    layer = moe(Mlp(DIM, 300), num_experts=6)
    randomise(layer.experts, scale=0.1)
    found = compare_experts(layer, tokens())
    assert found.deviation_similarity == pytest.approx(-1 / 5, abs=0.01)
    assert found.deviation_directions == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("dense", FFNS)
@torch.no_grad()
def test_permuted_copies_are_alike_once_their_neurons_are_matched(dense: str) -> None:
    layer = moe(FFNS[dense]())
    for e in range(EXPERTS):
        order = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(e))
        for name, w in layer.experts.weights(e).items():
            if name == "fc2.weight":
                w.copy_(w[:, order])
            elif name != "fc2.bias":
                w.copy_(torch.cat([half[order] for half in w.split(HIDDEN)]))
    found = compare_experts(layer, tokens())
    assert found.neuron_similarity < 0.5
    assert found.matched_neuron_similarity == pytest.approx(1, abs=ABOUT)
    assert found.weight_similarity < 0.9
    assert found.output_similarity == pytest.approx(1, abs=ABOUT)
    assert found.score_norm_correlation is found.top1_has_largest_norm is None  # norms differ by rounding alone


@pytest.mark.parametrize(
    ("said", "share"),
    [([1.0] * HIDDEN, 1), ([2.0] * 3 + [0.0] * (HIDDEN - 3), 3 / HIDDEN), ([3.0, -1.0] + [0.0] * 10, 16 / 120)],
)
@pytest.mark.parametrize("where", ["hidden", "column"])
def test_active_neurons(said: list[float], share: float, where: str) -> None:
    """A neuron says its hidden unit times its column, so it does not matter which of them is large."""
    weights, ones = torch.tensor(said), torch.ones(HIDDEN)
    hidden, columns = (weights, ones) if where == "hidden" else (ones, weights)
    dense = Mlp(DIM, HIDDEN, act_layer=nn.Identity)
    layer = set_experts(moe(dense), fc1_bias=hidden, fc2_weight=columns.expand(DIM, HIDDEN))
    assert compare_experts(layer, tokens()).active_neurons == pytest.approx(share)


def by_size(**settings: object) -> vimoe.MoE:
    """Expert e computes e + 1 times one function, and likes the first channel of the router the more."""
    layer = moe(top_k=2, **settings)
    sizes = torch.arange(1.0, 1 + layer.config.num_experts)
    layer.experts.fc2.weight.data *= sizes[:, None, None]
    layer.experts.fc2.bias.data *= sizes[:, None]
    layer.router.weight.data.zero_()[:, 0] = sizes
    return layer


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize(
    ("signs", "correlation", "share"),
    [([1, 1, 1, 1], 1, 1), ([-1, -1, -1, -1], -1, 0), ([1, 1, 1, -1], 0.5, 0.75), ([1, 0, 0, 0], 1, None)],
)
def test_the_router_against_the_outputs_norms(
    routing: str, signs: list[int], correlation: float, share: float | None
) -> None:
    """A router that follows norms, flees them, does either by turns, or has a preference for one unit alone."""
    x = tokens(4, 1 if routing == "token" else 3)
    x[:, 0, 0] = torch.tensor(signs)  # of an image the class token decides, so its other tokens keep their own
    found = compare_experts(by_size(routing=routing), x)
    assert found.score_norm_correlation == pytest.approx(correlation)
    assert share is None or found.top1_has_largest_norm == pytest.approx(share)
    assert found.output_similarity == pytest.approx(1, abs=ABOUT)


@pytest.mark.parametrize("routing", ["image", "token"])
@pytest.mark.parametrize("sign", [1, -1])
def test_ranks_of_experts_scaled_by_1_to_n_are_exact(routing: str, sign: int) -> None:
    """A router that follows norms has all counts on the diagonal, one that flees them on the other; never by chance."""
    x = tokens(4, 1 if routing == "token" else 3)
    x[:, 0, 0] = sign
    found = compare_experts(by_size(routing=routing), x).outputs
    expected = 4 * torch.eye(EXPERTS, dtype=torch.int64)
    assert found.ranks == (expected if sign > 0 else expected.flip(0)).tolist()
    assert found.diagonal.value == (1 if sign > 0 else 0)
    assert found.diagonal.low == 0 and 0.5 <= found.diagonal.high < 1  # of 24 labels one keeps all of the ranks


def test_a_rank_that_an_expert_always_has_is_no_more_than_a_label() -> None:
    """Scores and norms agree in every row, and so would two experts that never change: chance reaches as far."""
    layer = by_size(num_experts=2, num_shared_experts=0)
    found = compare_experts(layer, tokens().index_fill(2, torch.tensor([0]), 1.0)).outputs
    assert (found.diagonal.value, found.diagonal.low) == (1, pytest.approx(0.025))


def test_angles_of_outputs_and_of_outputs_for_other_tokens() -> None:
    layer = randomise(moe(num_experts=3), scale=0.5)
    x = tokens()
    flat = x.flatten(0, 1)
    with torch.no_grad():
        y = torch.stack([layer.experts.apply_weights(layer.experts.weights(e), flat) for e in range(3)])
    unit = nn.functional.normalize(y, dim=2)
    angle = {(i, j): 1 - (unit[i] @ unit[j].T).arccos() / torch.pi for i, j in itertools.combinations(range(3), 2)}
    found = compare_experts(layer, x).outputs.angular
    assert found.value == pytest.approx(torch.stack([a.diagonal().mean() for a in angle.values()]).mean().item())
    middle = torch.stack([a.mean() for a in angle.values()]).mean().item()
    assert (found.low + found.high) / 2 == pytest.approx(middle, abs=1e-5)
    random = [
        torch.stack([a[torch.arange(len(flat)), torch.randperm(len(flat))].mean() for a in angle.values()]).mean()
        for _ in range(2000)
    ]
    assert found.high - found.low == pytest.approx(2 * 1.959964 * torch.stack(random).std().item(), rel=0.06)


def test_a_chance_level_needs_few_tokens_and_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomise(moe(num_experts=6))
    whole = compare_experts(layer, tokens()).outputs.angular
    monkeypatch.setattr(expert_similarity, "EXCHANGED", 8)
    monkeypatch.setattr(expert_similarity, "EXCHANGING", 3)
    some = compare_experts(layer, tokens()).outputs.angular
    assert some.value == whole.value and some.low != whole.low and abs(some.low - whole.low) < 0.1


KINDS = ["ffn", "lora", "delta", "adapter"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [0, 1])
def test_each_kind_of_experts_has_what_is_defined_for_it(kind: str, shared: int) -> None:
    """Changes of one FFN are compared with it; an adapter adds hidden units, so its matrices have another shape."""
    layer = moe(experts=kind, num_shared_experts=shared, top_k=2)
    randomise(layer.experts, scale=0.5)
    found = compare_experts(layer.eval(), tokens())
    what = "shared" if shared else None if kind == "ffn" else "base"
    assert (found.parent.what if found.parent else None) == what
    known = what is not None and kind != "adapter"
    assert all((part.parent is not None) == known for part in found.weights.matrices.values())
    assert (found.weights.rho_parent is not None) == known
    assert found.parent is None or (found.parent.cosine is not None) == known
    assert found.weights.tau and found.outputs.angular and found.outputs.diagonal


def test_experts_that_are_no_ffns_are_compared_by_their_outputs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomise(moe()).eval()
    whole = compare_experts(layer, tokens())
    monkeypatch.setattr(type(layer.experts), "are_ffns", False)
    found = compare_experts(layer, tokens())
    assert found.weights is None and found.weight_similarity is None
    assert numbers(found.to_dict()["outputs"]) == pytest.approx(numbers(whole.to_dict()["outputs"]), abs=1e-5)
    assert found.parent.cosine is None and found.parent.outputs == pytest.approx(whole.parent.outputs, rel=1e-4)


def test_a_parent_that_is_given_comes_before_the_shared_expert() -> None:
    layer = moe()
    dense = copy.deepcopy(layer.shared)
    randomise(layer.shared)
    found = compare_experts(layer, tokens(), dense)
    assert found.parent.what == "given" and found.weights.rho_parent == 1
    assert (found.parent.cosine, found.parent.outputs) == (pytest.approx(1), pytest.approx(0, abs=1e-6))
    assert compare_experts(layer, tokens()).parent.outputs > 0.1


def test_scores_that_saturate_the_softmax_still_have_an_order() -> None:
    x = tokens(2, 3)
    x[:, 0, 0] = 1000
    assert compare_experts(by_size(), x).score_norm_correlation == pytest.approx(1)


@pytest.mark.parametrize(("routing", "share"), [("image", 1.0), ("token", 0.75)])
def test_an_image_is_judged_by_the_mean_norm_over_its_tokens(routing: str, share: float) -> None:
    """Expert 0 answers the class token and expert 1 the three patches; the router takes 1 throughout."""
    layer = moe(Mlp(3, 1, act_layer=nn.ReLU), num_experts=2, routing=routing)
    set_experts(layer, fc1_weight=torch.eye(3)[1:, None], fc2_weight=torch.ones(3, 1))
    layer.router.weight.data = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    x = torch.tensor([[1.0, 2, 0], [1, 0, 1], [1, 0, 1], [1, 0, 1]]).expand(2, 4, 3)
    found = compare_experts(layer, x)
    assert found.top1_has_largest_norm == pytest.approx(share)
    assert found.score_norm_correlation == pytest.approx(2 * share - 1)


@torch.no_grad()
def test_experts_that_share_the_largest_norm_share_the_hit() -> None:
    """Experts 2 and 3 are one, up to the order of their units and so to rounding."""
    layer = by_size(routing="token")
    for name, w in layer.experts.weights(2).items():
        other = layer.experts.weights(3)[name]
        w.copy_(other if name == "fc2.bias" else other.flip(1 if name == "fc2.weight" else 0))
    x = tokens(batch=20)
    x[..., 0] = 1
    assert compare_experts(layer, x).top1_has_largest_norm == pytest.approx(0.5)


def alike(rows: Tensor, deviations: Tensor) -> float | None:
    layer = moe()
    layer.experts.fc2.weight.data[:, :, 0] += deviations
    layer.router.weight.data = rows
    return compare_experts(layer, tokens()).router_expert_correlation


def test_router_rows_against_experts() -> None:
    rows = torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(2))
    rows -= rows.mean(dim=0)
    assert alike(rows, 5 * rows + 3) == pytest.approx(1, abs=1e-4)  # what all experts share plays no part
    assert abs(alike(rows, rows.roll(1, dims=0))) < 0.9
    pairs = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]]) @ torch.eye(2, DIM)
    apart = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]) @ torch.eye(2, DIM)
    assert alike(apart, pairs) == pytest.approx(-1, abs=1e-4)  # twins in one are opposites in the other
    assert alike(torch.eye(EXPERTS, DIM), rows) is None  # the router finds all pairs equally similar
    assert alike(torch.zeros(EXPERTS, DIM), rows) is None


@pytest.mark.parametrize("dense", FFNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_agrees_with_the_experts_run_as_modules(dense: str, dtype: torch.dtype) -> None:
    layer, x = moe(FFNS[dense]()), tokens().to(dtype)
    randomise(layer.experts, scale=0.5)
    layer.to(dtype)
    modules = [ffn.build(FFNS[dense](), layer.experts.weights(e)).float().eval() for e in range(EXPERTS)]
    seen: list[Tensor] = []
    for module in modules:
        module.fc2.register_forward_pre_hook(lambda fc2, args: seen.append((args[0] * fc2.weight.norm(dim=0)).abs()))
    outputs = [module(x.float()) for module in modules]
    pairs = list(itertools.combinations(range(EXPERTS), 2))
    cosines = torch.stack([nn.functional.cosine_similarity(outputs[i], outputs[j], dim=-1) for i, j in pairs])
    active = torch.stack([a.sum(dim=-1) ** 2 / (HIDDEN * a.square().sum(dim=-1)) for a in seen])
    flat = [torch.cat([p.flatten() for p in module.parameters()]) for module in modules]
    deviations = torch.stack(flat) - torch.stack(flat).mean(dim=0)
    eigenvalues = torch.linalg.eigvalsh(deviations.double() @ deviations.double().T)
    found = compare_experts(layer, x)
    close = {"rel": 1e-4, "abs": 1e-5}
    assert found.output_similarity == pytest.approx(cosines.mean().item(), **close)
    assert found.active_neurons == pytest.approx(active.mean().item(), **close)
    similarity = [nn.functional.cosine_similarity(flat[i], flat[j], dim=0).item() for i, j in pairs]
    assert found.weight_similarity == pytest.approx(sum(similarity) / len(pairs), **close)
    own = [ffn.read(module) for module in modules]
    neurons = [torch.cat([*w["fc1.weight"].split(HIDDEN), w["fc2.weight"].T], dim=1) for w in own]
    similarity = [nn.functional.cosine_similarity(neurons[i], neurons[j]).mean().item() for i, j in pairs]
    assert found.neuron_similarity == pytest.approx(sum(similarity) / len(pairs), **close)
    directions = (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item()
    assert found.deviation_directions == pytest.approx(directions, **close)


@pytest.mark.parametrize("routing", ["image", "token"])
def test_it_does_not_depend_on_the_chunks(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomise(moe(routing=routing))
    whole = compare_experts(layer, tokens())
    monkeypatch.setattr(expert_similarity, "CHUNK", 4)  # five tokens are an image
    monkeypatch.setattr(expert_similarity, "SPAN", 7)
    monkeypatch.setattr(expert_weights, "SPAN", 7)
    assert numbers(compare_experts(layer, tokens()).to_dict()) == pytest.approx(
        numbers(whole.to_dict()), rel=1e-4, abs=1e-5
    )


def test_it_looks_only() -> None:
    """No routing is recorded, no gradient kept, dropout and autocast play no part, and nothing changes."""
    layer = randomise(moe(Mlp(DIM, HIDDEN, drop=0.5)))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    expected = compare_experts(layer.eval(), tokens())
    with vimoe.record(layer.train()) as routings, torch.autocast("cpu", dtype=torch.bfloat16):
        found = compare_experts(layer, tokens())
    assert found == expected
    assert routings == []
    assert layer.training
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(p.grad is None for p in layer.parameters())


def test_it_is_json() -> None:
    found = compare_experts(randomise(moe()), tokens())
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert None not in numbers(values).values()
    assert values == found.to_dict()


@pytest.mark.parametrize("kind", FFNS)
@pytest.mark.parametrize("shared", [0, 1])
def test_copies_have_no_distance(kind: str, shared: int) -> None:
    layer = moe(FFNS[kind](), num_shared_experts=shared, top_k=2).eval()
    from_shared, from_mean = distances(layer, tokens(), layer.shared)
    assert (from_shared is None) == (shared == 0)
    for distance in (from_mean, *([from_shared] if from_shared else [])):
        assert distance.cosine == pytest.approx(1) and distance.weights == pytest.approx(0, abs=1e-6)
        assert distance.outputs == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shared", [0, 1])
def test_distances_are_those_of_loops_in_float64(shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_similarity, "SPAN", 7)  # in several pieces
    monkeypatch.setattr(expert_similarity, "CHUNK", 4)
    layer = randomise(moe(num_shared_experts=shared, top_k=2)).double().eval()
    x = tokens().double()
    weights = [torch.cat([w[e].flatten() for _, w in layer.experts.named_parameters()]) for e in range(EXPERTS)]
    with torch.no_grad():
        one = [layer.experts.apply_weights(layer.experts.weights(e), x) for e in range(EXPERTS)]
        references = [(sum(weights) / EXPERTS, sum(one) / EXPERTS)]
        if shared:
            references.append((torch.cat([p.flatten() for p in layer.shared.parameters()]), layer.shared(x)))
    found = [distance for distance in reversed(distances(layer, x, layer.shared)) if distance]
    assert len(found) == len(references)
    for distance, (w, y) in zip(found, references, strict=True):
        assert distance.cosine == pytest.approx(mean(v @ w / (v.norm() * w.norm()) for v in weights))
        assert distance.weights == pytest.approx(mean(relative(v, w) for v in weights))
        assert distance.outputs == pytest.approx(mean(relative(v, y) for v in one))


def relative(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm() / ((a.norm() ** 2 + b.norm() ** 2) / 2).sqrt()


def mean(values: Iterable[Tensor]) -> float:
    return torch.stack(list(values)).mean().item()


def test_a_shared_expert_of_another_width_is_compared_by_outputs_alone() -> None:
    layer = moe(num_shared_experts=2).eval()
    from_shared, from_mean = distances(layer, tokens(), layer.shared)
    assert from_shared.cosine is None and from_shared.weights is None and from_mean.cosine == pytest.approx(1)
    assert from_shared.outputs == pytest.approx(0, abs=1e-6)


def test_zero_is_at_no_distance_from_zero_and_far_from_all_else() -> None:
    layer = set_experts(moe().eval())
    for p in layer.shared.parameters():
        p.data.zero_()
    from_shared, _ = distances(layer, tokens(), layer.shared)
    assert from_shared.outputs == from_shared.weights == 0
    set_experts(layer, fc2_bias=torch.ones(EXPERTS, DIM))
    assert distances(layer, tokens(), layer.shared)[0].outputs == pytest.approx(2**0.5)
