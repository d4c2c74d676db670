"""Writes ccc/city.npz, the embeddings that the notebooks' maps are drawn from, and the run kept beside the tutorials. From a finished run of the city:

ccc train --dataset city                                          # 4 minutes on two cores
python tests/benchmarks/city_embeddings.py logs/city-seed999
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from ccc.data import load_dataset
from ccc.evaluation import evaluate_ranking
from ccc.model import load
from ccc.neighbors import knn
from ccc.training import Config, Trainer
from ccc.viz import umap_map

ROOT, DIRECTIONS = Path(__file__).parents[2], 56


def directions(x):
    """Rows on the first principal directions of all, float16: a few percent of their bytes, and nearly the
    same neighbours."""
    return (x @ np.linalg.svd(x, full_matrices=False)[2][:DIRECTIONS].T).astype(np.float16)


def agreement(x, short, k=21):
    "Share of the `k` nearest that stay."
    return np.mean(
        [
            len(set(a) & set(b)) / k
            for a, b in zip(
                *(
                    knn(np.float32(e) / np.linalg.norm(np.float32(e), axis=1, keepdims=True), k)[1]
                    for e in (x, short)
                )
            )
        ]
    )


def main(run):
    run, city = Path(run), load_dataset('city')
    told = json.loads((run / 'config.json').read_text())
    last = told['config']['num_epochs'] - 1
    untrained = Trainer(Config(**told['config'])).extract()
    # the weights from which the last epoch made its labels
    model = load(run / f'checkpoints/epoch_{last - 1:03d}.safetensors')
    model.progress = False
    parts = ('train', 'query', 'gallery')
    x = [model.embed(getattr(city, part)) for part in parts]
    short, ends = directions(np.vstack(x)), np.cumsum([len(e) for e in x])[:-1]
    short_untrained = directions(untrained)
    print(
        f'{DIRECTIONS} of {untrained.shape[1]} numbers: of the 20 nearest and the image itself,'
        f' {agreement(x[0], short[: ends[0]]):.0%} stay, untrained'
        f' {agreement(untrained, short_untrained):.0%}'
    )
    for q, g in (x[1:], np.split(np.float32(short), ends)[1:]):
        q, g = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (q, g))
        print(
            f'mAP {evaluate_ranking(2 - 2 * q @ g.T, city.query.pids, city.gallery.pids, city.query.camids, city.gallery.camids).mAP:.3f}'
        )
    maps = {e: np.load(run / f'labels/epoch_{e:03d}.npz')['map'] for e in (0, last)}
    shown = umap_map(np.vstack(x[1:]))
    arrays = dict(
        untrained=short_untrained,
        untrained_map=maps[0],
        train_map=maps[last],
        query_map=shown[: len(x[1])],
        gallery_map=shown[len(x[1]) :],
    )
    arrays |= dict(zip(parts, np.split(short, ends)))
    for part in parts:
        arrays |= {
            f'{part}_pids': getattr(city, part).pids.astype(np.int16),
            f'{part}_camids': getattr(city, part).camids.astype(np.int8),
        }
    np.savez_compressed(
        ROOT / 'ccc/city.npz',
        **{k: v.astype(np.float16) if k.endswith('map') else v for k, v in arrays.items()},
    )
    print(f'{(ROOT / "ccc/city.npz").stat().st_size:,} bytes')
    kept = ROOT / 'nbs/tutorials/runs/city'
    for name in ('config.json', 'metrics.jsonl'):
        shutil.copy(run / name, kept)
    shutil.copytree(run / 'labels', kept / 'labels', dirs_exist_ok=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
