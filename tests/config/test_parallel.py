"""The mesh of a training: its sizes multiply to the processes, and divide the batch and the experts."""

from __future__ import annotations

import pytest

from vimoe.config.command_line import Parser, read_settings
from vimoe.config.parallel import ParallelConfig, bytes_of
from vimoe.config.settings import Settings, flat
from vimoe.errors import ConfigError


def parsed(*args: str) -> Settings:
    parser = Parser(prog="vimoe train")
    parser.add_sections("train")
    return parser.settings(parser.parse_args(list(args)))


def test_by_default_all_processes_are_data_parallel() -> None:
    assert ParallelConfig().over(8) == ParallelConfig(data=8)
    assert ParallelConfig(fsdp=2, expert=4).over(16) == ParallelConfig(data=2, fsdp=2, expert=4)


@pytest.mark.parametrize(
    "mesh", [ParallelConfig(expert=3), ParallelConfig(data=2, fsdp=2), ParallelConfig(fsdp=16), ParallelConfig(data=9)]
)
def test_sizes_that_do_not_multiply_to_the_processes_are_refused(mesh: ParallelConfig) -> None:
    with pytest.raises(ConfigError, match=r"with 8 processes: expected sizes whose product is 8; "):
        mesh.over(8)


def test_batch_and_experts_have_to_be_divisible() -> None:
    mesh = ParallelConfig(data=2, expert=4)
    mesh.check(64, 8)
    with pytest.raises(ConfigError, match=r"train.batch_size=20 over 8 processes: .* of 8; set 16"):
        mesh.check(20, 8)
    with pytest.raises(ConfigError, match=r"train.parallel.expert=4 with moe.num_experts=6: .* set such as 2"):
        mesh.check(64, 6)
    with pytest.raises(ConfigError, match=r"train.parallel.expert=4 without MoE layers: expected 1"):
        mesh.check(64, 0)
    ParallelConfig(data=8).check(64, 0)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_size_is_a_whole_number(size: object) -> None:
    for name in ("data", "fsdp", "expert"):
        with pytest.raises(ConfigError, match=f"{name}={size!r}: expected a whole number of at least 1"):
            ParallelConfig(**{name: size})


def test_flags_and_files_give_the_same_mesh_and_settings_keep_it() -> None:
    settings = parsed("--train.parallel.fsdp=2", "--train.parallel.expert=4")
    assert settings == parsed("--train.parallel={fsdp: 2, expert: 4}")
    assert settings == read_settings("train: {parallel: {fsdp: 2, expert: 4}}")
    assert settings.train.parallel == ParallelConfig(fsdp=2, expert=4)
    assert flat(settings)["train.parallel"] == {"data": None, "fsdp": 2, "expert": 4}


@pytest.mark.parametrize("text", ["80", "80 gb", "GB", "-1GB", "0GB", "1e3GB", "80GBs", ""])
def test_memory_needs_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(ConfigError, match="expected the memory of a device with its unit, such as 80GB"):
        bytes_of(text)


def test_units_are_of_1000_or_1024_bytes() -> None:
    assert (bytes_of("2KB"), bytes_of("2KiB"), bytes_of("0.5 TB")) == (2000, 2048, 5e11)
