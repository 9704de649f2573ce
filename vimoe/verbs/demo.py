"""The verb `demo`."""

from __future__ import annotations

from vimoe.config.data import TASKS
from vimoe.verbs.options import Result, parser_of


def demo(argv: list[str]) -> Result:
    """Show a tour of a few minutes on scikit-learn's handwritten digits: train, upcycle, compare, look at experts.

    Example: vimoe demo --task segmentation
    """
    parser = parser_of(demo, out="folder to create (default: runs/demo-DATE-TIME)")
    parser.add_argument("--task", choices=list(TASKS), default="classification", help="kind of model to show")
    options = parser.parse_args(argv)
    from vimoe.demo.tours import run_demo

    return run_demo(options["out"], options["task"])
