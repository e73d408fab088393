"""Quick judgements on frozen features: nearest neighbours and a ridge classifier. Pure functions on arrays.

Shared by the in-loop probe and the evaluation verbs, so that the two agree.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hybridssl.health import rankme

Array = np.ndarray


def unit(x: Array | torch.Tensor) -> Array:
    """Rows at unit length, float32 and contiguous, as faiss wants them: [N, D] -> [N, D]."""
    x = np.ascontiguousarray(torch.as_tensor(x).detach().cpu().float().numpy())
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def neighbours(train_x: Array, test_x: Array, k: int) -> tuple[Array, Array]:
    """The k most alike training rows of every test row: (cosine [M, k], index int64 [M, k]), most alike first.

    k is cut to the number of training rows. Exact search.
    """
    train, test = unit(train_x), unit(test_x)
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train)
    return index.search(test, min(k, len(train)))


def vote(cosine: Array, labels: Array, classes: int, temperature: float = 0.07) -> Array:
    """Neighbours' votes weighted by exp(cosine / temperature): ([M, k], int [M, k]) -> shares [M, classes], sum 1
    (Wu 2018, section 3.4; the DINO kNN protocol)."""
    weight = np.exp((cosine - cosine[:, :1]) / temperature)  # the first is the largest: no overflow
    scores = np.zeros((len(cosine), classes), dtype=np.float64)
    np.add.at(scores, (np.arange(len(cosine))[:, None], labels), weight)
    return scores / scores.sum(1, keepdims=True)


def knn(train_x: Array, train_y: Array, test_x: Array, k: int, classes: int, temperature: float = 0.07) -> Array:
    """Weighted k-nearest-neighbour scores: [N, D], int [N], [M, D] -> [M, classes], rows sum to 1."""
    cosine, index = neighbours(train_x, test_x, k)
    return vote(cosine, np.asarray(train_y)[index], classes, temperature)


def linear(train_x: Array, train_y: Array, test_x: Array) -> Array:
    """Class of every test row by class-balanced ridge regression on one-hot: [N, D], int [N], [M, D] -> int [M].

    Features are standardised on the training rows; the penalty is chosen by leave-one-out on them. Closed form: it
    costs seconds where a logistic regression costs minutes, which is what a probe inside the loop can afford.
    """
    train_y = np.asarray(train_y)
    if len(np.unique(train_y)) < 2:
        return np.full(len(test_x), train_y[0])
    ridge = RidgeClassifierCV(alphas=np.logspace(0, 4, 9), class_weight="balanced")
    model = make_pipeline(StandardScaler(), ridge).fit(np.asarray(train_x, np.float64), train_y)
    return np.asarray(model.predict(np.asarray(test_x, np.float64)))


def balanced_accuracy(y: Array, prediction: Array) -> float:
    """Mean recall over the classes that occur in y."""
    y, prediction = np.asarray(y), np.asarray(prediction)
    return float(np.mean([np.mean(prediction[y == c] == c) for c in np.unique(y)]))


def quick_probe(train_x: Array, train_y: Array, val_x: Array, val_y: Array, k: int = 20) -> dict[str, float]:
    """The in-loop probe: balanced accuracy of kNN and ridge classifier on val, and RankMe of the training features.

    Rows with a negative label are unlabelled and take no part in the two accuracies, which are left out when either
    side has no labelled row.
    """
    found = {"probe/rankme": float(rankme(torch.as_tensor(train_x).float()))}
    train_y, val_y = np.asarray(train_y), np.asarray(val_y)
    train_x, val_x = np.asarray(train_x)[train_y >= 0], np.asarray(val_x)[val_y >= 0]
    train_y, val_y = train_y[train_y >= 0], val_y[val_y >= 0]
    if len(train_y) and len(val_y):
        scores = knn(train_x, train_y, val_x, k, int(train_y.max()) + 1)
        found["probe/knn"] = balanced_accuracy(val_y, scores.argmax(1))
        found["probe/linear"] = balanced_accuracy(val_y, linear(train_x, train_y, val_x))
    return found
