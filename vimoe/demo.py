"""The tours by task."""

from __future__ import annotations

from typing import Any

from vimoe.config import Task
from vimoe.tour import tiny_models, tour_folder
from vimoe.tour_digits import tour_of_digits
from vimoe.tour_scenes import tour_of_scenes

TOURS = {"classification": tour_of_digits, "segmentation": tour_of_scenes}


def run_demo(out: str | None, task: Task = "classification") -> tuple[str, dict[str, Any]]:
    """Runs a tour. Returns what to print and the figures.

    Args:
        out: folder to make; by default runs/demo-DATE-TIME.
        task: which of them.
    """
    with _tiny_models():
        return _tour(out)


@contextmanager
def _tiny_models() -> Iterator[None]:
    """One thread, for more would wait for one another, long on a busy machine; idle experts are told at the end."""
    threads, log = torch.get_num_threads(), logging.getLogger("vimoe")
    level = log.level
    torch.set_num_threads(1)
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        log.setLevel(level)


def _tour(out: str | None) -> tuple[str, dict[str, Any]]:
    start = time.perf_counter()
    folder = runs.new_run(out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    console = Console(stderr=True)
    data = load_data(DIGITS)
    console.print(f"A tour on scikit-learn's handwritten digits: {data}")
    parent = _train(folder / "parent", MoEConfig(layers="none"), FIRST, None)

    models: dict[str, list[nn.Module]] = {arm.name: [] for arm in ARMS}
    for seed in SEEDS:
        for arm in ARMS:
            console.print(f"seed {seed}: {arm.name}")
            name = arm.name.replace(",", "").replace(" ", "-").lower()
            run = _train(folder / f"{name}-seed{seed}", arm.moe, replace(FURTHER, seed=seed), parent)
            models[arm.name].append(load(run / runs.MODEL))

    console.print("analysing and pruning the ViMoEs")
    evidence: list[Evidence] = []
    decided: list[Pruning] = []
    models[PRUNED] = []
    for seed in SEEDS:
        run = folder / f"vimoe-seed{seed}"
        evidence.append(FinishedRun(run).analyze(draws=5))
        pruned = load(run / runs.MODEL)
        decided.append(prune(pruned, evidence[-1], _loader(pruned, data.val)))
        models[PRUNED].append(pruned)

    everything = [load(parent / runs.MODEL), *(model for group in models.values() for model in group)]
    measured = receipts(everything, _loader(everything[0], data.test))
    rest = iter(measured[1:])
    table = {"parent": measured[:1], **{name: [next(rest) for _ in group] for name, group in models.items()}}
    others = [name for name in table if name not in ("parent", ARMS[0].name)]
    comparisons = [compare(table, name, ARMS[0].name, len(others)) for name in others]
    kept = [keeps(*each) for each in zip(SEEDS, decided, evidence, strict=True)]

    seconds = time.perf_counter() - start
    report = _report(folder, data, table, comparisons, kept, decided, evidence, seconds)
    summary = {
        "table": {name: [receipt.to_dict() for receipt in group] for name, group in table.items()},
        "comparisons": comparisons,
        "pruned": [done.to_dict() for done in decided],
        "seconds": seconds,
        "report": str(report),
    }
    runs.write_json(folder / runs.SUMMARY, {"schema": runs.SCHEMA, "command": "demo", **summary})
    rows = [RECEIPT_HEADER, *rows_of(table)]
    lines = ["".join([f"{cells[0]:<25}", *(f"{cell:>17}" for cell in cells[1:])]) for cells in rows]
    text = "\n".join(["", *lines, "", *comparisons, "", *kept, "", DISCLAIMER, f"{seconds:.0f} s; report: {report}"])
    return text, summary


DISCLAIMER = (
    "This is a tour: a tiny model on tiny images, to show what the tool does. It says nothing about ViMoE on real data."
)


def rows_of(table: dict[str, list[Receipt]]) -> list[tuple[str, ...]]:
    """The table's rows under RECEIPT_HEADER."""
    return [receipt_row(name, [receipt.to_dict() for receipt in group]) for name, group in table.items()]


def compare(table: dict[str, list[Receipt]], name: str, control: str, comparisons: int) -> str:
    """What the seeds support of one arm against another, for this one parent: the paired difference of the top-1.

    With its 95% interval (Student's t), widened for as many comparisons as are made (Bonferroni). A difference cannot
    be known better than to one image, so seeds that agree by chance do not make it certain.
    """
    pairs = list(zip(table[name], table[control], strict=True))
    differences = [100 * (a.score.rank[0] - b.score.rank[0]) for a, b in pairs]
    mean, seeds = statistics.fmean(differences), len(pairs)
    error = max(statistics.stdev(differences), 100 / pairs[0][0].score.images) / seeds**0.5
    half = float(stats.t.ppf(1 - 0.025 / comparisons, seeds - 1)) * error
    verdict = "cannot be told apart" if abs(mean) <= half else "better" if mean > 0 else "worse"
    return (
        f"{name} against {control}: {mean:+.2f} points of top-1, 95% interval {mean - half:+.2f} to "
        f"{mean + half:+.2f} over {seeds} seeds and {comparisons} comparisons: {verdict}"
    )


def keeps(seed: int, done: Pruning, evidence: Evidence) -> str:
    """Which layers a seed kept, what losing each would have cost, and how many experts no validation image chose."""
    kept = [f"{step.layer} ({step.change.loss.value:+.3f})" for step in done.kept]
    why = " (nats of validation loss without its routed experts)" if kept else ""
    total = done.steps[-1].total if done.steps else None
    removed = f"; the {len(done.steps)} removed cost {total.loss} together" if total else ""
    idle = sum(int((layer.load == 0).sum()) for layer in evidence.layers)
    experts = sum(len(layer.load) for layer in evidence.layers)
    text = f"seed {seed} keeps {', '.join(kept) or 'no MoE layer'}"
    return f"{text}{why}{removed}; {idle} of {experts} experts were idle on validation"


def _train(out: Path, moe: MoEConfig, config: TrainConfig, parent: Path | None) -> Path:
    """One run: the parent from scratch, or a further training that starts from it."""
    model = PARENT if parent is None else ModelConfig(name=f"local-dir:{parent / runs.MODEL}")
    run_training(Settings(model=model, moe=moe, data=DIGITS, train=config), out)
    return out


def _loader(model: nn.Module, samples: Any) -> Any:
    return eval_loader(samples, preprocessing(model), batch_size=100, workers=0)


def _report(
    folder: Path, data: Data, table: dict[str, list[Receipt]], comparisons: list[str], kept: list[str],
    decided: list[Pruning], evidence: list[Evidence], seconds: float,
) -> Path:  # fmt: skip
    page = Page("vimoe: a tour on handwritten digits", folder / "figures")
    page.text(
        f"A small dense ViT, the parent, was trained on {len(data.train)} images for {FIRST.epochs} epochs. From it "
        f"each arm below was trained for {FURTHER.epochs} further epochs with the same settings, over {len(SEEDS)} "
        f"seeds. Validation ({len(data.val)} images) chose the epoch and decided what to prune; the table is of the "
        f"{len(data.test)} test images. It took {seconds:.0f} seconds."
    )
    page.text(DISCLAIMER)
    page.heading("Results")
    page.table(RECEIPT_HEADER, rows_of(table))
    page.items([f"{arm.name}: {arm.note}" for arm in ARMS])
    page.text(
        f"Mean ± standard deviation over seeds, all from one parent. MACs are multiply-adds of one image; images/s was "
        f"measured in turns on this machine. What {len(SEEDS)} seeds support:"
    )
    page.items(comparisons)
    page.heading("Layers kept, and why")
    page.items(kept)
    for seed, done in zip(SEEDS, decided, strict=True):
        page.text(f"Seed {seed}", note=True)
        page.items(str(done).splitlines())
    add_routing(page, evidence[0].to_dict(), "Routing")
    page.text("The routing shown is that of seed 0; each run's folder has its own report.", note=True)
    page.heading(f"Training of the {VIMOE}, seed 0")
    page.figure(curves(folder / "vimoe-seed0" / "metrics.csv"), "curves", "Loss and accuracy by epoch.")
    page.figure(loads(folder / "vimoe-seed0" / "load.csv"), "load", "Share of each expert in training, by epoch.")
    return page.write(folder / "report.html")
    folder = tour_folder(out)
    with tiny_models():
        return TOURS[task](folder)
