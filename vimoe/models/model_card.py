"""The model card of a hub repository: README.md with the header that the hub reads.

All figures are counted from the model, or come from the files of a run; none is typed.
"""

from __future__ import annotations

from torch import nn

from vimoe.models.cost import count
from vimoe.models.interface import find_backbone, unwrapped
from vimoe.models.segmenter import Segmenter
from vimoe.moe.layer import moe_layers

CARD = "README.md"


def model_card(model: nn.Module, repo_id: str, pretrained: bool = True, results: str = "") -> str:
    """Return the text of a model card.

    The licence is that of the parent's weights, where its configuration has one. Otherwise the card says that it is
    unknown.

    Args:
        model: a ViT of a known family, dense or with MoE layers.
        repo_id: "USER/REPO", for the lines that load it.
        pretrained: False for a model that was trained from random weights.
        results: Markdown text with measured figures.
    """
    from huggingface_hub import ModelCardData

    model = unwrapped(model)
    backbone, layers = find_backbone(model), moe_layers(model)
    dense_prediction = isinstance(model, Segmenter)
    parent, licence = (backbone.vit_config.get(key) if pretrained else None for key in ("hf_hub_id", "license"))
    header = ModelCardData(
        library_name="vimoe",
        pipeline_tag="image-segmentation" if dense_prediction else "image-classification",
        base_model=parent or None,
        license=licence or None,
        tags=["vision", *(["mixture-of-experts"] if layers else [])],
    )
    return "\n".join(
        [
            "---",
            header.to_yaml(),
            "---",
            f"# {repo_id.partition('/')[2]}",
            "",
            f"A {backbone.vit_config.get('architecture') or type(backbone.vit).__name__} for "
            f"{'segmentation into' if dense_prediction else 'classification into'} {backbone.num_classes} classes"
            f"{f', with {len(layers)} MoE layers' if layers else ''}, made with `vimoe`.",
            f"Parent: {parent or 'none noted'}. Licence of the parent's weights: {licence or 'unknown'}.",
            "",
            *_cost(model),
            *_layers(model),
            *([results, ""] if results else []),
            "## Use",
            "",
            "```python",
            "import vimoe",
            f'model = vimoe.load("{repo_id}")',
            "logits = model(images)  # normalised as model's config.json says",
            "```",
            "",
        ]
    )


def _cost(model: nn.Module) -> list[str]:
    cost = count(model)
    return [
        "| parameters | activated parameters | multiply-adds for one image |",
        "|---|---|---|",
        f"| {cost.params:,} | {cost.activated_params:,} | {cost.macs:,} |",
        "",
    ]


def _layers(model: nn.Module) -> list[str]:
    """Return the table of the MoE layers: N experts, k of them chosen, and shared ones."""
    layers = moe_layers(model)
    rows = [
        f"| `{name}` | {c.num_experts} | {c.top_k} | {c.num_shared_experts} | {c.routing} | {c.router} | {c.experts} |"
        for name, c in ((name, layer.config) for name, layer in layers.items())
    ]
    head = [
        f"## MoE layers (L = {len(layers)})",
        "",
        "| layer | experts N | top k | shared | routing | router | kind of experts |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*head, *rows, ""] if layers else []
