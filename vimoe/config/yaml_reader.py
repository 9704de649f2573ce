"""YAML as its writer means it: unlike PyYAML, a repeated key is an error, a date is text and 1e-3 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Strict(yaml.SafeLoader):  # type: ignore[misc]
    """Loader of plain values that refuses a repeated key; PyYAML would silently keep the last one.

    Dates stay text, and 1e-3 is a number, as in YAML 1.2.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # the keys as written: merged keys ("<<") are resolved later
        known: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, value = key.start_mark.line + 1, (key.tag, key.value)
            if value in known:
                where = f"line {line}" if line == known[value] else f"lines {known[value]} and {line}"
                raise yaml.YAMLError(f"key {key.value!r} is repeated in {where}; remove one")
            known[value] = line
        return node


class _Quoting(yaml.SafeDumper):  # type: ignore[misc]
    """Writer of plain values that puts a text in quotes which `_Strict` would read as a number."""


_FLOAT = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")
for _class in (_Strict, _Quoting):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, "-+0123456789")


def read_yaml(text: str) -> Any:
    """Return the plain values of a YAML text.

    Raises:
        yaml.YAMLError: if the text is no YAML, or repeats a key in a mapping.

    >>> read_yaml("{lr: 1e-3, day: 2024-01-02}")
    {'lr': 0.001, 'day': '2024-01-02'}
    """
    return yaml.load(text, _Strict)  # noqa: S506  a SafeLoader with one more check


def write_yaml(values: Any) -> str:
    """Return the text of which `read_yaml` makes these plain values.

    >>> print(write_yaml({"path": "12e4", "lr": 0.001}), end="")
    path: '12e4'
    lr: 0.001
    """
    text: str = yaml.dump(values, Dumper=_Quoting, sort_keys=False)
    return text
