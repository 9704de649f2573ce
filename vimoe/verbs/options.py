"""Options that several verbs have, and what a verb returns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from vimoe.config.analysis import OVERRULED_IMAGES
from vimoe.config.command_line import Parser
from vimoe.errors import ConfigError

Result = tuple[str, dict[str, Any]]  # text for a person, values for --json
Verb = Callable[[list[str]], Result]  # its argument is what follows the verb


def parser_of(verb: Verb, **extra: str) -> Parser:
    """Return the parser of a verb: its docstring is the help, and --json is there.

    Args:
        verb: function of the verb.
        extra: help text of each option more, by its name; such an option takes a text.
    """
    summary, _, example = (verb.__doc__ or "").partition("Example:")
    parser = Parser(prog=f"vimoe {verb.__name__}", description=summary.strip(), epilog=f"Example: {example.strip()}")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is one JSON object")
    for name, text in extra.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text)
    return parser


def add_inference(parser: Parser) -> None:
    """Add the options that change the inference of a segmentation model from that of its run."""
    for name, kind in (("inference", str), ("flip_test", bool)):
        what = "segmentation only: as in vimoe train (default: setting of the run)"
        parser.add_argument(f"--data.{name}", type=kind | None, default=None, help=what)


def add_sampling(parser: Parser, note: str = "") -> None:
    """Add the options that draw the images that are measured; `note` is the end of the first one's help text."""
    what = f"number of images for interventions, drawn at random{note}"
    parser.add_argument("--overrule", type=int, default=OVERRULED_IMAGES, help=what)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws")


def required_out(options: Any, example: str = "runs/first", kind: str = "folder") -> str:
    """Return --out. Raises ConfigError without one."""
    if not options["out"]:
        raise ConfigError(f"--out is required: name the {kind} to create, for example --out {example}")
    return options["out"]


def tell(line: str) -> None:
    """Print a line for the person who waits, beside the answer."""
    print(f"vimoe: {line}", file=sys.stderr)
