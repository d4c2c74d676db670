"""The label step as the formulas stand, over dense N x N matrices in NumPy: what published systems hold in memory, slow and easy to check.

Symbols as in the paper; every function returns what its sparse counterpart in `ccc` returns, densely.
"""

import numpy as np


def neighbours(x, k):
    "Ids of the k nearest, itself first: all N x N squared distances."
    squared = (x * x).sum(1)[:, None] + (x * x).sum(1) - 2 * x @ x.T
    np.fill_diagonal(squared, -1)
    nearest = np.argpartition(squared, k, axis=1)[:, :k]
    return np.take_along_axis(nearest, np.take_along_axis(squared, nearest, 1).argsort(1), 1)


def encoding(x, ranked, k2):
    "V (N, N): weights over the expanded k-reciprocal sets, averaged over the k2 nearest."
    n, k = ranked.shape
    half = round((k - 1) / 2) + 1

    def mutual(i, size):
        return ranked[i, :size][(ranked[ranked[i, :size], :size] == i).any(1)]

    halves = [mutual(i, half) for i in range(n)]
    V = np.zeros((n, n), np.float32)
    for i in range(n):
        core = members = mutual(i, k)
        for j in core:
            if 3 * len(np.intersect1d(halves[j], core)) > 2 * len(halves[j]):
                members = np.union1d(members, halves[j])
        weights = np.exp(-((x[i] - x[members]) ** 2).sum(1))
        V[i, members] = weights / weights.sum()
    return np.stack([V[nearest].mean(0) for nearest in ranked[:, :k2]])


def jaccard(V):
    """J (N, N): 1 - sum of minima / sum of maxima, a row at a time, over the columns in which the row is
    not 0."""
    J, columns = np.empty_like(V), np.ascontiguousarray(V.T)
    for i in range(len(V)):
        k = np.flatnonzero(V[i])
        s = np.minimum(columns[k], V[i, k][:, None]).sum(0)  # (|k|, N) -> (N,)
        J[i] = np.maximum(1 - s / (2 - s), 0)
    np.fill_diagonal(J, 0)
    return J


def starts(J, n_clusters, seed):
    "Greedy k-means++ on J: the next start in proportion to J to the nearest, the best of 2 + ln K draws."
    random, closest, found = np.random.RandomState(seed), np.ones(len(J)), []
    for k in range(n_clusters):
        cumulative = np.cumsum(closest)
        drawn = np.searchsorted(
            cumulative,
            random.uniform(size=2 + int(np.log(n_clusters)) if k else 1) * cumulative[-1],
            side='right',
        )
        found.append(drawn[np.argmin(np.minimum(J[drawn], closest).sum(1))])
        closest = np.minimum(closest, J[found[-1]])
    return np.array(found)


def euler_distances(x, c):
    "d (N, K): | sum over coordinates of (e - f)^2 |, e = exp(i 1.9 pi x) / sqrt 2, f likewise."
    e, f = (
        np.exp(1j * np.float32(1.9 * np.pi) * a).astype(np.complex64) / np.float32(2**0.5) for a in (x, c)
    )
    return np.abs((e * e).sum(1)[:, None] + (f * f).sum(1) - 2 * e @ f.T)


def hdc_round(x, a, labels, centroids):
    """Labels (N,) and H (N, K) of one round before empty clusters are refilled, a = 1 - exp(-J) dense;
    every cluster of the round before has a member."""
    d = euler_distances(x, centroids)
    m = np.exp(-5 * d[np.arange(len(x)), labels] / d.max()).astype(np.float32)
    H = np.empty(d.shape, np.float32)
    for j in range(len(centroids)):
        members = np.flatnonzero(labels == j)
        b = a[:, members]  # (N, |members|)
        h = b * m[members] / (b + m[members])
        H[:, j] = b[np.arange(len(x)), h.argmax(1)]
    return H.argmin(1), H


def centroids(x, labels, own, k):
    "Means of the members whose own H is at most mean + one standard deviation of their cluster."
    means = []
    for j in range(k):
        members = np.flatnonzero(labels == j)
        h = own[members].astype(np.float64)
        limit = np.float32(h.mean() + h.std(ddof=1)) if len(h) > 1 else np.inf
        means.append(x[members[own[members] <= limit]].mean(0))
    return np.stack(means)
