"""The arithmetic and where it happens: number formats, image store, several processes, repetition,
warm-ups shared, trackers. GPU checks skip without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp

from ccc.config import CITY_BATCH, PUBLISHED_BATCH, Config
from ccc.data import augment, draw_augmentation, image_key, load_images
from ccc.engine import (
    fetch_images,
    measured_peak,
    settle_images,
    training_flops,
)
from ccc.experiments import RECIPES, recipe
from ccc.runs import checkpoints, read_metrics
from ccc.training import Trainer, fit, take_warmup, warmup_folder
from test_faults import same
from test_training import SETTINGS, make, tiny_data, tiny_net

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU that torch can see')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp('images'))


# augmentation as torchvision does it


def test_augmentation_is_distributed_as_torchvisions():
    from torchvision import transforms as T

    torch.manual_seed(1)
    n, height, width = 2000, 48, 40
    ours = draw_augmentation(10 * n, height, width, torch.Generator().manual_seed(1), pad=4)
    theirs = np.array(
        [
            T.RandomErasing.get_params(torch.zeros(3, height, width), (0.02, 0.4), (0.3, 1 / 0.3), [0])[:4]
            for _ in range(n)
        ]
    )
    crops = np.array(
        [
            T.RandomCrop.get_params(torch.zeros(3, height + 8, width + 8), (height, width))[:2]
            for _ in range(n)
        ]
    )
    erased = ours.box[:, 2] > 0
    for mine, their in [
        *zip(ours.box[erased].T.numpy(), theirs.T),
        (ours.top.numpy(), crops[:, 0]),
        (ours.left.numpy(), crops[:, 1]),
    ]:
        assert ks_2samp(mine, their).pvalue > 1e-3
    assert (
        chisquare(np.bincount(ours.top, minlength=9)).pvalue > 1e-3
        and chisquare(np.bincount(ours.flip.int())).pvalue > 1e-3
        and chisquare(np.bincount(erased.int())).pvalue > 1e-3
    )


# number formats


@pytest.mark.parametrize(
    'how', [dict(precision='bf16'), dict(channels_last='on'), dict(precision='bf16', channels_last='on')]
)
def test_other_arithmetic_trains(data, tmp_path, how):
    plain, other = make(data, tmp_path / 'a'), make(data, tmp_path / 'b', **how)
    a, b = plain.fit(), other.fit()
    assert abs(a[0]['loss'] - b[0]['loss']) < 0.05 and np.isfinite(b[-1]['loss'])
    assert other.x.dtype == np.float32 and all(p.dtype == torch.float32 for p in other.net.parameters())
    told = json.loads((other.run / 'config.json').read_text())
    assert told['arithmetic'] == dict(precision='fp32', channels_last=False, compile=False) | {
        k: v == 'on' if v == 'on' else v for k, v in how.items()
    }
    if how == dict(channels_last='on'):
        first = next(other.net.parameters())
        assert first.is_contiguous(memory_format=torch.channels_last)
        again = Trainer.resume(other.run, data, tiny_net(5))
        assert all(
            torch.equal(u, v)
            for u, v in zip(again.net.state_dict().values(), other.net.state_dict().values())
        )


def test_embeddings_for_clustering_are_float32_whatever_the_training(data, tmp_path):
    a, b = make(data, tmp_path), make(data, tmp_path, precision='bf16')
    np.testing.assert_array_equal(a.extract(), b.extract())


def test_compile(data, tmp_path, monkeypatch):
    """The compiled network trains, and leaves names and weights alone (a backend that only traces: no C
    compiler is asked for)."""
    real = torch.compile
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda net, **kw: asked.append(net) or real(net, backend='eager'))
    a, b = make(data, tmp_path / 'a', num_epochs=2), make(data, tmp_path / 'b', num_epochs=2, compile=True)
    assert asked == [b.net]
    rows, others = a.fit(), b.fit()
    assert (
        abs(rows[-1]['loss'] - others[-1]['loss']) < 1e-3
        and a.net.state_dict().keys() == b.net.state_dict().keys()
    )


def test_speed_is_reported(data, tmp_path):
    row = make(data, tmp_path).step()
    assert set(row['seconds']) >= {'extract', 'graph', 'cluster', 'train', 'evaluate', 'diagnose', 'decode'}
    assert row['speed']['images_per_second'] > 0 and 0 < row['speed']['peak_share'] < 1.5
    assert row['speed']['images_per_second'] <= 1.1 * 3 * 16 / row['seconds']['train']


def test_a_network_that_cannot_be_counted_trains(data, tmp_path):
    class Peeks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, z):
            return self.net(z) if z.mean().item() < 99 else z

    t = Trainer(make(data, tmp_path).config, data, Peeks())
    assert t.step()['speed']['peak_share'] is None and training_flops(Peeks(), 16, 8) is None


# images


def test_images_are_cached_on_disk_by_the_trainer(data, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    t = make(data, tmp_path, image_cache='auto')
    images = t.images()
    assert [p.stem for p in (tmp_path / 'cache/ccc/images').iterdir()] == [image_key(data.train, 16, 8)]
    monkeypatch.setattr('ccc.data._decode', lambda *_: pytest.fail('decoded twice'))
    assert torch.equal(make(data, tmp_path, image_cache='auto').images(), images)
    assert image_key(data.train, 16, 8) != image_key(data.train, 8, 16) and image_key(
        data.train, 16, 8
    ) != image_key(data.train.blurred(), 16, 8)
    assert image_key(data.train, 16, 8) != image_key(data.train.where(np.arange(72)[::-1]), 16, 8)


def test_recipes_name_their_batch():
    for name in RECIPES.keys() - {'city-study'}:  # made for studies, and says that it leaves the recipe
        usual = CITY_BATCH if recipe(name).dataset == 'city' else PUBLISHED_BATCH
        assert {k: getattr(recipe(name), k) for k in usual} == usual


def test_a_run_that_leaves_the_recipe_says_so(data, tmp_path, capsys):
    t = make(data, tmp_path, num_epochs=1, bn_chunks=1)
    t.fit()
    said = capsys.readouterr().out
    assert (
        'leaves the recipe: batch_size is 16, the recipe has 64' in said
        and 'bn_chunks is 1, the recipe has 2' in said
    )
    assert json.loads((t.run / 'config.json').read_text())['leaves_recipe'] == [
        'batch_size is 16, the recipe has 64',
        'bn_chunks is 1, the recipe has 2',
    ]


# repetition


def test_the_same_twice(data, tmp_path):
    a, b = make(data, tmp_path / 'a'), make(data, tmp_path / 'b')
    a.fit(), b.fit()
    same(a.run, b.run)
    assert 'thread' in json.loads((a.run / 'config.json').read_text())['what_varies'][0]


def test_drop_out_is_resumed_too(data, tmp_path):
    def net(seed=0):
        inner = tiny_net(seed)
        inner.trunk.append(torch.nn.Dropout(0.3))
        return inner

    config = make(data, tmp_path).config
    whole = Trainer(config, data, net())
    whole.fit()
    from test_faults import stop_at

    t = stop_at(Trainer(config, data, net()), 1, 1)
    with pytest.raises(KeyboardInterrupt):
        t.fit()
    Trainer.resume(t.run, data, net(3)).fit()
    same(t.run, whole.run)


def test_warm_up_is_reused_and_changes_nothing(data, tmp_path, capsys):
    how = dict(warmup_store=str(tmp_path / 'store'), cluster_min_instances=3)
    first = make(data, tmp_path / 'a', **how)
    first.fit()
    assert 'this run will leave one there' in capsys.readouterr().out
    plain = make(
        data, tmp_path / 'b', clustering='kmeans', num_clusters=6, num_epochs=5, cluster_min_instances=3
    )
    plain.fit()
    capsys.readouterr()
    other = make(data, tmp_path / 'c', clustering='kmeans', num_clusters=6, num_epochs=5, **how)
    steps, real = [], other.stages.train_batch
    other.stages.train_batch = lambda n, batch: steps.append(other.epoch) or real(n, batch)
    other.fit()
    assert sorted(set(steps)) == [2, 3, 4] and 'warm-up of 2 epochs taken from' in capsys.readouterr().out
    same(other.run, plain.run)
    for change in (
        dict(seed=4),
        dict(dbscan_eps=0.5),
        dict(iters=4),
        dict(lr=1e-3),
        dict(loss_with_camera=False),
        dict(eval_step_epoch=1),
    ):
        t = make(data, tmp_path / 'd', **how | change, num_epochs=3)
        t.fit()
        assert 'taken' not in capsys.readouterr().out
    t = Trainer(first.config, data, tiny_net(1))  # first weights are part of the description
    t.fit()
    assert 'taken' not in capsys.readouterr().out
    told = json.loads((first.run / 'warmup.json').read_text())
    path = warmup_folder(how['warmup_store'], told) / 'warmup.json'
    path.write_text(json.dumps(dict(told=told | dict(weights='others'), made_by='somebody')))
    with pytest.raises(ValueError, match='another description'):
        take_warmup(t, told)  # the name of the folder alone is not believed


def test_tracker(data, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = make(data, tmp_path, track='tensorboard')
    rows = t.fit()
    seen = EventAccumulator(str(t.run / 'tensorboard')).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in seen.Scalars('loss')] == [
        (r['epoch'] + 1, r['loss']) for r in rows
    ]
    assert 'seconds/train' in seen.Tags()['scalars']


# several processes


def launched(*args):
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(('ACCELERATE', 'WORLD', 'RANK', 'LOCAL'))
    } | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, *map(str, args)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def close_to(run, data, tmp_path):
    "The run in one process gives the same labels, and the same numbers up to rounding."
    one = make(data, tmp_path / 'one')
    rows, others = one.fit(), read_metrics(run)
    assert len(others) == len(rows) == 4
    for a, b in zip(rows, others):
        assert a['n_clusters'] == b['n_clusters'] and abs(a['loss'] - b['loss']) < 2e-3
    with np.load(one.run / 'labels/epoch_000.npz') as a, np.load(run / 'labels/epoch_000.npz') as b:
        np.testing.assert_array_equal(a['labels'], b['labels'])
    assert [p.name for p in checkpoints(run / 'checkpoints')] == ['epoch_002.pt', 'epoch_003.pt'] and len(
        list(run.parent.iterdir())
    ) == 1


def test_two_processes_from_a_launcher(data, tmp_path):
    """The function that `notebook_launcher` is given; on a CPU Accelerate has `debug_launcher` for it,
    which forks in the same way."""
    launched(__file__, 'fork', data.root, tmp_path / 'two')
    close_to(next((tmp_path / 'two').iterdir()), data, tmp_path)


def test_two_processes_stopped_together_and_taken_up_by_one(data, tmp_path):
    "One of two processes gets SIGTERM; both stop after the same step, and one process goes on."
    said = launched(__file__, 'stop', data.root, tmp_path / 'two')
    run = next((tmp_path / 'two').iterdir())
    assert (
        said.count('stopped') == 2
        and [p.name for p in checkpoints(run / 'checkpoints')][-1] == 'epoch_001_step_00002.pt'
    )
    Trainer.resume(run, data, tiny_net(4)).fit()
    close_to(run, data, tmp_path)


# with a GPU


@gpu
def test_gpu_trains_as_the_cpu_does(data, tmp_path):
    a, b = make(data, tmp_path / 'a'), make(data, tmp_path / 'b', device='cuda', precision='fp32')
    one, two = a.fit(), b.fit()
    assert abs(one[0]['loss'] - two[0]['loss']) < 1e-2 and b.images().is_cuda


@gpu
@pytest.mark.parametrize(
    'how',
    [
        dict(),
        dict(image_store='host'),
        dict(compile=True),
        dict(deterministic=True),
        dict(channels_last='off', precision='fp32'),
    ],
)
def test_gpu_settings_run(data, tmp_path, how):
    t = make(data, tmp_path, device='cuda', **how)
    rows = t.fit()
    assert np.isfinite(rows[-1]['loss']) and t.x.dtype == np.float32 and rows[-1]['speed']['peak_share'] >= 0
    again = Trainer.resume(t.run, data, tiny_net(3))
    assert all(
        torch.equal(u.cpu(), v.cpu())
        for u, v in zip(again.net.state_dict().values(), t.net.state_dict().values())
    )


@gpu
def test_gpu_image_stores_give_the_same_batches(data):
    images, device = load_images(data.train, 16, 8, progress=False), torch.device('cuda', 0)
    batch = np.random.default_rng(0).integers(0, 72, 32)
    for home in ('device', 'pinned'):
        assert torch.equal(
            fetch_images(settle_images(images, home, device), batch, device).cpu(), images[batch]
        )
    on_both = [
        augment(u, torch.Generator().manual_seed(3), pad=2).cpu()
        for u in (images[batch], images[batch].to(device))
    ]
    torch.testing.assert_close(*on_both, atol=1e-5, rtol=0)


@gpu
def test_gpu_peak_is_plausible():
    assert measured_peak(torch.device('cuda', 0), 'bf16', 0.5) > 2e13


# processes of the tests above


def _whole(root, logs):
    fit(Config(**SETTINGS | dict(log_dir=logs)), None, tiny_data(Path(root)), tiny_net())


def _stopped(root, logs):
    import signal

    t = Trainer(Config(**SETTINGS | dict(log_dir=logs)), tiny_data(Path(root)), tiny_net())
    real = t.stages.train_batch

    def train_batch(n, batch):
        if t.engine.process_index == 1 and (t.epoch, n) == (1, 1):
            signal.raise_signal(signal.SIGTERM)
        return real(n, batch)

    t.stages.train_batch = train_batch
    try:
        t.fit()
    except KeyboardInterrupt:
        os.write(1, b'stopped\n')


if __name__ == '__main__':
    from accelerate import debug_launcher

    debug_launcher(dict(fork=_whole, stop=_stopped)[sys.argv[1]], (sys.argv[2], sys.argv[3]), 2)
