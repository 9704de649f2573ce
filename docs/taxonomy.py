"""Write docs/taxonomy.md: kinds of mixtures of experts, and where they are here. Run it from anywhere, no arguments.

The table below is the survey's taxonomy (arXiv 2407.06204), and what came after it. A row names settings, a verb, or
the reason why there is nothing; `problems` holds it to the registries and settings of the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from vimoe.config.moe import EXPERTS, GATES, ROUTERS, STARTS
from vimoe.config.settings import SECTIONS, Settings
from vimoe.errors import VimoeError
from vimoe.verbs import VERBS

PAGE = Path(__file__).parent / "taxonomy.md"
HEAD = """# Taxonomy

Kinds of mixtures of experts by the taxonomy of the survey of Cai et al. (arXiv 2407.06204), and what has come since.
Each row says where its kind is in vimoe, or why it is not there. `python docs/taxonomy.py` writes this page; a test
compares it with the settings of the package.

Evidence is for vision only. **F**: read in the full text or the source. **N**: from tables or notes of others.
**A**: from the abstract. All figures are those of their authors; none was measured here. "None found" means that none
of the sources at hand says something of vision.
"""
NONE = "none found"


@dataclass(frozen=True)
class Row:
    """One kind.

    Attributes:
        leaf: name of the kind.
        works: some works that have it.
        settings: command lines that choose it, such as "moe.router=soft"; without "=", a setting that takes numbers.
        verb: command of vimoe that does it.
        why: reason why it is not there, or a remark.
        evidence: what is known of it in vision.
    """

    leaf: str
    works: str
    settings: tuple[str, ...] = ()
    verb: str = ""
    why: str = ""
    evidence: str = NONE

    @property
    def present(self) -> bool:
        """True if the package has it."""
        return bool(self.settings or self.verb)

    @property
    def status(self) -> str:
        """Where it is, or why it is not there."""
        if not self.present:
            return self.why
        places = [f"`{each}`" for each in self.settings] + ([f"`vimoe {self.verb}`"] if self.verb else [])
        return f"present: {', '.join(places)}{f'; {self.why}' if self.why else ''}"


TAXONOMY: dict[str, tuple[Row, ...]] = {
    "Gating: dense": (
        Row("all experts weighted", "DS-MoE, EvoMoE, MoLE, LoRAMoE", ("moe.num_experts=4 moe.top_k=4",),
            evidence="a teacher with all experts weighted distils its sparse student (2604.13508, **N**)"),
    ),
    "Gating: sparse, token choice": (
        Row("trained: softmax over a linear map", "Shazeer et al., GShard, Switch, V-MoE, Mixtral, DeepSeekMoE",
            ("moe.router=softmax", "moe.routing=token"),
            evidence="trained from scratch on ImageNet-1k, ViT-Ti: dense 74.62, V-MoE 77.85 (2604.21330, **N**)"),
        Row("trained: one decision for an image", "Mobile V-MoE, ViMoE, Sentence-level MoE", ("moe.routing=image",),
            evidence="+3.39 points on ViT-Ti with super-classes for the router; without them worse than token routing "
            "(2309.04354, **N**)"),
        Row("trained: cosine", "X-MoE, GMoE", ("moe.router=cosine",),
            evidence="out of domain GMoE-S against dense DeiT-S: PACS 88.1 and 86.2, TerraInc 48.5 and 42.0; in domain "
            "(Paint) 69.3 and 69.0 (2206.04046, **F**). In domain a linear router was best and cosine worst "
            "(2411.18322, **N**)"),
        Row("trained: balanced assignment of a batch", "BASE, S-BASE",
            why="refused: the decisions for an image would depend on other images of its batch"),
        Row("trained: a relaxed choice", "DSelect-k",
            why="refused: nothing at hand speaks for it in vision; a router of your own can have it"),
        Row("trained: as many experts as needed", "AdaMoE, DynMoE",
            why="refused: no setting yet; a router of your own can leave slots empty, as one of the tests' does"),
        Row("fixed: hash of the token", "Hash layers", ("moe.router=hash",), why="a control"),
        Row("fixed: random", "THOR, SMoE-Dropout", ("moe.router=random",), why="a control",
            evidence="in a frozen DeiT-S on Imagenette, random and learnt routers differed by .06 points at most "
            "(2606.28516, **A**)"),
        Row("fixed: by task, domain or class", "DEMix, Task-MoE, Pangu-Sigma", ("moe.router=superclass",),
            why="super-classes take the place of domains, whose labels an image has not got when it is classified",
            evidence="10 super-classes from the confusions of the dense model were best, in 2 layers "
            "(2309.04354, **N**)"),
    ),
    "Gating: sparse, what limits a choice": (
        Row("pools of experts by kind of token", "VL-MoE", ("moe.groups=[2,6] moe.routing=token",),
            why="prefix tokens and patches, or kinds that the caller says"),
        Row("a capacity, filled by priority", "V-MoE", ("moe.capacity_factor=1.0 moe.routing=token",),
            why="of the tokens of an image, not of a batch"),
    ),
    "Gating: sparse, expert choice": (
        Row("experts choose tokens", "EC, Brainformers", ("moe.router=expert_choice",),
            why="the capacity is counted image by image",
            evidence="upcycled ViT-B/16: +1 point in 10-shot ImageNet for 13% more training, where the dense model "
            "needs 58% more (2212.05055, **N**); better than token choice (2401.15969, **A**)"),
    ),
    "Gating: soft": (
        Row("token merging", "Soft MoE, HOMOE", ("moe.router=soft",),
            evidence="ImageNet-1k from scratch, ViT-Ti: dense 74.62, V-MoE 77.85, Soft MoE 79.31 (2604.21330, **N**); "
            "the best of the routers compared (2401.15969, **A**)"),
        Row("expert merging", "SMEAR, Lory, MoV, SMoLA, MEO", ("moe.router=smear",),
            why="one merged expert for an image"),
    ),
    "Experts: network": (
        Row("FFN", "Switch, EMoE, MoEfication, BTX", ("moe.experts=ffn",),
            evidence="CLIP ViT-B/32, mean of 7 data sets: fully tuned dense 82.25, fully tuned MoE 84.40; by set "
            "from -0.37 (EuroSAT) to +6.50 (SUN397) (2502.16894, **N**)"),
        Row("attention", "MoA, JetMoE, ModuleFormer",
            why="refused: only FFNs are replaced, so that attention and its fused kernels stay the parent's"),
        Row("other, such as convolutions", "pMoE, AdvMoE, DeepMoE",
            why="not for vision transformers: a plain ViT has no convolution beside its patch embedding"),
    ),
    "Experts: hyper-parameters": (
        Row("number", "GShard, Switch", ("moe.num_experts=8",),
            evidence="on ImageNet-1k 8 experts helped and 16 hurt (2411.18322, **N**)"),
        Row("size", "DeepSeekMoE, PEER", ("moe.expert_width=192",),
            evidence="98 core and 196 quarter-size experts, ViT-Ti: 79.9 on ImageNet-1k, Soft MoE 77.1; they hold "
            "neurons of a larger ViT-S (2406.04801, **F**)"),
        Row("frequency", "ST-MoE, V-MoE, MoE-LLaVA", ("moe.layers=every:2", "moe.layers=last:2"),
            evidence="every second block was best, the last two second (2411.18322, **N**)"),
    ),
    "Experts: activation": (
        Row("ReLU, GELU, GEGLU, SwiGLU", "all", why="given by the parent: experts have the activation of its FFN"),
    ),
    "Experts: shared": (
        Row("shared expert", "DeepSpeed-MoE, DeepSeekMoE, Qwen1.5-MoE, Arctic, MoCLE, HyperMoE",
            ("moe.num_shared_experts=1",),
            evidence="DINOv2 ViT-S/14 tuned on ImageNet-1k: dense 83.1, dense of equal activated parameters 83.6, with "
            "8 experts and a shared one in 2 blocks 84.2 (2410.15732, **F**)"),
    ),
    "Parameter-efficient experts": (
        Row("in the FFN: low rank", "LoRAMoE, MixLoRA, LLaVA-MoLE", ("moe.experts=lora moe.rank=16",),
            evidence="CLIP ViT-B/32, mean of 7 data sets: LoRA 77.09, MoLoRA 80.26, fully tuned dense 82.25 "
            "(2502.16894, **N**)"),
        Row("in the FFN: adapters", "AdaMix, MixDA", ("moe.experts=adapter moe.rank=16",)),
        Row("in the FFN: sparse differences", "DeRS", ("moe.experts=delta",),
            evidence="in MoE-LLaVA sparse differences were as good as whole experts, with 0.26 M further parameters in "
            "place of 1.24 B (2503.01359, **N**)"),
        Row("in attention, in a block, in every layer", "MoELoRA, MoCLE, SiRA, MoV, MoLoRA, Omni-SMoLA, MoLA, MoLE",
            why="refused: only FFNs are replaced"),
    ),
    "Training: dense to sparse": (
        Row("copies", "Sparse Upcycling, RMoE, MoE-LLaVA", ("moe.init=copy",),
            evidence="upcycled ViT-B/16 beats the dense model at equal further cost; a MoE from scratch overtakes it "
            "beyond 100 to 120% of the parent's budget (2212.05055, **N**)"),
        Row("copies and noise", "Sparse Upcycling", ("moe.init=noise",),
            evidence="noise on the copies did not help, and much of it hurt (2212.05055, **N**)"),
        Row("copies, in part drawn anew", "Drop-Upcycling", ("moe.init=drop",)),
        Row("clusters of inputs", "Cluster-aware Upcycling", ("moe.init=cluster",),
            evidence="better than sparse and drop upcycling on CLIP ViT-B/32 and B/16 (2604.13508, **N**)"),
        Row("parts of the FFN", "MoEfication, LLaMA-MoE, EMoE", ("moe.init=split moe.expert_width=192",),
            evidence="DomainBed, ViT-B, mean: EMoE 74.65, GMoE 74.28; within noise, said its reviewers "
            "(2310.10908, **N**)"),
        Row("in stages", "MoE-LLaVA, EvoMoE", ("train.stages",),
            evidence="projector, then the dense model, then experts and routers: MoE-LLaVA on StableLM-1.6B 57.3, on "
            "Phi-2 61.1 (2401.15947, **F**)"),
    ),
    "Training: sparse to dense": (
        Row("distillation into a dense student", "OneS",
            why="refused: a second training of another model; train a dense model and distil with timm",
            evidence="61.7% of the benefit kept, 78.4 on ImageNet-1k with 15 M parameters (2201.10890, **A**)"),
        Row("pruning of experts and layers", "MoE-Pruning, ModuleFormer", verb="prune"),
        Row("averaging during and after training", "EWA", ("train.fuse=ewa moe.num_shared_experts=0",),
            evidence="said to give a better dense ViT; figures not at hand (2308.06093, **A**)"),
    ),
    "Training: merge of expert models": (
        Row("experts trained apart", "BTM, BTX, FoE",
            why="refused: a run has one parent, and models trained apart would first have to be matched"),
    ),
    "Derivatives": (
        Row("depth by token", "MoD",
            why="refused: tokens that skip a block change the attention of the others, and the function of the parent"),
        Row("tokens mixed across examples", "MoT",
            why="refused: the output for an image would depend on the other images of its batch"),
        Row("experts shared between layers", "WideNet, SUT",
            why="refused: layers of a pretrained parent have weights of their own"),
        Row("prompts", "SMoP", why="not for vision: its experts are prompts of a language model"),
        Row("growing experts", "Lifelong-MoE",
            why="refused: the number of experts is fixed over a sequence of tasks (data.tasks)"),
    ),
    "System": (
        Row("computation", "MegaBlocks, ScatterMoE", verb="bench",
            why="it times grouped products without dropped tokens (`vimoe.set_backend`)"),
        Row("communication", "–", ("train.parallel",),
            why="`expert` processes share the experts of each layer, and exchange tokens by all-to-all"),
        Row("storage", "–", ("train.parallel",),
            why="`fsdp` processes divide weights and optimiser state; nothing is moved to the CPU or a disk"),
    ),
    "Not in the survey but needed today": (
        Row("gate: probability", "Switch, ViMoE", ("moe.gate=probability",)),
        Row("gate: a choice, whose weight does not follow the scores", "–", ("moe.gate=choice",)),
        Row("gate: sigmoid of a score", "–", ("moe.gate=sigmoid",)),
        Row("router: sigmoid scores", "–", ("moe.router=sigmoid",),
            evidence="theory, not vision: fewer samples than with a softmax (2405.13997, **A**)"),
        Row("router: ReLU", "ReMoE", why="refused: the number of experts follows a loss whose weight has to be "
            "adapted, and a well-tuned comparison on language saw it diverge (2504.12463, **N**)"),
        Row("router: centroids of clusters", "Cluster-aware Upcycling, TGR-MoE", ("moe.router=centroids",),
            evidence="routes taught by a frozen DeiT-III, from scratch: ViT-S 82.63 dense, 83.34; ViT-B 83.97 dense, "
            "85.46 (2604.21330, **N**)"),
        Row("router: held still for a part of the training", "Mobile V-MoE, TGR-MoE",
            ("train.router_frozen", "train.router_freeze_epochs"),
            evidence="V-MoE changes 40% of its decisions in the middle of the training (2604.21330, **N**)"),
        Row("router: random decisions at first", "THOR", ("train.router_warmup_epochs",)),
        Row("balance: a bias on the choice", "loss-free balancing", ("moe.bias_update_rate=0.001",)),
        Row("balance: losses", "Switch, ST-MoE, V-MoE",
            ("train.balance_loss", "train.z_loss", "train.importance_loss")),
        Row("gradient of routers from all experts", "DenseMixer, Default MoE",
            ("moe.router_gradient=dense", "moe.router_gradient=default_vectors")),
        Row("loss: confident routers", "TGR-MoE, expert specialisation",
            ("train.entropy_loss", "train.variance_loss"),
            evidence="an entropy loss of weight .005 is part of TGR-MoE (2604.21330, **N**)"),
        Row("experts: orthogonal outputs", "OMoE, MOORE", ("moe.orthogonal=outputs moe.experts=lora moe.top_k=2",)),
        Row("loss: mutual distillation of experts", "MoDE", ("train.mutual_loss",)),
        Row("loss: orthogonal outputs", "expert specialisation", ("train.orthogonal_loss",)),
        Row("loss: distillation from all experts", "Cluster-aware Upcycling", ("train.distill_loss",),
            evidence="part of what beats sparse upcycling (2604.13508, **N**)"),
        Row("loss: given routes", "Mobile V-MoE", ("train.route_loss",),
            evidence="a cross-entropy of weight .3 on super-classes (2309.04354, **N**)"),
        Row("rates and parts of the training", "upcycling at the peak rate",
            ("train.expert_lr_scale", "train.train_only")),
        Row("fusion before each forward pass", "ExFusion", ("train.fuse=exfusion moe.num_shared_experts=0",),
            evidence="said to help in vision and language; figures not at hand (2603.27965, **A**)"),
        Row("merge of all experts after the training", "–", verb="prune --merge_all"),
    ),
}  # fmt: skip


def rows() -> Iterator[Row]:
    """Yield all rows in order."""
    for group in TAXONOMY.values():
        yield from group


def problems() -> list[str]:
    """Return where the table and the package differ: settings that cannot be chosen, and kinds without a row."""
    found, chosen = [], set[str]()
    for row in rows():
        for line in row.settings:
            chosen |= set(line.split())
            if wrong := _wrong(line):
                found.append(f"{row.leaf}: {wrong}")
        if row.verb and row.verb.split()[0] not in VERBS:
            found.append(f"{row.leaf}: no verb {row.verb!r}")
    for registry in (ROUTERS, GATES, EXPERTS, STARTS):
        for name, entry in registry.items():
            ours = (entry if isinstance(entry, str) else entry.__module__).startswith("vimoe.")
            if ours and f"{registry.setting}={name}" not in chosen:
                found.append(f"{registry.setting}={name} has no row")
    return found


def _wrong(line: str) -> str:
    """Return what is wrong with a row's command line; "" where a run can have these settings."""
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for each in line.split():
        name, given, value = each.partition("=")
        section, _, setting = name.partition(".")
        if section not in SECTIONS or setting not in {field.name for field in fields(SECTIONS[section])}:
            return f"no setting {name}"
        if given:
            values[section][setting] = yaml.safe_load(value)
    try:
        settings = Settings(**{section: SECTIONS[section](**values[section]) for section in SECTIONS})
        for registry, kind in ((ROUTERS, "router"), (GATES, "gate"), (EXPERTS, "experts"), (STARTS, "init")):
            registry.find(getattr(settings.moe, kind))
    except (VimoeError, ImportError, AttributeError) as error:
        return f"{line}: {error}"
    return ""


def page() -> str:
    """Return the page as Markdown."""
    parts = [HEAD]
    for title, group in TAXONOMY.items():
        parts.append(f"\n## {title}\n\n| kind | works | in vimoe | evidence for vision |\n|---|---|---|---|\n")
        parts += [f"| {row.leaf} | {row.works} | {row.status} | {row.evidence} |\n" for row in group]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print("\n".join([str(PAGE), *problems()]))
