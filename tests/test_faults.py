"""What can go wrong with a run, and what is left: killed at random and at every write, asked to stop,
damaged files, full disks, impossible data."""

import io
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccc.config import Config
from ccc.data import ReIDDataset, load_images
from ccc.labels import PseudoLabels
from ccc.runs import (
    RunFolder,
    Stopped,
    checkpoints,
    progress,
    read_checkpoint,
    read_metrics,
)
from ccc.training import Epoch, Trainer, fit
from test_training import SETTINGS, make, numbers, tiny_data, tiny_net


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp('images'))


def settings(folder, **other):
    return Config(**SETTINGS | dict(log_dir=str(folder)) | other)


def kept(run):
    "Everything of a run that must come out the same: rows, labels, confidences, final weights."
    labels = {p.name: dict(np.load(p)) for p in sorted((run / 'labels').glob('*.npz'))}
    state = read_checkpoint(checkpoints(run / 'checkpoints')[-1])
    return numbers(read_metrics(run)), labels, state['network'], state['memory']


def same(run, other, unrated=()):
    "Two runs came out the same; the scores of `unrated` epochs are not compared."
    (rows, labels, net, memory), (rows_, labels_, net_, memory_) = kept(run), kept(other)
    for row in (row for row in (*rows, *rows_) if row['epoch'] in unrated):
        for score in ('mAP', 'mINP', 'rank1', 'rank5', 'rank10'):
            row.pop(score, None)
    assert rows == rows_
    assert labels.keys() == labels_.keys()
    for name in labels:
        for key in labels[name]:
            np.testing.assert_array_equal(labels[name][key], labels_[name][key])
    assert (
        all(torch.equal(net[k], net_[k]) for k in net)
        and net.keys() == net_.keys()
        and torch.equal(memory, memory_)
    )


# killed


