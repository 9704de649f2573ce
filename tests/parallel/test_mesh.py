from __future__ import annotations

from typing import Any

import pytest

from vimoe.errors import ConfigError
from vimoe.parallel.mesh import layout


@pytest.mark.parametrize(
    ("parallel", "count", "sizes"),
    [
        ({}, 3, (3, 1, 1)),
        ({"expert": 2}, 2, (1, 1, 2)),
        ({"fsdp": 2, "expert": 2}, 8, (2, 2, 2)),
        ({"data": 2, "fsdp": 4}, 8, (2, 4, 1)),
    ],
)
def test_data_takes_the_rest(parallel: dict[str, int], count: int, sizes: tuple[int, ...]) -> None:
    assert layout(parallel, count) == dict(zip(("data", "fsdp", "expert"), sizes, strict=True))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"experts": 2}, "train.parallel has 'experts': expected one of data, fsdp, expert; did you mean 'expert'?"),
        ({"fsdp": 0}, "train.parallel.fsdp=0: expected a whole number from 1"),
        ({"fsdp": True}, "train.parallel.fsdp=True: expected a whole number from 1"),
        ({"expert": 3}, "train.parallel has fsdp=1 x expert=3 for 4 processes: expected a product that divides them"),
        ({"data": 1, "expert": 2}, "train.parallel has data=1 x fsdp=1 x expert=2 for 4 processes: expected a product"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        layout(parallel, 4)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
