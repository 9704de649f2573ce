"""Time of the MoE layer and of whole models beside dense FFNs and other libraries, for the tables of README.md here.

    python benchmarks/speed.py                          # all of it; what is in results/ is not measured again
    python benchmarks/speed.py --only "layer *" --redo  # some of it again

Each measurement is a round robin (`vimoe.bench.timing`) in each of several processes, kept as results/NAME.json with
the machine it was made on. Peers that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import itertools
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import analysis_cost
import numpy as np
import peers
import torch
from scipy import stats

from vimoe.bench.layer import bench_layer, layer_case, layer_seconds
from vimoe.bench.model import bench_model
from vimoe.bench.result import Benchmark, machine, peak_gemm
from vimoe.bench.step import optimised
from vimoe.bench.timing import compare, interleaved
from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.model import ModelConfig
from vimoe.config.moe import MoEConfig
from vimoe.files import write_json, write_text
from vimoe.moe.grouped_linear import BACKENDS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- the tables begin -->", "<!-- the tables end -->"
DTYPES, ROUTINGS, LOADS = ("float32", "bfloat16"), ("image", "token"), ("balanced", "zipf")
AUTOCAST = "autocast"  # float32 weights, as in training
FLOOR = "dense FFNs side by side"  # of which there is an optimised form, too
EXPERTS = (8, 16, 32, 64)
IMAGES = (1, 4, 16)
VIT = ModelConfig(name="vit_small_patch14_dinov2", pretrained=False, img_size=224, num_classes=1000)
# the largest ratio of the time to the floor's (forward; with backward)
GOALS = {"balanced": (1.10, 1.15), "zipf": (1.20, 1.25)}


def measurements(rounds: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name and function of each contestant."""
    for dtype, routing, load in itertools.product((*DTYPES, AUTOCAST), ROUTINGS, LOADS):
        types = {"precision": "bf16"} if dtype == AUTOCAST else {"dtype": dtype}
        bench = LayerBench(**types, load=load, rounds=rounds)
        moe = MoEConfig(routing=routing)
        every = BACKENDS if (routing, load) == ("token", "balanced") else ("auto",)
        measure = functools.partial(bench_layer, bench, moe, every)
        yield f"layer {dtype} {routing} {load}", lambda measure=measure: measure().to_dict()
    for dtype in DTYPES:
        yield f"peers {dtype}", lambda dtype=dtype: beside_peers(LayerBench(dtype=dtype, rounds=rounds))
        for images in IMAGES:
            bench = ModelBench(images=images, dtype=dtype, rounds=rounds)
            yield f"model {dtype} {images}", lambda bench=bench: whole_model(bench)
    yield "experts bfloat16", lambda: more_experts(LayerBench(dtype="bfloat16", rounds=rounds))


def whole_model(bench: ModelBench) -> dict[str, Any]:
    """Return a ViT whose last two blocks have experts, beside its parent."""
    return bench_model(bench, VIT, MoEConfig(layers="last:2", routing="image")).to_dict()


def beside_peers(bench: LayerBench) -> dict[str, Any]:
    """Return layers of other libraries with the same forced, balanced token routing, and ours."""
    case = layer_case(bench, MoEConfig(routing="token"), ["auto"])
    shape = peers.Shape(bench.dim, bench.hidden, 8)
    layers = {name: case.layers[name] for name in (*case.floor, "vimoe auto")}
    macs, notes = dict.fromkeys(layers, float(case.macs)), {}
    for peer in peers.installed(case.x.device.type):
        notes[peer.name] = peer.note
        if case.x.dtype in peer.types:
            layer = peer.build(shape).to(case.x.device, case.x.dtype)
            if peer.route is not None:
                peer.route(layer, case.experts[:, 0])
            layers[peer.name], macs[peer.name] = layer, peer.macs(shape)
    whole, timings = replace(case, layers=layers), {}
    flops = {name: 2 * each * case.x.shape[:2].numel() for name, each in macs.items()}
    for what, passes in (("forward", 1), ("training", 3)):
        seconds = layer_seconds(whole, what == "training", bench.rounds)
        timings[what] = compare(seconds, case.floor, {name: passes * each for name, each in flops.items()})
    done = Benchmark("peers", timings, {}, peak_gemm(case.x.dtype, case.x.device), machine()).to_dict()
    extra = {"macs": macs, "notes": notes, "missing": peers.missing(), "versions": peers.versions()}
    return {**done, **extra}


def more_experts(bench: LayerBench) -> dict[str, Any]:
    """Return optimised layers with more and more experts, of which a token passes one."""
    steps = {}
    for n in EXPERTS:
        case = layer_case(bench, MoEConfig(routing="token", num_experts=n), ["auto"])
        (layer,) = optimised(case.layers, "vimoe auto").values()
        steps[str(n)] = functools.partial(layer, case.x)
    with torch.inference_mode():
        timings = compare(interleaved(steps, bench.rounds), (str(EXPERTS[0]),), {})
    return Benchmark("experts", {"forward": timings}, {}, peak_gemm(torch.bfloat16, case.x.device), machine()).to_dict()


