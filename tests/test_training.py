"""Schedules, checkpoints, resuming, two processes as one, and what training may not see. Run as a script
it is one of several processes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ccc.backbone import Backbone, GeM
from ccc.config import Config, evaluation_due, learning_rate
from ccc.data import ReIDDataset, Split
from ccc.labels import PseudoLabels
from ccc.training import (
    Epoch,
    Trainer,
    checkpoints,
    label_options,
    rank_gallery,
    read_checkpoint,
    read_metrics,
    seed_for,
    write_file,
    write_metrics,
)

SETTINGS = dict(
    dataset='city',
    height=16,
    width=8,
    num_clusters=8,
    jaccard_k1=8,
    jaccard_k2=3,
    batch_size=16,
    num_instances=4,
    iters=3,
    num_epochs=4,
    warmup_iters=2,
    warmup_with_dbscan=True,
    loss_with_camera=True,
    hdc_outlier=True,
    hdc_centroids=True,
    eval_step_epoch=2,
    maps=False,
    num_workers=1,
    image_cache='none',
    device='cpu',
    seed=3,
)


def tiny_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Backbone(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1)
            ),
            GeM(),
            16,
        )


def tiny_data(folder):
    "Eight people in coloured squares, three cameras, as a data set of files; the same for every process."
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, per_camera in (('train', 3), ('query', 1), ('gallery', 2)):
        for pid in range(8):
            for cam in range(3):
                for shot in range(per_camera):
                    path = folder / f'{split}_{pid:04d}_c{cam}_{shot}.png'
                    if not path.exists():
                        base = (
                            np.random.default_rng(pid).integers(40, 216, (4, 2, 3)).repeat(4, 0).repeat(4, 1)
                        )
                        pixels = (
                            base
                            + 12 * cam
                            + np.random.default_rng([pid, cam, shot, len(split)]).normal(0, 12, base.shape)
                        )
                        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
                    rows.append((split, str(path), pid, cam))

    def part(name):
        paths, pids, cams = zip(*[r[1:] for r in rows if r[0] == name])
        return Split(np.array(paths), np.array(pids), np.array(cams))

    return ReIDDataset('tiny', str(folder), part('train'), part('query'), part('gallery'))


def true_labels(dataset, dim=16):
    pids = dataset.train.pids
    centroids = np.random.default_rng(0).normal(size=(8, dim)).astype(np.float32)
    labels = pids.astype(np.int32).copy()
    labels[::11] = -1
    return PseudoLabels(labels, np.ones(len(pids), np.float32), centroids)


def few_steps(folder, **settings):
    "A trainer after one epoch on given labels, and its loss."
    dataset = tiny_data(Path(folder))
    trainer = Trainer(Config(**SETTINGS | dict(iters=20) | settings), dataset, tiny_net())
    return trainer, trainer.train_epoch(true_labels(dataset))['loss']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp('images'))


def make(data, tmp_path, **settings):
    return Trainer(Config(**SETTINGS | dict(log_dir=str(tmp_path / 'logs')) | settings), data, tiny_net())


def numbers(rows):
    return [{k: v for k, v in r.items() if k not in ('seconds', 'speed')} for r in rows]


# schedule and settings


@pytest.mark.parametrize(
    'form,settings', [('v1', {}), ('v2', dict(warmup_version='v2', warmup_lr_factor=0.1))]
)
def test_published_learning_rates(form, settings):
    from conftest import golden

    want = golden('lr_schedule')[form]
    config = Config(**settings)
    np.testing.assert_allclose([learning_rate(config, e) for e in range(len(want))], want, rtol=1e-6)


@pytest.mark.parametrize(
    'name,value',
    [
        ('dataset', 'duke'),
        ('clustering', 'ward'),
        ('iters', 0),
        ('iters', 2.5),
        ('lr', -1.0),
        ('cm_momentum', 1.5),
        ('dbscan_eps', 2.0),
        ('hdc_init', 'kmeans'),
        ('warmup_version', 'v3'),
        ('subset_ids', 0),
        ('threshold', -0.1),
        ('no_cam', 'yes'),
        ('eval_dist', 'L1'),
        ('device', 3),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert name in str(error.value) and repr(value) in str(error.value)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match='num_cluster'):
        Config(num_cluster=3)


def test_settings_survive_json():
    config = Config(threshold=0.5, notes='ä')
    assert Config(**json.loads(json.dumps(asdict(config)))) == config


def test_evaluation_days():
    config = Config(num_epochs=60)
    assert [e + 1 for e in range(60) if evaluation_due(config, e)] == [1, *range(5, 61, 5)]


def test_seeds_are_stable_numbers():
    "A change here silently changes every run."
    assert seed_for(1, 0, 'labels') == 1501029259 and seed_for(1, 0, 'augment', 1) == 1801087983
    assert (
        len(
            {
                seed_for(s, e, p)
                for s in range(5)
                for e in range(5)
                for p in ('weights', 'labels', 'batches', 'augment')
            }
        )
        == 100
    )


def test_label_options_follow_the_settings():
    config = Config(
        no_jaccard=True, warmup_with_dbscan=True, hdc_init='k-means++', hdc_similarity='Cosine', threshold=0.4
    )
    warm, later = label_options(config, 9), label_options(config, 10)
    assert (warm['method'], warm['jaccard'], later['method'], later['jaccard']) == (
        'dbscan',
        True,
        'hdc',
        False,
    )
    assert later['hdc_options'] == dict(
        init='k-means++-x',
        metric='cosine',
        max_iter=80,
        outliers=False,
        normalize_centroids=False,
        threshold=0.4,
    )


# one epoch


def test_step_is_the_four_calls(data, tmp_path):
    a, b = make(data, tmp_path), make(data, tmp_path)
    row = a.step()
    labels = b.make_labels(b.extract())
    assert b.train_epoch(labels)['loss'] == row['loss'] and b.evaluate().mAP == row['mAP']
    assert not (tmp_path / 'logs').exists()


class Touched(AssertionError):
    "Somebody looked at an identity."


def refuse(*args, **kwargs):
    raise Touched('an identity was read')


class Untouchable:
    "In the place of identities: any way of reading it raises."


for way in (
    '__array__ __getattr__ __getitem__ __iter__ __len__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __add__'
    ' __sub__ __mul__ __neg__ __bool__ __int__ __index__ __hash__ __contains__ __repr__ __str__ __reduce_ex__'
    ' __copy__ __deepcopy__'
).split():
    setattr(Untouchable, way, refuse)
POISON = {
    'shuffled': lambda pids: np.random.default_rng(0).permutation(pids),
    'unknown': lambda pids: np.full_like(pids, -1),
    'untouchable': lambda pids: Untouchable(),
}
METHODS = {
    'hdc': dict(warmup_iters=1),
    'dbscan': dict(clustering='dbscan', dbscan_eps=0.7),
    'kmeans': dict(clustering='kmeans', warmup_iters=1),
}


def nameless(split, folder):
    "The same images in the same order, under file names that tell nothing."
    folder.mkdir(exist_ok=True)
    paths = [folder / f'{i:04d}.png' for i in range(len(split))]
    for old, new in zip(split.paths, paths):
        new.write_bytes(Path(old).read_bytes())
    return replace(split, paths=np.array([str(p) for p in paths]))


class Watched(Epoch):
    "Keeps every batch it is given."

    def train_batch(self, step, batch):
        self.drawn = [*getattr(self, 'drawn', []), batch]
        return super().train_batch(step, batch)


def two_epochs(dataset, settings):
    """What training leaves: labels, losses and centroids of each epoch, all batches, the weights; and the
    trainer."""
    trainer, left = Watched(Config(**SETTINGS | settings), dataset, tiny_net()), []
    for _ in range(2):
        trainer.state.x = trainer.extract()
        labels = trainer.make_labels(trainer.state.x)
        row = trainer.train(labels)
        left += [
            trainer.state.x,
            labels.labels,
            labels.confidence,
            labels.centroids,
            np.array(row['loss']),
            trainer.state.memory.centroids.numpy(),
        ]
    return left + trainer.drawn + [w.numpy() for w in trainer.net.state_dict().values()], trainer


@pytest.mark.parametrize('poison', POISON)
@pytest.mark.parametrize('method', METHODS)
def test_identities_are_never_read_in_training(data, tmp_path, method, poison):
    """Other identities, none, or such as raise when looked at, under file names without them: labels,
    batches and weights are the same to the bit."""
    poisoned = replace(
        data,
        **{
            part: replace(
                nameless(getattr(data, part), tmp_path / part), pids=POISON[poison](getattr(data, part).pids)
            )
            for part in ('train', 'query', 'gallery')
        },
    )
    (left, trainer), (other, watched) = (
        two_epochs(data, METHODS[method]),
        two_epochs(poisoned, METHODS[method]),
    )
    # the embeddings have moved
    assert len(left) == len(other) > 2 * 6 + 2 * 3 and not np.array_equal(left[0], left[6])
    for a, b in zip(left, other):
        np.testing.assert_array_equal(a, b)
    # the poison is in place, where the reports read it
    assert watched.dataset.train is poisoned.train
    told = trainer.describe_labels()
    if poison == 'untouchable':
        with pytest.raises(Touched):
            watched.describe_labels()
        with pytest.raises(Touched):
            watched.evaluate()
        return
    changed = watched.describe_labels()
    if poison == 'unknown':
        assert 'nmi' in told and 'nmi' not in changed
    else:
        assert told['nmi'] != changed['nmi'] and trainer.evaluate().mAP != watched.evaluate().mAP
    assert all(changed[k] == told[k] for k in changed if k not in ('nmi', 'ami', 'ari', 'purity'))


def test_a_label_maker_that_peeks_is_caught(data, monkeypatch):
    "The test above can fail: with a label maker that looks at identities, it would."
    monkeypatch.setattr(Epoch, 'make_labels', lambda self, x: true_labels(self.dataset))
    shuffled = replace(data, train=replace(data.train, pids=POISON['shuffled'](data.train.pids)))
    (left, _), (other, _) = two_epochs(data, METHODS['hdc']), two_epochs(shuffled, METHODS['hdc'])
    # labels of the first epoch, embeddings of the second
    assert not np.array_equal(left[1], other[1]) and not np.array_equal(left[6], other[6])
    with pytest.raises(Touched):
        two_epochs(replace(data, train=replace(data.train, pids=Untouchable())), METHODS['hdc'])


def test_a_whole_run_without_identities_keeps_the_same_files(data, tmp_path):
    """`fit` on a data set that knows no identity of its training images: the same labels and weights on
    disk, no NMI."""
    unknown = replace(data, train=replace(data.train, pids=np.full_like(data.train.pids, -1)))
    a, b = make(data, tmp_path / 'a'), make(unknown, tmp_path / 'b')
    told, without = a.fit(), b.fit()
    for e in range(4):
        one, other = (np.load(t.run / f'labels/epoch_{e:03d}.npz') for t in (a, b))
        for k in ('labels', 'confidence'):
            np.testing.assert_array_equal(one[k], other[k])
    one, other = (read_checkpoint(checkpoints(t.checkpoint_dir)[-1])['network'] for t in (a, b))
    assert all(torch.equal(one[k], other[k]) for k in one)
    assert all(
        'nmi' in r and 'nmi' not in s and r['loss'] == s['loss'] and r.get('mAP') == s.get('mAP')
        for r, s in zip(told, without)
    )


def test_warm_up_then_method(data, tmp_path, monkeypatch):
    import ccc.parts

    asked, real = [], ccc.parts.make_labels
    monkeypatch.setattr(ccc.parts, 'make_labels', lambda x, **kw: asked.append(kw['method']) or real(x, **kw))
    make(data, tmp_path).fit()
    assert asked == ['dbscan', 'dbscan', 'hdc', 'hdc']


@pytest.mark.parametrize(
    'settings',
    [
        dict(clustering='kmeans'),
        dict(clustering='dbscan'),
        dict(cm_mode='cm', loss_with_camera=False),
        dict(no_jaccard=True, warmup_iters=0),
        dict(no_cam=True, rerank=True),
        dict(bn_chunks=1, hdc_centroids=False, hdc_outlier=False),
        dict(threshold=0.5, hdc_normalize=True),
    ],
)
def test_settings_run(data, tmp_path, settings):
    rows = make(data, tmp_path, num_epochs=3, **settings).fit()
    assert len(rows) == 3 and 0 < rows[-1]['mAP'] <= 1 and np.isfinite(rows[-1]['loss'])


def test_random_weights_follow_the_seed(data, tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    config = Config(**SETTINGS | dict(arch='resnet18', resnet_pretrained='none'))
    a, b, c = (
        Trainer(replace(config, seed=s), data).net.state_dict()['trunk.conv1.weight'] for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.random.get_rng_state())


def test_distances_of_the_evaluation(data):
    rng = np.random.default_rng(0)
    unit = lambda n: (lambda a: (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32))(
        rng.normal(size=(n, 8))
    )
    q, g = unit(len(data.query)), unit(len(data.gallery))
    plain = [rank_gallery(q, g, data.query, data.gallery, d).mAP for d in ('none', 'Euclidean', 'Cosine')]
    assert plain[0] == plain[1] == plain[2]
    again = [
        rank_gallery(q, g, data.query, data.gallery, d, reranked=True).mAP
        for d in ('none', 'Euclidean', 'Cosine')
    ]
    assert again[0] == again[2] != again[1]


# the folder


def test_a_run_resumed_is_the_run_uninterrupted(data, tmp_path):
    whole = make(data, tmp_path / 'a')
    rows = whole.fit()
    for stop in (0, 1, 3):  # epochs finished before the power fails
        part = make(data, tmp_path / f'b{stop}')
        part.start()
        for _ in range(stop):
            row = part.step()
            part.record(row)
            part.save()
        part.record(part.step())  # the line is written, the checkpoint is not
        resumed = Trainer.resume(part.run, data, tiny_net(9) if stop else tiny_net())
        assert resumed.epoch == stop
        assert numbers(resumed.fit()) == numbers(rows)
        for u, v in zip(whole.net.state_dict().values(), resumed.net.state_dict().values()):
            assert torch.equal(u, v)
        for e in range(4):
            with (
                np.load(whole.run / f'labels/epoch_{e:03d}.npz') as u,
                np.load(part.run / f'labels/epoch_{e:03d}.npz') as v,
            ):
                np.testing.assert_array_equal(u['labels'], v['labels'])
                np.testing.assert_array_equal(u['confidence'], v['confidence'])


def test_what_a_run_keeps(data, tmp_path):
    t = make(data, tmp_path, notes='hello')
    rows = t.fit()
    told = json.loads((t.run / 'config.json').read_text())
    assert (
        Config(**told['config']) == t.config
        and told['seed'] == 3
        and told['data']['train'] == 72
        and told['versions']['torch'] == torch.__version__.split('+')[0]
    )
    assert [p.name for p in checkpoints(t.checkpoint_dir)] == ['epoch_002.pt', 'epoch_003.pt'] and numbers(
        read_metrics(t.run)
    ) == numbers(rows)
    best = max((r for r in rows if 'mAP' in r), key=lambda r: r['mAP'])
    assert read_checkpoint(t.checkpoint_dir / 'best.pt')['epoch'] == best['epoch'] + 1
    assert Trainer.resume(t.run, data, tiny_net(), checkpoint='best').evaluate().mAP == best['mAP']
    assert make(data, tmp_path).fit() and {p.name for p in (tmp_path / 'logs').iterdir()} == {
        'city-hdc-seed3',
        'city-hdc-seed3-2',
    }


def test_every_evaluated_checkpoint_on_request(data, tmp_path):
    t = make(
        data,
        tmp_path,
        eval_and_ckpt=True,
        num_epochs=5,
        eval_step_epoch=2,
        ckpt_dir=str(tmp_path / 'elsewhere'),
    )
    t.fit()
    assert [p.name for p in checkpoints(tmp_path / 'elsewhere' / t.run.name)] == [
        f'epoch_00{e}.pt' for e in (0, 1, 3, 4)
    ]


def test_other_data_are_refused(data, tmp_path):
    t = make(data, tmp_path, num_epochs=1)
    t.fit()
    other = replace(data, query=replace(data.query, camids=data.query.camids + 1))
    with pytest.raises(ValueError, match='fingerprint'):
        Trainer.resume(t.run, other, tiny_net())


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ('touch ' + str(tmp_path / 'harm'),)

    torch.save(dict(epoch=1, network=Evil()), tmp_path / 'epoch_000.pt')
    with pytest.raises(Exception):  # noqa: B017
        read_checkpoint(tmp_path / 'epoch_000.pt')
    assert not (tmp_path / 'harm').exists()


def test_half_a_file_is_never_seen(tmp_path):
    path = tmp_path / 'f'
    write_file(path, lambda f: f.write(b'old'))

    def fails(f):
        f.write(b'ne')
        raise OSError('disk full')

    with pytest.raises(OSError):
        write_file(path, fails)
    assert path.read_bytes() == b'old'


def test_a_line_cut_short_is_left_out(tmp_path):
    write_metrics(tmp_path, [dict(epoch=0), dict(epoch=1)])
    with open(tmp_path / 'metrics.jsonl', 'a') as f:
        f.write('{"epo')
    assert read_metrics(tmp_path) == [dict(epoch=0), dict(epoch=1)] and read_metrics(tmp_path / 'none') == []


def test_no_gpu_is_said(data):
    if torch.cuda.is_available():
        pytest.skip('there is one')
    with pytest.raises(ValueError, match='device=cuda needs a GPU'):
        Trainer(Config(**SETTINGS | dict(device='cuda')), data, tiny_net())


# several processes


def test_two_processes_are_one_with_two_chunks(data, tmp_path):
    one, loss = few_steps(data.root)
    env = os.environ | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            __file__,
            data.root,
            str(tmp_path),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    x = one.extract()
    for p in range(2):
        two = torch.load(tmp_path / f'{p}.pt', weights_only=True)
        assert abs(two['loss'] - loss) < 1e-4
        torch.testing.assert_close(two['memory'], one.memory.centroids, atol=1e-4, rtol=0)
        torch.testing.assert_close(two['x'], torch.from_numpy(x), atol=1e-3, rtol=0)
        for name, value in one.net.state_dict().items():
            torch.testing.assert_close(
                two['network'][name], value, atol=1e-4, rtol=1e-4, msg=lambda m: f'process {p}, {name}: {m}'
            )


if __name__ == '__main__':  # started by the test above, once for each process
    trainer, loss = few_steps(sys.argv[1])
    assert trainer.engine.num_processes == 2
    x = trainer.extract()
    torch.save(
        dict(
            loss=loss,
            memory=trainer.memory.centroids,
            network=trainer.net.state_dict(),
            x=torch.from_numpy(x),
        ),
        f'{sys.argv[2]}/{trainer.engine.process_index}.pt',
    )
    try:
        Trainer(replace(trainer.config, bn_chunks=1), trainer.dataset, tiny_net())
    except ValueError as error:
        assert 'multiple of the number of processes' in str(error)
    else:
        raise AssertionError('one chunk for two processes must be refused')
