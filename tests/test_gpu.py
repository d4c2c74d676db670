"""The path of a GPU, on any machine: a device made of real numbers refuses what CUDA refuses and counts
kernels and synchronisations."""

import copy
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ccc.engine
import ccc.training
from ccc import hdc, neighbors
from ccc._neighbors_torch import row_blocks
from ccc.backbone import InstanceBatchNorm, build_backbone
from ccc.config import Config
from ccc.engine import (
    extract_embeddings,
    fetch_images,
    make_engine,
    settle_images,
    unused_parameters,
    what_varies,
)
from ccc.labels import make_labels
from ccc.memory import RULES, ClusterMemory
from ccc.rows import Processes
from ccc._evaluation_kernels import rank_rows
from ccc.epoch import LOSSES_AT_ONCE
from ccc.evaluation import evaluate_embeddings, rank_on_device, scores_of_counts
from ccc.runs import Stopped, checkpoints, describe_run, progress
from ccc.training import Maps, Trainer, check_clusters
from fake_device import DEVICE, fake_gpu
from test_faults import same, stop_at
from test_training import SETTINGS, tiny_data, tiny_net

TIMM = 'timm:convnext_atto'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp('images'))


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as counts:
        yield counts


# the device itself


def test_the_fake_device_refuses_what_cuda_refuses(gpu):
    a = torch.arange(6.0, device='cuda:0')
    assert (
        a.is_cuda
        and a.device == DEVICE
        and (a * 2).is_cuda
        and torch.zeros_like(a).is_cuda
        and not a.cpu().is_cuda
    )
    with pytest.raises(RuntimeError, match='same device'):
        a + torch.ones(6)
    with pytest.raises(RuntimeError, match='same device'):
        torch.cat([a, torch.ones(6)])
    with pytest.raises(TypeError, match='numpy'):
        a.numpy()
    assert (a + torch.tensor(1.0)).is_cuda  # a single number may lie anywhere


def test_the_fake_device_counts(gpu):
    a = torch.ones(4).to('cuda:0', non_blocking=True)
    gpu.start()
    b = a * 2
    assert (gpu.kernels, gpu.syncs) == (1, 0)
    for wait in (
        lambda: float(b.sum()),
        lambda: b.tolist(),
        lambda: b.cpu(),
        lambda: b.nonzero(),
        lambda: bool((b > 1).all()),
        lambda: b[b > 1],
        lambda: torch.unique(b),
        lambda: torch.ones(3).to('cuda:0'),
        lambda: torch.tensor([1.0], device='cuda:0'),
        lambda: b[torch.tensor([0, 1])],
    ):
        gpu.start(), wait()
        assert gpu.syncs == 1, gpu.by_place()


def test_gradients_pass(gpu):
    w = torch.randn(3, device='cuda:0', requires_grad=True)
    (w**2).sum().backward()
    assert w.grad.is_cuda and torch.equal(w.grad.cpu(), 2 * w.detach().cpu())


# the engine


def test_each_engine_is_where_it_was_asked_to_be(gpu):
    """Accelerate keeps its state for the whole process: after a run on a CPU one on a GPU stayed on the
    CPU, silently; the other way round it raised."""
    first, second, third = (make_engine(Config(device=d)) for d in ('cpu', 'cuda', 'cpu'))
    assert (first.device.type, second.device, third.device.type) == ('cpu', DEVICE, 'cpu')


