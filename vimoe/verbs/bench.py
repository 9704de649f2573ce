"""The verb `bench`."""

from __future__ import annotations

from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.moe import MoEConfig
from vimoe.errors import ConfigError
from vimoe.verbs.options import Result, parser_of


def bench(argv: list[str]) -> Result:
    """Time the MoE layer (`layer`) or a whole model (`model`) against dense FFNs of the same arithmetic.

    Example: vimoe bench layer --moe.routing token --bench.dtype bfloat16
    """
    what = argv[0] if argv and not argv[0].startswith("-") else None
    if what not in ("layer", "model") and argv[:1] not in (["-h"], ["--help"]):
        raise ConfigError(f"bench {what or 'alone'}: expected layer or model, for example vimoe bench layer")
    parser = parser_of(bench)
    parser.prog += f" {what or 'layer|model'}"
    if what is None:
        parser.epilog = (
            f"These are the options of vimoe bench layer; for a model, see vimoe bench model --help. {parser.epilog}"
        )
    if what == "model":
        parser.epilog = "Example: vimoe bench model --model.name vit_small_patch14_dinov2 --moe.layers last:2"
        parser.add_sections("model", "moe")
        parser.add_class_arguments(ModelBench, "bench")
    else:
        parser.add_sections("moe")
        parser.add_class_arguments(LayerBench, "bench")
    options = parser.parse_args(argv[what is not None :])
    shape, settings = parser.instantiate(options)["bench"], parser.settings(options)
    if what == "layer" and settings.moe.layers != MoEConfig.layers:
        raise ConfigError(
            f"moe.layers={settings.moe.layers!r} with bench layer: expected none for a single layer; leave it out"
        )
    if what == "model":
        from vimoe.models.names import check_layer_names, check_name

        check_name(settings.model)
        check_layer_names(settings.model, settings.moe.selection)
    from vimoe.bench.layer import bench_layer
    from vimoe.bench.model import bench_model

    timings = bench_model(shape, settings.model, settings.moe) if what == "model" else bench_layer(shape, settings.moe)
    return str(timings), timings.to_dict()
