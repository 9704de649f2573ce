"""The commands of docs/guides/distributed.md have flags that the installed launchers, and vimoe, know."""

from __future__ import annotations

import re
import shlex
import subprocess
from argparse import ArgumentParser
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from vimoe.config.parallel import ParallelConfig
from vimoe.config.settings import SECTIONS, Settings, flat
from vimoe.verbs import VERBS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "guides/distributed.md").read_text("utf-8")
SCRIPT = DOCS / "slurm.sh"
LAUNCHERS = {"torchrun": get_args_parser, "accelerate launch": launch_command_parser}


def commands(launcher: str) -> list[list[str]]:
    """The command lines of a launcher on the page and in the script, without its name."""
    text = re.sub(r"\\\n\s*", " ", PAGE + SCRIPT.read_text("utf-8"))
    text = re.sub(
        r"\$\w+", "1", re.sub(r"(--node-rank=.*)\n\s+(--master-port)", r"\1 \2", text)
    )  # variables of the shell
    found = re.findall(rf"(?:^ {{4}}|srun +|- ){launcher} (.*-m vimoe.*)$", text, re.M)
    return [shlex.split(line) for line in found]


def test_all_commands_are_found() -> None:
    assert len(commands("torchrun")) == 7 and len(commands("accelerate launch")) == 3


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_knows_its_flags_and_the_rest_is_vimoe_s(launcher: str) -> None:
    parser: ArgumentParser = LAUNCHERS[launcher]()
    for command in commands(launcher):
        parsed = parser.parse_args(command)
        assert parsed.module and parsed.training_script == "vimoe"
        verb, *rest = parsed.training_script_args
        assert verb in VERBS
        flags = {word.removeprefix("--") for word in rest if word.startswith("--")}
        assert flags <= {*flat(Settings()), *(f"train.parallel.{each.name}" for each in fields(ParallelConfig))} | {
            "out", "resume",
        }  # fmt: skip


def test_the_flags_of_plan_and_the_mesh_are_settings() -> None:
    (command,) = re.findall(r"^ {4}vimoe plan (.*)$", PAGE, re.M)
    flags = {word.removeprefix("--") for word in command.split() if word.startswith("--")}
    assert flags - {"devices", "memory"} <= set(flat(Settings()))
    (mesh,) = re.findall(r"`(\{data: .*?\})`", PAGE)
    SECTIONS["train"](parallel=type(Settings().train.parallel)(**yaml.safe_load(mesh)))


def test_a_wrong_flag_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--nodes=4", "-m", "vimoe", "train"])
    assert "--nodes" in capsys.readouterr().err


def test_the_script_and_the_manifest_can_be_read() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    (manifest,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    pods = yaml.safe_load(manifest)["spec"]["pytorchReplicaSpecs"]
    assert [pods[name]["replicas"] for name in ("Master", "Worker")] == [1, 3]
    assert pods["Worker"]["template"] == pods["Master"]["template"]


def test_the_timeouts_are_torch_s() -> None:
    from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout

    minutes = [each.total_seconds() / 60 for each in (default_pg_nccl_timeout, default_pg_timeout)]
    assert minutes == [10, 30] and "10 minutes with NCCL (GPUs) and 30 with gloo" in PAGE
