"""YAML: a repeated key is an error, dates are text, 1e-3 is a number."""

from __future__ import annotations

import pytest
import yaml

from vimoe.config.yaml_reader import read_yaml, write_yaml


def test_yaml_is_read_as_its_writer_means_it() -> None:
    merged = "a: {inner: &x {<<: &b {k: 1}, k: 2}}\ny: {<<: *x}"  # where the loader merges an anchor twice
    assert read_yaml(merged) == {"a": {"inner": {"k": 2}}, "y": {"k": 2}}
    text = "a: &base {x: 1}\nb: {<<: *base, x: 2}\nday: 2024-01-02\nrate: 1e-3\n'1': s\n1: n"
    read = read_yaml(text)
    assert read == {"a": {"x": 1}, "b": {"x": 2}, "day": "2024-01-02", "rate": 1e-3, "1": "s", 1: "n"}
    for twice, line in (
        ("a: 1\nb: 2\na: 3", "lines 1 and 3"),
        ("c:\n  0: x\n  0: y", "lines 2 and 3"),
        ("[{k: 1, k: 1}]", "line 1"),
        ("a: &x {<<: {k: 1}, k: 2, k: 3}", "line 1"),
    ):
        with pytest.raises(yaml.YAMLError, match=f"is repeated in {line};"):
            read_yaml(twice)


def test_what_is_written_is_read_as_it_was() -> None:
    values = {"path": "12e4", "b": "1e-3", "+1E5": "-2e+3", "date": "2024-01-02", "no": "no", "rate": 1e-3, "n": None}
    assert read_yaml(write_yaml(values)) == values
    assert list(read_yaml(write_yaml(values))) == list(values)  # in their order