def test_a_device_that_processes_do_not_have_is_refused(gpu, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    with pytest.raises(ValueError, match='got device=cuda for processes on cpu'):
        make_engine(Config(device='cuda'))


def test_processes_that_have_joined_stay_where_they_are(gpu):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        assert make_engine(Config(device='cpu')).device.type == 'cpu'
        with pytest.raises(ValueError, match='got device=cuda for processes on cpu'):
            make_engine(Config(device='cuda'))
    finally:
        torch.distributed.destroy_process_group()


def test_settings_of_a_launcher_have_no_effect_and_that_is_said(gpu, monkeypatch):
    for name, value in dict(
        MIXED_PRECISION='fp16', GRADIENT_ACCUMULATION_STEPS='4', DYNAMO_BACKEND='INDUCTOR'
    ).items():
        monkeypatch.setenv(f'ACCELERATE_{name}', value)
    with pytest.warns(
        UserWarning,
        match=(
            'ACCELERATE_MIXED_PRECISION=fp16, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4,'
            ' ACCELERATE_DYNAMO_BACKEND=INDUCTOR'
        ),
    ):
        engine = make_engine(Config(device='cuda'))
    assert (
        engine.scaler is None
        and engine.gradient_accumulation_steps == 1
        and engine.state.dynamo_plugin.backend.value == 'NO'
    )
    w = torch.ones(1, device='cuda:0', requires_grad=True)
    engine.backward(w.sum())
    assert w.grad.item() == 1  # an fp16 configuration made it 65,536


def test_a_launcher_that_shares_out_the_network_is_refused(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(ValueError, match='ACCELERATE_USE_FSDP=true'):
        make_engine(Config(device='cpu'))


def test_what_varies_between_devices(gpu, data):
    "k-means on a GPU and approximate neighbours anywhere; a row of a study says so in its config.json."
    how = {d: make_engine(Config(device=d)) for d in ('cpu', 'cuda')}
    varies = lambda device, **s: ' '.join(what_varies(Config(device=device, **s), how[device]))
    kmeans, index = 'k-means takes the same steps', 'approximate index'
    assert kmeans in varies('cuda', clustering='kmeans')
    assert kmeans not in varies('cpu', clustering='kmeans') + varies('cuda', clustering='hdc')
    for device in how:
        for name in ('ivf', 'hnsw'):
            assert f'{index} {name} is built by FAISS' in varies(device, knn_index=name)
        assert index not in varies(device)
    saved = describe_run(Config(device='cuda', clustering='kmeans'), data, how['cuda'])
    assert any(kmeans in sentence for sentence in saved['what_varies'])


# images and layout


def test_images_are_fetched_in_one_copy(gpu):
    images = torch.randint(0, 256, (40, 3, 8, 4), dtype=torch.uint8)
    positions = np.array([3, 1, 3, 39])
    for home in ('device', 'pinned'):
        settled = settle_images(images, home, DEVICE)
        gpu.start()
        batch = fetch_images(settled, positions, DEVICE)
        assert batch.is_cuda and gpu.syncs == 0 and gpu.operations['copy to the device'] == 1, gpu.by_place()
        assert torch.equal(batch.cpu(), images[positions])


def test_batches_of_extraction_are_of_one_size(gpu):
    "cuDNN looks for kernels anew for each size of batch."
    plain, images, sizes = tiny_net(), torch.randint(0, 256, (37, 3, 16, 8), dtype=torch.uint8), []
    net = copy.deepcopy(plain).to(DEVICE)
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    engine = make_engine(Config(device='cuda'))
    x = extract_embeddings(net, images.to(DEVICE), 16, engine)
    assert sizes == [16, 16, 16] and x.shape == (37, 16)
    np.testing.assert_allclose(
        x, extract_embeddings(plain, images, 16, make_engine(Config(device='cpu'))), atol=1e-6
    )


def test_instance_norm_keeps_the_layout():
    "In channels-last every convolution of an IBN network gets its maps in channels-last."
    layer, x = InstanceBatchNorm(8), torch.randn(4, 8, 6, 5)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and layer(x).is_contiguous()
    torch.testing.assert_close(last, layer(x), atol=1e-6, rtol=0)
    net, seen = build_backbone('resnet_ibn50a', weights=None).to(memory_format=torch.channels_last), []
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.register_forward_pre_hook(
                lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    net(torch.randn(2, 3, 32, 16).to(memory_format=torch.channels_last))
    assert len(seen) == 53 and all(seen)


# the memory


@pytest.mark.parametrize('rule', RULES)
def test_a_step_of_the_memory_waits_for_nothing(gpu, rule):
    """Clusters and cameras in main memory, embeddings on the device, no look at values: 0 synchronisations
    (18 before); the same numbers as on a CPU."""
    g = torch.Generator().manual_seed(0)
    start, x = torch.randn(9, 16, generator=g), torch.randn(40, 16, generator=g)
    y, cams = torch.randint(0, 9, (40,), generator=g), torch.randint(0, 4, (40,), generator=g)
    plain, there = ClusterMemory(start, rule=rule), ClusterMemory(start, rule=rule, check=False).to(DEVICE)
    want = plain(x, y, cams)
    plain.update(x, y, cams)
    z = x.to(DEVICE)
    gpu.start()
    loss = there(z, y, cams)
    there.update(z, y, cams)
    assert gpu.syncs == 0, gpu.by_place()
    torch.testing.assert_close(loss.cpu(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(there.centroids.cpu(), plain.centroids, atol=1e-6, rtol=0)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e38])
def test_embeddings_that_cannot_be_right_show_in_a_loss_of_nan(bad):
    "Where values are not looked at; norms beyond float32, too."
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x[2] = bad
    for weight in (True, False):
        assert ClusterMemory(torch.eye(16)[:3], check=False, camera_weight=weight)(
            x, [0, 1, 2, 0, 1, 2], [0] * 6
        ).isnan()
    assert ClusterMemory(torch.eye(16)[:3], check=False)(
        x.nan_to_num(0, 0, 0).clamp(-9, 9), [0, 1, 2, 0, 1, 2], [0] * 6
    ).isfinite()


# the label step

CLUSTERERS = [dict(method='hdc'), dict(method='dbscan', min_instances=3), dict(method='kmeans')]


def embeddings(n=72, d=16):
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(n // 9, d)), 9, 0) + 0.3 * rng.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize('index', ['exact', 'ivf', 'hnsw'])
@pytest.mark.parametrize('how', CLUSTERERS, ids=lambda how: how['method'])
def test_labels_on_the_device_are_those_of_the_cpu(gpu, how, index):
    "With approximate neighbours too, which died in the first label step."
    if index != 'exact':
        pytest.importorskip('faiss')
    x, options = embeddings(), how | dict(n_clusters=8, k1=8, k2=3, index=index, random_state=0)
    there, here = make_labels(torch.from_numpy(x).to(DEVICE), **options), make_labels(x, **options)
    np.testing.assert_array_equal(there.labels, here.labels)
    np.testing.assert_allclose(there.confidence, here.confidence, atol=1e-5)
    np.testing.assert_allclose(there.centroids, here.centroids, atol=1e-5)


@pytest.mark.parametrize('n_clusters', [3, 8, 40, 72])
def test_k_means_takes_the_steps_of_scikit_learn(gpu, n_clusters):
    x = embeddings()
    if n_clusters == 40:
        x[40:] = x[:32]  # copies: clusters run empty
    there, here = (
        make_labels(v, 'kmeans', 0, n_clusters=n_clusters, random_state=3)
        for v in (torch.from_numpy(x).to(DEVICE), x)
    )
    if n_clusters != 40:
        np.testing.assert_array_equal(there.labels, here.labels)
    spread = [np.square(x - l.centroids[l.labels]).sum() for l in (there, here)]
    assert abs(spread[0] - spread[1]) <= 0.02 * spread[1] + 1e-6


def test_no_cluster_at_all_is_said_as_on_a_cpu(gpu):
    "DBSCAN with a radius in which nobody has neighbours."
    labels = make_labels(torch.from_numpy(embeddings()).to(DEVICE), 'dbscan', 4, eps=1e-6, k1=8, k2=3)
    assert labels.n_clusters == 0 and labels.n_outliers == 72 and labels.centroids.shape == (0, 16)
    with pytest.raises(ValueError, match='an epoch needs two clusters to contrast, got 0'):
        check_clusters(labels, Config())


def test_the_starts_bring_the_graph_to_the_host_once(gpu):
    "Row by row it was 50,944 blocking transfers at K = 750; the starts and the first labels are the same."
    x = embeddings(720)
    here, there = (neighbors.jaccard_distance(v, 8, 3) for v in (x, torch.from_numpy(x).to(DEVICE)))
    want = hdc.graph_plusplus(here, 60, 0)
    gpu.start()
    starts = hdc.graph_plusplus(there, 60, 0)
    first = hdc.nearest_start(there, starts)
    assert gpu.syncs <= 10, gpu.by_place()
    np.testing.assert_array_equal(starts, want)
    np.testing.assert_array_equal(first, hdc.nearest_start(here, starts))


def test_blocks_are_as_wide_as_what_they_hold():
    """Lists of 31 neighbours do not grow with N: two blocks for 100,000 samples, 15,000 before; 12,936
    samples and 750 clusters in one."""
    assert len(row_blocks(100_000, 2**25, 31 * 31)) <= 3 and len(row_blocks(12_936, 2**26, 750)) == 1
    assert row_blocks(10, 20) == [(lo, lo + 2) for lo in range(0, 10, 2)] and row_blocks(10, 1) == [
        (i, i + 1) for i in range(10)
    ]


def test_a_process_searches_for_its_rows_on_its_device(gpu):
    "The step that multiplies N by N; the rest of a step that is shared out is done in main memory."
    x = embeddings(720)
    there, whole = torch.from_numpy(x).to(DEVICE), neighbors.knn(x, 9)[1]
    for rank in range(3):
        lo, hi = Processes(rank, 3).share(len(x))
        np.testing.assert_array_equal(neighbors.nearest(there, 9, 'exact', (lo, hi))[1], whole[lo:hi])


def test_what_lies_in_main_memory_is_searched_by_the_cpu(monkeypatch):
    "device='cpu' used a FAISS GPU."
    faiss = pytest.importorskip('faiss')
    monkeypatch.setattr(faiss, 'get_num_gpus', lambda: 1)
    monkeypatch.setattr(faiss, 'index_cpu_to_gpu', lambda *_: pytest.fail('a GPU was used'), raising=False)
    x = embeddings()
    for index in ('exact', 'ivf'):
        neighbors.knn(x, 9, index)


# ranking


def gallery(levels, n_q=37, n_g=300, people=9, cameras=3, seed=0):
    "Embeddings of few values, so that distances tie; persons, cameras, some in one camera alone."
    rng = np.random.default_rng(seed)
    draw = lambda n: (
        rng.integers(-levels, levels + 1, (n, 6)).astype(np.float32),
        rng.integers(0, people, n),
        rng.integers(0, cameras, n),
    )
    (q, q_pids, q_cams), (g, g_pids, g_cams) = draw(n_q), draw(n_g)
    q_pids[:2], g_cams[g_pids == 3] = 77, 0  # nobody in the gallery; one person by one camera
    return q, g, (q_pids, g_pids, q_cams, g_cams)


@pytest.mark.parametrize('levels', [1, 3, 1000])
@pytest.mark.parametrize('block', [1, 16, 256])
@pytest.mark.parametrize('people', [2, 9, 200])
def test_ranking_on_the_device_is_that_of_the_kernels(gpu, levels, block, people):
    "To the last bit, ties included: coordinates are whole numbers, so that distances are exact."
    q, g, ids = gallery(levels, people=people)
    here = evaluate_embeddings(q, g, *ids, block=block)
    q, g = (torch.from_numpy(a).to(DEVICE) for a in (q, g))
    gpu.start()
    there = evaluate_embeddings(q, g, *ids, block=block)
    # three counts come back for each block; all else is sent without waiting
    blocks = -(-len(q) // block)
    assert gpu.waits['copy to the host'] <= 3 * blocks + 2 and gpu.syncs <= 3 * blocks + 8, gpu.by_place()
    for name in ('mAP', 'mINP', 'n_valid', 'n_query', 'cmc', 'ap', 'first_rank', 'inp'):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name))


def test_nothing_to_rank_on_the_device_is_said_as_on_a_cpu(gpu):
    q, g, (q_pids, g_pids, q_cams, g_cams) = gallery(3)
    q, g = (torch.from_numpy(a).to(DEVICE) for a in (q, g))
    for n_g, pids in ((len(g), g_pids + 1000), (0, g_pids[:0])):
        with pytest.raises(ValueError, match='no query has a match'):
            evaluate_embeddings(q, g[:n_g], q_pids, pids, q_cams, g_cams[:n_g])


def test_a_distance_of_infinity_or_nan():
    """Infinite distances are the farthest and tie with each other, with no filling among them; a NaN in a
    row marks the row."""
    d = np.array([[1, np.inf, np.inf, 0], [np.inf] * 4, [0, np.nan, 1, 2]], np.float32)
    pids, cams = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    q_pids, q_cams = np.array([0, 1, 0]), np.array([1, 2, 2])
    order = np.argsort(pids, kind='stable')
    lo, hi = (np.searchsorted(pids[order], q_pids, side) for side in ('left', 'right'))
    own = np.concatenate([order[lo[:, None] + np.arange(2)], np.zeros((3, 2), np.int64)], 1)  # two of filling
    valid = np.arange(4) < 2 * np.ones((3, 1))
    is_match = valid & (cams[own] != q_cams[:, None])
    counts = rank_on_device(*map(torch.tensor, (d, own, valid, is_match)))
    for mine, theirs in zip(
        scores_of_counts(*(c.numpy() for c in counts)), rank_rows(d, order, lo, hi, q_cams, cams)
    ):
        np.testing.assert_array_equal(mine, theirs)


# an epoch


@pytest.mark.parametrize(
    'how',
    [
        dict(clustering='hdc'),
        dict(clustering='dbscan'),
        dict(clustering='kmeans'),
        dict(image_store='host'),
        dict(rerank=True),
        dict(knn_index='ivf'),
        dict(optimizer='adamw'),
        dict(optimizer='sgd', precision='bf16'),
    ],
    ids=str,
)
def test_a_whole_epoch(data, tmp_path, monkeypatch, how):
    "Extract, label, train, evaluate on the device, nothing on two devices; the loss is that of a CPU."
    config = Config(**SETTINGS | dict(warmup_with_dbscan=False, log_dir=str(tmp_path)) | how)
    plain = Trainer(
        replace(config, precision='auto' if 'precision' not in how else how['precision']), data, tiny_net()
    ).step()
    net = tiny_net()
    with fake_gpu(monkeypatch, bf16='precision' in how) as gpu:
        row = Trainer(replace(config, device='cuda'), data, net).step()
        assert next(net.parameters()).is_cuda and gpu.kernels > 500
    assert (
        abs(row['loss'] - plain['loss']) < (0.2 if 'precision' in how else 2e-3)
        and row['n_clusters'] == plain['n_clusters']
        and row['mAP'] == pytest.approx(plain['mAP'], abs=0.05)
    )


MOST_KERNELS = 296  # 370 while clusters and cameras were looked at on the device


def test_a_step_of_the_trainer_waits_for_nothing(data, tmp_path, monkeypatch):
    """From fetching the images to the update of the memory: 0 synchronisations. 20 at first, 12 when
    constants, dice and indices were sent without waiting."""
    net = tiny_net()
    with fake_gpu(monkeypatch) as gpu:
        t = Trainer(Config(**SETTINGS | dict(device='cuda', log_dir=str(tmp_path), iters=9)), data, net)
        t.stages.begin(t.make_labels(t.extract()))
        batch = np.arange(16)
        t.stages.train_batch(0, batch)
        gpu.start()
        loss = t.stages.train_batch(1, batch)
        assert gpu.syncs == 0 and gpu.kernels <= MOST_KERNELS, (gpu.kernels, gpu.by_place())
        assert loss.is_cuda and np.isfinite(float(loss))


# of an epoch's train stage beside the looks at losses: centroids to the device and a look whether they are
# finite; whether the weights are finite, after the last step
AROUND_AN_EPOCH = 3


@pytest.mark.parametrize('iters', [20, 65])
def test_synchronisations_of_an_epoch_of_training(data, tmp_path, monkeypatch, iters):
    """One look at the losses for 20 steps. 12 a step before: 243 and 783 for these two, 2,403 for 200
    steps; now 4 and 7, 13 for 200. The losses are those of a CPU."""
    config = Config(**SETTINGS | dict(log_dir=str(tmp_path), iters=iters))
    plain = Trainer(config, data, tiny_net())
    labels = plain.make_labels(plain.extract())
    plain.train_epoch(labels)
    net = tiny_net()
    with fake_gpu(monkeypatch) as gpu:
        t = Trainer(replace(config, device='cuda'), data, net)
        t.images()
        gpu.start()
        t.train_epoch(labels)
        looks = -(-iters // LOSSES_AT_ONCE)
        assert gpu.syncs <= looks + AROUND_AN_EPOCH, gpu.by_place()
    losses = t.state.under_way.losses
    assert len(losses) == iters and not t.state.under_way.unread
    np.testing.assert_allclose(losses[:5], plain.state.under_way.losses[:5], atol=1e-3)


def test_the_next_batch_is_there_before_losses_are_read(data, tmp_path, monkeypatch):
    net, order = tiny_net(), []
    with fake_gpu(monkeypatch):
        t = Trainer(Config(**SETTINGS | dict(device='cuda', log_dir=str(tmp_path), iters=45)), data, net)
        prepare, read = t.stages.prepare, t.stages.read_losses

        def reading(least=1):
            before = len(t.state.under_way.losses)
            read(least)
            if len(t.state.under_way.losses) > before:
                order.append('read')

        t.stages.prepare = lambda step, batch: order.append(step) or prepare(step, batch)
        t.stages.read_losses = reading
        t.train_epoch(t.make_labels(t.extract()))
    assert [order[i - 1] for i, what in enumerate(order) if what == 'read'] == [20, 40, 44]
    assert [what for what in order if what != 'read'] == list(range(45))


def test_the_bar_shows_the_loss_read_last(data, tmp_path, monkeypatch):
    net, shown = tiny_net(), []

    class Bar:
        __enter__ = lambda self: self
        __exit__ = update = lambda self, *_: None
        set_postfix = lambda self, loss, refresh: shown.append(loss)

    monkeypatch.setattr(ccc.training, 'progress_bar', lambda *_: Bar())
    with fake_gpu(monkeypatch):
        t = make_on_device(data, tmp_path, net, iters=45)
        labels = t.make_labels(t.extract())
        monkeypatch.setattr(ccc.engine, 'progress_bar', lambda items, *_: items)
        t.train_epoch(labels)
        losses = [f'{loss:.3f}' for loss in t.state.under_way.losses]
    # nothing in the first twenty steps, then the last of twenty, of forty, and the very last
    assert shown == [losses[19]] * 20 + [losses[39]] * 4 + [losses[44]]


def test_parts_get_clusters_and_cameras_on_the_device(data, tmp_path, monkeypatch):
    "A memory or a loss of the user's may compare them with embeddings; only our own takes them from memory."
    net, places = tiny_net(), []

    class Own(ClusterMemory):
        def forward(self, z, y, camids):
            places.append((y.is_cuda, camids.is_cuda))
            return super().forward(z, y, camids)

    def loss(z, y, camids, positions):
        places.append((y.is_cuda, camids.is_cuda))
        return 0 * (z * (y == y[0])[:, None]).sum()

    with fake_gpu(monkeypatch):
        config = Config(**SETTINGS | dict(log_dir=str(tmp_path), device='cuda', iters=1))
        make = lambda labels: Own(torch.as_tensor(labels.centroids))
        Trainer(config, data, net, memory=make, loss=loss).step()
    assert places == [(True, True)] * 2


@pytest.mark.parametrize('what', ['embedding', 'weight', 'augment'])
def test_the_bad_batch_is_the_right_one(data, tmp_path, monkeypatch, what):
    """A loss that is no number is found up to 20 steps later. The batch that is kept is that of its step,
    image for image, with the step's number; nothing of the epoch is kept as a checkpoint."""
    bad_step, net, seen = 5, tiny_net(), {}
    with fake_gpu(monkeypatch):
        t = make_on_device(data, tmp_path, net, iters=30)
        prepare, calls = t.stages.prepare, []

        def poisoned(step, batch):
            images = prepare(step, batch)
            if t.epoch == 1 and step == bad_step and not calls.count(step):
                if what == 'embedding':
                    net.neck.weight.data[3] = float('nan')
                if what == 'weight':
                    net.trunk[0].weight.register_hook(lambda g: g * float('inf'))
            calls.append(step) if t.epoch == 1 else None
            if what == 'augment' and (t.epoch, step) == (1, bad_step):
                images[0, 0, 0, 0] = float('nan')
            seen.setdefault((t.epoch, step), (batch.copy(), images.cpu().clone()))
            return images

        t.stages.prepare = poisoned
        # gradients of infinity spoil the weights, which the loss of the next step shows
        step = bad_step + (what == 'weight')
        with pytest.raises(ValueError, match=rf'epoch 2, step {step + 1}: .*finite.*kept as bad_batch.pt'):
            t.fit()
        batch = torch.load(t.run / 'bad_batch.pt', weights_only=True)
        saved = [progress(p) for p in checkpoints(t.checkpoint_dir)]
    assert (batch['epoch'], batch['step']) == (1, step) and saved == [(1, 0)]
    # it was found later
    assert max(s for e, s in seen if e == 1) == 20
    positions, images = seen[1, step]
    np.testing.assert_array_equal(batch['positions'], positions)
    torch.testing.assert_close(batch['images'], images, rtol=0, atol=0, equal_nan=True)


def make_on_device(data, tmp_path, net, **settings):
    return Trainer(Config(**SETTINGS | dict(log_dir=str(tmp_path), device='cuda') | settings), data, net)


def test_a_stop_before_losses_are_read(data, tmp_path, monkeypatch):
    "The checkpoint has every step and its loss; with a loss that is no number there is none."
    nets = [tiny_net() for _ in range(4)]
    with fake_gpu(monkeypatch):
        whole = make_on_device(data, tmp_path, nets[0], iters=30, num_epochs=2)
        whole.fit()
        t = stop_at(make_on_device(data, tmp_path, nets[1], iters=30, num_epochs=2), 1, 24)
        with pytest.raises(Stopped, match='saved after 1 epochs and 25 steps'):
            t.fit()
        again = Trainer.resume(t.run, data, nets[2])
        assert len(again.state.under_way.losses) == 25 and not again.state.under_way.unread
        again.fit()
        same(t.run, whole.run)
        bad = stop_at(make_on_device(data, tmp_path, nets[3], iters=30, num_epochs=2), 1, 6)
        prepare = bad.stages.prepare

        def poisoned(step, batch):
            if (bad.epoch, step) == (1, 4):
                nets[3].neck.weight.data[3] = float('nan')
            return prepare(step, batch)

        bad.stages.prepare = poisoned
        with pytest.raises(ValueError, match='epoch 2, step 5: .*kept as bad_batch.pt'):
            bad.fit()
        assert [progress(p) for p in checkpoints(bad.checkpoint_dir)] == [(1, 0)]


def test_maps_are_made_beside_training(data, tmp_path, monkeypatch):
    """By a thread that begins when the labels are there. The folder holds the same maps as if each had
    been made when its epoch was kept."""
    pytest.importorskip('umap')
    net, other, threads = tiny_net(), tiny_net(), []
    real = Maps.make

    def make(self, trainer):
        threads.append(threading.current_thread() is threading.main_thread())
        return real(self, trainer)

    monkeypatch.setattr(Maps, 'make', make)
    with fake_gpu(monkeypatch):
        t = make_on_device(data, tmp_path, net, maps=True, num_epochs=2)
        t.fit()
        monkeypatch.setattr(Maps, 'after_labels', lambda self, trainer: None)
        plain = make_on_device(data, tmp_path, other, maps=True, num_epochs=2)
        plain.fit()
    assert threads == [False, False, True, True]
    same(t.run, plain.run)
    names = [sorted(str(p.relative_to(u.run)) for p in u.run.rglob('*')) for u in (t, plain)]
    assert names[0] == names[1] and 'map' in np.load(t.run / 'labels/epoch_001.npz')


# the measurement that waits for a GPU


def test_the_measurement_runs_in_a_tiny_form():
    program = str(Path(__file__).parent / 'benchmarks' / 'training.py')

    def run(*args):
        return subprocess.run(
            [sys.executable, program, 'all', *args], capture_output=True, text=True, timeout=300
        )

    tiny = run('--tiny', '--device', 'cpu')
    assert tiny.returncode == 0, tiny.stderr[-2000:]
    assert (
        tiny.stdout.count('|---|') >= 3
        and '| train |' in tiny.stdout
        and '2 epochs: ' in tiny.stdout
        and '(measured)' in tiny.stdout
    )
    if not torch.cuda.is_available():
        refused = run()
        assert (
            refused.returncode == 1
            and refused.stderr.count('\n') == 1
            and 'a GPU that torch can see is needed' in refused.stderr
        )


# several processes


def test_parameters_that_nothing_reaches():
    pytest.importorskip('timm')
    assert unused_parameters(build_backbone('resnet18', weights=None), 32, 16) == []
    assert unused_parameters(build_backbone(TIMM, weights=None, pooling='avg', size=(64, 32)), 64, 32) == [
        'trunk.head.norm.weight',
        'trunk.head.norm.bias',
    ]


@pytest.mark.parametrize('what', ['unused', 'chunks'])
def test_two_processes(what):
    if what == 'unused':
        pytest.importorskip('timm')
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(('ACCELERATE', 'WORLD', 'RANK', 'LOCAL'))
    } | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, __file__, what], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('fine') == 2


def test_processes_wait_long_for_the_first_one(monkeypatch):
    "NCCL's own limit is ten minutes, less than decoding or re-ranking can take."
    asked = {}

    def joined(*args, **how):
        asked.update(how)
        raise ConnectionError

    monkeypatch.setattr(torch.distributed, 'init_process_group', joined)
    for name, value in dict(
        WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR='localhost', MASTER_PORT=29511
    ).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError):
        make_engine(Config(device='cpu'))
    assert asked['timeout'].total_seconds() == 12 * 3600


def _unused():
    "Two steps of a network with parameters that its embeddings do not depend on; DDP died on the second."
    from ccc.engine import training_module

    config = Config(
        device='cpu',
        arch=TIMM,
        pooling_type='avg',
        resnet_pretrained='none',
        height=64,
        width=32,
        batch_size=8,
        num_instances=4,
        bn_chunks=2,
    )
    engine = make_engine(config)
    torch.manual_seed(0)
    net = build_backbone(TIMM, weights=None, pooling='avg', size=(64, 32))
    embed = training_module(net, config, engine)
    for _ in range(3):
        engine.backward(embed(torch.randn(4, 3, 64, 32)).sum())
    os.write(1, b'fine\n')


def _chunks():
    with pytest.raises(ValueError, match='Launch at most 1 .*or give --bn-chunks 2'):
        make_engine(Config(device='cpu', bn_chunks=1))
    os.write(1, b'fine\n')


if __name__ == '__main__':
    from accelerate import debug_launcher

    debug_launcher(dict(unused=_unused, chunks=_chunks)[sys.argv[1]], (), 2)
