"""The verb `plan`."""

from __future__ import annotations

from typing import Any

from vimoe.config.parallel import bytes_of
from vimoe.errors import ConfigError
from vimoe.verbs.conversion import conversion_of, costs
from vimoe.verbs.options import Result, parser_of


def plan(argv: list[str]) -> Result:
    """Show the layers that would be converted and their cost; with --devices, the memory of a training on these too.

    Example: vimoe plan --model.name vit_small_patch14_dinov2 --model.img_size 224 --moe.layers last:2
    """
    parser = parser_of(plan)
    many = "number of devices to train on; takes the options data and train as well, shown by --devices 8 --help"
    parser.add_argument("--devices", type=int | None, default=None, help=many)
    parser.add_argument("--memory", type=str | None, default=None, help="memory of each device, such as 80GB")
    over_devices = any(arg.partition("=")[0] == "--devices" for arg in argv)
    parser.add_sections("model", "moe", *(("data", "train") if over_devices else ()))
    options = parser.parse_args(argv)
    devices, limit = _devices(options)
    settings, conversion = conversion_of(parser, options, argv)
    from vimoe.models.create import create
    from vimoe.models.upcycling import needs_images
    from vimoe.models.upcycling import plan as make_plan

    at_hand = settings.model.pretrained and settings.model.name.startswith("local-dir:")
    if conversion.start and at_hand and not needs_images(settings.moe):
        conversion = make_plan(create(settings.model), settings.moe, read=settings.model.read)
    text, values = str(conversion), costs(conversion)
    if devices is None:
        return text, values
    from vimoe.experiments.size import size_of

    size = size_of(settings, devices, limit)
    return f"{text}\n\n{size}", {**values, "size": size.to_dict()}


def _devices(options: Any) -> tuple[int | None, float]:
    """Return the number of devices of `plan`, None without one, and the memory of each in bytes."""
    devices, memory = options["devices"], options["memory"]
    if devices is None and memory is None:
        return None, 0
    if devices is None or memory is None:
        missing, example = ("--devices", 8) if devices is None else ("--memory", "80GB")
        raise ConfigError(
            f"{missing} is required for the memory of a training: add it, for example {missing} {example}"
        )
    if devices < 1:
        raise ConfigError(f"--devices {devices}: expected at least 1")
    return devices, bytes_of(memory)
