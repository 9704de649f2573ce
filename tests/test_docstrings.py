"""Docstrings are plain English: they begin with a verb or a noun, and their sentences are short."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for part in ("vimoe", "benchmarks", "studies") for path in (ROOT / part).rglob("*.py"))
# A line that begins with one of these is a clause whose subject the reader has to find.
FRAGMENT = re.compile(
    r"(of|what|whatever|whether|which|how|who|whom|whose|where|wherever|when|why|that|those|in(?! -?\d)|to|on|at|from|"
    r"for|by|as|with|without|if|only|so|than|but|because|since|until|while|unless)\b(?!-)",
    re.IGNORECASE,
)
NAMED = ("Args", "Attributes", "Raises")  # sections whose entries are "name: text"
PLAIN = ("Returns", "Yields")
LIMIT = 0.03  # share of lines that may begin as a fragment
LONGEST = 40  # words of a sentence


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the docstring of a module and of every class and function in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def beginnings(text: str) -> Iterator[str]:
    """Yield what a reader's eye lands on: the first line, and the text of each entry of a section.

    An entry of Raises may begin with "if", as is usual.
    """
    yield text.partition("\n")[0]
    sections = re.findall(r"^(\w+):\n((?:(?: .*)?\n)+)", text + "\n\n", re.M)
    for title, body in sections:
        if title in PLAIN:
            yield inspect.cleandoc(body).partition("\n")[0]
        if title in NAMED:
            entries = [line for line in inspect.cleandoc(body).splitlines() if line and not line.startswith(" ")]
            texts = [entry.partition(": ")[2] for entry in entries]
            yield from (re.sub("^if ", "", each) if title == "Raises" else each for each in texts)


def fragments(text: str) -> list[str]:
    """Return the beginnings in a docstring that are fragments."""
    return [line for line in beginnings(text) if FRAGMENT.match(line)]


def long_sentences(text: str) -> list[str]:
    """Return the sentences of a docstring that have too many words; examples are left out."""
    text = re.sub(r"^ *>>>.*?(?=\n\s*\n|\Z)", "", text, flags=re.M | re.S)
    parts = re.split(r"[.!?:;](?=\s)|\n\s*\n|^\s*- |^\s*[\w, ]+: |^\s*\|", text, flags=re.M)
    return [" ".join(part.split()) for part in parts if len(re.findall(r"\w[\w'-]*", part)) > LONGEST]


def test_few_lines_begin_as_a_fragment() -> None:
    found, total = [], 0
    for path in SOURCES:
        for line, text in docstrings(path.read_text("utf-8")):
            total += len(list(beginnings(text)))
            found += [f"{path.relative_to(ROOT)}:{line}: {each}" for each in fragments(text)]
    share = len(found) / total
    assert share <= LIMIT, f"{len(found)} of {total} lines ({share:.1%}) begin as a fragment:\n" + "\n".join(found)


def test_no_sentence_is_long() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {each}"
        for path in SOURCES
        for line, text in docstrings(path.read_text("utf-8"))
        for each in long_sentences(text)
    ]
    assert not found, "\n".join(found)


def test_these_checks_see_what_is_wrong() -> None:
    source = '''
"""What this holds."""
def f(a, b, c):
    """Return a sum.

    Args:
        a: of a thing, which
            where it is long goes on
        b, c: number of things: which are many
        d: whether it is

    Returns:
        In which order.

    Raises:
        DataError: if there is none.
        ConfigError: where there is one.
    """
class A:
    """A class that's fine."""
    @property
    def b(self):
        """Whether it is."""
    async def c(self):
        def d():
            """From here on."""
'''
    found = [line for _, text in docstrings(source) for line in fragments(text)]
    assert sorted(found) == sorted(
        [
            "What this holds.", "of a thing, which", "whether it is", "In which order.", "where there is one.",
            "Whether it is.", "From here on.",
        ]
    )  # fmt: skip
    assert not fragments("For-loops are fine.") and not fragments("Format of it.")
    long = " ".join(["word"] * (LONGEST + 1))
    assert long_sentences(f"Short. {long}. Short.") == [long]
    assert not long_sentences(f"{long[:100]}.\n\n{long[:100]}.\n\n>>> {long}\n{long}\n\nArgs:\n    a: {long[:100]}")
