"""A classifier whose classes stand in another order than those of the data."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from vimoe.models.interface import find_backbone

logger = logging.getLogger(__name__)


def order_classes(model: nn.Module, classes: Sequence[str]) -> None:
    """Bring the rows of a classifier into the order of the data's classes, in place, if it has these by name.

    So a trained classifier is right from the first step on, whatever order its classes were saved in. A classifier
    without names, or of other names, stays as it is. The latter may be the same classes in other words, and is logged.

    Args:
        model: ViT, or a module around one.
        classes: names of the data's classes, in order, as many as the model has.
    """
    backbone = find_backbone(model)
    names = backbone.label_names
    if names in (list(classes), [str(i) for i in range(len(names))]):
        return
    if sorted(names) != sorted(classes) or len(set(names)) < len(names):
        logger.info(
            "the classifier is of %s, ...; it begins as it is for %s, ...", ", ".join(names[:3]), ", ".join(classes[:3])
        )
        return
    rows = torch.tensor([names.index(name) for name in classes])
    for last in backbone.last_matrices():
        for parameter in last.parameters(recurse=False):
            parameter.data = parameter.data[rows.to(parameter.device)]
    backbone.set_label_names(classes)
