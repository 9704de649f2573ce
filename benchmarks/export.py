"""Latency of exported models in ONNX Runtime over that of their dense parent; and of an MoE layer's forms in ONNX.

    python benchmarks/export.py            # writes results/export.json

The models are a ViT-S/14 at 224 px, dense (as timm computes it, and with the tokens that its head reads alone), and
with MoE layers (N = 8, k = 1) in its last two blocks. The goal: at batch 1 the image-routed one takes at most 1.15
times as long as its share of multiply-adds of the dense one says. The forms are ways to write the experts of one
image-routed layer (257 tokens, 384 channels):

    split    slots sorted by expert, and split by the loads; empty products cost nothing (what vimoe exports)
    if       the same, with each expert's products inside an If
    gather   the chosen matrices gathered for each image, and batched products
    loop     a Loop over images, which gathers the matrices of one

All contestants run in turn in one process with one thread; ratios are medians over rounds of those within a round, with
95% intervals by bootstrap. Seconds are of processor time, because other jobs disturb it less than the clock.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from torch import nn

import vimoe
from vimoe.bench import timing
from vimoe.bench.result import machine
from vimoe.bench.timing import compare
from vimoe.models.export.onnx_file import OnnxFile
from vimoe.models.export.program import program_of, to_export, traced_images
from vimoe.run_folder import write_json

RESULT = Path(__file__).parent / "results" / "export.json"
EXPERTS, TOKENS, DIM, HIDDEN = 8, 257, 384, 1536


def dense() -> nn.Module:
    """Return a ViT-S/14 with random weights, the same on every call."""
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=1000).eval()


def models() -> dict[str, nn.Module]:
    """Return the contestants by name."""
    sparse = {
        f"vimoe, {routing} routing": vimoe.upcycle(
            dense(), vimoe.MoEConfig(layers="last:2", num_experts=EXPERTS, routing=routing)
        )
        for routing in ("image", "token")
    }
    return {"dense": dense(), "dense, read tokens": vimoe.set_reading(dense()), **sparse}


def session(file: Path) -> onnxruntime.InferenceSession:
    """Return a session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def layer(form: str) -> onnx.ModelProto:
    """Return the experts of a layer in a form: y (B, T, D) of x (B, T, D) and the expert (B,) of each image."""
    ffn = (
        "{p}1 = MatMul({x}, {a}) {p}2 = Add({p}1, {b}) {p}3 = Gelu({p}2) {p}4 = MatMul({p}3, {c}) {y} = Add({p}4, {d})"
    )

    def expert(e: int, x: str, y: str) -> str:
        return ffn.format(p=f"t{e}_", x=x, y=y, a=f"a{e}", b=f"b{e}", c=f"c{e}", d=f"d{e}")

    def branch(e: int) -> str:
        yes = f"then_branch = yes{e} () => (float[k,{TOKENS},{DIM}] u{e}) {{ {expert(e, f'x{e}', f'u{e}')} }}"
        no = f"else_branch = no{e} () => (float[k,{TOKENS},{DIM}] v{e}) {{ v{e} = Identity(x{e}) }}"
        return f"n{e} = Constant<value_ints=[{e}]>() l{e} = Gather(load, n{e}) m{e} = Greater(l{e}, zero) " + (
            f"y{e} = If(m{e}) <{yes}, {no}>"
        )

    every = range(EXPERTS)
    parts = ", ".join(f"x{e}" for e in every)
    sort = f"""size = Shape(expert) sorted, order = TopK<axis=0, largest=0>(expert, size)
        hot = OneHot<axis=-1>(expert, depth, flags) load = ReduceSum<keepdims=0>(hot, zero) xs = Gather(x, order)
        {parts} = Split<axis=0>(xs, load)"""
    join = f"""ys = Concat<axis=0>({", ".join(f"y{e}" for e in every)})
        again, back = TopK<axis=0, largest=0>(order, size) y = Gather(ys, back)"""
    pick = """one = Constant<value_ints=[1]>() wa = Gather(a, {e}) wb0 = Gather(b, {e}) wb = Unsqueeze(wb0, {axis})
        wc = Gather(c, {e}) wd0 = Gather(d, {e}) wd = Unsqueeze(wd0, {axis})"""
    gathered = ffn.format(p="t", x="{x}", y="{y}", a="wa", b="wb", c="wc", d="wd")
    bodies = {
        "split": " ".join([sort, *(expert(e, f"x{e}", f"y{e}") for e in every), join]),
        "if": " ".join([sort, *(branch(e) for e in every), join]),
        "gather": pick.format(e="expert", axis="one") + " " + gathered.format(x="x", y="y"),
        "loop": f"""size = Shape(expert) trip = Squeeze(size) y = Loop(trip, keep) <body = image (int64 i, bool on) =>
            (bool still, float[{TOKENS},{DIM}] yi) {{ still = Identity(on) xi = Gather(x, i) ei = Gather(expert, i)
            {pick.format(e="ei", axis="zero")} {gathered.format(x="xi", y="yi")} }}>""",
    }
    shape = f"float[B,{TOKENS},{DIM}]"
    head = f'<ir_version: 9, opset_import: ["": 20]> layer ({shape} x, int64[B] expert) => ({shape} y)'
    text = f"{head} {{ {bodies[form]} }}"
    model = onnx.parser.parse_model(text)
    draw, names = np.random.default_rng(0), set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    weights = {
        "a": (EXPERTS, DIM, HIDDEN), "b": (EXPERTS, HIDDEN), "c": (EXPERTS, HIDDEN, DIM), "d": (EXPERTS, DIM),
    }  # fmt: skip
    tensors = {name: draw.normal(0, 0.02, size).astype("float32") for name, size in weights.items()}
    tensors |= {f"{name}{e}": tensor[e] for name, tensor in tensors.items() for e in every}
    tensors |= {"zero": np.array([0]), "depth": np.array(EXPERTS), "flags": np.array([0, 1]), "keep": np.array(True)}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(t, name) for name, t in tensors.items() if name in names
    )
    return model


