"""Flags and YAML files as settings; a mistake is an error of one line with the nearest right name."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from vimoe.config.settings import SECTIONS, Settings
from vimoe.config.yaml_reader import read_yaml, write_yaml
from vimoe.errors import ConfigError, FolderError, choice, nearest
from vimoe.files import read_text

PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}

# The wording of jsonargparse, whose exceptions carry neither the setting nor the value. A new version may change it:
# tests/config/test_command_line.py gives a wrong value to a setting of every type.
_UNKNOWN = re.compile(
    r"[Uu]nrecognized arguments: (\S+)"  # on the command line
    r"|Group '(\w+)' does not accept option '([\w.]+)'"  # in a section of a file
    r"|Option '([\w.]+)' is not accepted"  # in a file, outside of all sections
)
_WRONG_TYPE = re.compile(
    r'key "(?P<name>[\w.]+)": (?:Expected an? (?P<kind>.+)\. Got value: (?P<value>.*)'
    r"|Does not validate .* Subtypes: \[(?P<kinds>.+)\] Errors: .* Given value: (?P<given>.*))"
)
_NO_SECTION = re.compile(r"key \"([\w.]+)\": Unable to load config ['\"](.*?)['\"](?: - |$)")
_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "dict": "values by name",
    "tuple[float, ...]": "a list of numbers in brackets", "NoneType": "none",
    "tuple[int, ...]": "a list of whole numbers in brackets, such as [2, 6],",
    "tuple[str, ...]": "a list of words in brackets, such as [a, b],",
}  # fmt: skip


# settings by the names that timm's and transformers' trainings, or habit, give them
_ALIASES = {
    "learning_rate": "train.lr", "wd": "train.weight_decay", "max_grad_norm": "train.clip_grad",
    "batch": "train.batch_size", "bs": "train.batch_size", "train_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size", "gradient_accumulation_steps": "train.accumulation",
    "grad_accum_steps": "train.accumulation", "num_epochs": "train.epochs", "num_train_epochs": "train.epochs",
    "warmup": "train.warmup_epochs", "smoothing": "train.label_smoothing", "aa": "train.auto_augment",
    "reprob": "train.random_erasing", "model_ema_decay": "train.ema_decay", "drop_path": "model.drop_path_rate",
    "image_size": "model.img_size", "input_size": "model.img_size", "num_labels": "model.num_classes",
    "num_workers": "data.workers", "data_dir": "data.path", "dataset": "data.path", "k": "moe.top_k",
    "experts_per_token": "moe.top_k", "output_dir": "out", "output": "out",
}  # fmt: skip
# settings that are off by default, for which "none" means so as null does
_OFF = {f"{section}.{each.name}" for section, kind in SECTIONS.items() for each in fields(kind) if each.default is None}


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line (ConfigError)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "parser_mode": "strict", **kwargs})
        self._sections: tuple[str, ...] = ()

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Parse flags; --config takes a file or the name of a preset, and leaves out the sections of other verbs."""
        others = SECTIONS.keys() - set(self._sections)
        given = list(sys.argv[1:] if args is None else args)
        for index, arg in enumerate(given):
            flag, equals, name = arg.partition("=")
            if arg == "--config" and index + 1 < len(given):
                given[index + 1] = _content(given[index + 1], others)
            elif flag == "--config" and equals:
                given[index] = f"--config={_content(name, others)}"
            elif flag.removeprefix("--") in _OFF and equals and name == "none":
                given[index] = f"{flag}=null"
            elif arg.removeprefix("--") in _OFF and given[index + 1 : index + 2] == ["none"]:
                given[index + 1] = "null"
        return super().parse_args(given, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ConfigError, where jsonargparse would print a usage text and exit."""
        raise ConfigError(self._one_line(message)) from ex

    def add_sections(self, *names: str) -> None:
        """Add a flag --SECTION.OPTION for every setting of the named sections, and --config for a YAML file."""
        self._sections += names
        presets = ", ".join(PRESETS)
        text = f"YAML file with the same sections and names as the flags, or a preset: {presets}; flags after it win"
        self.add_argument("--config", action="config", help=text)
        for name in names:
            self.add_class_arguments(SECTIONS[name], name)

    def settings(self, values: Namespace) -> Settings:
        """Return parsed settings; sections that this parser does not have keep their defaults."""
        for name in (*SECTIONS, "train.parallel"):
            if not isinstance(values.get(name, Namespace()), Namespace):
                raise ConfigError(f"section {name!r} is {values[name]!r}: expected its settings by name")
        made = self.instantiate(values)
        return Settings(**{name: made[name] for name in SECTIONS if name in made})

    def given(self, args: list[str], section: str) -> list[str]:
        """Return the names of the settings of a section that flags or --config set, be it to their defaults."""
        values = self.parse_args(args, defaults=False).get(section, Namespace())
        return list(vars(values))

    def _one_line(self, message: str) -> str:
        """Return a message of jsonargparse in our form: value, what was expected, remedy."""
        text = " ".join(re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", message).split())
        text = re.sub(r'(Parser key "config": )+', "", text)
        if found := _UNKNOWN.search(text):
            return self._unknown(".".join(filter(None, found.groups())).partition("=")[0])
        if found := _WRONG_TYPE.search(text):
            name, kinds, value = found["name"], found["kind"] or found["kinds"], found["value"] or found["given"]
            if re.search(r"\bint\b", kinds) and (words := re.findall(r"'([^']+)'", kinds)):  # a number or a word
                return f"{name}={value}: expected a whole number, or {' or '.join(map(repr, words))}"
            if choices := re.findall(r"'([^']+)'", kinds):  # of a Literal
                bare = value == "False" and "no" in choices  # YAML reads a bare no as False
                expected = (
                    f"expected one of {', '.join(choices)}; put 'no' in quotes" if bare else choice(value, choices)
                )
                return f"{name}={value}: {expected}"
            words = [_KINDS.get(kind, f"a value of type {kind}") for kind in re.split(r", (?=NoneType)", kinds)]
            return f"{name}={value}: expected {' or '.join(words)}"
        if found := _NO_SECTION.search(text):
            flag = f"--{found[1]}"
            return f"{flag}={found[2]}: expected a YAML file; to set one option use {flag}.NAME, see {self.prog} --help"
        return text.replace("Problems parsing config: ", "--config: expected a YAML file of sections and settings: ")

    def _unknown(self, name: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        dashes = "--" if name.startswith("-") else ""
        known = [dashes + flag.removeprefix("--") for flag in flags]
        own = name.lstrip("-").replace("-", "_").rpartition(".")[2]
        same = [flag for flag in known if flag.removeprefix("--").rpartition(".")[2] == own]
        meant = same if len(same) == 1 else [dashes + _ALIASES.get(own, "")]
        if meant[0] in known:
            return f"unknown option {name}: did you mean {meant[0]!r}?"
        if difflib.get_close_matches(name, known, n=1):
            return f"unknown option {name}: {nearest(name, known)}"
        return f"unknown option {name}: see {self.prog} --help"


def _content(name: str, without: Collection[str]) -> str:
    """Return a YAML file or preset as YAML text, so that jsonargparse reads no file in the locale's encoding.

    Args:
        name: path of the file, or name of the preset.
        without: names of sections to leave out.

    Raises:
        ConfigError: if it is missing or cannot be read.
    """
    path = PRESETS[name] if name in PRESETS and not Path(name).exists() else Path(name)
    if not path.exists() and not path.suffix:
        raise ConfigError(f"--config {name}: expected a YAML file or a preset; {nearest(name, PRESETS)}")
    try:
        values = read_yaml(read_text(path))
    except (yaml.YAMLError, FolderError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--config {name}: {reason}; expected a YAML file of sections and settings") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {name}: expected a YAML file of sections and settings, such as 'train: {{epochs: 3}}'"
        )
    kept = {name: _off(name, part) for name, part in values.items() if part is not None and name not in without}
    return write_yaml(kept)


def _off(section: str, values: Any) -> Any:
    """Return the values of a section with None for "none" where that is the setting's default."""
    if not isinstance(values, dict):
        return values
    return {name: None if value == "none" and f"{section}.{name}" in _OFF else value for name, value in values.items()}


def _load_value(text: str) -> Any:
    """Return the value of a text for jsonargparse: of one flag, or of a whole file."""
    value = read_yaml(text)
    path = re.fullmatch(r"\S[^\n]*:", text.strip())  # one that ends in a colon is a text, not a mapping
    return text if path else value


set_loader("strict", _load_value, exceptions=(yaml.YAMLError,))


@cache
def _parser_of_files() -> Parser:
    """Return the parser of settings in files, which takes longer to make than to use."""
    parser = Parser(prog="settings")
    parser.add_sections(*SECTIONS)
    return parser


def read_settings(text: str) -> Settings:
    """Return settings from YAML. Raises ConfigError if a section, a setting or a value is wrong."""
    parser = _parser_of_files()
    return parser.settings(parser.parse_string(text))
