"""How far from the best the suggestions of ccc.choosing land, with other signals beside them: eps of DBSCAN, K of HDC and k-means, on embeddings of several stages of training.

    python tests/benchmarks/choosing.py train 90:0 200:0 90:1 90:0:dbscan     # K:seed[:clustering] of small networks in the city, a minute each; leaves FOLDER/*.npz
    python tests/benchmarks/choosing.py measure                                # table over stages, and shares of the best ARI
"""
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

from ccc.choosing import label_quality
from ccc.data import city_embeddings, load_dataset
from ccc.labels import make_labels
from ccc.neighbors import jaccard_distance

FOLDER, EPOCHS = Path('logs/choosing'), (0, 4, 13)
RADII, KS = np.round(np.arange(.25, .81, .05), 2), (30, 45, 60, 75, 90, 110, 135, 165, 200)


def train(specs):
    "A run of fourteen epochs for each of the specs; the embeddings of every epoch are kept."
    from ccc.backbone import Backbone, GeM
    from ccc.experiments import recipe
    from ccc.training import Trainer
    data = load_dataset('city')
    for spec in specs:
        k, seed, *clustering = spec.split(':')
        torch.manual_seed(int(seed))
        layers = [m for i, o in ((3, 32), (32, 64), (64, 128)) for m in (nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())]
        c = recipe('city', num_clusters=int(k), seed=int(seed), maps=False, log_dir=str(FOLDER / spec.replace(':', '-')), lr=1e-3, iters=30, num_epochs=14, lr_steps=10, num_workers=1,
                   clustering=(clustering or ['hdc'])[0])
        kept, trainer = [], Trainer(c, data, Backbone(nn.Sequential(*layers), GeM(), 128))
        trainer.fit(watch=lambda t, row: kept.append(t.x))
        np.savez(FOLDER / f'{spec.replace(":", "-")}.npz', x=np.stack(kept), pids=data.train.pids)


def alone(labels):
    "Every outlier a cluster of its own."
    return np.where(labels < 0, labels.max() + 1 + np.arange(len(labels)), labels)


def stages():
    seen = set()
    for part in ('untrained', 'train'): yield f'resnet18 {part}', *city_embeddings(part)[:2]
    for file in sorted(FOLDER.glob('*.npz')):
        f = np.load(file)
        for e in EPOCHS:
            x = f['x'][e].astype(np.float32)
            if x.tobytes() not in seen: yield f'{file.stem} epoch {e + 1}', x, f['pids']     # runs of one seed begin alike
            seen.add(x.tobytes())


def measure():
    shares = {}
    for stage, x, pids in stages():
        graph = jaccard_distance(x, 20, 6)
        for what, candidates in (('dbscan', RADII), ('hdc', KS), ('kmeans', KS)):
            made = [make_labels(x, what, graph=graph, random_state=0, **{'eps' if what == 'dbscan' else 'n_clusters': c}) for c in candidates]
            ari = np.array([adjusted_rand_score(pids, alone(m.labels)) for m in made])
            signals = dict(silhouette=[label_quality(graph, m) for m in made], clusters=[m.n_clusters for m in made], confidence=[m.confidence.mean() for m in made],
                           published=[-abs(c - (.6 if what == 'dbscan' else 90)) for c in candidates])
            told = []
            for name, s in signals.items():
                at = int(np.argmax(s))
                shares.setdefault((what, name), []).append(ari[at] / ari.max())
                told.append(f'{name} {candidates[at]}: {ari[at]:.3f}')
            print(f'{stage:24}{what:7} best {candidates[ari.argmax()]}: {ari.max():.3f} | ' + '  '.join(told), flush=True)
    for (what, name), v in shares.items(): print(f'{what:7} by {name:11} share of the best ARI over {len(v)} stages: mean {np.mean(v):.2f}, worst {np.min(v):.2f}')


if __name__ == '__main__': train(sys.argv[2:]) if sys.argv[1] == 'train' else measure()
