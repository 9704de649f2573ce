"""The probe of single experts: the known matrix of a model made by hand, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import config, images, layers, perturb_experts, upcycle, vit
from torch import Tensor, nn

import vimoe
from vimoe.analysis.evidence import Evidence
from vimoe.errors import VimoeError
from vimoe.report.html_page import Page
from vimoe.report.routing_section import add_routing_section

CODES = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])  # of images that look like class 0, 1, 2, 3


def two_experts() -> nn.Module:
    """A model whose tokens are the image's code, unchanged by attention. Expert 0 tells classes 0 and 1 apart, expert 1
    classes 2 and 3, and each takes all others for its own; the router goes by the code's first number.
    """
    model = vit(class_token=False, global_pool="avg", depth=1, num_classes=4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.patch_embed.proj.weight[range(3), range(3)] = 1 / 256
        for norm in (model.blocks[0].norm2, model.fc_norm if isinstance(model.fc_norm, nn.LayerNorm) else model.norm):
            norm.weight.fill_(1)
        model.head.weight[:, :3] = CODES
        model.head.weight[:2, 3], model.head.weight[2:, 3] = 5, -5
        moe = config(num_experts=2, gate="choice", gate_weight=1.0)
        vimoe.upcycle(model, moe)
        (layer,) = layers(model)
        layer.experts.fc2.bias[0, 3], layer.experts.fc2.bias[1, 3] = 9, -9
        layer.router.weight.zero_()
        layer.router.weight[0, 0], layer.router.weight[1, 0] = 1, -1
    return model.eval()


def pictures(looks: list[int]) -> Tensor:
    return CODES[looks][:, :, None, None].expand(-1, -1, 32, 32).contiguous()


LOOKS, LABELS = (
    [0, 0, 1, 1, 2, 2, 3, 3, 2, 3],
    [0, 0, 1, 1, 2, 2, 3, 3, 3, 3],
)  # one image of class 3 looks like class 2


def analysed(**settings: object) -> Evidence:
    batch = (pictures(LOOKS), torch.tensor(LABELS))
    return vimoe.analyze(two_experts(), [batch], **{"draws": 1, "overrule": None, "probe": True, **settings})


def test_a_model_made_by_hand_has_the_known_matrix() -> None:
    (layer,) = analysed().layers
    probe = layer.probe
    assert probe["serves"] == (0, 0, 1, 1) and probe["images"] == (4, 6)
    assert np.array(probe["right"]) == pytest.approx(np.array([[1, 0], [0, 5 / 6]]))
    assert probe["mixture_right"] == pytest.approx((1, 5 / 6))
    assert probe["advantage"]["value"] == pytest.approx(0.9)  # of 10 images 9 are right with their own expert alone
    assert probe["advantage_loss"]["value"] > 1 and probe["advantage_loss"]["low"] > 0


def test_losses_are_those_of_a_layer_with_one_expert_alone() -> None:
    (layer,) = analysed().layers
    probe, model, labels = layer.probe, two_experts(), torch.tensor(LABELS)
    for e in range(2):
        alone = two_experts()
        with torch.no_grad():
            layers(alone)[0].router.weight.zero_()[e, 0] = 1e-9
            stacked = layers(alone)[0].experts.fc2.bias
            stacked[:] = stacked[e].clone()
            loss = F.cross_entropy(alone(pictures(LOOKS)), labels, reduction="none")
            base = F.cross_entropy(model(pictures(LOOKS)), labels, reduction="none")
        for group, some in enumerate((labels < 2, labels >= 2)):
            assert probe["loss"][e][group] == pytest.approx(loss[some].mean().item(), rel=1e-5)
            assert probe["mixture_loss"][group] == pytest.approx(base[some].mean().item(), rel=1e-5, abs=1e-6)


def test_it_is_in_the_evidence_its_file_and_the_report_and_only_where_it_was_asked_for() -> None:
    evidence = analysed()
    again = Evidence.from_dict(json.loads(json.dumps(evidence.to_dict())))
    assert "points more right than the others alone" in str(evidence) and str(again) == str(evidence)
    page = Page("probe")
    add_routing_section(page, json.loads(json.dumps(evidence.to_dict())), "Routing")
    text = str(vars(page))
    assert "Each expert alone" in text and "83.3%" in text and "effective rank" in text
    plain = analysed(probe=False)
    assert plain.layers[0].probe is None and "alone" not in str(plain)
    same = {k: v for k, v in evidence.to_dict()["layers"][0].items() if k != "probe"}
    assert {k: v for k, v in plain.to_dict()["layers"][0].items() if k != "probe"} == same


def test_the_untouched_model_runs_once_for_it() -> None:
    passes = []
    for probe in (False, True):
        model, calls = two_experts(), []
        model.blocks[0].attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        vimoe.analyze(model, [(pictures(LOOKS), torch.tensor(LABELS))], draws=1, probe=probe)
        passes.append(len(calls))
    assert passes[1] == passes[0] + 2  # and once with the experts alone


def test_a_group_without_images_has_no_figures() -> None:
    batch = (pictures([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    (layer,) = vimoe.analyze(two_experts(), [batch], draws=1, probe=True).layers
    assert layer.probe["serves"] == (0, 0, -1, -1) and layer.probe["images"] == (4, 0)
    assert layer.probe["right"] == ((1.0, None), (0.0, None)) and layer.probe["mixture_right"] == (1.0, None)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"routing": "token"}, {"router": "smear"}], ids=str)
def test_other_layers_can_be_probed(settings: dict) -> None:
    model = perturb_experts(upcycle(vit(), config(**settings)))
    evidence = vimoe.analyze(model, [(images(model, 10), torch.arange(10) % 5)], draws=1, probe=True)
    assert all(
        np.shape(layer.probe["right"]) == (4, 4) and sum(layer.probe["images"]) == 10 for layer in evidence.layers
    )


def test_what_cannot_be_probed_is_refused_before_any_work() -> None:
    def refused(model: nn.Module, **settings: object) -> str:
        with pytest.raises(VimoeError) as caught:
            vimoe.analyze(model, [], probe=True, **settings)
        return str(caught.value)

    assert "overrule=0: expected at least 2 images" in refused(two_experts(), overrule=0)
    assert "masks: expected labels of whole images" in refused(two_experts(), metric="segmentation")
    soft = upcycle(vit(), config(router="soft", routing="token"))
    assert "moe.router='soft' and 4 experts: expected at least 2" in refused(soft)
    assert "1 experts" in refused(upcycle(vit(), config(num_experts=1)))
