"""k-means of directions: finds clusters that are there, keeps its promises where they are not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vimoe.moe.kmeans import balanced_kmeans, spherical_kmeans


def blobs(sizes: list[int], dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors around orthogonal directions, of lengths from 0.1 to 10, and the direction of each."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = F.one_hot(label, dim).float() + 0.1 * torch.randn(len(label), dim, generator=g)
    return x * (10 ** (2 * torch.rand(len(label), 1, generator=g) - 1)), label


def test_clusters_of_directions_are_found_whatever_their_lengths_and_sizes() -> None:
    x, label = blobs([50, 5, 20, 100])
    centroids, found = spherical_kmeans(x, 4)
    assert all(len(found[label == c].unique()) == 1 for c in range(4)) and len(found.unique()) == 4
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
    assert torch.equal((F.normalize(x, dim=1) @ centroids.T).argmax(dim=1), found)  # a router with these rows agrees


def test_no_cluster_is_empty_even_of_copies() -> None:
    centroids, found = spherical_kmeans(torch.ones(6, 3), 4)
    assert len(found.unique()) == 4 and centroids.isfinite().all()
    for seed in range(40):  # rounding says which of several vectors that fit perfectly fits worst
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(3, 5, generator=g)[torch.randint(3, (9,), generator=g)]
        centroids, found = spherical_kmeans(x, 5, seed)
        assert len(found.unique()) == 5
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize(("vectors", "clusters", "sizes"), [(40, 4, [10] * 4), (10, 4, [2, 2, 3, 3])])
def test_balanced_clusters_have_equal_sizes(vectors: int, clusters: int, sizes: list[int]) -> None:
    x = torch.randn(vectors, 8, generator=torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(balanced_kmeans(x, clusters)).tolist()) == sizes


def test_balanced_clusters_are_those_that_are_there() -> None:
    x, label = blobs([12, 12, 12])
    found = balanced_kmeans(x, 3)
    assert all(len(found[label == c].unique()) == 1 for c in range(3))


def test_a_seed_gives_the_same_clusters_again() -> None:
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(spherical_kmeans(x, 5, seed=3)[1], spherical_kmeans(x, 5, seed=3)[1])