class Nursery:
    """A process that has loaded everything and forks a run when told, so that ten kills do not cost ten starts of Python.

    It computes nothing itself: a forked child must not inherit threads of a parent that has."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hear()

    def hear(self):
        return json.loads(self.process.stdout.readline())

    def run(self, logs, after=None, number=signal.SIGKILL, die_at_write=0):
        """Starts a run in `logs` or goes on with the one there; after so many seconds, or at a write, it
        gets a signal. -> (exit code, negative: signal; seconds)"""
        self.process.stdin.write(
            json.dumps(dict(logs=str(logs), after=after, number=number, die_at_write=die_at_write)) + '\n'
        )
        self.process.stdin.flush()
        return self.hear()

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope='module')
def nursery(data):
    n = Nursery(data.root)
    yield n
    n.close()


@pytest.fixture(scope='module')
def whole(nursery, tmp_path_factory):
    "An uninterrupted run, and how long it took."
    logs = tmp_path_factory.mktemp('whole')
    code, seconds = nursery.run(logs)
    assert code == 0
    return next(logs.iterdir()), seconds


def test_ten_kills(nursery, whole, tmp_path):
    seed = time.time_ns() % 10_000
    moments, kills, attempts = random.Random(seed), 0, 0
    print('seed of the moments', seed)
    while kills < 10:  # ten runs' worth of deaths: each run is killed until it gets through
        logs = tmp_path / f'run{attempts}'
        for life in range(30):
            code, _ = nursery.run(logs, after=moments.uniform(0, whole[1] * 0.6) if kills < 10 else None)
            kills += code == -signal.SIGKILL
            if code == 0:
                break
        assert code == 0, f'seed {seed}: exit code {code}'
        runs = [r for r in logs.iterdir() if (r / 'config.json').exists()]
        assert len(runs) == 1
        same(runs[0], whole[0])
        attempts += 1
    assert kills >= 10


def test_death_at_every_write(nursery, whole, tmp_path):
    "Killed just before and just after the n-th renaming of a file."
    # config, then an epoch: labels, numbers, best weights and checkpoint, weights and checkpoint
    for n in range(1, 9):
        for when in (n, -n):
            logs = tmp_path / f'write{when}'
            code, _ = nursery.run(logs, die_at_write=when)
            assert code == -signal.SIGKILL
            code, _ = nursery.run(logs)
            assert code == 0
            same(next(r for r in logs.iterdir() if (r / 'config.json').exists()), whole[0])


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(nursery, whole, tmp_path, number, code):
    """At any moment of a life. Before `fit` and after it the system's own answer to SIGTERM holds: death
    by the signal, which a shell reports as 143, too."""
    moments = random.Random(1)
    for attempt in range(4):
        logs = tmp_path / f'{attempt}'
        got, _ = nursery.run(logs, after=whole[1] * (attempt + moments.random()) / 4, number=number)
        assert got in (code, 0, -signal.SIGTERM)  # 0: it was done before
        assert nursery.run(logs)[0] == 0
        (run,) = logs.iterdir()  # a folder that was begun is a run, and is gone on with
        same(run, whole[0])


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_at_a_write(nursery, whole, tmp_path, number, code):
    """Just before and just after the n-th renaming of a file: the probe of the folder, its config.json,
    the files of an epoch. The run has begun, so it is stopped in order and goes on."""
    for n in (1, -1, 2, -2, 3, 5, -6, 8):
        logs = tmp_path / f'{n}'
        assert nursery.run(logs, die_at_write=n, number=number)[0] == code
        assert nursery.run(logs)[0] == 0
        (run,) = logs.iterdir()
        same(run, whole[0])


def stop_at(trainer, epoch, step, number=signal.SIGTERM, times=1):
    "Sends this process a signal in the middle of a step."
    real = trainer.stages.train_batch

    def train_batch(n, batch):
        if (trainer.epoch, n) == (epoch, step):
            for _ in range(times):
                signal.raise_signal(number)
        return real(n, batch)

    trainer.stages.train_batch = train_batch
    return trainer


def test_stop_in_an_epoch_is_taken_up_at_the_step(data, tmp_path):
    whole = make(data, tmp_path / 'a')
    whole.fit()
    t = stop_at(make(data, tmp_path / 'b'), 2, 1)
    with pytest.raises(
        Stopped, match='saved after 2 epochs and 2 steps. Go on with: ccc train --resume'
    ) as stop:
        t.fit()
    assert stop.value.signal == signal.SIGTERM and progress(checkpoints(t.checkpoint_dir)[-1]) == (2, 2)
    again = Trainer.resume(t.run, data, tiny_net(8))
    assert len(again.state.under_way.losses) == 2 and again.epoch == 2
    again.fit()
    same(t.run, whole.run)
    # the one in the middle is not needed any more
    assert all(progress(p)[1] == 0 for p in checkpoints(t.checkpoint_dir))
    del t.stages.train_batch
    other = stop_at(make(data, tmp_path / 'c'), 1, 0)
    with pytest.raises(Stopped):
        other.fit()
    del other.stages.train_batch  # and without a new process, as in a notebook
    other.fit()
    same(other.run, whole.run)


def test_stop_between_stages(data, tmp_path, monkeypatch):
    "In the evaluation the epoch is trained already: nothing of it is lost, though it has no line yet."
    whole = make(data, tmp_path / 'a')
    whole.fit()
    for stage in ('extract', 'make_labels', 'evaluate', 'record'):
        t = make(data, tmp_path / stage)
        owner = t if stage == 'record' else t.stages
        real = getattr(owner, stage)

        def stopping(*args, **kw):
            if t.epoch >= 2:
                signal.raise_signal(signal.SIGINT)
            return real(*args, **kw)

        monkeypatch.setattr(owner, stage, stopping)
        with pytest.raises(Stopped):
            t.fit()
        again = Trainer.resume(t.run, data, tiny_net(8))
        # the first extraction of an evaluation comes before that of the next epoch; what is being kept
        # is kept as a whole
        assert again.saved == ((2, 0) if stage in ('make_labels', 'record') else (1, 3))
        again.fit()
        same(t.run, whole.run)


def test_a_second_sigterm_does_not_stop_the_saving(data, tmp_path, monkeypatch):
    "Some queues send SIGTERM twice, the second while the checkpoint is being written."
    whole = make(data, tmp_path / 'a')
    whole.fit()
    t = stop_at(make(data, tmp_path / 'b'), 2, 1)
    real = t.save

    def save(partial=False):
        if partial:
            signal.raise_signal(signal.SIGTERM)
        return real(partial)

    monkeypatch.setattr(t, 'save', save)
    with pytest.raises(Stopped, match='saved after 2 epochs and 2 steps'):
        t.fit()
    again = Trainer.resume(t.run, data, tiny_net(8))
    assert len(again.state.under_way.losses) == 2
    again.fit()
    same(t.run, whole.run)


def test_stop_that_became_another_error(data, tmp_path):
    "PyTorch's C++ makes a RuntimeError of what a signal raises inside it; it stays a stop."
    t = make(data, tmp_path)
    real = t.stages.make_labels

    class File(io.BytesIO):
        def write(self, content):
            signal.raise_signal(signal.SIGTERM)

    def make_labels(x):
        if t.epoch == 1:
            torch.save(dict(a=torch.ones(9)), File())
        return real(x)

    t.stages.make_labels = make_labels
    with pytest.raises(Stopped, match='saved after 1 epochs and 0 steps'):
        t.fit()
    assert Trainer.resume(t.run, data, tiny_net(8)).epoch == 1


class Gate:
    "Holds every checkpoint back until it is opened; an error may come out of it."

    def __init__(self, error=None):
        self.opened, self.began, self.most, self.error = threading.Event(), [], 0, error
        self.real, self.under_way = RunFolder.save, 0

    def save(self, *args, **how):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.began.append(threading.current_thread() is threading.main_thread())
        self.opened.wait(60)
        self.under_way -= 1
        if self.error is not None:
            raise self.error
        return self.real(*args, **how)


def gated(monkeypatch, error=None):
    gate = Gate(error)
    monkeypatch.setattr(RunFolder, 'save', lambda *args, **how: gate.save(*args, **how))
    return gate


def test_checkpoints_are_written_beside_training(data, tmp_path, monkeypatch):
    """The next epoch trains while a checkpoint is held back; one is under way at a time, and what is
    written is the state as it was."""
    whole = make(data, tmp_path / 'a')
    whole.fit()
    t = make(data, tmp_path / 'b')
    gate, real, steps = gated(monkeypatch), t.stages.train_batch, []

    def train_batch(n, batch):
        steps.append((t.epoch, len(gate.began), t.saved))
        loss = real(n, batch)
        if (t.epoch, n) == (1, 2):
            gate.opened.set()
        return loss

    t.stages.train_batch = train_batch
    t.fit()
    # three steps of the second epoch with the first checkpoint begun and not written
    assert steps[3:6] == [(1, 1, (0, 0))] * 3 and gate.most == 1 and gate.began == [False] * 4
    same(t.run, whole.run)


def test_a_signal_waits_for_a_checkpoint_that_is_being_written(data, tmp_path, monkeypatch):
    t = stop_at(make(data, tmp_path), 1, 1)
    gate = gated(monkeypatch)
    threading.Timer(0.5, gate.opened.set).start()
    with pytest.raises(Stopped, match='saved after 1 epochs and 2 steps'):
        t.fit()
    assert gate.most == 1 and [progress(p) for p in checkpoints(t.checkpoint_dir)] == [(1, 0), (1, 2)]


def test_an_error_of_the_writer_ends_the_run_at_the_next_step(data, tmp_path, monkeypatch):
    "And what it did not write is not taken for written."
    t = make(data, tmp_path, iters=50)
    gate, done = gated(monkeypatch, OSError('no room')), []
    real = t.stages.train_batch

    def train_batch(n, batch):
        done.append((t.epoch, n))
        if (t.epoch, n) == (1, 1):
            gate.opened.set()
            t.writer.join()
        return real(n, batch)

    t.stages.train_batch = train_batch
    with pytest.raises(OSError, match='no room'):
        t.fit()
    assert done[-1] == (1, 1) and t.saved == (0, 0) and not checkpoints(t.checkpoint_dir)
    del t.stages.train_batch
    monkeypatch.undo()
    t.fit()  # room was made: on from the step that was reached
    whole = make(data, tmp_path / 'whole', iters=50)
    whole.fit()
    same(t.run, whole.run)


def test_asked_twice(data, tmp_path):
    t = stop_at(make(data, tmp_path), 2, 1, number=signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt) as stop:
        t.fit()
    assert not isinstance(stop.value, Stopped) and progress(checkpoints(t.checkpoint_dir)[-1]) == (2, 0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_command_asked_to_stop(data, tmp_path, monkeypatch, capsys, number, code):
    "One line, with the command that goes on, and the exit code of the signal."
    import ccc.epoch
    from ccc.cli import main
    from ccc.experiments import command

    monkeypatch.setattr(ccc.epoch, 'open_dataset', lambda config: data)
    monkeypatch.setattr(ccc.epoch, 'make_network', lambda config: tiny_net())
    real = Epoch.train_batch
    monkeypatch.setattr(
        Epoch,
        'train_batch',
        lambda t, n, batch: (
            signal.raise_signal(number) if (t.state.epoch, n) == (1, 1) else None,
            real(t, n, batch),
        )[1],
    )
    assert main(shlex.split(command(settings(tmp_path / 'logs')))[1:]) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(
        f'ccc train: stopped by {number.name}, saved after 1 epochs and 2 steps. Go on with: ccc train'
        ' --resume '
    )
    monkeypatch.undo()
    monkeypatch.setattr(ccc.epoch, 'open_dataset', lambda config: data)
    monkeypatch.setattr(ccc.epoch, 'make_network', lambda config: tiny_net(7))
    assert main(shlex.split(said[0].split('Go on with: ccc ')[1])) == 0
    whole = make(data, tmp_path / 'whole')
    whole.fit()
    same(next((tmp_path / 'logs').iterdir()), whole.run)


# files


@pytest.mark.parametrize('kind', ['cut', 'empty', 'bit', 'text'])
def test_damaged_checkpoint(data, tmp_path, kind):
    whole = make(data, tmp_path)
    whole.fit()
    path = checkpoints(whole.checkpoint_dir)[-1]
    content = bytearray(path.read_bytes())
    if kind == 'bit':
        weight = whole.net.state_dict()['trunk.0.weight'].numpy().tobytes()
        content[content.find(weight) + 5] ^= 4
    path.write_bytes(
        {'cut': content[:-1000], 'empty': b'', 'bit': content, 'text': b'not a checkpoint'}[kind]
    )
    before = kept_rows = numbers(read_metrics(whole.run))
    with pytest.warns(UserWarning, match='epoch_003.pt cannot be read .* going back to the one before'):
        again = Trainer.resume(whole.run, data, tiny_net(4))
    assert again.epoch == 3
    again.fit()
    assert numbers(read_metrics(whole.run)) == before == kept_rows
    assert all(
        torch.equal(a, b) for a, b in zip(again.net.state_dict().values(), whole.net.state_dict().values())
    )
    assert (whole.checkpoint_dir / 'epoch_003.pt.set_aside').exists()


def test_checkpoint_of_another_run(data, tmp_path):
    t = make(data, tmp_path, num_epochs=1)
    t.fit()
    path = checkpoints(t.checkpoint_dir)[-1]
    for other, said in (
        (dict(num_clusters=5), r'num_clusters 8 there and 5 here'),
        (dict(arch='resnet18'), "arch 'resnet50' there and 'resnet18' here"),
        (dict(lr=1.0), r'lr 0.00035 there and 1.0 here'),
    ):
        b = Trainer(settings(tmp_path, **other), data, tiny_net())
        b.folder = t.folder
        with pytest.raises(ValueError, match=said):
            b.load(path)
    wide = Trainer(t.config, data, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(384, 16)))
    wide.folder = t.folder
    with pytest.raises(ValueError, match='network it was made of, got .*Missing key'):
        wide.load(path)
    with pytest.raises(ValueError, match='folder of a run with its config.json'):
        Trainer.resume(tmp_path, data)


def test_weights_as_safetensors(data, tmp_path):
    from safetensors import safe_open

    t = make(data, tmp_path)
    t.fit()
    for name in ('epoch_003', 'best'):
        with safe_open(t.checkpoint_dir / f'{name}.safetensors', 'pt') as f:
            assert f.metadata()['height'] == '16'
            state = read_checkpoint(t.checkpoint_dir / f'{name}.pt')['network']
            assert f.keys() and all(torch.equal(f.get_tensor(k), state[k]) for k in state)
    assert len(list(t.checkpoint_dir.iterdir())) == 6  # no weights without their checkpoint


def test_disk_full(data, tmp_path, monkeypatch):
    "A file may not grow beyond 20 kB: the system's own error, in the middle of a checkpoint."
    whole = make(data, tmp_path / 'a')
    whole.fit()
    t = make(data, tmp_path / 'b', num_epochs=2)
    t.fit()
    t.config.num_epochs = 4
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {
        p: p.read_bytes()
        for p in t.run.rglob('*')
        if p.is_file() and p.name not in ('metrics.jsonl', 'config.json')
    }
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match='cannot write epoch_002.* Make room or choose another folder'):
            t.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(p.read_bytes() == content for p, content in before.items()) and not list(t.run.rglob('*.tmp'))
    # going on for longer is noted before the first epoch of it
    assert RunFolder(t.run).config.num_epochs == 4
    Trainer.resume(t.run, data, tiny_net(3)).fit()
    assert read_metrics(t.run)[-1]['loss'] == read_metrics(whole.run)[-1]['loss']


def test_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='log_dir must be a folder, or one that can be made'):
        make(data, tmp_path / 'file').fit()

    def never(*_):
        raise AssertionError('found out too late')

    t = make(data, tmp_path, ckpt_dir=str(tmp_path / 'file' / 'deeper'))
    t.step = never
    with pytest.raises(OSError):
        t.fit()


def test_image_cache_faults(data, tmp_path):
    images = load_images(data.train, 16, 8, cache=tmp_path / 'c', progress=False)
    (path,) = (tmp_path / 'c').iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match='damaged'):
        assert torch.equal(load_images(data.train, 16, 8, cache=tmp_path / 'c', progress=False), images)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(load_images(data.train, 16, 8, cache=tmp_path / 'c', progress=False), images)
    (tmp_path / 'file').touch()
    with pytest.warns(UserWarning, match='not cached'):
        assert torch.equal(
            load_images(data.train, 16, 8, cache=tmp_path / 'file' / 'c', progress=False), images
        )


# numbers and data


@pytest.mark.parametrize('what', ['loss', 'embedding', 'weight'])
def test_nan_stops_with_the_batch(data, tmp_path, monkeypatch, what):
    t = make(data, tmp_path)
    real = t.stages.train_batch

    def poisoned(step, batch):
        if t.epoch == 1 and step == (2 if what == 'weight' else 1):
            if what == 'embedding':
                t.net.neck.weight.data[3] = float('nan')
            if what == 'loss':
                import ccc.epoch

                monkeypatch.setattr(ccc.epoch, 'train_step', lambda *a: torch.tensor(float('nan')))
            if what == 'weight':
                t.net.trunk[0].weight.register_hook(lambda g: g * float('inf'))
        return real(step, batch)

    t.stages.train_batch = poisoned
    with pytest.raises(ValueError, match=r'epoch 2, step [23]: .*(finite).*kept as bad_batch.pt'):
        t.fit()
    kept = torch.load(t.run / 'bad_batch.pt', weights_only=True)
    assert (
        kept['images'].shape == (16, 3, 16, 8)
        and kept['positions'].shape == kept['labels'].shape == (16,)
        and kept['epoch'] == 1
    )
    # nothing of the epoch that went wrong
    assert [progress(p) for p in checkpoints(t.checkpoint_dir)] == [(1, 0)]
    assert all(
        torch.isfinite(v).all()
        for v in read_checkpoint(checkpoints(t.checkpoint_dir)[-1])['network'].values()
    )


@pytest.mark.parametrize('n', [0, 1])
def test_no_cluster_or_one(data, tmp_path, monkeypatch, n):
    import ccc.parts

    labels = PseudoLabels(np.full(72, n - 1, np.int32), np.ones(72, np.float32), np.ones((n, 16), np.float32))
    monkeypatch.setattr(ccc.parts, 'make_labels', lambda x, **_: labels)
    t = make(data, tmp_path)
    with pytest.raises(ValueError, match=f'two clusters to contrast, got {n} among 72 images'):
        t.fit()
    # the real thing: an impossible DBSCAN
    t = make(data, tmp_path, warmup_iters=2, dbscan_eps=1e-6, cluster_min_instances=30)
    monkeypatch.undo()
    with pytest.raises(ValueError, match='dbscan_eps'):
        t.fit()


def test_fewer_clusters_than_places(data, tmp_path):
    with pytest.warns(UserWarning, match='4 places for clusters and there are [23]'):
        rows = make(data, tmp_path, num_clusters=3, warmup_iters=0, warmup_with_dbscan=False).fit()
    assert len(rows) == 4 and np.isfinite(rows[-1]['loss'])


def one_camera(split):
    return replace(split, camids=np.zeros_like(split.camids))


def test_one_camera(data, tmp_path, capsys):
    alone = ReIDDataset(
        'alone', data.root, one_camera(data.train), one_camera(data.query), one_camera(data.gallery)
    )
    rows = make(alone, tmp_path).fit()
    assert (
        len(rows) == 4
        and np.isfinite(rows[-1]['loss'])
        and 'mAP' not in rows[-1]
        and rows[-1]['camera_entropy'] == 0
    )
    assert 'no query has a match' in capsys.readouterr().out


@pytest.mark.parametrize('clustering', ['hdc', 'dbscan', 'kmeans'])
def test_identical_images(data, tmp_path, clustering):
    Image.new('RGB', (8, 16), (90, 80, 70)).save(tmp_path / 'one.png')
    train = replace(data.train, paths=np.full(len(data.train), str(tmp_path / 'one.png')))
    try:
        rows = make(
            replace(data, train=train), tmp_path, clustering=clustering, warmup_with_dbscan=False
        ).fit()
    except ValueError as e:
        assert 'two clusters' in str(e) or 'finite' in str(e)
    else:
        assert all(np.isfinite(r['loss']) for r in rows)


def test_odd_images_train(data, tmp_path):
    "Grey, palette, transparent and 16-bit files among the others."
    paths = data.train.paths.astype('U300')
    for i, mode in enumerate(('L', 'P', 'RGBA', 'LA', '1', 'CMYK')):
        name = tmp_path / f'{mode}.{"tif" if mode == "CMYK" else "png"}'
        Image.open(paths[i]).convert(mode).save(name)
        paths[i] = str(name)
    rows = make(replace(data, train=replace(data.train, paths=paths)), tmp_path, num_epochs=2).fit()
    assert np.isfinite(rows[-1]['loss'])
    broken = tmp_path / 'half.png'
    broken.write_bytes(Path(paths[9]).read_bytes()[:60])
    paths[9] = str(broken)
    with pytest.raises(OSError, match='half.png'):
        make(replace(data, train=replace(data.train, paths=paths)), tmp_path).fit()


def test_a_query_without_a_match(data, tmp_path):
    query = replace(data.query, pids=np.where(np.arange(len(data.query)) == 0, 99, data.query.pids))
    t = make(replace(data, query=query), tmp_path)
    t.step()
    ranking = t.evaluate()
    assert (ranking.n_query, ranking.n_valid) == (24, 23) and np.isnan(ranking.ap[0])


def test_fault_table_names_tests_that_exist():
    root = Path(__file__).parent.parent
    table = (root / 'nbs/08g_faults.ipynb').read_text().split('| fault | what happens | shown by |')[1]
    named = set(re.findall(r'`(?:(test_\w+\.py))?(?:::)(test_\w+)`', table))
    assert len(named) >= 15
    for file, test in named:
        assert f'def {test}(' in (root / 'tests' / (file or 'test_faults.py')).read_text(), test


# a process that forks runs, told by lines of JSON what to do to them


def nurse(folder):
    data = tiny_data(Path(folder))
    print('{}', flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        start, child = time.perf_counter(), os.fork()
        if not child:
            life(data, **order)
        if order['after'] is not None:
            time.sleep(order['after'])
            os.kill(child, order['number'])
        _, status = os.waitpid(child, 0)
        print(json.dumps((os.waitstatus_to_exitcode(status), time.perf_counter() - start)), flush=True)


def life(data, logs, die_at_write, number, **_):
    "One life of a run: begun, or gone on with if its folder is there."
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        if die_at_write:
            mortal(die_at_write, number)
        runs = [r for r in Path(logs).glob('*') if (r / 'config.json').exists()]
        fit(settings(logs) if not runs else None, runs[0] if runs else None, data, tiny_net())
        code = 0
    except KeyboardInterrupt as stop:
        code = 128 + getattr(stop, 'signal', 2)
    finally:
        os._exit(code)


def mortal(n, number):
    "This process gets a signal before its n-th renaming of a file, or for a negative n after it."
    real, count = os.replace, [0]

    def replace_(*args):
        count[0] += 1
        if count[0] == n:
            os.kill(os.getpid(), number)
        real(*args)
        if count[0] == -n:
            os.kill(os.getpid(), number)

    os.replace = replace_


if __name__ == '__main__':
    nurse(sys.argv[1])


# going on elsewhere, for longer, beside others


def test_a_run_goes_on_for_longer(data, tmp_path):
    "Three epochs, lengthened to five and moved between: every number and label of the run of five."
    whole = make(data, tmp_path / 'a', num_epochs=5)
    whole.fit()
    short = make(data, tmp_path / 'b', num_epochs=3)
    short.fit()
    moved = tmp_path / 'elsewhere'
    short.run.rename(moved)
    Trainer.resume(moved, data, tiny_net(8), num_epochs=5, num_workers=1, log_dir=str(tmp_path)).fit()
    same(moved, whole.run, unrated={2})  # the third epoch was the last of the short run, and so was evaluated
    content = json.loads((moved / 'config.json').read_text())
    assert (
        content['config']['num_epochs'] == 5
        and content['resumed'][0]['epoch'] == 3
        and 'num_epochs' in content['resumed'][0]['settings']
    )
    assert Trainer.resume(moved, data, tiny_net(8)).config.num_epochs == 5


@pytest.mark.parametrize(
    'settings, said',
    [
        (dict(lr=1.0), 'lr from'),
        (dict(seed=4), 'seed from'),
        (dict(pad=0), 'pad from'),
        (dict(num_epochs=1), 'at least the 2 epochs'),
    ],
)
def test_a_run_goes_on_under_what_decides_its_weights(data, tmp_path, settings, said):
    t = make(data, tmp_path, num_epochs=2)
    t.fit()
    before = (t.run / 'config.json').read_bytes()
    with pytest.raises(ValueError, match=said):
        Trainer.resume(t.run, data, tiny_net(), **settings)
    assert (t.run / 'config.json').read_bytes() == before


def test_runs_under_one_ckpt_dir_are_kept_apart(data, tmp_path):
    "Two studies with runs of one name: each goes on from its own checkpoints."
    runs = [make(data, tmp_path / name, num_epochs=2, ckpt_dir=str(tmp_path / 'shared')) for name in 'ab']
    for t in runs:
        t.fit()
    a, b = (t.checkpoint_dir for t in runs)
    assert runs[0].run.name == runs[1].run.name and a != b and a.parent == b.parent
    for t, place in zip(runs, (a, b)):
        again = Trainer.resume(t.run, data, tiny_net(8))
        assert again.checkpoint_dir == place and again.epoch == 2
    other = tmp_path / 'moved'
    a.parent.rename(other)
    again = Trainer.resume(runs[0].run, data, tiny_net(8), ckpt_dir=str(other), num_epochs=3)
    assert again.epoch == 2 and again.checkpoint_dir == other / a.name
    again.fit()
    assert (
        progress(checkpoints(other / a.name)[-1]) == (3, 0)
        and Trainer.resume(runs[0].run, data, tiny_net(8)).epoch == 3
    )


@pytest.mark.parametrize(
    'net',
    [
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, 4)),
        torch.nn.Flatten(0),
        torch.nn.Identity(),
    ],
)
def test_a_network_that_does_not_take_the_size(data, tmp_path, net):
    t = make(data, tmp_path)
    t.stages.net = net
    with pytest.raises(ValueError, match='height=16, width=8'):
        t.fit()
    assert t.run is None and not list(tmp_path.glob('*/config.json'))


def test_a_run_of_other_numerics_says_so(data, tmp_path):
    t = make(data, tmp_path, num_epochs=2)
    t.fit()
    file = t.run / 'config.json'
    file.write_text(file.read_text().replace('"numerics": ', '"numerics": 90'))
    with pytest.warns(UserWarning, match='began under NUMERICS 90'):
        Trainer.resume(t.run, data, tiny_net())


# a damaged run


def claimed(n):
    "A label file that claims n labels and holds none."
    header, archive = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr='<i4', fortran_order=False, shape=(n,)))
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('labels.npy', header.getvalue())
    return archive.getvalue()


def arrays(**named):
    "A label file with these arrays."
    file = io.BytesIO()
    np.savez_compressed(file, **named)
    return file.getvalue()


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'junk',
        claimed(3_000_000_000),
        arrays(labels=np.zeros(5, int), confidence=np.zeros(5)),
        arrays(confidence=np.zeros(72)),
        arrays(labels=np.array([None] * 72), confidence=np.zeros(72)),
        arrays(labels=np.zeros(72, int), confidence=np.zeros((72, 72))),
    ],
)
def test_damaged_labels(data, tmp_path, content):
    t = make(data, tmp_path, num_epochs=1)
    t.fit()
    (t.run / 'labels/epoch_000.npz').write_bytes(content)
    with pytest.raises(ValueError, match='epoch_000.npz must hold labels and confidence'):
        RunFolder(t.run).labels(0)
    with pytest.raises(ValueError, match='epoch_000.npz must hold labels and confidence'):
        Trainer.resume(t.run, data, tiny_net())


@pytest.mark.parametrize('name', ['config.json', 'metrics.jsonl', 'labels/epoch_000.npz'])
def test_a_folder_in_a_files_place(data, tmp_path, name):
    t = make(data, tmp_path, num_epochs=1)
    t.fit()
    (t.run / name).unlink()
    (t.run / name).mkdir()
    with pytest.raises(ValueError, match=name.split('/')[-1]):
        Trainer.resume(t.run, data, tiny_net()).fit()
