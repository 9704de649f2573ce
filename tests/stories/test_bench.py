"""The verb bench: what it prints, and mistakes; and the table beside other libraries."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers.slow import one_in

import vimoe.bench.result
import vimoe.models.precision
from vimoe import cli
from vimoe.config.bench import LayerBench

SMALL = LayerBench(images=2, tokens=8, dim=16, hidden=32, rounds=3)


def test_the_bench_warns_of_emulated_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vimoe.models.precision, "has_bfloat16", lambda: False)
    monkeypatch.setattr(vimoe.bench.result, "has_bfloat16", lambda: False)
    small = ["--bench.tokens=8", "--bench.dim=16", "--bench.hidden=32", "--bench.images=2", "--bench.rounds=2"]
    for option in ("--bench.precision=bf16", "--bench.dtype=bfloat16"):
        vimoe.models.precision.warn_of_slow_bfloat16.cache_clear()
        caplog.clear()
        assert cli.main(["bench", "layer", *small, option]) == 0
        said = f"{option.removeprefix('--')} is slow: this CPU has no bfloat16 and emulates it; leave it out"
        assert [record.getMessage()[: len(said)] for record in caplog.records] == [said]
    assert "forward, 2 rounds" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "precision"), one_in(3, itertools.product(["layer", "model"], ["no", "bf16"])))
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
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    peers, speed = (importlib.import_module(name) for name in ("peers", "speed"))
    monkeypatch.setattr(peers, "_present", lambda entry: False)
    table = speed.peer_table("peers float32", speed.beside_peers(SMALL))
    assert "| vimoe auto |" in table and "Not installed: " in table
    assert "fastest peer" not in table and "Versions" not in table
