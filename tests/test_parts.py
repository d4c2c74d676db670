"The doors through which a part of 3C is exchanged. Run as a script it is one of two processes."

import inspect
import os
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import DBSCAN, HDBSCAN, KMeans
from torch import nn
from torch.nn import functional as F

from ccc.cli import train_options
from ccc.config import Config
from ccc.data import augment
from ccc.experiments import RECIPES, recipe
from ccc.labels import PseudoLabels, make_labels
from ccc.memory import RULES, ClusterMemory, Updates, pick_updates
from ccc.parts import RECIPE_PARTS, Parts, describe_part, epoch_batches, load_part
from ccc.runs import RunFolder, Stopped
from ccc.training import Epoch, Trainer, fit
from test_faults import same, stop_at
from test_training import SETTINGS, numbers, tiny_data, tiny_net


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp('images'))


class Prototypes(nn.Module):
    """A memory of one's own: a cosine classifier that moves its centroids half of the way to the mean of
    the batch."""

    def __init__(self, labels):
        super().__init__()
        self.register_buffer('centroids', F.normalize(torch.as_tensor(labels.centroids), dim=1))
        self.register_buffer('seen', torch.zeros(len(self.centroids)))

    def forward(self, z, y, camids):
        return F.cross_entropy(10 * z @ self.centroids.T, y)

    def update(self, z, y, camids):
        self.seen.index_add_(0, y, torch.ones(len(y)))
        sums = torch.zeros_like(self.centroids).index_add(0, y, z)
        self.centroids.copy_(F.normalize(self.centroids + F.normalize(sums, dim=1), dim=1))


def by_first_number(x, graph, camids, epoch):
    "Six clusters along one direction that changes with the epoch."
    values = x[:, epoch % x.shape[1]]
    return np.digitize(values, np.quantile(values, np.arange(1, 6) / 6))


def compact(z, y, camids, positions):
    "A loss of one's own: images of a cluster near each other."
    return (1 - (z @ z.T)[y[:, None] == y]).mean()


def plain_augment(images, generator):
    "Noise, and nothing else."
    return images.float() / 255 + torch.randn(images.shape, generator=generator) / 50


def any_order(labels, camids, config, epoch):
    "Batches of images drawn without a thought for clusters."
    rng = np.random.default_rng([config.seed, epoch])
    while True:
        yield rng.choice(np.flatnonzero(labels >= 0), config.batch_size)


PARTS = dict(
    label_maker=by_first_number, memory=Prototypes, sampler=any_order, augment=plain_augment, loss=compact
)
NAMES = {name: f'test_parts:{part.__name__}' for name, part in PARTS.items()}


def trainer(data, tmp_path, net=0, **parts):
    return Trainer(Config(**SETTINGS | dict(log_dir=str(tmp_path / 'logs'))), data, tiny_net(net), **parts)


@pytest.mark.parametrize('name', PARTS)
def test_each_door_changes_the_run(data, tmp_path, name):
    usual, other = trainer(data, tmp_path).fit(), trainer(data, tmp_path, **{name: PARTS[name]})
    rows = other.fit()
    assert np.isfinite(rows[-1]['loss']) and rows[-1]['loss'] != usual[-1]['loss']
    assert other.folder.parts == {name: describe_part(PARTS[name])}


def test_our_own_parts_through_the_doors_change_nothing(data, tmp_path):
    "The method's clusterers, memory with each rule, sampler and augmentation, given from outside."
    config = Config(**SETTINGS | dict(warmup_iters=0, log_dir=str(tmp_path)))
    from ccc.parts import label_options, make_memory

    def labels(x, graph, camids, epoch):
        return make_labels(x, graph=None, **label_options(config, epoch))

    usual = Trainer(config, data, tiny_net()).fit()
    given = Trainer(
        config,
        data,
        tiny_net(),
        label_maker=labels,
        memory=partial(make_memory, config=config),
        sampler=epoch_batches,
        augment=partial(augment, pad=config.pad),
    ).fit()
    assert numbers(given) == numbers(usual)


