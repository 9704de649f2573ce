"""Mistakes on the command line and in YAML files, one line each, whatever the wording of jsonargparse."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from vimoe.config.bench import LayerBench, ModelBench
from vimoe.config.command_line import Parser, read_settings
from vimoe.config.data import DataConfig
from vimoe.config.model import ModelConfig
from vimoe.config.moe import EXPERTS, GATES, ROUTERS, STARTS, MoEConfig
from vimoe.config.registry import Registry
from vimoe.config.settings import SECTIONS, Settings
from vimoe.config.yaml_reader import write_yaml
from vimoe.errors import ConfigError

ONE_OF_A_TYPE = {
    str(get_type_hints(config)[field.name]): f"{section}.{field.name}"
    for section, config in SECTIONS.items()
    for field in fields(config)
}  # the wording of jsonargparse depends on the type alone
TYPED = [
    name
    for kind, name in ONE_OF_A_TYPE.items()
    if "str" not in kind.replace("dict[str", "") and name != "train.parallel"  # text can be all, and that is a section
]


@cache
def parser() -> Parser:
    made = Parser(prog="vimoe count")
    made.add_sections(*SECTIONS)
    return made


def parse(*args: str) -> None:
    parser().settings(parser().parse_args(list(args)))


def in_file(name: str, value: str) -> None:
    section, _, option = name.partition(".")
    parser().settings(parser().parse_string(f"{section}: {{{option}: {value}}}"))


def on_command_line(name: str, value: str) -> None:
    parse(f"--{name}={value}")


@pytest.mark.parametrize("name", TYPED)
@pytest.mark.parametrize("give", [on_command_line, in_file])
def test_a_value_of_a_wrong_type_is_told_by_setting_value_and_kind(give: Callable, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        give(name, "[wrong]")
    message = str(raised.value)
    assert message.startswith(f"{name}=['wrong']: expected ") and "\n" not in message
    assert not any(word in message for word in ("Parser key", "type", "Got value", "Errors")), message


def test_every_kind_of_type_is_among_them() -> None:
    assert len(TYPED) >= 12 and {"model.args", "data.std", "train.early_stopping", "train.precision"} <= set(TYPED)


def test_every_flag_has_a_help_text() -> None:
    """jsonargparse finds the text of an argument only if it has a line of its own."""
    made = Parser(prog="vimoe bench")
    made.add_sections(*SECTIONS)
    for name, config in (("layer", LayerBench), ("model_bench", ModelBench)):
        made.add_class_arguments(config, name)
    flags = {action.option_strings[0]: action.help for action in made._actions if action.option_strings}
    without = [flag for flag, text in flags.items() if "." in flag and not text]
    assert not without and len(flags) > 80


def test_none_is_off_where_that_is_the_default(tmp_path: Path) -> None:
    names = ("train.early_stopping", "train.auto_augment", "data.interpolation", "model.decoder")
    (tmp_path / "off.yaml").write_text("train: {early_stopping: none, auto_augment: none}\ndata: {val_split: none}\n")
    for args in ([f"--{name}=none" for name in names], [a for n in names for a in (f"--{n}", "none")]):
        made = parser().settings(parser().parse_args(args))
        assert made.train.early_stopping is made.train.auto_augment is made.data.interpolation is None
        assert made.model.decoder is None
    made = parser().settings(parser().parse_args(["--config", str(tmp_path / "off.yaml")]))
    assert made.train.early_stopping is made.train.auto_augment is None and made.data.val_split == "none"


UNKNOWN = {
    "--moe.layer=all": "unknown option --moe.layer: did you mean '--moe.layers'?",
    "--train.learning_rate=1": "unknown option --train.learning_rate: did you mean '--train.lr'?",
    "--num-epochs=1": "unknown option --num-epochs: did you mean '--train.epochs'?",
    "--lr=1": "unknown option --lr: did you mean '--train.lr'?",
    "--train.batch=1": "unknown option --train.batch: did you mean '--train.batch_size'?",
    "--image_size=1": "unknown option --image_size: did you mean '--model.img_size'?",
    "surplus": "unknown option surplus: see vimoe count --help",
    "--moe=3": "--moe=3: expected a YAML file; to set one option use --moe.NAME, see vimoe count --help",
    "--moe.groups=[a]": "moe.groups=['a']: expected a list of whole numbers in brackets, such as [2, 6], or none",
    "--data.mean=[a]": "data.mean=['a']: expected a list of numbers in brackets or none",
    "--train.stages=head": "train.stages=head: expected a list of words in brackets, such as [a, b], or none",
    "--train.train_only=lst:2": (
        "train_only='lst:2': expected one of all, moe, experts, head, last:N, every:N with N of 1 or more; "
        "did you mean 'last:N'?"
    ),
    "--train.epochs=x": "train.epochs=x: expected a whole number",
    "--model.img_size=x": "model.img_size=x: expected a whole number or none",
    "--train.precision=bf61": "train.precision=bf61: expected one of auto, no, bf16, fp16; did you mean 'bf16'?",
}


@pytest.mark.parametrize("given", UNKNOWN)
def test_a_mistake_is_one_line_with_the_remedy(given: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(given)
    assert str(raised.value) == UNKNOWN[given]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rate: 1}", "unknown option train.learning_rate: did you mean 'train.lr'?"),
        ("moe: {layer: all}", "unknown option moe.layer: did you mean 'moe.layers'?"),
        ("moo: {layers: all}", "unknown option moo.layers: did you mean 'moe.layers'?"),
        ("train: {precision: no}", "train.precision=False: expected one of .*; put 'no' in quotes"),
        ("moe: 3", "section 'moe' is 3: expected its settings by name"),
        ("train: {parallel: 3}", "section 'train.parallel' is 3: expected its settings by name"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_settings(text)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("last:2", "last:2"),
        ("[10, 11]", (10, 11)),
        ("blocks.1?.mlp", "blocks.1?.mlp"),
        ("[3, 'blocks.1?.mlp']", (3, "blocks.1?.mlp")),
    ],
)
def test_a_part_to_train_is_written_as_layers_are(written: str, expected: object) -> None:
    """On the command line and in a file, and back into a file."""
    parser = Parser(prog="test")
    parser.add_sections("moe", "train")
    given = parser.settings(parser.parse_args([f"--moe.layers={written}", f"--train.train_only={written}"]))
    read = read_settings(f"train:\n  train_only: {written}\n")
    assert given.moe.layers == given.train.train_only == read.train.train_only == expected
    assert read_settings(write_yaml(read.to_dict())) == read


def test_pools_are_a_list() -> None:
    parser = Parser(prog="test")
    parser.add_sections("moe")
    given = parser.settings(parser.parse_args(["--moe.groups", "[2, 6]", "--moe.routing=token"]))
    read = read_settings("moe:\n  groups: [2, 6]\n  routing: token\n")
    assert given.moe.groups == read.moe.groups == (2, 6)
    assert read_settings(write_yaml(read.to_dict())) == read


def test_texts_that_look_like_numbers_stay_texts() -> None:
    made = Settings(data=DataConfig(path="12e4"), model=ModelConfig(args={"c": ["1e3"], "d": 1e-3}))
    assert read_settings(write_yaml(made.to_dict())) == made


def test_stages_are_a_list() -> None:
    read = read_settings("train:\n  stages: [head, all, experts]\n")
    assert read.train.stages == ("head", "all", "experts")
    assert read_settings(write_yaml(read.to_dict())) == read


@pytest.mark.parametrize("name, kinds", {"router": ROUTERS, "gate": GATES, "experts": EXPERTS, "init": STARTS}.items())
def test_the_help_names_every_kind(name: str, kinds: Registry) -> None:
    text = inspect.getdoc(MoEConfig) or ""  # Python 3.13 leaves out the indentation itself
    entry = re.search(rf"^    {name}: (.*\n(?:        .*\n)*)", text, re.M)
    own = [kind for kind, made in kinds.items() if "vimoe." in str(made)]  # tests register others
    assert entry and own and all(f'"{kind}"' in entry[1] for kind in own)
