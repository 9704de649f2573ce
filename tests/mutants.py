"""Break the package in one place at a time, and see that the tests notice.

    python tests/mutants.py                     # all mutants, two at a time; takes some minutes
    python tests/mutants.py --only combine      # those with the word in their name
    python tests/mutants.py --out results.json

A mutant is a text in a module, what stands there instead, and the tests that ought to fail. Each runs in a copy of the
repository, so that a broken package never meets the real one. `tests/test_mutants.py` holds that each text is there
once, so that no mutant goes stale unseen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info", "runs", "build")
AT_ONCE = 2
LIMIT = 600  # seconds for the tests of one mutant; a mutant that hangs is noticed, too


class Mutant(NamedTuple):
    """One change of one module.

    Attributes:
        name: what goes wrong.
        module: path of the module within the package.
        text: what stands there now, once.
        instead: what stands there in the mutant.
        tests: paths within tests/ that ought to notice.
    """

    name: str
    module: str
    text: str
    instead: str
    tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "combine forgets the difference to the shared expert",
        "moe/dispatch.py",
        "                term.sub_(start)\n",
        "                pass\n",
        ("moe/test_layer.py",),
    ),
    Mutant(
        "ragged combine forgets the difference to the shared expert",
        "moe/dispatch.py",
        "        if mix:\n            terms = terms - start.index_select(0, self.source)\n",
        "",
        ("moe/test_dispatch.py", "moe/test_router.py"),
    ),
    Mutant(
        "the shared expert of a mix gets the whole gradient",
        "moe/dispatch.py",
        "dshared[at] = d * (1 - gates[at].sum(1))[:, None, None]",
        "dshared[at] = d",
        ("moe/test_layer.py",),
    ),
    Mutant(
        "slots are sorted the wrong way round",
        "moe/dispatch.py",
        "    order = chosen.argsort(stable=True)\n",
        "    order = chosen.argsort(stable=True, descending=True)\n",
        ("moe/test_layer.py",),
    ),
    Mutant(
        "idle experts keep a gradient from memory",
        "moe/grouped_linear.py",
        "weight.new_empty(weight.shape) if len(loaded) == len(weight) else unwritten_zeros(weight)",
        "torch.empty_like(weight).fill_(float('nan'))",
        ("moe/test_grouped_linear.py", "moe/test_layer.py"),
    ),
    Mutant(
        "a row with several slots keeps the gradient of one",
        "moe/grouped_linear.py",
        "dx.index_add_(0, source[at]",
        "dx.index_copy_(0, source[at]",
        ("moe/test_grouped_linear.py", "moe/test_layer.py"),
    ),
    Mutant(
        "as many slots as rows are taken for one slot a row",
        "moe/grouped_linear.py",
        "once = source is not None and _is_permutation(source, rows)",
        "once = source is not None and len(source) == rows",
        ("moe/test_grouped_linear.py",),
    ),
    Mutant(
        "narrow experts keep the last matrix as it is",
        "moe/ffn.py",
        "return [scaled(part, parts, 1) for part in each]",
        "return [scaled(part, 1, 1) for part in each]",
        ("moe/test_start.py",),
    ),
    Mutant(
        "experts are joined with equal weights",
        "moe/layer.py",
        "zip(parts, matrix, mass, strict=True)",
        "zip(parts, [1 / len(mass)] * len(mass), mass, strict=True)",
        ("models/test_densify.py",),
    ),
    Mutant(
        "split parts the units in their order",
        "moe/starts/split.py",
        "label_F = balanced_kmeans(rows_FD, n).to(rows_FD.device)",
        "label_F = torch.arange(len(rows_FD)) // (len(rows_FD) // n)",
        ("moe/starts/test_split.py",),
    ),
    Mutant(
        "cluster cuts matrices without regard to the data",
        "moe/starts/cluster.py",
        "small @ (moment_II + ridge",
        "small @ (0 * moment_II + ridge",
        ("moe/starts/test_cluster.py",),
    ),
    Mutant(
        "drop draws other units in each matrix",
        "moe/starts/drop.py",
        "                old = units[dropped]",
        "                dropped = torch.randperm(hidden)[:count]\n                old = units[dropped]",
        ("moe/starts/test_drop.py",),
    ),
    Mutant(
        "a plan measures the start on the model itself",
        "models/start_change.py",
        "copied = copy.deepcopy(model).eval()",
        "copied = model.eval()",
        ("models/test_start_change.py",),
    ),
    Mutant(
        "image routing reads the last token",
        "moe/router.py",
        "            return x_BTD[:, 0]\n",
        "            return x_BTD[:, -1]\n",
        ("moe/test_router.py",),
    ),
    Mutant(
        "the mean of the patches has the prefix in it",
        "moe/router.py",
        "        patches = x_BTD[:, self.layout.num_prefix_tokens :]\n",
        "        patches = x_BTD\n",
        ("moe/test_layer.py",),
    ),
    Mutant(
        "router noise in evaluation",
        "moe/router.py",
        "        if not self.training or not self.config.router_noise:",
        "        if not self.config.router_noise:",
        ("moe/test_router.py",),
    ),
    Mutant(
        "scores with noise are recorded",
        "moe/router.py",
        "return replace(self.route(self.noisy(logits_RN), batch), logits=logits_RN)",
        "return self.route(self.noisy(logits_RN), batch)",
        ("moe/test_router.py",),
    ),
    Mutant(
        "slots are filled over slots, not over tokens",
        "moe/routers/soft.py",
        "routing.slots.softmax(dim=1)",
        "routing.slots.softmax(dim=2)",
        ("moe/routers/test_soft.py",),
    ),
    Mutant(
        "the shared expert has no part in a smear router's mix",
        "moe/routers/smear.py",
        "F.pad(logits_RN, (0, 1)).softmax(dim=-1)[:, :-1]",
        "logits_RN.softmax(dim=-1)",
        ("moe/routers/test_smear.py",),
    ),
    Mutant(
        "chosen experts train the router twice",
        "moe/layer.py",
        ".masked_fill(routing.chosen, 0)",
        "",
        ("moe/test_router_gradient.py",),
    ),
    Mutant(
        "recomputation moves default vectors again",
        "moe/router_gradient.py",
        "self.mean.clone() if recomputing() else self._moved(",
        "self._moved(",
        ("moe/test_router_gradient.py",),
    ),
    Mutant(
        "gates of chosen experts have another slope than those of the others",
        "moe/layer.py",
        "routing = router_gradient.through(routing, all_RN)",
        "pass",
        ("moe/test_router_gradient.py",),
    ),
    Mutant(
        "an expert that is ruled out fills a slot",
        "moe/router.py",
        "allowed_RN = chosen_RN & (logits_RN > -torch.inf)",
        "allowed_RN = chosen_RN",
        ("moe/test_router.py",),
    ),
    Mutant(
        "a frozen router is trained after pruning",
        "moe/router.py",
        "nn.Parameter(rows_ND, requires_grad=self.weight.requires_grad)",
        "nn.Parameter(rows_ND)",
        ("moe/test_router.py",),
    ),
    Mutant(
        "gates are never normalised",
        "moe/gates.py",
        "return gates / gates.sum(dim=-1, keepdim=True).clamp(min=_TINY)",
        "return gates",
        ("moe/test_router.py", "moe/test_layer.py"),
    ),
    Mutant(
        "the bias reaches the gates",
        "moe/top_k.py",
        "weights_RN.gather(-1, experts_RK), experts_RK",
        "self.preferences(weights_RN).gather(-1, experts_RK), experts_RK",
        ("moe/test_router.py", "moe/test_balancing.py"),
    ),
    Mutant(
        "the bias moves the wrong way",
        "moe/balancing.py",
        "(own.sum() - len(own) * own).sign()",
        "(len(own) * own - own.sum()).sign()",
        ("moe/test_balancing.py",),
    ),
    Mutant(
        "the balance loss forgets the number of experts",
        "moe/losses.py",
        "return routing.num_experts * (f_N",
        "return 1 * (f_N",
        ("moe/test_losses.py",),
    ),
    Mutant(
        "the z-loss is not squared",
        "moe/losses.py",
        "logsumexp(dim=-1).square().mean()",
        "logsumexp(dim=-1).mean()",
        ("moe/test_losses.py",),
    ),
    Mutant(
        "recomputation under checkpointing is recorded",
        "moe/routing.py",
        "torch._C._current_graph_task_id() != -1",
        "torch._C._current_graph_task_id() == -2",
        ("moe/test_routing.py",),
    ),
    Mutant(
        "widening repeats the last matrix",
        "moe/ffn.py",
        "[w] + [torch.zeros_like(w)] * (times - 1)",
        "[w / times] * times",
        ("moe/test_ffn.py", "models/test_upcycling.py"),
    ),
    Mutant(
        "pruned experts leave the router's rows in order",
        "moe/router.py",
        "self.weight.detach()[list(kept)]",
        "self.weight.detach()[: len(kept)]",
        ("analysis/test_pruning.py", "moe/test_router.py", "moe/test_layer.py"),
    ),
    Mutant(
        "merging forgets who was used",
        "moe/layer.py",
        "        mass = gate_mass.tolist()\n",
        "        mass = [float(gate_mass.mean())] * len(gate_mass)\n",
        ("models/test_densify.py",),
    ),
    Mutant(
        "activated parameters count idle experts",
        "moe/experts.py",
        "experts / self.num_experts if role.per_expert else 1",
        "1",
        ("models/test_cost.py",),
    ),
    Mutant(
        "a folder is not proved",
        "models/model_folder.py",
        "            _prove(model, temporary)\n",
        "",
        ("models/test_model_folder.py",),
    ),
    Mutant(
        "surgery swaps before all is checked",
        "models/surgery.py",
        "            if child in names:\n",
        "            if False:\n",
        ("models/test_surgery.py",),
    ),
    Mutant(
        "permuted decisions are the image's own",
        "analysis/interventions.py",
        "chosen, device = self.donors[images], routing.experts.device",
        "chosen, device = images, routing.experts.device",
        ("analysis/test_interventions.py", "analysis/test_analyze.py"),
    ),
    Mutant(
        "an expert that is ruled out stays",
        "analysis/interventions.py",
        "logits[:, self.expert] = -torch.inf",
        "logits[:, self.expert] -= 0",
        ("analysis/test_interventions.py",),
    ),
    Mutant(
        "a broken outcome seems harmless",
        "analysis/interventions.py",
        "scores.nan_to_num(nan=_BROKEN, posinf=_BROKEN)",
        "scores.nan_to_num(nan=0.0, posinf=0.0)",
        ("analysis/test_interventions.py",),
    ),
    Mutant(
        "the oracle is measured on the images that it was chosen on",
        "analysis/halves.py",
        "values[same & (half != side)]",
        "values[same & (half == side)]",
        ("analysis/test_halves.py", "analysis/test_diagnose.py"),
    ),
    Mutant(
        "an expert that is tried alone gets the first gate only",
        "moe/routing.py",
        "self.gates.sum(dim=1)",
        "self.gates[:, 0]",
        ("analysis/test_interventions.py", "analysis/test_diagnose.py"),
    ),
    Mutant(
        "images that teach routers train the model too",
        "training/loop.py",
        "self.job.loss(outputs[own], targets[own]) if own.any()",
        "self.job.loss(outputs, targets) if own.any()",
        ("training/test_oracle.py",),
    ),
    Mutant(
        "losses of scores and outputs learn from images that teach routers",
        "training/loop.py",
        "learnt = routings if teaches is None else ",
        "learnt = routings if True else ",
        ("training/test_oracle.py",),
    ),
    Mutant(
        "distillation learns from images that teach routers",
        "training/loop.py",
        "own = outputs if teaches is None else ",
        "own = outputs if True else ",
        ("training/test_oracle.py",),
    ),
    Mutant(
        "averages and biases follow an update that fp16 skipped",
        "training/loop.py",
        "skipped=self._scale < scale",
        "skipped=False",
        ("training/test_routing_health.py",),
    ),
    Mutant(
        "a job goes on in the epoch that another training was interrupted in",
        "training/loop.py",
        "    _order(job.loader).start(epoch=1)",
        "    _order(job.loader)",
        ("training/test_checkpoint.py",),
    ),
    Mutant(
        "a capacity is one token too large where float32 rounds it up",
        "moe/capacity.py",
        ".view(images, tokens, n).double()",
        ".view(images, tokens, n).float()",
        ("moe/test_capacity.py",),
    ),
    Mutant(
        "the activation of experts stays in training mode",
        "moe/experts.py",
        "self.kind = replace(kind, act=self.act)",
        "self.kind = replace(kind)",
        ("moe/test_experts.py",),
    ),
    Mutant(
        "the oracle teaches on the images that train experts",
        "training/loop.py",
        "self.oracle.loss(images[teaches], targets[teaches], ",
        "self.oracle.loss(images[~teaches], targets[~teaches], ",
        ("training/test_oracle.py",),
    ),
    Mutant(
        "the oracle prefers the expert that loses most",
        "training/oracle.py",
        "(-losses_HN / self.temperature)",
        "(losses_HN / self.temperature)",
        ("training/test_oracle.py",),
    ),
    Mutant(
        "familiarity trains its target",
        "analysis/familiarity.py",
        "torch.optim.AdamW(self.predictor.parameters()",
        "torch.optim.AdamW(self.requires_grad_().parameters()",
        ("analysis/test_familiarity.py",),
    ),
    Mutant(
        "correctness is judged on the images that it was fitted on",
        "analysis/trust.py",
        "validation.part(0), validation.part(1)",
        "validation.part(1), validation.part(1)",
        ("analysis/test_trust.py",),
    ),
    Mutant(
        "a layer with idle experts is healthy",
        "analysis/remedies.py",
        "for fault in (collapsed, idle, misses)",
        "for fault in (collapsed, misses)",
        ("analysis/test_remedies.py",),
    ),
    Mutant(
        "a sample is of the first images",
        "analysis/diagnose.py",
        "self.places[first:last] - seen",
        "np.arange(last - first)",
        ("analysis/test_diagnose.py",),
    ),
    Mutant(
        "heatmaps are drawn from the half that ordered them",
        "analysis/analyze.py",
        "found.table(~half)",
        "found.table(half)",
        ("analysis/test_analyze.py",),
    ),
    Mutant(
        "only the first images are kept",
        "analysis/decisions.py",
        "self._rng.integers(0, nth + 1)",
        "limit + 0 * nth",
        ("analysis/test_analyze.py",),
    ),
    Mutant(
        "chance is not taken off",
        "analysis/dependence.py",
        "value, half = (nats - expected) / scale",
        "value, half = nats / scale",
        ("analysis/test_dependence.py",),
    ),
    Mutant(
        "intervals over frames in place of videos",
        "analysis/intervals.py",
        "yield weights if sequences is None else weights[:, sequences]",
        "yield np.ones((len(weights), images)) * weights[:, :1] + rng.random((len(weights), images))",
        ("analysis/test_intervals.py", "stories/test_sequences.py"),
    ),
    Mutant(
        "a pair counts as often as one of its images",
        "analysis/intervals.py",
        "across * w * w[:, partner]",
        "across * w",
        ("analysis/test_intervals.py",),
    ),
    Mutant(
        "p counts from none",
        "analysis/dependence.py",
        "p = (1 + int((null >= nats - 1e-12).sum())) / (1 + len(null))",
        "p = int((null >= nats - 1e-12).sum()) / len(null)",
        ("analysis/test_dependence.py",),
    ),
    Mutant(
        "a removal is judged by its mean",
        "analysis/pruning.py",
        "            if step.change.loss.high > self.tolerance:",
        "            if step.change.loss.value > self.tolerance:",
        ("analysis/test_pruning.py",),
    ),
    Mutant(
        "the first method of making a layer dense is taken",
        "analysis/pruning.py",
        "column = min(range(len(effects)), key=lambda i: effects[i].loss.value)",
        "column = 0",
        ("analysis/test_pruning.py",),
    ),
    Mutant(
        "the layer with the highest bound goes first",
        "analysis/pruning.py",
        "step, column = min(best.values(), key=lambda each: each[0].change.loss.high)",
        "step, column = max(best.values(), key=lambda each: each[0].change.loss.high)",
        ("analysis/test_pruning.py",),
    ),
    Mutant(
        "totals are of the last step alone",
        "analysis/pruning.py",
        "taken if self._total is None else self._total.then(taken)",
        "taken",
        ("analysis/test_pruning.py",),
    ),
    Mutant(
        "several removals are compared with the model before the last one",
        "analysis/changes.py",
        "later.curves, self.untouched, self.base)",
        "later.curves, later.untouched, self.base)",
        ("analysis/test_changes.py",),
    ),
    Mutant(
        "an intervention has the temperature 1",
        "analysis/temperatures.py",
        "temperature = round(math.exp(found.x), 3)",
        "temperature = 1.0",
        ("analysis/test_changes.py", "analysis/test_temperatures.py"),
    ),
    Mutant(
        "experts are dropped without being asked for",
        "analysis/pruning.py",
        "    if experts:\n        for name in reversed",
        "    if not experts:\n        for name in reversed",
        ("analysis/test_pruning.py", "test_cli.py"),
    ),
    Mutant(
        "void pixels count",
        "metrics/segmentation.py",
        "        counted = masks != IGNORE\n        pairs",
        "        counted = masks != IGNORE + 1\n        pairs",
        ("metrics/test_segmentation.py",),
    ),
    Mutant(
        "a class without truth counts as 0",
        "metrics/segmentation.py",
        "if truth[c] > 0 else None",
        "if truth[c] > 0 else 0.0",
        ("metrics/test_segmentation.py",),
    ),
    Mutant(
        "of patches the last of equal classes wins",
        "metrics/segmentation.py",
        "votes.argmax(dim=-1), IGNORE)",
        "classes - 1 - votes.flip(-1).argmax(dim=-1), IGNORE)",
        ("metrics/test_segmentation.py", "stories/test_segmentation_analysis.py"),
    ),
    Mutant(
        "scores of mirrored images stay mirrored",
        "tasks/windows.py",
        "model(images.flip(-1)).flip(-1).float()",
        "model(images.flip(-1)).float()",
        ("tasks/test_windows.py",),
    ),
    Mutant(
        "the last window stops short of the edge",
        "tasks/windows.py",
        "[*range(0, last, stride), last]",
        "[*range(0, last, stride)] or [0]",
        ("tasks/test_windows.py",),
    ),
    Mutant(
        "top-5 is top-1",
        "metrics/classification.py",
        "self.top5 += int((right | among).sum())",
        "self.top5 += int(right.sum())",
        ("metrics/test_classification.py", "metrics/test_base.py"),
    ),
    Mutant(
        "a bin of confidence has its lower end",
        "metrics/calibration.py",
        "torch.bucketize(confidence, inner)",
        "torch.bucketize(confidence, inner, right=True)",
        ("metrics/test_calibration.py",),
    ),
    Mutant(
        "all processes have the images of the first",
        "data/loaders.py",
        "[range(at + rank, min(",
        "[range(at, min(",
        ("data/test_loaders.py",),
    ),
    Mutant(
        "the temperature is that of the images it is reported on",
        "experiments/finished_run.py",
        "temperature := decides.temperature()",
        "temperature := scored.temperature()",
        ("experiments/test_finished_run.py",),
    ),
    Mutant(
        "a metric that is named is not the one that measures",
        "metrics/base.py",
        "METRICS.find(name or str(",
        "METRICS.find(str(",
        ("metrics/test_base.py",),
    ),
    Mutant(
        "figures of two kinds are of the first",
        "metrics/registry.py",
        "    if len(kinds) != 1:",
        "    if not kinds:",
        ("metrics/test_registry.py",),
    ),
    Mutant(
        "images without a class count as some",
        "analysis/decisions.py",
        " * (self.labels >= 0)[:, None]",
        "",
        ("analysis/test_analyze.py",),
    ),
    Mutant(
        "images are opened before mistakes are told",
        "experiments/train.py",
        "    _check_stages(kind, settings, stages, prepared)\n",
        "    scanned = scanned or task.scan(data)\n    _check_stages(kind, settings, stages, prepared)\n",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "experts train the shared expert that they hold",
        "training/parameter_groups.py",
        " and id(p) not in shared)",
        ")",
        ("training/test_parameter_groups.py",),
    ),
    Mutant(
        "the rate of experts is that of a shared expert too",
        "training/parameter_groups.py",
        "for p in layer.experts.parameters()} - _shared(layers)",
        "for p in layer.experts.parameters()} | _shared(layers)",
        ("training/test_parameter_groups.py",),
    ),
    Mutant(
        "the bias of a frozen layer moves",
        "training/loop.py",
        " if routing.layer in biased]",
        "]",
        ("training/test_loop.py",),
    ),
    Mutant(
        "what is evaluated is compiled",
        "training/compiled.py",
        "if not block.training:",
        "if False:",
        ("training/test_compiled.py",),
    ),
    Mutant(
        "blocks of later trainings run uncompiled",
        "training/compiled.py",
        ", fail_on_recompile_limit_hit=True",
        "",
        ("training/test_compiled.py",),
    ),
    Mutant(
        "the teacher runs few experts",
        "training/loop.py",
        "with all_experts(self.ema.module):",
        "if True:",
        ("training/test_loop.py",),
    ),
    Mutant(
        "outputs are in the slots of others",
        "moe/routing.py",
        ".argsort(stable=True)[:filled]",
        ".argsort(stable=True, descending=True)[:filled]",
        ("moe/test_losses.py",),
    ),
    Mutant(
        "experts of a resumed training are of other random numbers",
        "experiments/train.py",
        "                set_seed(mix(settings.train.seed, number))",
        "                pass",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "what an earlier stage froze stays frozen",
        "experiments/train.py",
        "p.requires_grad_(all(p is not other for other in frozen))",
        "pass",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "a later stage has its own first epoch in the logs",
        "training/state.py",
        "        return self.before + self.epoch",
        "        return self.epoch",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "a score of features does not say so",
        "tasks/base.py",
        '    return dict(getattr(loader, "facts", {}))',
        "    return {}",
        ("tasks/test_cached_features.py",),
    ),
    Mutant(
        "features are those of any trunk",
        "tasks/feature_files.py",
        "{sorted(self.prepared.items())} {self._digest} ",
        "{sorted(self.prepared.items())} ",
        ("tasks/test_cached_features.py",),
    ),
    Mutant(
        "features begin after an MoE layer that was not trained",
        "tasks/cached_features.py",
        "(settings.moe.selection, *settings.train.parts)",
        "settings.train.parts",
        ("tasks/test_cached_features.py",),
    ),
    Mutant(
        "a task passes over settings of another",
        "config/settings.py",
        "    if readers and task not in readers:",
        "    if readers and not task:",
        ("tasks/test_base.py",),
    ),
    Mutant(
        "an epoch's order is that of the first",
        "data/order.py",
        "manual_seed(mix(self.seed, self.epoch)))",
        "manual_seed(mix(self.seed, 1)))",
        ("training/test_loop.py", "training/test_checkpoint.py", "data/test_loaders.py"),
    ),
    Mutant(
        "a half-written file gets its name",
        "files.py",
        "        temporary = Path(name)\n",
        "        temporary, handle = path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)\n",
        ("test_files.py",),
    ),
    Mutant(
        "a checkpoint of other settings goes on",
        "training/checkpoint.py",
        "    if names:\n        name = names[0]",
        "    if False:\n        name = names[0]",
        ("training/test_checkpoint.py",),
    ),
    Mutant(
        "a resumed epoch begins again",
        "training/loop.py",
        "self.order.start(state.number, state.step * self.config.batch_size)",
        "self.order.start(state.number, 0)",
        ("training/test_checkpoint.py",),
    ),
    Mutant(
        "the last epoch is the best",
        "training/state.py",
        "        if score.rank > self.rank:",
        "        if True:",
        ("training/test_loop.py",),
    ),
    Mutant(
        "early stopping is an epoch late",
        "training/state.py",
        "self.best.last - self.best.epoch >= patience",
        "self.best.last - self.best.epoch > patience",
        ("training/test_loop.py",),
    ),
    Mutant(
        "a folder that holds something is taken",
        "run_folder.py",
        "any(not is_own(inside) for inside in path.iterdir())",
        "False",
        ("stories/test_mistakes.py", "test_run_folder.py", "test_cli.py"),
    ),
    Mutant(
        "an unfinished run is opened",
        "run_folder.py",
        "    if not (path / MODEL).is_dir():",
        "    if not path.is_dir():",
        ("training/test_checkpoint.py", "stories/test_mistakes.py"),
    ),
    Mutant(
        "the random share does not fall",
        "training/loop.py",
        "max(0.0, 1 - epochs / config.router_warmup_epochs)",
        "1.0",
        ("training/test_loop.py", "moe/test_balancing.py"),
    ),
    Mutant(
        "a router of centroids looks at what all images share",
        "moe/routers/centroids.py",
        "spherical_kmeans(x_RD - (x_RD @ common_D)[:, None] * common_D, ",
        "spherical_kmeans(x_RD, ",
        ("moe/routers/test_centroids.py",),
    ),
    Mutant(
        "confusions are of images that were fitted",
        "moe/confusions.py",
        "model.fit(x[fitted], label[fitted])",
        "model.fit(x, label)",
        ("moe/test_confusions.py",),
    ),
    Mutant(
        "the loss of super-classes counts classes without an expert",
        "moe/routers/superclass.py",
        "self.superclass[:, None] == torch.arange",
        "self.superclass[:, None].clamp(min=0) == torch.arange",
        ("moe/routers/test_superclass.py",),
    ),
    Mutant(
        "routers are frozen by steps, not by updates",
        "training/loop.py",
        "state.updates >= self.config.router_frozen * self._updates",
        "state.done(self.batches) >= self.config.router_frozen * self._updates",
        ("training/test_given_routes.py",),
    ),
    Mutant(
        "a frozen router has a load-balancing bias that moves on",
        "training/loop.py",
        " and n not in state.frozen}",
        "}",
        ("training/test_router_freeze.py",),
    ),
    Mutant(
        "routers that were frozen in a task learn in the next one",
        "training/state.py",
        'self._take(stored, out, *_LOGS, "frozen")',
        "self._take(stored, out, *_LOGS)",
        ("experiments/test_task_sequence.py",),
    ),
    Mutant(
        "a resumed training measures the distances of experts from its checkpoint",
        "training/locality.py",
        "mine.copy_(stored)",
        "pass",
        ("training/test_locality.py",),
    ),
    Mutant(
        "forgetting is counted from right after a task",
        "analysis/forgetting.py",
        "max(row[i] for row in rows[i:-1])",
        "rows[i][i]",
        ("analysis/test_forgetting.py",),
    ),
    Mutant(
        "a task's fingerprint is of its own images",
        "data/tasks.py",
        "test=test, parts=(), whole=data.train",
        "test=test, parts=()",
        ("data/test_tasks.py",),
    ),
    Mutant(
        "zeros of idle experts' gradients are written",
        "moe/grouped_linear.py",
        "if len(loaded) == len(weight) else unwritten_zeros(weight)",
        "if len(loaded) == len(weight) else weight.new_zeros(weight.shape)",
        ("moe/test_grouped_linear.py",),
    ),
    Mutant(
        "zeros of idle experts' gradients come from a heap",
        "moe/grouped_linear.py",
        "return torch.frombuffer(pages, dtype=x.dtype, count=x.numel()).view(x.shape)",
        "return torch.from_numpy(__import__('numpy').zeros(size, 'uint8')).view(x.dtype).view(x.shape)",
        ("moe/test_grouped_linear.py",),
    ),
    Mutant(
        "other data are read by the usual names of splits alone",
        "data/roles.py",
        "splits = _there(listing, name) or _splits(listing, role, role)",
        "splits = _splits(listing, role, role)",
        ("data/test_classification.py",),
    ),
    Mutant(
        "other scenes are read by the usual names of splits alone",
        "data/scene_layouts.py",
        '    found = {role: name for role in ROLES if (name := getattr(config, f"{role}_split")) in names}\n',
        "    found: dict[str, str] = {}\n",
        ("data/test_scenes.py",),
    ),
    Mutant(
        "blank test masks of Cityscapes are scored",
        "data/scene_layouts.py",
        'if images.get("test", root).name == "test":',
        'if config.test_split == "never":',
        ("data/test_scenes.py",),
    ),
    Mutant(
        "a class that is named like a role is never scored as one",
        "data/roles.py",
        'name == "none" and set(splits) <= set(classes)',
        "False",
        ("data/test_classification.py",),
    ),
    Mutant(
        "a table without a split to train on is trained on whole",
        "data/roles.py",
        'listing.word != "folder" and len(listing.splits) > 1',
        'listing.word != "folder" and len(listing.splits) > 9',
        ("stories/test_sources.py",),
    ),
    Mutant(
        "a split's fingerprint is of its own images",
        "data/tasks.py",
        "replace(part, parts=(), whole=data.train)",
        "replace(part, parts=())",
        ("data/test_tasks.py",),
    ),
    Mutant(
        "a task of a split has the images of all splits",
        "data/classification.py",
        "train=of(split, whole.train)",
        "train=whole.train",
        ("data/test_classification.py",),
    ),
    Mutant(
        "validation is split off joined splits by class alone",
        "data/draws.py",
        "lambda sample: (sample[1], origin[id(sample)])",
        "lambda sample: sample[1]",
        ("data/test_classification.py",),
    ),
    Mutant(
        "a split is trained on and reported on",
        "data/splits.py",
        "            if split in named:",
        "            if False:",
        ("data/test_classification.py",),
    ),
    Mutant(
        "a study finds last that an arm cannot be trained",
        "verbs/study.py",
        "    work.check_trainings([*ready, *waiting])\n",
        "",
        ("stories/test_studies.py",),
    ),
    Mutant(
        "the best classes of a task are sought among all",
        "experiments/task_sequence.py",
        "chosen = torch.tensor(among,",
        "chosen = torch.arange(logits.shape[1],",
        ("experiments/test_task_sequence.py",),
    ),
    Mutant(
        "calibration keeps a view of all tokens",
        "models/calibration.py",
        'x.to("cpu", torch.float32, copy=True)',
        'x.to("cpu", torch.float32)',
        ("models/test_calibration.py",),
    ),
    Mutant(
        "the last steps of an epoch weigh less",
        "training/loop.py",
        "        return min(self.config.accumulation, self.batches - first)",
        "        return self.config.accumulation",
        ("training/test_loop.py",),
    ),
    Mutant(
        "biases decay",
        "training/parameter_groups.py",
        ": role.matrix\n",
        ": True\n",
        ("training/test_parameter_groups.py",),
    ),
    # six that a suite of before did not notice
    Mutant(
        "pruning ignores --experts",
        "experiments/finished_run.py",
        "prune(pruned, evidence, loader, **options, progress",
        'prune(pruned, evidence, loader, **{**options, "experts": False}, progress',
        ("test_cli.py",),
    ),
    Mutant(
        "the worst way of making a layer dense is the best",
        "analysis/evidence.py",
        "return min(self.dense.items(), key",
        "return max(self.dense.items(), key",
        ("analysis/test_analyze.py",),
    ),
    Mutant(
        "the plot of effects shows heatmaps",
        "analysis/evidence.py",
        "return figures.effects(self.to_dict())",
        "return figures.heatmaps(self.to_dict())",
        ("analysis/test_evidence.py",),
    ),
    Mutant(
        "no expert is idle",
        "training/routing_health.py",
        "enumerate(shares) if share == 0]",
        "enumerate(shares) if share < 0]",
        ("training/test_routing_health.py",),
    ),
    Mutant(
        "a CPU does not loop over experts",
        "moe/grouped_linear.py",
        '    return "loop"\n\n\ndef unfit',
        '    return "bmm"\n\n\ndef unfit',
        ("moe/test_grouped_linear.py",),
    ),
    Mutant(
        "operators that wait for the loads do not say so",
        "moe/grouped_linear.py",
        "    tags=(torch.Tag.cudagraph_unsafe,),",
        "    tags=(),",
        ("moe/test_grouped_linear.py",),
    ),
    Mutant(
        "weights are downloaded before contradictory settings are told",
        "experiments/train.py",
        "        settings = _check_architecture(kind, data, settings)  # before its weights are downloaded\n",
        "        pass\n",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "a model that cannot be saved is trained",
        "experiments/train.py",
        "        process.once(_try_to_save, model, data, prepared, folder)\n",
        "",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "what a killed training left stays in the new run",
        "experiments/train.py",
        "        process.once(discard_leftovers, folder)  # of a training that was killed before it began\n",
        "",
        ("experiments/test_train.py",),
    ),
    Mutant(
        "a resumed training with other classes ends in a traceback",
        "training/checkpoint.py",
        "    except RuntimeError as error:\n        raise other_images(run) from error\n",
        "    except KeyError as error:\n        raise other_images(run) from error\n",
        ("training/test_checkpoint.py",),
    ),
    Mutant(
        "a segmenter computes with the backbone that it had first",
        "models/segmenter.py",
        "        tokens = find_backbone(self.backbone).features(",
        '        self.__dict__.setdefault("_vit", find_backbone(self.backbone))\n        tokens = self._vit.features(',
        ("models/test_segmenter.py",),
    ),
    Mutant(
        "soft labels are rounded to class 0",
        "metrics/base.py",
        "    if labels.is_floating_point() or labels.is_complex():\n",
        "    if False:\n",
        ("metrics/test_base.py",),
    ),
    Mutant(
        "validation scores a random expert, not the mean of the experts",
        "training/fuse.py",
        "        if not self.training:\n",
        "        if False:\n",
        ("training/test_fuse.py",),
    ),
    Mutant(
        "rows that are left over always go to the first experts",
        "training/fuse.py",
        "device=device) - first) % n",
        "device=device)) % n",
        ("training/test_fuse.py",),
    ),
    Mutant(
        "experts are pulled by the whole rate from the start",
        "training/fuse.py",
        "layer.pull(config.fuse_rate * done)",
        "layer.pull(config.fuse_rate)",
        ("training/test_fuse.py",),
    ),
    Mutant(
        "merging all layers measures each against the unpruned model",
        "analysis/pruning.py",
        "            swap(self.model, {name: merged})\n",
        "",
        ("analysis/test_pruning.py",),
    ),
    Mutant(
        "the last block leaves out patches that its router needs",
        "models/reading.py",
        "if any(isinstance(m, MoE) and m.router.needs_patches for m in block.modules()):",
        "if False:",
        ("models/test_reading.py",),
    ),
    Mutant(
        "the last block computed less whatever its mask",
        "models/timm_narrow.py",
        "return None if attn_mask is not None or is_causal else self._first(x_BTD, read, rope)",
        "return self._first(x_BTD, read, rope)",
        ("models/test_reading.py",),
    ),
    Mutant(
        "checkpointing computes other tokens again",
        "models/reading.py",
        "            return self._latest\n",
        "            return None\n",
        ("models/test_reading.py",),
    ),
    Mutant(
        "keys of the last block are not turned",
        "models/timm_narrow.py",
        "k = torch.cat([k[:, :, :prefix], turned], dim=2)",
        "pass",
        ("models/test_reading.py",),
    ),
    Mutant(
        "a block that is there twice is the last one at once",
        "models/reading.py",
        " or called.index(block) + 1 < len(called)",
        "",
        ("models/test_reading.py",),
    ),
    Mutant(
        "a part of nobody's class gets a part of the tokens",
        "models/timm_narrow.py",
        "return known and all(c.forward is known",
        "return all(c.forward is known",
        ("models/test_reading.py",),
    ),
    Mutant(
        "a compiled model keeps the reading of its first head",
        "models/reading.py",
        "tokens: int | None = begin.constant(id(vit), id(self))",
        "tokens: int | None = 1",
        ("models/test_reading.py",),
    ),
    Mutant(
        "changes are orthogonal to the first expert's alone",
        "moe/orthogonal.py",
        "        for other_RUD in found:\n",
        "        for other_RUD in found[:1]:\n",
        ("moe/test_orthogonal.py",),
    ),
    Mutant(
        "the expert with the smallest gate comes first",
        "moe/routing.py",
        "(-self.gates.detach()).argsort",
        "self.gates.detach().argsort",
        ("moe/test_orthogonal.py",),
    ),
    Mutant(
        "experts learn from empty slots",
        "moe/losses.py",
        "((y_RUKD - mean_RU1D).square() * filled_R1K1 / number_R111)",
        "((y_RUKD - mean_RU1D).square() / number_R111)",
        ("moe/test_losses.py",),
    ),
    Mutant(
        "an expert that adds nothing counts as a direction",
        "analysis/diversity.py",
        "    u_MnD = u_MnD.where(adds_Mn[..., None], 0)\n",
        "",
        ("analysis/test_diversity.py",),
    ),
    Mutant(
        "the probe takes the first expert for each class's own",
        "analysis/probe.py",
        "    own = alone[:, rows, group]\n",
        "    own = alone[:, rows, 0]\n",
        ("analysis/test_probe.py",),
    ),
    Mutant(
        "interventions leave out the projection",
        "analysis/interventions.py",
        '        if shared is not None and config.orthogonal != "none":\n',
        "        if False:\n",
        ("analysis/test_interventions.py",),
    ),
    Mutant(
        "tokens see the experts of other pools",
        "moe/router.py",
        "logits_RN.masked_fill(self.pool_of_experts != kinds_R[:, None], -torch.inf)",
        "logits_RN",
        ("moe/test_pools.py",),
    ),
    Mutant(
        "a loss takes all pools together",
        "moe/losses.py",
        "for part in each.by_pool]",
        "for part in [each]]",
        ("moe/test_pools.py",),
    ),
    Mutant(
        "kinds stay after their block",
        "moe/kinds.py",
        "            router.kinds = kind\n",
        "            pass\n",
        ("moe/test_kinds.py",),
    ),
    Mutant(
        "the last expert of a pool can be removed",
        "moe/router.py",
        "if size > self.config.top_k]",
        "if size]",
        ("moe/test_pools.py",),
    ),
    Mutant(
        "an expert keeps the lowest gates",
        "moe/capacity.py",
        "dim=1, descending=True, stable=True)",
        "dim=1, descending=False, stable=True)",
        ("moe/test_capacity.py",),
    ),
    Mutant(
        "second choices come with the first ones",
        "moe/capacity.py",
        "sorted_BTK.transpose(1, 2).reshape(images, k * tokens)",
        "sorted_BTK.reshape(images, k * tokens)",
        ("moe/test_capacity.py",),
    ),
    Mutant(
        "a capacity is of all experts, whatever their pool",
        "moe/capacity.py",
        "allowed_BTN / allowed_BTN.sum(dim=2, keepdim=True)",
        "allowed_BTN / n",
        ("moe/test_capacity.py",),
    ),
    Mutant(
        "prompts keep their length",
        "models/prompted.py",
        "return F.normalize(self.to_prompts(vectors_CE), dim=1)",
        "return self.to_prompts(vectors_CE)",
        ("models/test_prompted.py",),
    ),
    Mutant(
        "dense attention of prompts to rows of patches",
        "models/prompted.py",
        "CHANNELS**0.5).softmax(dim=1)",
        "CHANNELS**0.5).softmax(dim=2)",
        ("models/test_prompted.py",),
    ),
    Mutant(
        "prompts of a file in the order of the file",
        "models/prompted.py",
        "[found[name].float() for name in classes]",
        "[found[name].float() for name in sorted(classes)]",
        ("models/test_prompted.py",),
    ),
    Mutant(
        "object tokens are sums, not means",
        "models/tracker.py",
        " / share.sum(dim=(2, 3))[..., None]",
        "",
        ("models/test_tracker.py",),
    ),
    Mutant(
        "the track token is read at the place of the object token",
        "models/tracker.py",
        "self.layer(pairs)[:, 1]",
        "self.layer(pairs)[:, 0]",
        ("models/test_tracker.py",),
    ),
    Mutant(
        "no track token goes to the next frame",
        "models/prompted.py",
        "prompts_BCK if tokens_BCK is None else prompts_BCK + tokens_BCK",
        "prompts_BCK",
        ("models/test_tracker.py",),
    ),
    Mutant(
        "gradients that are divided are held whole",
        "training/gathering.py",
        "self.reduced[1] += group.expert",
        "pass",
        ("training/test_gathering.py",),
    ),
    Mutant(
        "a block's weights stay after its backward pass",
        "training/gathering.py",
        "self.gathered.remove(key)",
        "pass",
        ("training/test_gathering.py",),
    ),
    Mutant(
        "the tolerance of contours is rounded down",
        "metrics/contours.py",
        "math.ceil(tolerance",
        "math.floor(tolerance",
        ("metrics/test_contours.py",),
    ),
    Mutant(
        "void belongs to predicted masks",
        "metrics/segmentation.py",
        "(guess == c) & counted",
        "guess == c",
        ("metrics/test_contours.py",),
    ),
    Mutant(
        name="an interval of a study is not widened for its contrasts",
        module="study/contrasts.py",
        text="name, each, len(declared))",
        instead="name, each)",
        tests=("study/test_report.py",),
    ),
    Mutant(
        name="a study chooses the worst rate",
        module="study/results.py",
        text="return min(val, key=lambda name: (ranks[name], losses[name]))",
        instead="return max(val, key=lambda name: (ranks[name], losses[name]))",
        tests=("study/test_report.py",),
    ),
    Mutant(
        name="a cell whose code changed is written under another name",
        module="study/work.py",
        text="if key not in (None, own):",
        instead="if False:",
        tests=("stories/test_studies.py",),
    ),
    Mutant(
        name="an interrupted study leaves its trainings running",
        module="study/queue.py",
        text="self.processes.end()",
        instead="pass",
        tests=("study/test_queue.py",),
    ),
)


@contextmanager
def changed(copy: Path, mutant: Mutant) -> Iterator[None]:
    """Break the copy of the repository while the block runs."""
    path = copy / "vimoe" / mutant.module
    source = path.read_text(encoding="utf-8")
    assert source.count(mutant.text) == 1, f"{mutant.name}: {source.count(mutant.text)} times in {mutant.module}"
    path.write_text(source.replace(mutant.text, mutant.instead), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")


def run(copy: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Run tests in a copy of the repository. Returns whether they pass, and the last line of pytest."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *(f"tests/{each}" for each in tests),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"more than {LIMIT} s"
    if done.returncode not in (0, 1):  # 1 is a test that failed; more is a mistake in this file
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (failed or done.stdout.splitlines()[-1:])[0][:160]


def main() -> None:
    """Run the mutants and print which of them the tests notice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="word in the names of the mutants to run")
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    results = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        copies: Queue[Path] = Queue()
        for number in range(AT_ONCE):
            copies.put(Path(shutil.copytree(ROOT, Path(folder, str(number)), ignore=LEFT_OUT)))

        def one(mutant: Mutant) -> dict[str, object]:
            copy, start = copies.get(), time.perf_counter()
            try:
                with changed(copy, mutant):
                    passes, last = run(copy, mutant.tests)
            finally:
                copies.put(copy)
            return {"name": mutant.name, "killed": not passes, "by": last, "seconds": time.perf_counter() - start}

        for result in pool.map(one, chosen):
            results.append(result)
            print(f"{'killed  ' if result['killed'] else 'SURVIVED'} {result['name']}: {result['by']}", flush=True)
    killed = sum(bool(result["killed"]) for result in results)
    print(f"{killed} of {len(results)} killed")
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
