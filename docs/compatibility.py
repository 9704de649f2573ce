"""Write docs/compatibility.md: what holds for each architecture once it is upcycled. Run it from anywhere.

Each row of `compatibility_rows` is built small, with random weights, and upcycled with 4 experts and token routing in
all of its blocks; then each probe of `compatibility_probes` is tried. Findings are kept in docs/compatibility.json, row
by row, and the page is made of them.

    python docs/compatibility.py                probe what the file does not have yet, and write the page
    python docs/compatibility.py swin clip      probe again the rows with one of these words, and no others
    python docs/compatibility.py --all          probe all again
    python docs/compatibility.py --quick        leave out inductor, which takes a minute for a row

A finding is "yes", "no" with the reason, or "unknown" with the error. "no" is what vimoe, the library or the dense
model itself refuses; "unknown" is a failure that nobody has explained.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from compatibility_probes import PROBES, probe
from compatibility_rows import ARCHITECTURES, Architecture

PAGE, FOUND = Path(__file__).with_suffix(".md"), Path(__file__).with_suffix(".json")
Found = dict[str, dict[str, str]]

COLUMNS = tuple(name for name in PROBES if name != "inductor")
HEAD = """# What holds for which architecture

Made by `python docs/compatibility.py`, which builds each architecture small with random weights, upcycles all of its
FFNs into 4 experts with token routing, and tries what the columns say. Nothing here was measured on a trained model.

- **identity**: the upcycled model computes what the dense one did. **backward**: gradients of all that is no FFN are
  the dense model's, and gradients reach the experts of each layer. **checkpointing**: in training mode the library's
  own switch changes no gradient.
- **compile**: `torch.compile(fullgraph=True, backend="aot_eager")`, forward and backward, changes no gradient. This
  captures and differentiates the graphs, and leaves out the code that inductor would write of them, which takes a
  minute for each architecture; a sample was compiled by inductor too and is named below each table.
- **bfloat16**: as the dense model in bfloat16, to 5% or twice what rounding changes in that. **save, load**: a model
  folder brings it back. **export**: `torch.export.export`, run on other images. **image routing**: one decision for an
  image.

A family is what the library describes in one module or configuration. "no" has its reason below the table; "unknown"
is a failure that nobody has explained.
"""
TOGETHER = ("identity", "backward", "save, load", "compile", "checkpointing")


def holding(found: Found, columns: tuple[str, ...] = TOGETHER) -> list[Architecture]:
    """Return the architectures for which all of these columns hold."""
    return [each for each in ARCHITECTURES if all(found.get(each.key, {}).get(name) == "yes" for name in columns)]


def page(found: Found) -> str:
    """Return the page as Markdown."""
    known = {each.key: found.get(each.key, {}) for each in ARCHITECTURES}
    five, full, upcycled = (len(holding(found, columns)) for columns in (TOGETHER, COLUMNS, TOGETHER[:1]))
    parts = [
        HEAD,
        f"\n{len(ARCHITECTURES)} architectures of {len(families())} families, of which {upcycled} can be upcycled. "
        f"{full} have all columns. These five hold together for {five}: {'; '.join(TOGETHER)}.\n",
    ]
    for library in dict.fromkeys(each.library for each in ARCHITECTURES):
        rows = [each for each in ARCHITECTURES if each.library == library]
        columns = ("family", *COLUMNS)
        parts.append(f"\n## {library}\n\n| architecture | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n")
        for each in rows:
            cells = [known[each.key].get(name, "not probed").partition(":")[0] for name in COLUMNS]
            parts.append(f"| {each.name} | {each.family} | {' | '.join(cells)} |\n")
        compiled = [each.name for each in rows if known[each.key].get("inductor") == "yes"]
        parts.append(f"\nCompiled by inductor too: {', '.join(compiled)}.\n\n" if compiled else "\n")
        parts += [f"- {line}\n" for each in rows for line in reasons(each, known[each.key])]
    return "".join(parts)


def families() -> dict[tuple[str, str], list[Architecture]]:
    """Return the architectures of each family, by library and name."""
    found: dict[tuple[str, str], list[Architecture]] = {}
    for each in ARCHITECTURES:
        found.setdefault((each.library, each.family), []).append(each)
    return found


def reasons(of: Architecture, found: dict[str, str]) -> Iterator[str]:
    """Yield a line for each reason why something does not hold, with the columns that it is about."""
    why: dict[str, list[str]] = {}
    for name, value in found.items():
        if value != "yes":
            why.setdefault(value, []).append(name)
    for value, columns in why.items():
        said = "all columns" if len(columns) == len(found) else ", ".join(columns)
        shown = value.replace("*", r"\*")  # of vit_*, which Markdown would take for emphasis
        yield f"**{of.name}**, {said}: {shown}."


def read() -> Found:
    """Return the findings in the file."""
    found: Found = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    return found


def main(arguments: list[str]) -> None:
    """Probe, and write the file and the page."""
    parser = argparse.ArgumentParser(description="Write docs/compatibility.md.")
    parser.add_argument("words", nargs="*", help="probe again the rows whose names have one of these words")
    parser.add_argument("--all", action="store_true", help="probe all rows again")
    parser.add_argument("--quick", action="store_true", help="leave out inductor, which takes a minute for a row")
    given = parser.parse_args(arguments)
    found = read()
    for each in ARCHITECTURES:
        again = given.all or any(re.search(word, each.key) for word in given.words)
        known = {} if again else found.get(each.key, {})
        all_of_them = (*COLUMNS, *["inductor"] * (each.inductor and not given.quick))
        wanted = [name for name in all_of_them if name not in known]
        if not wanted or (given.words and not again):
            continue
        new = {**known, **probe(each, wanted)}
        found[each.key] = {name: new[name] for name in PROBES if name in new}
        print(each.key, found[each.key], flush=True)
        kept = {one.key: found[one.key] for one in ARCHITECTURES if one.key in found}
        FOUND.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(found), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