@pytest.mark.parametrize(
    'clusterer',
    [
        HDBSCAN(min_cluster_size=4, metric='precomputed', copy=True),
        DBSCAN(0.6, min_samples=4, metric='precomputed'),
        KMeans(8, n_init=1),
    ],
)
def test_a_clusterer_of_scikit_learn(data, tmp_path, clusterer):
    before = clusterer.get_params()
    t = trainer(data, tmp_path, label_maker=clusterer)
    x = t.extract()
    labels = t.make_labels(x)
    assert labels.n_clusters > 1 and clusterer.get_params() == before and not hasattr(clusterer, 'labels_')
    if isinstance(clusterer, DBSCAN):
        options = dict(method='dbscan', eps=0.6, k1=SETTINGS['jaccard_k1'], k2=t.config.jaccard_k2)
        np.testing.assert_array_equal(labels.labels, make_labels(x, **options).labels)
    # random ones have the seed of the epoch
    np.testing.assert_array_equal(t.make_labels(x).labels, labels.labels)


@pytest.mark.parametrize('rule', ['cm_hard', 'tccl_camera', 'hd_camera'])
def test_a_rule_of_ones_own_is_the_named_one(rule):
    "Those with one update a cluster, written as a function."
    g = torch.Generator().manual_seed(1)
    z, y, camids = (
        F.normalize(torch.randn(40, 8, generator=g), dim=1),
        torch.arange(40) % 6,
        torch.arange(40) % 3,
    )

    def own(z, y, camids, centroids):
        vectors, clusters, _ = pick_updates(z, y, camids, centroids, rule)
        return centroids.index_copy(0, clusters, vectors)

    named, free = (
        ClusterMemory(torch.randn(9, 8, generator=torch.Generator().manual_seed(2)), rule=r)
        for r in (rule, own)
    )
    for memory in (named, free):
        memory.update(z, y, camids)
    assert torch.equal(named.centroids, free.centroids)


@pytest.mark.parametrize(
    'given, message',
    [
        (lambda z, y, camids, c: c[:3], r'rule must give a tensor \(K, D\) = \(9, 8\), got \(3, 8\)'),
        (lambda z, y, camids, c: c * float('nan'), 'rule must give finite vectors, got 9 rows'),
        (lambda z, y, camids, c: 3, 'rule must give a tensor .*, got int'),
    ],
)
def test_a_rule_that_returns_nonsense(given, message):
    memory = ClusterMemory(torch.randn(9, 8), rule=given)
    before = memory.centroids.clone()
    with pytest.raises(ValueError, match=message):
        memory.update(torch.randn(4, 8), torch.arange(4))
    assert torch.equal(memory.centroids, before)


def test_a_rule_that_is_unknown():
    for rule in ('harder', 3, None):
        with pytest.raises(ValueError, match='rule must be a function or one of cm, '):
            ClusterMemory(torch.randn(3, 2), rule=rule)


@pytest.mark.parametrize('name', RULES)
def test_the_six_rules_go_through_the_door_of_own_rules(name):
    "A name of ours, its function, and a function that no name is known for: one memory to the last bit."
    g = torch.Generator().manual_seed(0)
    start, z = torch.randn(5, 8, generator=g), torch.randn(24, 8, generator=g)
    y, camids = torch.randint(5, (24,), generator=g), torch.randint(3, (24,), generator=g)
    memories = [
        ClusterMemory(start, rule=rule)
        for rule in (name, RULES[name], lambda z, y, camids, c: RULES[name](z, y, camids, c))
    ]
    for memory in memories:
        memory.update(z, y, camids)
    assert not torch.equal(memories[0].centroids, ClusterMemory(start).centroids)
    for memory in memories[1:]:
        assert torch.equal(memory.centroids, memories[0].centroids)