# ---- several processes


def in_processes(name: str, processes: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the measurement of one new process after the other."""
    command = [sys.executable, __file__, "--measure", name, "--rounds", str(rounds)]
    for _ in range(processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        yield json.loads(done.stdout.splitlines()[-1])


def commit() -> str:
    """Return the commit of the measured code."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def paired(runs: list[dict[str, Any]], what: str, name: str, over: str) -> dict[str, float]:
    """Return one contestant's time over another's: the mean over processes, with Student's 95% interval."""
    timings = [{timing["name"]: timing["ratio"] for timing in run["timings"][what]} for run in runs]
    ratios = np.array([timing[name] / timing[over] for timing in timings])
    reach = float(stats.t.ppf(0.975, len(ratios) - 1) * stats.sem(ratios))
    return {"ratio": (mean := float(ratios.mean())), "low": mean - reach, "high": mean + reach}


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine the measurements of several processes: median times; the floor is the contestant fastest on the mean."""

    def merge(what: str) -> list[dict[str, Any]]:
        columns = {timings[0]["name"]: timings for timings in zip(*(run["timings"][what] for run in runs), strict=True)}
        floors = [name for name, timings in columns.items() if any(timing["ratio"] == 1 for timing in timings)]
        floor = min(floors, key=lambda name: np.mean([timing["ratio"] for timing in columns[name]]))
        return [
            {
                "name": name,
                "seconds": float(np.median([timing["seconds"] for timing in timings])),
                "gflops": timings[0]["gflops"] and float(np.median([timing["gflops"] for timing in timings])),
                **paired(runs, what, name, floor),
            }
            for name, timings in columns.items()
        ]

    peak = max(run["peak_gflops"] for run in runs)
    return {**runs[0], "timings": {what: merge(what) for what in runs[0]["timings"]}, "peak_gflops": peak, "runs": runs}


# ---- the page


def write_page() -> None:
    """Put the tables of all results between the marks of README.md."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    analyses = [analysis_cost.table(result) for name, result in found.items() if name.startswith("analysis ")]
    results = {name: merged(result["processes"]) for name, result in found.items() if "processes" in result}
    page = HERE / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    made = "\n\n".join([tables(results), *analyses])
    write_text(page, f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Return all tables with results."""
    parts = [
        layer_table({name: r for name, r in results.items() if name.startswith("layer ")}),
        *(
            backend_table(name, results[name])
            for name in results
            if name.startswith("layer ") and name.endswith("token balanced")
        ),
        *(peer_table(name, results[name]) for name in results if name.startswith("peers ")),
        peer_notes([results[name] for name in results if name.startswith("peers ")]),
        *(model_table(name, results[name]) for name in results if name.startswith("model ")),
        *(expert_table(results[name]) for name in results if name.startswith("experts ")),
        machines(results),
    ]
    return "\n\n".join(part for part in parts if part)


def layer_table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of our layer over the floor."""
    shapes = sorted({re.split(r", \w+ routing", result["of"])[0] for result in results.values()})
    lines = [
        "### The layer over the floor",
        "",
        f"A layer of {' and of '.join(shapes)}.",
        "",
        "| type | routing | load | forward | goal | with backward | goal | kept | forward, both optimised |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        _, dtype, routing, load = name.split()
        forward, training = (_timing(result, what, "vimoe auto") for what in ("forward", "training"))
        fast = (
            ""
            if dtype == AUTOCAST
            else _ratio(paired(result["runs"], "forward", *(f"{layer}, optimised" for layer in ("vimoe auto", FLOOR))))
        )
        kept = result["bytes_kept"]
        more = kept["vimoe auto"] / min(size for name, size in kept.items() if "dense" in name)
        goals = [f"{goal:.2f} {_reached(t, goal)}" for t, goal in zip((forward, training), GOALS[load], strict=True)]
        lines.append(
            f"| {dtype} | {routing} | {load} | {_ratio(forward)} | {goals[0]} | {_ratio(training)} | {goals[1]} | "
            f"{more:.3f} | {fast} |"
        )
    return "\n".join(lines) if results else ""


def backend_table(name: str, result: dict[str, Any]) -> str:
    """Return the rows of all contestants of one measurement."""
    return "\n".join([f"### {name}: every backend", "", *_rows(result)])


def peer_table(name: str, result: dict[str, Any]) -> str:
    """Return the table of other libraries' layers, and of ours over the fastest of them."""
    ours = []
    for what, form, goal in (("forward", "", 0.75), ("forward", ", optimised", 0.75), ("training", "", 0.80)):
        theirs = [timing for timing in result["timings"][what] if timing["name"] in result["notes"]]
        if theirs:
            fastest = min(theirs, key=lambda timing: timing["ratio"])["name"]
            beside = paired(result["runs"], what, f"vimoe auto{form}", fastest)
            ours.append(f"{what}{form}, {_ratio(beside)} of {fastest} (goal {goal:.2f} {_reached(beside, goal)})")
    unfit = [peer for peer in result["notes"] if peer not in result["macs"]]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    words = [
        f"Ours beside the fastest peer, which has no optimised form: {'; '.join(ours)}." if ours else "",
        f"Versions: {versions}." if versions else "",
        f"Not in this type: {', '.join(unfit)}." if unfit else "",
        f"Not installed: {', '.join(result['missing'])}." if result["missing"] else "",
    ]
    title = f"### {name}, token routing, balanced load"
    return "\n".join([title, "", *_rows(result), "", " ".join(filter(None, words))])


def peer_notes(results: list[dict[str, Any]]) -> str:
    """Return notes on the arithmetic of each of the other libraries' layers."""
    shares = {peer: macs / result["macs"]["vimoe auto"] for result in results for peer, macs in result["macs"].items()}
    notes = {peer: note for result in results for peer, note in result["notes"].items()}
    return "\n".join(f"- {peer}: {shares[peer]:.3f} of our activated multiply-adds; {notes[peer]}" for peer in notes)


def model_table(name: str, result: dict[str, Any]) -> str:
    """Return the table of a whole model over its dense parent."""
    beside = []
    for parent, goal in (("dense", 1.00), ("dense, read tokens", 1.07)):
        words = []
        for what in ("forward", "training"):
            timing = paired(result["runs"], what, "vimoe", parent)
            words.append(f"{what} {_ratio(timing)} (goal {goal:.2f} {_reached(timing, goal)})")
        optimised_ratio = paired(result["runs"], "forward", "vimoe, optimised", f"{parent}, optimised")
        beside.append(f"ViMoE over {parent}: {'; '.join(words)}; both optimised {_ratio(optimised_ratio)}.")
    return "\n".join([f"### {name}: {result['of']}", "", *_rows(result), "", *beside])


def expert_table(result: dict[str, Any]) -> str:
    """Return the table of the cost of more experts."""
    timings = result["timings"]["forward"]
    last = timings[-1]
    lines = [
        "### More experts, k 1, 16 x 257 tokens, bfloat16, optimised, forward",
        "",
        "| N | ms | over N = 8 |",
        "|---|---|---|",
    ]
    lines += [f"| {t['name']} | {1e3 * t['seconds']:.1f} | {_ratio(t)} |" for t in timings]
    return "\n".join([*lines, "", f"Goal for N = {last['name']}: 1.30 {_reached(last, 1.30)}."])


def machines(results: dict[str, dict[str, Any]]) -> str:
    """Return a line for each machine that was used, with the kinds of tables that it made."""
    known: dict[str, set[str]] = {}
    for name, result in results.items():
        known.setdefault(json.dumps(result["machine"], sort_keys=True), set()).add(name.split()[0])
    lines = []
    for text, kinds in sorted(known.items()):
        words = ", ".join(f"{name} {value}" for name, value in json.loads(text).items())
        lines.append(f"Machine of {', '.join(sorted(kinds))}: {words}.")
    return "\n\n".join(lines)


def _rows(result: dict[str, Any]) -> list[str]:
    lines = [
        "| | forward, ms | over the floor | GFLOP/s | with backward, ms | over the floor | GFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for timing in result["timings"]["forward"]:
        trained = [t for t in result["timings"].get("training", []) if t["name"] == timing["name"]]
        cells = [cell for t in (timing, *trained) for cell in (f"{1e3 * t['seconds']:.1f}", _ratio(t), _speed(t))]
        lines.append("| " + " | ".join([timing["name"], *cells, *[""] * (6 - len(cells))]) + " |")
    return [*lines, "", f"A plain matrix product reaches {result['peak_gflops']:.0f} GFLOP/s."]


def _timing(result: dict[str, Any], what: str, name: str) -> dict[str, Any]:
    return next(t for t in result["timings"][what] if t["name"] == name)


def _ratio(timing: dict[str, Any]) -> str:
    return f"{timing['ratio']:.3f} [{timing['low']:.3f}, {timing['high']:.3f}]"


def _speed(timing: dict[str, Any]) -> str:
    return "" if timing["gflops"] is None else f"{timing['gflops']:.0f}"


def _reached(timing: dict[str, Any], goal: float) -> str:
    return "met" if timing["ratio"] <= goal else "within the interval" if timing["low"] <= goal else "missed"


def main() -> None:
    """Measure what has no results yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=6, help="that make each measurement, one after the other")
    parser.add_argument("--rounds", type=int, default=6, help="in each process")
    parser.add_argument("--only", default="*", help="names of measurements, with * for anything")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--measure", help="make one measurement in this process, and print it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # of other libraries
    measures = dict(measurements(args.rounds))
    if args.measure:
        print(json.dumps(measures[args.measure]()))
        return
    if args.processes < 2:
        parser.error(f"--processes {args.processes}: expected at least 2, of which an interval can be had")
    RESULTS.mkdir(exist_ok=True)
    for name in fnmatch.filter(measures, args.only):
        file = RESULTS / f"{name}.json"
        if args.redo or not file.exists():
            runs = list(in_processes(name, args.processes, args.rounds))
            write_json(file, {"processes": runs, "rounds": args.rounds, "commit": commit()})
            print(file, flush=True)
    write_page()


if __name__ == "__main__":
    main()
