"""The examples run: those in docstrings, the README's ten lines, and the code of docs/python.md and the guides."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.scenery import scenes
from helpers.tiny import randomise, shrink_timm
from timm.layers import Mlp
from torch import nn

import vimoe
import vimoe.moe.layer
from vimoe.config.model import FAMILIES
from vimoe.moe.ffn import KINDS
from vimoe.moe.router import TokenLayout

ROOT = Path(__file__).parent.parent
WITH_EXAMPLES = [path for path in sorted((ROOT / "vimoe").rglob("*.py")) if ">>> " in path.read_text("utf-8")]


def examples() -> dict[str, doctest.DocTest]:
    """The docstrings with examples of all modules, by name."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in WITH_EXAMPLES]
    found = [test for name in names for test in doctest.DocTestFinder().find(importlib.import_module(name))]
    return {test.name: test for test in found if test.examples}


EXAMPLES = examples()


def run(test: doctest.DocTest) -> None:
    doctest.DebugRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_gives_what_its_docstring_says(name: str) -> None:
    run(EXAMPLES[name])


@pytest.mark.parametrize("name", [name for name in vimoe.__all__ if name != "__version__"])
def test_every_public_name_has_an_example(name: str) -> None:
    assert f"vimoe.{name}" in code_of(getattr(vimoe, name).__doc__)


def code_of(docstring: str) -> str:
    """The code of the examples in a docstring."""
    return "".join(example.source for example in doctest.DocTestParser().get_examples(docstring))


def test_no_example_is_missed() -> None:
    assert len(WITH_EXAMPLES) > 20 and len(EXAMPLES) > 30
    written = sum(path.read_text("utf-8").count(">>> ") for path in WITH_EXAMPLES)
    assert sum(len(test.examples) for test in EXAMPLES.values()) == written


def test_these_checks_can_fail() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    with pytest.raises(doctest.DocTestFailure):
        run(wrong)
    assert "vimoe.plan" not in code_of("Of `vimoe.plan`.\n\n>>> 1 + 1\n2\n")


def blocks(file: str) -> list[str]:
    """The Python code in a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text("utf-8"), re.M | re.S)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """In a folder with scenes, each model of timm is built tiny and with random weights."""
    shrink_timm(monkeypatch)
    monkeypatch.chdir(tmp_path)
    scenes(tmp_path / "street")


def test_the_first_lines_of_the_readme(tiny: None) -> None:
    images, labels = torch.randn(8, 3, 28, 28), torch.arange(8)
    names = {"images": images, "labels": labels, "validation_loader": [(images, labels)]}
    exec(blocks("README.md")[0], names | {"criterion": nn.CrossEntropyLoss()})
    assert vimoe.load("my-vimoe").num_classes == 100


def test_the_forward_of_the_readme_is_the_layer_s() -> None:
    layer = vimoe.MoE(Mlp(16, 32), vimoe.MoEConfig(num_experts=4), TokenLayout(1, class_token=True))
    randomise(layer)
    names = vars(vimoe.moe.layer).copy()
    exec(blocks("README.md")[1], names)
    tokens = torch.randn(6, 5, 16)
    torch.testing.assert_close(names["forward"](layer, tokens), layer(tokens))


@pytest.fixture
def own_entries() -> Iterator[None]:
    """Take what a page enters into the tables out again, since it is no family of other tests."""
    tables: tuple[dict[Any, Any], ...] = (FAMILIES, KINDS)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_the_page_on_python_runs(tiny: None, own_entries: None) -> None:
    code = blocks("docs/python.md")
    assert len(code) >= 3
    for index, block in enumerate(code):
        if "runs/street" in block:  # one after the other into the same folder
            block = block.replace("runs/street", f"runs/{index}").replace("epochs=40", "epochs=1, batch_size=2")
        exec(block, {"__name__": "page"})
        if "runs/" in block:
            vimoe.load(f"runs/{index}/model")


def pools_and_capacity(names: dict[str, Any]) -> None:
    assert sum(names["loads"][:2]) == 8 * 6 and sum(names["loads"]) == 8 * 16
    assert names["most"] == 13


def orthogonal(names: dict[str, Any]) -> None:
    chosen = names["evidence"].layers[0].diversity["chosen"]
    assert chosen["cosine"] == pytest.approx(0, abs=1e-3)
    assert chosen["effective_rank"] == pytest.approx(2, abs=0.01)


def merged(names: dict[str, Any]) -> None:
    assert names["dense"](names["images"]).shape == (8, 10)


def compared(names: dict[str, Any]) -> None:
    assert names["look"]["parent"]["what"] == "given" and names["look"]["weights"]["rho"] == 1


def probed(names: dict[str, Any]) -> None:
    assert len(names["probe"]["right"]) == 2


def learnt_in_tasks(names: dict[str, Any]) -> None:
    assert [len(row) for row in names["tasks"]["own"]["accuracy"]] == [1, 2, 3, 4, 5]


ELSEWHERE = ("distributed",)  # its code needs Ray and eight GPUs, and is compiled only
GUIDES = sorted(path.stem for path in (ROOT / "docs/guides").glob("*.md") if "```python" in path.read_text("utf-8"))
FOUND = {  # what a page's names hold after its code has run, where the page says it
    "analysis": probed,
    "comparing_experts": compared,
    "continual_learning": learnt_in_tasks,
    "experts": orthogonal,
    "groups_and_capacity": pools_and_capacity,
    "losses": merged,
}


@pytest.mark.parametrize("page", GUIDES)
def test_the_code_of_a_guide_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its blocks run one after the other; one in a list continues a loop of the reader's, and is not run."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code, names = blocks(f"docs/guides/{page}.md"), dict[str, Any](__name__="page")
    if "transformers" in "".join(code):
        pytest.importorskip("transformers")
    for block in code:
        compiled = compile(block, page, "exec")
        if page not in ELSEWHERE:
            exec(compiled, names)
    FOUND.get(page, lambda _: None)(names)


def test_every_guide_with_a_result_to_check_is_run() -> None:
    assert set(FOUND) <= set(GUIDES)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft asks
def test_the_page_on_any_vit_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("transformers", "peft"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("docs/any_vit.md"):
        exec(block, names)
    x = names["images"]
    torch.testing.assert_close(names["model"](x).logits, names["dense"].eval()(x).logits, rtol=1e-4, atol=1e-5)
    assert names["output"].loss > 0 and vimoe.load("my-vimoe").config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    torch.testing.assert_close(names["again"].eval()(x).logits, vimoe.load("my-vimoe")(x).logits)