@pytest.mark.parametrize(
    'vectors, clusters, message',
    [
        (torch.ones(2, 7), [0, 1], r'Updates of \(U, 8\), .* got \[\(2, 7\)'),
        (torch.ones(2, 8), [0], r'Updates of \(U, 8\), .* got \[\(2, 8\), \(1,\)'),
        (torch.ones(2, 8), [0, 9], r'clusters in \[0, 9\), got 0 to 9'),
        (torch.full((2, 8), float('nan')), [0, 1], 'finite vectors, got 2 rows'),
    ],
)
def test_updates_that_are_nonsense(vectors, clusters, message):
    updates = Updates(vectors, torch.tensor(clusters), torch.full((len(clusters),), -1))
    memory = ClusterMemory(torch.randn(9, 8), rule=lambda z, y, camids, c: updates)
    with pytest.raises(ValueError, match=message):
        memory.update(torch.randn(4, 8), torch.arange(4))


# labels of any clusterer


def test_from_labels():
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    made = PseudoLabels.from_labels([0, 1, 0, -1, 1, 2, 2], x)
    for k in range(3):
        np.testing.assert_allclose(made.centroids[k], x[made.labels == k].mean(0), rtol=1e-5)
    cosine = [
        x[i] @ made.centroids[k] / np.linalg.norm(x[i]) / np.linalg.norm(made.centroids[k]) if k >= 0 else -1
        for i, k in enumerate(made.labels)
    ]
    np.testing.assert_allclose(made.confidence, (1 + np.array(cosine)) / 2, atol=1e-6)
    assert made.labels.dtype == np.int32 and made.n_outliers == 1
    np.testing.assert_array_equal(
        PseudoLabels.from_labels(made.labels, x, np.full(7, 0.25)).confidence, np.full(7, 0.25)
    )
    assert PseudoLabels.from_labels(np.full(7, -1), x).n_clusters == 0


@pytest.mark.parametrize(
    'labels, message',
    [
        (np.zeros(6, int), r'labels must be \(72,\), got shape \(6,\)'),
        (np.zeros(72), 'whole numbers, got float64'),
        (np.arange(72) * 2, 'without a gap, got 72 clusters up to number 142'),
        (np.full(72, -2), 'got -2'),
        (np.full(72, 5), 'without a gap, got 1 clusters up to number 5'),
        (np.full(72, -1), 'two clusters to contrast, got 0'),
        (np.zeros(72, int), 'two clusters to contrast, got 1'),
        (None, 'labels must be'),
        ('labels', 'labels must be'),
    ],
)
def test_nonsense_of_a_label_maker(data, tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        trainer(data, tmp_path, label_maker=lambda x, graph, camids, epoch: labels).fit()


BAD = dict(
    memory=[
        (lambda labels: nn.Linear(2, 2), 'memory must give an nn.Module with forward'),
        (
            lambda labels: ClusterMemory(labels.centroids[:1]),
            r'memory must have finite centroids \(K, D\) for \d+ clusters',
        ),
    ],
    sampler=[
        (
            lambda labels, camids, config, epoch: iter([]),
            'sampler must give iters=3 batches in an epoch, got 0',
        ),
        (
            lambda labels, camids, config, epoch: iter([np.arange(3)] * 3),
            r'sampler must give integer positions \(16,\), got int64 \(3,\)',
        ),
        (
            lambda labels, camids, config, epoch: iter([np.arange(16) + 999] * 3),
            r'sampler must give positions in \[0, 72\), got 999 to 1014',
        ),
    ],
    augment=[
        (lambda images, generator: images, r'augment must give float32 .*, got torch.uint8'),
        (lambda images, generator: images.float() * float('nan'), 'augment must give finite numbers'),
    ],
    loss=[
        (lambda z, y, camids, positions: z.sum(1), r'loss must give a scalar tensor, got shape \(16,\)'),
        (lambda z, y, camids, positions: z.sum() * float('inf'), 'loss must be a finite number'),
        (lambda z, y, camids, positions: 3.0, 'loss must give a scalar tensor, got float'),
    ],
)


@pytest.mark.parametrize(
    'name, part, message', [(name, *bad) for name, several in BAD.items() for bad in several]
)
def test_nonsense_is_refused(data, tmp_path, name, part, message):
    t = trainer(data, tmp_path, **{name: part})
    with pytest.raises(ValueError, match=message):
        t.fit()


@pytest.mark.parametrize('name', PARTS)
def test_what_is_no_part(name):
    with pytest.raises(ValueError, match=f'{name} must be a .*function, got 3'):
        Parts(**{name: 3})


# resumed


def test_a_run_goes_on_with_its_parts(data, tmp_path):
    t = trainer(data, tmp_path, **PARTS)
    t.fit()
    for missing in PARTS:
        given = {name: part for name, part in PARTS.items() if name != missing}
        with pytest.raises(
            ValueError,
            match=(
                f'goes on|go on with the parts it began with, got {missing} .*{PARTS[missing].__name__} there'
                ' and of the method here'
            ),
        ):
            Trainer.resume(t.run, data, tiny_net(), **given)
    with pytest.raises(ValueError, match='loss .*compact there and .*any_order here'):
        Trainer.resume(t.run, data, tiny_net(), **PARTS | dict(loss=any_order))
    assert Trainer.resume(t.run, data, tiny_net(), **PARTS).epoch == 4
    plain = trainer(data, tmp_path)
    plain.fit()
    with pytest.raises(ValueError, match='label_maker of the method there and'):
        Trainer.resume(plain.run, data, tiny_net(), label_maker=by_first_number)


def test_a_killed_run_with_own_parts_goes_on_bit_for_bit(data, tmp_path):
    whole = trainer(data, tmp_path / 'a', **PARTS)
    whole.fit()
    t = stop_at(trainer(data, tmp_path / 'b', **PARTS), 2, 1)
    with pytest.raises(Stopped):
        t.fit()
    again = Trainer.resume(t.run, data, tiny_net(8), **PARTS)
    # its whole state is back
    assert len(again.state.under_way.losses) == 2 and again.state.under_way.memory.seen.sum() == 32
    again.fit()
    same(t.run, whole.run)


def test_names_in_a_run_are_never_imported(data, tmp_path):
    "What stands in config.json is compared, not loaded."
    t = trainer(data, tmp_path, label_maker=by_first_number)
    t.fit()
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "harm")!r}, "w")\ndef labels(): pass\n')
    folder = RunFolder(t.run)
    folder.write_metadata(folder.metadata | dict(parts=dict(label_maker='evil:labels')))
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ValueError, match='evil:labels there'):
            Trainer.resume(t.run, data, tiny_net())
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / 'harm').exists()


