"""Orders bring out blocks that are there, and none that are not."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.made_up_routing import CLASSES, EXPERTS, IMAGES, chosen, labels, rng

from vimoe.analysis.block_order import orders
from vimoe.analysis.halves import halves


def test_orders_look_at_shares_not_at_numbers_of_images() -> None:
    """A class with a hundred times the images does not decide for the others; idle experts stand last."""
    table = np.zeros((6, 5), int)
    table[[0, 1], 3] = 9
    table[[2, 3], 1] = 9
    table[[4, 5], 4] = 9
    table[1] *= 100
    table = np.insert(table, 2, 0, axis=0)  # a class without images stands last
    order, (columns,) = orders([table])
    blocks = [set(order[i : i + 2]) for i in (0, 2, 4)]
    assert all(block in ({0, 1}, {3, 4}, {5, 6}) for block in blocks) and order[-1] == 2
    assert sorted(columns[:3]) == [1, 3, 4] and sorted(columns[3:]) == [0, 2]
    drawn = table[order][:, columns] > 0
    assert drawn.argmax(axis=1).tolist() == [0, 0, 1, 1, 2, 2, 0]


def test_within_a_block_the_clearest_class_comes_first() -> None:
    table = np.array([[6, 4, 0, 0], [9, 1, 0, 0], [0, 0, 1, 9], [0, 0, 4, 6], [10, 0, 0, 0], [0, 0, 0, 10]])
    order, _ = orders([table])
    rank = {int(c): i for i, c in enumerate(order)}
    assert rank[1] == rank[4] + 1 and rank[2] == rank[5] + 1


def test_orders_bring_out_blocks_on_images_that_they_were_not_found_on() -> None:
    y = labels()
    experts = np.where(rng(9).random(IMAGES) < 0.8, (7 * y + 2) % EXPERTS, rng(10).integers(0, EXPERTS, IMAGES))
    half = halves(y)

    def table(mask: np.ndarray, e: np.ndarray) -> np.ndarray:
        return np.stack([chosen(e[mask & (y == c)]).sum(axis=0) for c in range(CLASSES)])

    order, (columns,) = orders([table(half, experts)])
    drawn = table(~half, experts)[order][:, columns]
    assert sorted(order) == list(range(CLASSES)) and sorted(columns) == list(range(EXPERTS))
    favourite = drawn.argmax(axis=1)
    assert (np.diff(favourite) >= 0).mean() > 0.8  # runs along the diagonal
    # where there is no structure, the half that was not sorted shows none
    nothing = rng(11).integers(0, EXPERTS, IMAGES)
    order, (columns,) = orders([table(half, nothing)])
    sorted_half, other = (table(m, nothing)[order][:, columns] for m in (half, ~half))
    along = [np.corrcoef(t.argmax(axis=1), np.arange(CLASSES))[0, 1] for t in (sorted_half, other)]
    assert along[0] > along[1]


@pytest.mark.parametrize("tables", [[np.ones((1, 4), int)], [np.ones((3, 1), int)], [np.zeros((3, 4), int)]])
def test_orders_of_next_to_nothing_exist(tables: list[np.ndarray]) -> None:
    order, columns = orders(tables)
    assert sorted(order) == list(range(len(tables[0]))) and sorted(columns[0]) == list(range(tables[0].shape[1]))


def test_orders_keep_classes_with_the_same_routes_together() -> None:
    """Rounding parted them; and scikit-learn warned where it found fewer clusters than there were classes."""
    first, second = [4, 7, 3, 7, 3, 4, 0, 0], [2, 1, 2, 1, 7, 7, 6, 6]
    tables = [np.zeros((10, 8)) for _ in range(2)]
    for table, experts in zip(tables, (first, second), strict=True):
        table[np.arange(8), experts] = 1
    order, columns = orders(tables)  # pytest turns a warning into an error
    assert sorted(order) == list(range(10)) and [sorted(column) for column in columns] == [list(range(8))] * 2
    alike = [np.array([[18, 0], [15, 4], [18, 0], [18, 0], [14, 4], [18, 0]]), np.full((6, 2), 9)]
    order, _ = orders(alike)
    places = [list(order).index(each) for each in (0, 2, 3, 5)]
    assert max(places) - min(places) == 3
