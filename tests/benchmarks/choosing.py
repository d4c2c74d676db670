"""How far from the best the suggestions of ccc.choosing land, with other signals beside them: eps of DBSCAN, K of HDC and k-means, on embeddings of several stages of training.

python tests/benchmarks/choosing.py train 90:0 200:0 90:1 90:0:dbscan     # K:seed[:clustering] of small networks in the city, a minute each; leaves FOLDER/*.npz
python tests/benchmarks/choosing.py measure                                # table over stages, and shares of the best ARI
python tests/benchmarks/choosing.py study logs/stored/study                # the same over the stored study: before, after the warm-up, at the end; writes choosing.json, which 09c_choosing prints
"""

import json
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

from ccc.choosing import label_quality, likely_clusters, suggest_eps, suggest_n_clusters
from ccc.config import NUMERICS, Config, warmup_settings
from ccc.data import city_embeddings, load_dataset
from ccc.labels import make_labels
from ccc.model import load
from ccc.neighbors import jaccard_distance
from ccc.studies import find_runs, run_key, study_base

FOLDER, EPOCHS = Path('logs/choosing'), (0, 4, 13)
RADII, KS = np.round(np.arange(0.25, 0.81, 0.05), 2), (30, 45, 60, 75, 90, 110, 135, 165, 200)


def train(specs):
    "A run of fourteen epochs for each of the specs; the embeddings of every epoch are kept."
    from ccc.backbone import Backbone, GeM
    from ccc.experiments import recipe
    from ccc.training import Trainer

    data = load_dataset('city')
    for spec in specs:
        k, seed, *clustering = spec.split(':')
        torch.manual_seed(int(seed))
        layers = [
            m
            for i, o in ((3, 32), (32, 64), (64, 128))
            for m in (nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        ]
        c = recipe(
            'city',
            num_clusters=int(k),
            seed=int(seed),
            maps=False,
            log_dir=str(FOLDER / spec.replace(':', '-')),
            lr=1e-3,
            iters=30,
            num_epochs=14,
            lr_steps=10,
            num_workers=1,
            clustering=(clustering or ['hdc'])[0],
        )
        kept = []
        keep = SimpleNamespace(after_epoch=lambda trainer, row: kept.append(trainer.x))
        trainer = Trainer(c, data, Backbone(nn.Sequential(*layers), GeM(), 128), callbacks=[keep])
        trainer.fit()
        np.savez(FOLDER / f'{spec.replace(":", "-")}.npz', x=np.stack(kept), pids=data.train.pids)


def alone(labels):
    "Every outlier a cluster of its own."
    return np.where(labels < 0, labels.max() + 1 + np.arange(len(labels)), labels)


def study_stages(folder):
    "Embeddings of the training images in the runs of a study."
    from ccc.training import Trainer

    city, found = load_dataset('city').train, find_runs(folder)
    usual = warmup_settings(Config())  # a warm-up older than a setting has its default
    warmups = {
        json.dumps(usual | json.loads(f.read_text())['told']['settings'], sort_keys=True): f.parent
        for f in Path(folder).glob('warmups/*/warmup.json')
    }
    for c in (replace(study_base('city'), seed=seed) for seed in (1, 2, 3)):
        yield f'untrained, seed {c.seed}', Trainer(c).extract(), city.pids
        yield (
            f'warm-up, seed {c.seed}',
            load(warmups[json.dumps(warmup_settings(c), sort_keys=True)] / 'epoch_001.pt').embed(city),
            city.pids,
        )
        for clustering in ('hdc', 'kmeans', 'dbscan'):
            yield (
                f'{clustering}, seed {c.seed}',
                load(found[run_key(replace(c, clustering=clustering))]).embed(city),
                city.pids,
            )


def kept_stages():
    seen = set()
    for file in sorted(FOLDER.glob('*.npz')):
        f = np.load(file)
        for e in EPOCHS:
            x = f['x'][e].astype(np.float32)
            if x.tobytes() not in seen:
                yield f'{file.stem} epoch {e + 1}', x, f['pids']  # runs of one seed begin alike
            seen.add(x.tobytes())


def measure(stages):
    shares, counts, resnet = (
        {},
        [],
        ((f'resnet18 {part}', *city_embeddings(part)[:2]) for part in ('untrained', 'train')),
    )
    for stage, x, pids in chain(resnet, stages):
        graph = jaccard_distance(x, 20, 6)
        count = likely_clusters(suggest_eps(x, graph=graph), len(x))
        counts.append(int(count))
        for what, candidates in (('dbscan', RADII), ('hdc', KS), ('kmeans', KS)):
            own = (
                {}
                if what == 'dbscan'
                else dict(suggested=suggest_n_clusters(x, method=what, graph=graph).value, count=count)
            )
            made = {
                c: make_labels(
                    x, what, graph=graph, random_state=0, **{'eps' if what == 'dbscan' else 'n_clusters': c}
                )
                for c in (*candidates, *own.values())
            }
            ari = {c: adjusted_rand_score(pids, alone(m.labels)) for c, m in made.items()}
            signals = dict(
                silhouette=lambda c: label_quality(graph, made[c]),
                clusters=lambda c: made[c].n_clusters,
                confidence=lambda c: made[c].confidence.mean(),
                published=lambda c: -abs(c - (0.6 if what == 'dbscan' else 90)),
            )
            chosen = {name: max(candidates, key=signal) for name, signal in signals.items()} | own
            for name, c in chosen.items():
                shares.setdefault((what, name), []).append(ari[c] / max(ari.values()))
            best = max(ari, key=ari.get)
            print(
                f'{stage:24}{what:7} best {best}: {ari[best]:.3f} | '
                + '  '.join(f'{name} {c}: {ari[c]:.3f}' for name, c in chosen.items()),
                flush=True,
            )
    for (what, name), v in shares.items():
        print(
            f'{what:7} by {name:11} share of the best ARI over {len(v)} stages: mean {np.mean(v):.2f}, worst'
            f' {np.min(v):.2f}'
        )
    rows = [
        dict(what=what, by=name, shares=[round(float(share), 4) for share in v])
        for (what, name), v in shares.items()
    ]
    return dict(numerics=NUMERICS, counts=counts, rows=rows)


if __name__ == '__main__':
    if sys.argv[1] == 'train':
        train(sys.argv[2:])
    elif sys.argv[1] == 'measure':
        measure(kept_stages())
    else:
        Path(__file__).with_name('choosing.json').write_text(
            json.dumps(measure(study_stages(sys.argv[2])), indent=1) + '\n'
        )
