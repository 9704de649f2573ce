"""The verb `count`."""

from __future__ import annotations

from vimoe.verbs.conversion import conversion_of, costs
from vimoe.verbs.options import Result, parser_of


def count(argv: list[str]) -> Result:
    """Count parameters, activated parameters and multiply-adds before and after conversion; download nothing.

    Example: vimoe count --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers all --json
    """
    parser = parser_of(count)
    parser.add_sections("model", "moe")
    _, conversion = conversion_of(parser, parser.parse_args(argv), argv)
    return "\n".join(str(conversion).splitlines()[:2]), costs(conversion)
