"""Maps: the label step's neighbours against plain UMAP, and two ways of keeping the maps of a run aligned.

python tests/benchmarks/maps.py FEATURES.npz       # one array of embeddings, e.g. all training images of a benchmark
python tests/benchmarks/maps.py EPOCHS_DIR         # 0.npz, 1.npz, ... each with `x` (N, D): the embeddings of successive epochs
"""

import sys
import time
import warnings
from pathlib import Path

import numpy as np

from ccc.neighbors import knn
from ccc.viz import _turned_onto, umap_map

warnings.simplefilter('ignore')


def timed(name, make):
    start, busy = time.perf_counter(), time.process_time()
    value = make()
    print(
        f'{name:58s} {time.perf_counter() - start:7.1f} s, {time.process_time() - busy:7.1f} s of CPU',
        flush=True,
    )
    return value


def near(a, k):
    return knn(np.ascontiguousarray(a, np.float32), k + 1)[1][:, 1:]


def kept(x, at):
    "Share of the 10 nearest on the map that are among the 20 nearest in the embedding."
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(near(at, 10), near(x, 20))])


def from_neighbours(file):
    import umap

    arrays = np.load(file)
    x = next(arrays[k] for k in arrays if arrays[k].ndim == 2)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    print(f'{len(x):,} embeddings of {x.shape[1]} numbers')
    found = timed('k-NN of the label step, k1 = 30', lambda: knn(x, 31))
    small = x[:500]
    timed('first call of umap_map in a process, 500 points', lambda: umap_map(small))
    at = timed('umap_map from those neighbours', lambda: umap_map(x, neighbors=found))
    fit = lambda a: umap.UMAP(n_neighbors=15, min_dist=0.8, random_state=0, n_jobs=1).fit(a).embedding_
    timed('first call of UMAP.fit in a process, 500 points', lambda: fit(small))
    plain = timed('plain UMAP.fit, searching by itself', lambda: fit(x))
    print(f'neighbours kept: {kept(x, at):.3f} from our neighbours, {kept(x, plain):.3f} plain')


def aligned(folder):
    import umap

    xs = [np.load(f)['x'] for f in sorted(Path(folder).glob('*.npz'), key=lambda f: int(f.stem))]
    print(f'{len(xs)} epochs of {len(xs[0]):,} embeddings')
    umap_map(xs[0][:100])

    def chain(start=None):
        maps = []
        for x in xs:
            maps.append(umap_map(x, init=maps[-1] if maps else None))
        return maps

    def together():
        same = {i: i for i in range(len(xs[0]))}
        return list(
            np.stack(
                umap.AlignedUMAP(n_neighbors=15, min_dist=0.8, random_state=0)
                .fit([x for x in xs], relations=[same] * (len(xs) - 1))
                .embeddings_
            )
        )

    def alone():
        maps = []
        for x in xs:
            maps.append(umap_map(x) if not maps else _turned_onto(umap_map(x), maps[-1]))
        return maps

    calm = [
        np.mean([len(set(a) & set(b)) for a, b in zip(near(x, 20), near(y, 20))]) for x, y in zip(xs, xs[1:])
    ]
    print('mean neighbours of 20 that stay:', np.round(calm, 1))
    for name, make in [
        ('each from the one before, then turned onto it', chain),
        ('AlignedUMAP', together),
        ('each alone, turned onto the one before', alone),
    ]:
        maps, drift = timed(name, make), []
        for x, y, a, b in zip(xs, xs[1:], maps, maps[1:]):
            same = np.array([len(set(p) & set(q)) for p, q in zip(near(x, 20), near(y, 20))])
            still = same >= np.quantile(same, 0.9)
            drift.append(np.linalg.norm(a - b, axis=1)[still].mean() / b.std())
        print(
            f'    neighbours kept {np.mean([kept(x, at) for x, at in zip(xs, maps)]):.3f}, drift'
            f' {np.mean(drift):.3f}'
        )


if __name__ == '__main__':
    given = Path(sys.argv[1])
    aligned(given) if given.is_dir() else from_neighbours(given)