def timed(runs: dict[str, Callable[[], object]], floor: str, rounds: int) -> list[dict[str, object]]:
    """Return the timing of each contestant over the floor's."""
    with mock.patch.object(timing, "time", SimpleNamespace(perf_counter=time.process_time)):
        times = compare(timing.interleaved(runs, rounds), (floor,), {})
    print(*times, "", sep="\n", flush=True)
    return [asdict(each) for each in times]


def main() -> None:
    """Write and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    values: dict[str, object] = {"machine": {**machine(), "onnxruntime": onnxruntime.__version__}}
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for form in ("split", "if", "gather", "loop"):
            files[form] = Path(folder) / f"{form}.onnx"
            onnx.save(layer(form), files[form])
        forms = {form: session(file) for form, file in files.items()}
        for batch in args.batches:
            x = draw.normal(size=(batch, TOKENS, DIM)).astype("float32")
            feed = {"x": x, "expert": draw.integers(EXPERTS, size=batch)}
            outputs = [each.run(None, feed)[0] for each in forms.values()]
            assert all(np.allclose(outputs[0], other, atol=1e-4) for other in outputs[1:])
            runs = {form: lambda s=each, feed=feed: s.run(None, feed) for form, each in forms.items()}
            values[f"forms of a layer, batch {batch}"] = timed(runs, "split", args.rounds)
        sessions, macs = {}, {}
        for name, model in models().items():
            exported, file = to_export(model), Path(folder) / "model.onnx"
            OnnxFile().write(program_of(exported, traced_images(exported)), file)
            sessions[name], macs[name] = session(file), vimoe.count(model).computed_macs
            if "image" in name:
                OnnxFile().quantize(file, small := file.with_name("small.onnx"))
                sessions[f"{name}, int8"], macs[f"{name}, int8"] = session(small), macs[name]
    for batch in args.batches:
        feed = {"images": draw.normal(size=(batch, 3, 224, 224)).astype("float32")}
        runs = {name: lambda s=each, feed=feed: s.run(None, feed) for name, each in sessions.items()}
        times = timed(runs, "dense", args.rounds)
        for each in times:
            share = macs[str(each["name"])] / macs["dense"]
            each["macs"] = macs[str(each["name"])]
            each["over_macs"] = {end: float(each[end]) / share for end in ("ratio", "low", "high")}  # type: ignore[arg-type]
            print(f"{each['name']}, batch {batch}: time over multiply-adds {each['over_macs']}", flush=True)
        values[f"models, batch {batch}"] = times
    write_json(RESULT, values)


if __name__ == "__main__":
    main()
