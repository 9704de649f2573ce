"""The benchmark's arithmetic, its contestants, and the verb; and that what is chosen is not slower than the loop."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vimoe
from vimoe import cli
from vimoe.bench import activations, compare, interleaved, layer_case, layer_memory, layer_seconds, model_case, wanted
from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.moe.grouped_linear import BACKENDS

SMALL = LayerBench(images=2, tokens=8, dim=16, hidden=32, rounds=3)


def test_ratios_are_of_pairs_within_a_round_to_the_faster_floor() -> None:
    slow_machine = np.array([1.0, 10.0, 1.0, 10.0, 1.0])
    seconds = {"a": slow_machine, "b": 3 * slow_machine, "ours": 1.5 * slow_machine}
    timings = {t.name: t for t in compare(seconds, ("b", "a"), {"ours": 3e9})}
    assert (timings["ours"].ratio, timings["ours"].low, timings["ours"].high) == (1.5, 1.5, 1.5)
    assert timings["b"].ratio == 3
    assert timings["ours"].gflops == pytest.approx(2)  # 3 GFLOP in the median of 1.5 s
    assert timings["a"].gflops is None


def test_the_interval_is_as_wide_as_the_rounds_differ() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.3, size=200)
    (_, ours) = compare({"floor": np.ones(200), "ours": noise}, ("floor",), {})
    assert ours.low < ours.ratio < ours.high
    assert 0.05 < ours.high - ours.low < 0.2


def test_every_contestant_runs_once_a_round_in_changing_order() -> None:
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=20, warmup=1)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 21 and all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 3
    assert all(len(taken) == 20 and (taken > 0).all() for taken in seconds.values())


def test_a_slow_comparison_says_how_long_it_takes_and_does_fewer_rounds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, calls = [0.0], []

    def takes(seconds: float) -> None:
        calls.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(vimoe.bench.time, "perf_counter", lambda: now[0])
    slow = {"a": lambda: takes(20.0), "b": lambda: takes(10.0)}
    for asked, timed in ((30, 8), (9, 8), (3, 3), (2, 2)):
        caplog.clear(), calls.clear()
        seconds = interleaved(slow, asked)
        assert seconds["a"].tolist() == [20.0] * timed and len(calls) <= 2 * (timed + 2)
        assert ("30 s a round, so 8 of 30 rounds are timed, in about 4 min" in caplog.text) == (asked == 30)
        assert bool(caplog.records) == (asked > 8)
    glacial = interleaved({"a": lambda: takes(1000.0)}, 30)
    assert len(glacial["a"]) == 2 and "2 of 30 rounds are timed, in about 33 minutes" in caplog.text


def test_the_bench_warns_of_emulated_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vimoe.models.precision, "has_bfloat16", lambda: False)
    monkeypatch.setattr(vimoe.bench, "has_bfloat16", lambda: False)
    small = ["--bench.tokens=8", "--bench.dim=16", "--bench.hidden=32", "--bench.images=2", "--bench.rounds=2"]
    for option in ("--bench.precision=bf16", "--bench.dtype=bfloat16"):
        vimoe.models.precision.warn_of_slow_bfloat16.cache_clear()
        caplog.clear()
        assert cli.main(["bench", "layer", *small, option]) == 0
        said = f"{option.removeprefix('--')} is slow: this CPU has no bfloat16 and emulates it; leave it out"
        assert [record.getMessage()[: len(said)] for record in caplog.records] == [said]
    assert "forward, 2 rounds" in capsys.readouterr().out


def test_activations_count_each_storage_once_and_no_weights() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    linear = nn.Linear(8, 8)
    # exp keeps its result; the second linear keeps that same tensor as its input
    assert activations(lambda: linear(x.exp()), [x, *linear.parameters()]) == 4 * 8 * 4
    assert activations(lambda: linear(x), [x, *linear.parameters()]) == 0
    assert activations(lambda: linear(x), list(linear.parameters())) == 4 * 8 * 4


@pytest.mark.parametrize("k", [1, 2])
def test_loads_are_what_they_are_called(k: int) -> None:
    even = wanted("balanced", 4000, 8, k)
    assert (even.flatten().bincount() == 500 * k).all()
    skewed = wanted("zipf", 4000, 8, k)
    counts = skewed.flatten().bincount(minlength=8)
    assert (counts.diff() < 0).all() and counts[0] > (4 if k == 1 else 2) * counts[7]
    for experts in (even, skewed):
        assert all(len(set(row)) == k for row in experts.tolist())


@pytest.mark.parametrize("routing", ["image", "token"])
def test_layers_are_routed_as_asked_and_compute_in_the_type(routing: str) -> None:
    case = layer_case(replace(SMALL, images=8, dtype="bfloat16", load="zipf"), MoEConfig(routing=routing))
    assert set(case.layers) >= {*case.floor, "vimoe auto", "vimoe loop", "vimoe bmm", "vimoe grouped_mm"}
    outputs = []
    for name, layer in case.layers.items():
        with vimoe.record(layer) as routings:
            y = layer(case.x)
        assert y.shape == case.x.shape and y.dtype == torch.bfloat16
        if name not in case.floor:
            assert torch.equal(routings[0].experts, case.experts)
            outputs.append(y)
    side_by_side = case.layers[case.floor[0]]
    assert case.macs == sum(p.numel() for p in side_by_side.parameters() if p.ndim == 2)
    for y in outputs:  # every expert and the shared one begin as one FFN, so all of them compute it
        torch.testing.assert_close(y, side_by_side.ffns[0](case.x), rtol=0.02, atol=0.002)


def test_under_autocast_products_are_bfloat16_and_gradients_float32() -> None:
    case = layer_case(replace(SMALL, precision="bf16"), MoEConfig(routing="token"))
    seen: dict[str, torch.dtype] = {}
    for name, layer in case.layers.items():
        layer.register_forward_hook(lambda module, args, y, name=name: seen.update({name: y.dtype}))
    layer_seconds(case, training=True, rounds=1)
    assert seen == dict.fromkeys(case.layers, torch.bfloat16)
    assert {p.grad.dtype for layer in case.layers.values() for p in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("routing", ["image", "token"])
def test_a_layer_keeps_at_most_7_percent_more_for_backward_than_the_floor(
    routing: str, dtype: str, backend: str
) -> None:
    case = layer_case(LayerBench(images=2, tokens=129, dtype=dtype), MoEConfig(routing=routing))
    kept = layer_memory(replace(case, layers={name: case.layers[name] for name in (*case.floor, f"vimoe {backend}")}))
    assert 1 < kept[f"vimoe {backend}"] / min(kept[name] for name in case.floor) < 1.07


def test_a_backend_that_torch_cannot_run_here_is_left_out() -> None:
    for bench in (replace(SMALL, dim=7), replace(SMALL, dim=20, precision="bf16")):  # rows of 28 and of 40 bytes
        case = layer_case(bench, MoEConfig())
        assert "vimoe loop" in case.layers and "vimoe grouped_mm" not in case.layers
        assert "16 bytes" in case.left_out["vimoe grouped_mm"]


def test_a_model_and_its_parent_compute_the_same() -> None:
    model = ModelConfig(name="vit_tiny_patch16_224", img_size=32, num_classes=5, args={"depth": 2})
    models, images = model_case(ModelBench(images=2), model, MoEConfig(layers="last:1"))
    assert images.shape == (2, 3, 32, 32)
    with vimoe.record(models["vimoe"]) as routings:
        torch.testing.assert_close(models["vimoe"].eval()(images), models["dense"].eval()(images))
    assert routings[0].load.max() == 1  # two images, at two experts


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("what", ["layer", "model"])
def test_the_verb_prints_what_json_holds(what: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    of_layer = ["--bench.tokens", "8", "--bench.dim", "16", "--bench.hidden", "32"]
    of_model = ["--model.name", "vit_tiny_patch16_224", "--model.img_size", "32", "--model.args", "{depth: 2}"]
    options = of_layer if what == "layer" else [*of_model, "--moe.layers", "last:1"]
    argv = ["bench", what, *options, "--bench.images", "2", "--bench.rounds", "2", "--bench.precision", precision]
    assert cli.main([*argv, "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        done["command"] == "bench"
        and done["peak_gflops"] > 0
        and done["machine"]["torch"] == torch.__version__.split("+")[0]
    )
    names = [timing["name"] for timing in done["timings"]["training"]]
    assert ("vimoe auto" if what == "layer" else "vimoe") in names
    assert all(t["low"] <= t["ratio"] <= t["high"] for t in done["timings"]["forward"])
    assert any("optimised" in t["name"] for t in done["timings"]["forward"]) == (precision == "no")
    assert ("autocast" in done["of"]) == (precision == "bf16")
    assert cli.main(argv) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "expected layer or model"),
        (["modle"], "expected layer or model"),
        (["layer", "--bench.images", "0"], "images"),
        (["layer", "--bench.rounds", "1"], "rounds"),
        (["layer", "--moe.layers", "last:1"], "moe.layers='last:1'"),
        (["layer", "--moe.num_experts", "0", "--moe.num_shared_experts", "2"], "expected experts"),
        (["layer", "--bench.load", "zip"], "zipf"),
        (["layer", "--bench.precision", "bf16", "--bench.dtype", "bfloat16"], "leave one of them out"),
        (["model", "--moe.layers", "none"], "expected MoE layers"),
        (["model", "--moe.num_experts", "0", "--moe.num_shared_experts", "2"], "expected MoE layers"),
        (["model", "--bench.tokens", "9"], "unknown option"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_the_table_beside_other_libraries_is_made_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    peers, speed = (importlib.import_module(name) for name in ("peers", "speed"))
    monkeypatch.setattr(peers, "_present", lambda entry: False)
    table = speed.peer_table("peers float32", speed.beside_peers(SMALL))
    assert "| vimoe auto |" in table and "Not installed: " in table
    assert "fastest peer" not in table and "Versions" not in table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU the loop is chosen: test_grouped_linear.py")
# images, routing, number of experts
@pytest.mark.parametrize(("images", "routing", "experts"), [(8, "token", 8), (8, "image", 8), (1, "image", 64)])
def test_what_is_chosen_is_not_slower_than_the_loop_beyond_noise(images: int, routing: str, experts: int) -> None:
    bench = LayerBench(images=images, tokens=65, dim=96, hidden=384)
    case = layer_case(bench, MoEConfig(routing=routing, num_experts=experts))
    case = replace(case, layers={name: case.layers[name] for name in (*case.floor, "vimoe auto", "vimoe loop")})
    for training in (False, True):
        seconds = layer_seconds(case, training, rounds=20)
        (auto,) = (t for t in compare(seconds, ("vimoe loop",), {}) if t.name == "vimoe auto")
        assert auto.low < 1.1, f"{auto.ratio:.2f} [{auto.low:.2f}, {auto.high:.2f}] of the loop"
