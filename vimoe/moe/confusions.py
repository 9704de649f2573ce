"""Confusions of classes by linear classifiers, groups of classes that are confused, and a classifier of groups.

Axes: I images, E channels, C classes, N groups.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.linalg import eigh
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor

from vimoe.moe.kmeans import balanced_kmeans

FOLDS = 5
FAINT = 0.01  # affinity of classes that are never confused, relative to the mean: it joins the parts of the graph
# of the classifier's squared weights, whose mean confidence is then near its accuracy (docs/guides/given_routes.md)
PENALTY = 10.0


def confusions(x_IE: Tensor, label_I: Tensor, seed: int = 0) -> Tensor:
    """Return (C, C), the probability that an image of the row's class is taken for the column's, summed over images.

    It is that of a linear discriminant analysis with a shrunk covariance (Ledoit and Wolf, 2004), fitted to the other
    images each time (cross-validation).

    Args:
        x_IE: features.
        label_I: class of each image, 0 to C - 1, each at least once.
        seed: seed of the folds.
    """
    x, label = x_IE.double().numpy(), label_I.numpy()
    found_CC = np.zeros((label.max() + 1, label.max() + 1))
    for fitted, held in KFold(min(FOLDS, len(x)), shuffle=True, random_state=seed).split(x):
        if 1 < len(np.unique(label[fitted])) < len(fitted):  # else there is nothing to fit
            model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Only one sample available")  # of a class: it has no covariance
                model.fit(x[fitted], label[fitted])
            np.add.at(found_CC, (label[held][:, None], model.classes_), model.predict_proba(x[held]))
    return torch.from_numpy(found_CC)


def groups_of(confusions_CC: Tensor, groups: int, seed: int = 0) -> Tensor:
    """Return the group (C,) of each class, 0 to N - 1: classes that are confused are together, in groups of equal size.

    Spectral clustering (Ng, Jordan and Weiss, 2001) of the graph A whose edges are the confusions in both directions:
    the rows of the N first eigenvectors of D^-1/2 A D^-1/2, by a k-means whose clusters are equal.

    Args:
        confusions_CC: confusions.
        groups: N, at most C. Sizes differ by 1 at most.
        seed: seed of the k-means.
    """
    classes = len(confusions_CC)
    graph_CC = (confusions_CC + confusions_CC.T).fill_diagonal_(0)
    graph_CC = (graph_CC + FAINT * graph_CC.mean() + torch.finfo(graph_CC.dtype).eps).fill_diagonal_(0)
    scale_C = graph_CC.sum(dim=1).rsqrt()
    laplacian_CC = scale_C[:, None] * graph_CC * scale_C
    first_CN = eigh(laplacian_CC.numpy(), subset_by_index=[classes - groups, classes - 1])[1]
    return balanced_kmeans(torch.from_numpy(first_CN), groups, seed)


def linear_classifier(x_ID: Tensor, group_I: Tensor) -> Tensor:
    """Return rows (N, D) such that softmax(rows x) is the probability of each group: logistic regression without bias.

    Args:
        x_ID: features.
        group_I: group of each image, 0 to N - 1, each at least once; N is at least 2.
    """
    size = x_ID.square().mean().sqrt()
    model = LogisticRegression(C=1 / PENALTY, fit_intercept=False, max_iter=1000)
    rows_ND = torch.from_numpy(model.fit((x_ID / size).numpy(), group_I.numpy()).coef_).float() / size
    return torch.cat([-rows_ND, rows_ND]) / 2 if len(rows_ND) == 1 else rows_ND  # of two groups it gives one row
