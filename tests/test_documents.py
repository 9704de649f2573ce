"""Documents name files, modules, sections and settings that exist; the log is history and may name old ones."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from vimoe.config.settings import Settings, flat

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("studies/*/*.md"),
    )
    if path.name not in ("log.md", "CHANGELOG.md")
}
FOLDERS = ("", "vimoe", "tests/stories", "tests/helpers", "benchmarks", "studies", "docs")  # that names start from


def missing_files(text: str, folder: Path) -> list[str]:
    """Return the Python files in backquotes, and the targets of links, that do not exist."""
    files = re.findall(r"`(?:python )?([\w/]+\.py)\b", text)
    found = [name for name in files if not any((ROOT / start / name).is_file() for start in FOLDERS)]
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    return found + [link for link in links if not (folder / link).exists()]


def missing_names(text: str) -> list[str]:
    """Return the names that begin with "vimoe." and cannot be imported."""
    return [name for name in sorted(set(re.findall(r"`(vimoe(?:\.\w+)+)", text))) if not _exists(name)]


def missing_sections(text: str, folder: Path) -> list[str]:
    """Return the links to sections that their document does not have."""
    found = []
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", text):
        target = (folder / file).read_text("utf-8") if file else text
        sections = [re.sub(r"[^\w -]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", target, re.M)]
        if anchor not in [title.replace(" ", "-") for title in sections]:
            found.append(f"{file}#{anchor}")
    return found


def missing_settings(text: str) -> list[str]:
    """Return the settings in backquotes, or flags, of sections that have no such setting."""
    found = re.findall(r"(?:`|--)((?:moe|train|data)\.[a-z_]+\w)\b(?!\*)|--(model\.\w+)", text)
    names = {one or other for one, other in found} - {"train.tar"}  # an archive
    return sorted(name for name in names if not name.endswith("_") and name not in flat(Settings()))


def _exists(name: str) -> bool:
    module, *rest = name.split(".")
    value: object = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(value, part):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_a_document_names_what_is_there(document: str) -> None:
    text, folder = DOCUMENTS[document], (ROOT / document).parent
    assert not missing_files(text, folder) + missing_names(text) + missing_sections(text, folder)
    assert not missing_settings(text)


def test_the_checks_see_what_is_wrong() -> None:
    text = "`vimoe/nowhere.py` [a](nowhere.md) `vimoe.upcycle` `vimoe.moe.layer.Nothing` [b](#parts)\n\n## The parts\n"
    assert missing_files(text, ROOT) == ["vimoe/nowhere.py", "nowhere.md"]
    assert missing_names(text) == ["vimoe.moe.layer.Nothing"]
    assert missing_settings("`moe.gate` `moe.gait` --train.lrr 1 `--model.nam x` `train.router_freeze_*`") == [
        "model.nam", "moe.gait", "train.lrr",
    ]  # fmt: skip
    assert missing_sections(text, ROOT) == ["#parts"] and not missing_sections("[c](#a-b)\n# A b\n", ROOT)