# callbacks


def test_callbacks_are_called_in_order(data, tmp_path):
    calls = []

    class Listener:
        def before_fit(self, trainer):
            calls.append(('before', trainer.epoch))

        def after_epoch(self, trainer, row):
            calls.append((row['epoch'], len(trainer.folder.rows)))

        def after_fit(self, trainer):
            calls.append(('after', trainer.epoch))

    Trainer(Config(**SETTINGS | dict(log_dir=str(tmp_path))), data, tiny_net(), callbacks=[Listener()]).fit()
    assert calls == [('before', 0), (0, 1), (1, 2), (2, 3), (3, 4), ('after', 4)]
    with pytest.raises(ValueError, match='a callback must have one of before_fit'):
        trainer(data, tmp_path, callbacks=['me'])


# the command line


def test_parts_from_the_command_line(data, tmp_path, monkeypatch):
    import ccc.epoch
    from ccc.cli import main
    from ccc.experiments import command

    monkeypatch.setattr(ccc.epoch, 'open_dataset', lambda config: data)
    monkeypatch.setattr(ccc.epoch, 'make_network', lambda config: tiny_net())
    monkeypatch.setitem(sys.modules, 'test_parts', sys.modules[__name__])
    words = command(Config(**SETTINGS | dict(log_dir=str(tmp_path)))).split()[1:]
    options = [w for name, text in NAMES.items() for w in (f'--{name.replace("_", "-")}', text)]
    assert main(words + options) == 0
    (run,) = tmp_path.iterdir()
    assert set(RunFolder(run).parts) == set(PARTS)
    assert main(['train', '--resume', str(run), '--num-epochs', '5', *options]) == 0
    assert len(RunFolder(run).rows) == 5


