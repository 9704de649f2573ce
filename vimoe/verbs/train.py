"""The verb `train`."""

from __future__ import annotations

from typing import Any

from vimoe import process
from vimoe.errors import ConfigError, counted
from vimoe.run_folder import check_new, open_unfinished
from vimoe.verbs.options import Result, parser_of, required_out


def train(argv: list[str]) -> Result:
    """Train a ViT, or the ViMoE made from it, on your images; write a run folder.

    Example: vimoe train --data.path photos/ --model.name vit_tiny_patch16_224 --moe.layers last:2 --out runs/photos
    """
    resume = "run folder of a stopped or killed training to continue; takes no other option"
    parser = parser_of(train, out="run folder to create", resume=resume)
    parser.add_sections("model", "moe", "data", "train")
    options = parser.parse_args(argv)
    if options["resume"] is None:
        required_out(options)
    elif others := [a for a in argv if a.startswith("--") and a.partition("=")[0] not in ("--resume", "--json")]:
        raise ConfigError(f"{others[0]} with --resume: expected none, since the run has its own settings; leave it out")
    settings = parser.settings(options)
    from vimoe.models.names import check_layer_names, check_name

    check_name(settings.model, segmentation=True)  # the task judges the folder of a segmenter
    check_layer_names(settings.model, settings.moe.selection, *settings.train.parts)
    from vimoe.data.data_path import check_there

    resumed = options["resume"]
    alone = process.launched() == 1  # else another process may be ahead, and have made or locked the folder
    if resumed is None:
        check_there(settings.data.path)
        if alone:
            check_new(options["out"])
    elif alone:
        open_unfinished(resumed)
    from vimoe.experiments.train import resume_training, run_training
    from vimoe.models.continued import with_own_layers

    if resumed is None:
        summary = run_training(with_own_layers(settings, parser.given(argv, "moe")), options["out"])
    else:
        summary = resume_training(resumed)
    from vimoe.metrics.registry import shown

    val = summary["val"]
    names = shown(val)
    text = (
        f"validation {names.judge_name} {val[names.judge]:.2%}, loss {val['loss']:.4f} "
        f"({counted(val['images'], 'image')}) "
        f"in epoch {summary['best_epoch']} of {summary['epochs']}\n{_tasks_line(summary)}{summary['report']}"
    )
    return text, summary


def _tasks_line(summary: dict[str, Any]) -> str:
    """Return a line on the tasks that were learnt one after the other; nothing for other trainings."""
    if "tasks" not in summary:
        return ""
    seen, own = summary["tasks"]["seen"], summary["tasks"]["own"]
    return (
        f"{len(summary['tasks']['trained'])} tasks: mean accuracy {seen['mean']:.2%} among all classes, "
        f"{own['mean']:.2%} within a task; forgetting {seen['forgetting']:.2%} and {own['forgetting']:.2%}\n"
    )
