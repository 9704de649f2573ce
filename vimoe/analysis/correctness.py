"""Predicted correctness: a logistic head that says how likely the class that a model names is right.

Axes: B images, D features.
"""

from __future__ import annotations

from typing import Self

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn

FOLDS = 5  # of cross-validation; fewer right or wrong images than this cannot be divided
STRENGTHS = (1.0, 1e1, 1e2, 1e3, 1e4)  # C of scikit-learn: the smaller, the less features count
_SHRUNK = 100.0  # features are divided by it, so that with the least C the maximum probability counts alone


class Correctness(nn.Module):
    """A logistic regression of "the named class is right" on features and the maximum probability.

        P(right) = sigmoid(w . z + a log(m / (1 - m)) / s + b)

    z are the standardised features over 100, m is the maximum softmax probability, s the standard deviation of its
    log-odds. The L2 penalty is chosen by five-fold cross-validation of the log-likelihood, on the images of the fit
    alone. It is as good as none for a. For w its largest value leaves next to nothing but a log(m / (1 - m)) / s + b,
    which orders images as m does. Were both penalised alike, features would drown m where images are few.

    After the self-perceiving module of SERL (arXiv 2007.10835), whose equations were not at hand: there an agent
    predicts its progress. The maximum probability alone is the baseline of Hendrycks and Gimpel (arXiv 1610.02136).

    Args:
        dim: D.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim + 1, 1).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(dim + 1))
        self.register_buffer("std", torch.ones(dim + 1))

    @torch.no_grad()
    def fit(self, logits: Tensor, features: Tensor, right: Tensor) -> Self:
        """Fit the head; arguments as of `forward`, and right (B,), 1 where the named class is the label, else 0.

        At least `FOLDS` images have to be right, and as many wrong.
        """
        x = _inputs(logits, features)
        self.mean.copy_(x.mean(dim=0))
        self.std.copy_(x.std(dim=0, correction=0).clamp(min=1e-6))
        self.std[:-1] *= _SHRUNK
        search = GridSearchCV(
            LogisticRegression(max_iter=10_000), {"C": STRENGTHS}, scoring="neg_log_loss", cv=FOLDS, error_score="raise"
        )
        search.fit(self._standardised(x).double().numpy(), right.int().numpy())
        self.head.weight.copy_(torch.from_numpy(search.best_estimator_.coef_))
        self.head.bias.copy_(torch.from_numpy(search.best_estimator_.intercept_))
        return self

    def forward(self, logits: Tensor, features: Tensor) -> Tensor:
        """Return (B,) the probability that the named class is right.

        Args:
            logits: (B, classes).
            features: (B, D).
        """
        probability: Tensor = self.head(self._standardised(_inputs(logits, features)))[:, 0].sigmoid()
        return probability

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _inputs(logits: Tensor, features: Tensor) -> Tensor:
    """Return (B, D + 1): features, and the log-odds of the maximum probability."""
    best = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, best, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([features, logits.gather(1, best) - others], dim=1)