def test_a_name_that_is_none(capsys):
    from ccc.cli import main

    assert main(['train', '--loss', 'nothing']) == 2
    assert "a part must be named as module:object, got 'nothing'" in capsys.readouterr().err
    assert train_options(['--sampler', 'ccc.parts:epoch_batches']).sampler == 'ccc.parts:epoch_batches'


# the contract

CONTRACT = {
    'ccc.data': 'load_dataset ReIDDataset CameraAwareSampler',
    'ccc.backbone': 'build_backbone',
    'ccc.neighbors': 'knn jaccard_distance',
    'ccc.hdc': 'HDC',
    'ccc.labels': 'PseudoLabels make_labels diagnose',
    'ccc.memory': 'ClusterMemory camera_entropy',
    'ccc.evaluation': 'evaluate_ranking rerank rerank_features',
    'ccc.training': 'Config Trainer',
    'ccc.viz': 'plot_umap plot_evolution show_clusters show_ranking',
}


def test_the_public_names_of_the_design():
    import importlib

    for module, names in CONTRACT.items():
        for name in names.split():
            assert hasattr(importlib.import_module(module), name), f'{module}.{name}'
    given = list(inspect.signature(Trainer).parameters)
    assert given == [
        'config',
        'dataset',
        'net',
        'label_maker',
        'memory',
        'sampler',
        'augment',
        'loss',
        'callbacks',
    ]
    for name in 'extract make_labels train_epoch evaluate step fit save resume'.split():
        assert callable(getattr(Trainer, name))
    assert {f.name for f in fields(Parts)} == set(PARTS)


def test_the_loop_fits_on_half_a_screen():
    assert (
        len(inspect.getsource(Trainer.fit).splitlines()) <= 20
        and len(inspect.getsource(Epoch.step).splitlines()) <= 20
    )
    assert Trainer.__bases__ == Epoch.__bases__ == RunFolder.__bases__ == (object,)


def test_recipes_name_parts_that_exist():
    assert RECIPE_PARTS and RECIPE_PARTS.keys() <= RECIPES.keys()
    for parts in RECIPE_PARTS.values():
        for text in parts.values():
            assert describe_part(load_part(text)) == text


@pytest.mark.parametrize('name', ['city-cluster-contrast', 'city-spcl-like'])
def test_an_ancestor_trains_and_goes_on(data, tmp_path, name):
    "Its part comes with the recipe, also when the run goes on."
    settings = {
        k: v
        for k, v in SETTINGS.items()
        if k
        in (
            'height',
            'width',
            'jaccard_k1',
            'jaccard_k2',
            'batch_size',
            'num_instances',
            'iters',
            'maps',
            'num_workers',
            'image_cache',
            'device',
        )
    }
    t = Trainer(recipe(name, **settings, num_epochs=1, log_dir=str(tmp_path)), data, tiny_net())
    t.fit()
    assert t.folder.parts == RECIPE_PARTS.get(name, {}) and (t.labels.n_outliers == 0) >= ('spcl' in name)
    assert len(Trainer.resume(t.run, data, tiny_net(), num_epochs=2).fit()) == 2


# two processes


def test_two_processes_equal_one_with_an_own_memory(data, tmp_path):
    def run(folder, n):
        command = [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            str(n),
            __file__,
            data.root,
            str(folder),
        ]
        done = subprocess.run(
            command, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (run_path,) = folder.iterdir()
        return RunFolder(run_path)

    one, two = run(tmp_path / 'one', 1), run(tmp_path / 'two', 2)
    assert one.parts == two.parts and set(one.parts) == {'memory', 'loss'}
    for a, b in zip(one.rows, two.rows):
        assert abs(a['loss'] - b['loss']) < 1e-3
    assert len(one.rows) == len(two.rows) == 2


if __name__ == '__main__':
    settings = SETTINGS | dict(log_dir=sys.argv[2], num_epochs=2)
    fit(
        Config(**settings),
        dataset=tiny_data(Path(sys.argv[1])),
        net=tiny_net(),
        memory=Prototypes,
        loss=compact,
    )
