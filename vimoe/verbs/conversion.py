"""The conversion that `plan` and `count` are asked about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vimoe.config.command_line import Parser
from vimoe.config.settings import Settings

if TYPE_CHECKING:
    from vimoe.models.upcycling import Plan


def conversion_of(parser: Parser, options: Any, argv: list[str]) -> tuple[Settings, Plan]:
    """Return the settings that were asked for, and the plan of their model without weights."""
    settings = parser.settings(options)
    from vimoe.models.names import check_layer_names, check_name

    check_name(settings.model)
    check_layer_names(settings.model, settings.moe.selection)
    from vimoe.models.continued import plan_of_own, with_own_layers
    from vimoe.models.create import create_without_weights
    from vimoe.models.upcycling import plan as make_plan

    settings = with_own_layers(settings, parser.given(argv, "moe"))
    own = plan_of_own(settings.model)
    return settings, own or make_plan(create_without_weights(settings.model), settings.moe, read=settings.model.read)


def costs(conversion: Plan) -> dict[str, Any]:
    """Return what a plan says for --json."""
    dense = {name: getattr(conversion.dense, name) for name in ("params", "macs", "computed_macs")}
    moe = {name: getattr(conversion.moe, name) for name in ("params", "activated_params", "macs", "computed_macs")}
    change = conversion.start and conversion.start.change
    return {"dense": dense, "moe": {**moe, "layers": [site.name for site in conversion.sites], "change": change}}
