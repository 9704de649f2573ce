"""Flags and YAML files become settings; a mistake becomes one line with the nearest right name."""

from __future__ import annotations

import difflib
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader

from vimoe.config import DataConfig, ModelConfig, MoEConfig, TrainConfig
from vimoe.errors import ConfigError, FolderError, nearest
from vimoe.files import read_text, read_yaml

SECTIONS: dict[str, type] = {"model": ModelConfig, "moe": MoEConfig, "data": DataConfig, "train": TrainConfig}
PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}


# settings that only one task reads; another task refuses them, rather than to pass them over
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "classification": (
        "train.mixup", "train.cutmix", "train.auto_augment", "train.random_erasing", "train.min_crop",
        "data.images_per_class", "data.cache", "data.views", "data.crop_pct", "data.interpolation",
        "data.skip_unreadable",
    ),
    "segmentation": (
        "model.decoder", "data.inference", "data.flip_test", "train.min_scale", "train.max_scale", "train.dice_loss",
        "train.class_weights",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that a run was told, by section.

    Raises:
        ConfigError: for a setting that the task does not read, or that cached features cannot have.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for task, names in ONLY_FOR.items():
            for section, name in (full.split(".") for full in names if task != self.data.task):
                value, default = (getattr(each, name) for each in (getattr(self, section), SECTIONS[section]()))
                if value != default:
                    raise ConfigError(
                        f"{section}.{name}={value!r} with data.task={self.data.task!r}: expected it for {task} alone; "
                        f"leave it out"
                    )
        self._check_features()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain values, as JSON and YAML know them, by section and name."""
        values: dict[str, dict[str, Any]] = json.loads(json.dumps(asdict(self)))
        return values

    def _check_features(self) -> None:
        cache, train = self.data.cache, self.train
        if cache != "features":
            if self.data.views != DataConfig().views:
                raise ConfigError(
                    f"data.views={self.data.views} with data.cache={cache!r}: expected it with data.cache=features "
                    f"alone; leave it out"
                )
            return
        if train.train_only != "moe":
            raise ConfigError(
                f"data.cache='features' with train.train_only={train.train_only!r}: expected 'moe', since features of "
                f"blocks that are trained do not last; set it, or use data.cache=disk"
            )
        for name, value in (("mixup", train.mixup), ("cutmix", train.cutmix)):
            if value:
                raise ConfigError(
                    f"train.{name}={value:g} with data.cache='features': expected 0, since it mixes pixels; leave it "
                    f"out, or use data.cache=disk"
                )


class Parser(ArgumentParser):
    """jsonargparse's parser, whose mistakes are ConfigErrors of one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "parser_mode": "strict", **kwargs})

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Parses flags; a preset's name after --config stands for its file."""
        given = list(sys.argv[1:] if args is None else args)
        for place, arg in enumerate(given):
            flag, equals, name = arg.partition("=")
            if arg == "--config" and place + 1 < len(given):
                given[place + 1] = _content(given[place + 1])
            elif flag == "--config" and equals:
                given[place] = f"--config={_content(name)}"
        return super().parse_args(given, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ConfigError in place of printing a usage text."""
        raise ConfigError(self._one_line(message)) from ex

    def add_sections(self, *names: str) -> None:
        """Adds --SECTION.OPTION for every setting of the named sections, and --config for a YAML file of them."""
        presets = ", ".join(PRESETS)
        text = f"YAML file with the same sections and names as the flags, or a preset: {presets}; flags after it win"
        self.add_argument("--config", action="config", help=text)
        for name in names:
            self.add_class_arguments(SECTIONS[name], name)

    def settings(self, values: Namespace) -> Settings:
        """The settings of the sections that this parser has; the others keep their defaults."""
        for name in SECTIONS:
            if not isinstance(values.get(name, Namespace()), Namespace):
                raise ConfigError(f"section {name!r} is {values[name]!r}: expected its settings by name")
        made = self.instantiate(values)
        return Settings(**{name: made[name] for name in SECTIONS if name in made})

    def _one_line(self, message: str) -> str:
        """The message of jsonargparse in the form of all others: value, what was expected, remedy."""
        text = " ".join(re.sub(r"<class '([\w.]+)'>|typing\.", r"\1", message).split())
        text = re.sub(r'(Parser key "config": )+', "", text)
        for pattern in _UNKNOWN:
            if found := re.search(pattern, text):
                return self._unknown(".".join(found.groups()).partition("=")[0])
        if found := re.search(r"key \"([\w.]+)\": Expected an? (.+)\. Got value: (.*)", text):
            name, kind, value = found.groups()
            choices = re.findall(r"'([^']+)'", kind) if kind.startswith("Literal") else []
            if choices:
                word = value == "False" and "no" in choices  # which is what YAML reads a bare no as
                remedy = "put 'no' in quotes" if word else nearest(value, choices)
                return f"{name}={value}: expected one of {', '.join(choices)}; {remedy}"
            return f"{name}={value}: expected a value of type {kind}"
        return text.replace("Problems parsing config: ", "--config: expected a YAML file of sections and settings: ")

    def _unknown(self, name: str) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        known = flags if name.startswith("-") else [flag.removeprefix("--") for flag in flags]
        if difflib.get_close_matches(name, known, n=1):
            return f"unknown option {name}: {nearest(name, known)}"
        return f"unknown option {name}: see {self.prog} --help"


def _content(name: str) -> str:
    """Return the content of a YAML file or preset as YAML that needs no file, encoding or second look.

    Raises:
        ConfigError: where there is neither, or it cannot be read.
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
    return yaml.safe_dump({name: part for name, part in values.items() if part is not None}, sort_keys=False)


def _load_value(text: str) -> Any:
    """Read one value or a whole file for jsonargparse."""
    value = read_yaml(text)
    return text if re.fullmatch(r"\S[^\n]*:", text.strip()) else value  # a path that ends in a colon is no mapping


set_loader("strict", _load_value, exceptions=(yaml.YAMLError,))


# what jsonargparse calls an option that there is not: on the command line, in a section of a file, in no section
_UNKNOWN = (
    r"[Uu]nrecognized arguments: (\S+)",
    r"Group '(\w+)' does not accept option '([\w.]+)'",
    r"Option '([\w.]+)' is not accepted",
)


def flat(settings: Settings) -> dict[str, Any]:
    """Return the plain values of all settings by the names of their flags, such as "train.lr"."""
    return {f"{section}.{name}": v for section, values in settings.to_dict().items() for name, v in values.items()}


def read_settings(text: str) -> Settings:
    """Settings from YAML. Raises ConfigError for what is no section, no setting or no value of one."""
    parser = Parser(prog="settings")
    parser.add_sections(*SECTIONS)
    return parser.settings(parser.parse_string(text))
