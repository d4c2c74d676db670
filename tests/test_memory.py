"""Memory: published values, twins over many batches, number types, determinism, cost in operations and
host transfers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ccc.memory import RULES, ClusterMemory, camera_entropy, pick_updates
from conftest import golden


@pytest.fixture(scope='module')
def published():
    return golden('memory')


@pytest.mark.parametrize('weight', ['plain', 'cie'])
@pytest.mark.parametrize('rule', RULES)
def test_published(published, rule, weight):
    g, key = published, f'{rule}__{weight}__'
    memory = ClusterMemory(g['memory_before'], rule=rule, camera_weight=weight == 'cie')
    x = torch.tensor(g['inputs'], requires_grad=True)
    loss = memory(x, g['targets'], g['camids'])
    loss.backward()
    memory.update(x, g['targets'], g['camids'])
    assert abs(loss.item() - g[key + 'loss']) < 1e-5
    assert np.abs(x.grad.numpy() - g[key + 'grad']).max() < 1e-5
    assert np.abs(memory.centroids.numpy() - g[key + 'memory_after']).max() < 1e-5


def test_published_entropy(published):
    clusters, bits, weights = camera_entropy(published['targets'], published['camids'])
    assert (clusters.numpy() == published['cie__clusters']).all()
    assert np.abs(bits.numpy() - published['cie__entropy_bits'][clusters]).max() < 1e-5
    assert np.abs(weights.numpy() - published['cie__cluster_weights']).max() < 1e-5


def slow_rows(c, x, camids, rule):
    "Vectors that update centroid `c`, in turn, by loops: of one cluster, in batch order."
    cameras = list(dict.fromkeys(camids))
    of = {k: [i for i, q in enumerate(camids) if q == k] for k in cameras}
    centre = {k: F.normalize(x[of[k]].mean(0), dim=0) for k in cameras}
    like = [(v * c).sum().item() for v in x]
    best = lambda items, score: min(items, key=lambda i: (score[i], i))
    h = [0.0] * len(x)
    for i, k in enumerate(camids):
        d, s = max(1 - like[i], 0), max((x[i] * centre[k]).sum().item() + 1, 0)
        h[i] = -d * s / (d + s) if d + s else 0
    everyone = range(len(x))
    return {
        'cm': lambda: [x[i] for i in everyone],
        'cm_hard': lambda: [x[best(everyone, like)]],
        'cm_camera': lambda: [x[of[k][0]] for k in cameras],
        'cm_hard_camera': lambda: [x[best(of[k], like)] for k in cameras],
        'tccl_camera': lambda: [min(centre.values(), key=lambda z: (z @ c).item())],
        'hd_camera': lambda: [x[best(everyone, h)]],
    }[rule]()


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('momentum', [0.0, 0.1, 0.9])
def test_twin(rule, momentum):
    rng = np.random.default_rng(7)
    for trial in range(15):
        K, B, cameras = rng.integers(1, 12), rng.integers(1, 60), rng.integers(1, 6)
        x = F.normalize(torch.tensor(rng.normal(size=(B, 8)), dtype=torch.float32), dim=1)
        if trial % 3 == 0:
            x = x[rng.integers(0, B, B)]  # doubles: ties
        # any numbers will do for cameras
        y, cams = rng.integers(0, K, B), rng.integers(0, cameras, B) * 1000 - 7
        memory = ClusterMemory(rng.normal(size=(K, 8)), momentum=momentum, rule=rule)
        start = memory.centroids.clone()
        memory.update(x, y, cams)
        for j in range(K):
            c = start[j]
            mine = np.flatnonzero(y == j)
            for v in slow_rows(start[j], x[mine], list(cams[mine]), rule) if len(mine) else []:
                c = F.normalize(momentum * c + (1 - momentum) * v, dim=0)
            assert torch.allclose(memory.centroids[j], c, atol=1e-5), (rule, trial, j)
            if not len(mine):
                assert torch.equal(memory.centroids[j], start[j])


@pytest.mark.parametrize('rule', ['cm_hard', 'hd_camera', 'cm_hard_camera', 'cm_camera'])
def test_ties_go_to_the_first(rule):
    x = F.normalize(torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 1]]), dim=1)
    y, cams = torch.tensor([1, 0, 1, 0]), torch.zeros(4, dtype=torch.int64)
    _, clusters, rows = pick_updates(x, y, cams, torch.eye(2), rule)
    assert dict(zip(clusters.tolist(), rows.tolist())) == {0: 1, 1: 0}


def test_camera_turns_are_by_appearance():
    x = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    cams = torch.tensor([9, 2, 9, 5, 2, 5])
    _, _, rows = pick_updates(x, torch.zeros(6, dtype=torch.int64), cams, torch.eye(4)[:1], 'cm_camera')
    assert rows.tolist() == [0, 1, 3]
    _, _, rows = pick_updates(x, torch.zeros(6, dtype=torch.int64), cams, torch.eye(4)[:1], 'cm_hard_camera')
    assert cams[rows].tolist() == [9, 2, 5]


@pytest.mark.parametrize(
    'kind',
    [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, 'list', torch.int32, torch.uint8],
)
def test_any_integer_type(published, kind):
    g = published
    as_kind = lambda a: (
        a.tolist()
        if kind == 'list'
        else torch.tensor(a).to(kind)
        if isinstance(kind, torch.dtype)
        else a.astype(kind)
    )
    memory = ClusterMemory(g['memory_before'])
    x = torch.tensor(g['inputs'])
    loss = memory(x, as_kind(g['targets']), as_kind(g['camids']))
    memory.update(x, as_kind(g['targets']), as_kind(g['camids']))
    assert abs(loss.item() - g['hd_camera__cie__loss']) < 1e-5
    assert np.abs(memory.centroids.numpy() - g['hd_camera__cie__memory_after']).max() < 1e-5


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(published, dtype):
    "The memory and the loss stay float32, also under autocast; the gradient has the type of the input."
    g = published
    memory = ClusterMemory(torch.tensor(g['memory_before'], dtype=torch.float64))
    x = torch.tensor(g['inputs']).to(dtype).requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = memory(x, g['targets'], g['camids'])
    loss.backward()
    memory.update(x, g['targets'], g['camids'])
    assert loss.dtype == memory.centroids.dtype == torch.float32 and x.grad.dtype == dtype
    assert (
        abs(loss.item() - g['hd_camera__cie__loss'])
        < {torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    )


@pytest.mark.parametrize('rule', RULES)
def test_no_cameras_is_one_camera(published, rule):
    g = published
    x = torch.tensor(g['inputs'])
    without, one, plain = (
        ClusterMemory(g['memory_before'], rule=rule, camera_weight=w) for w in (True, True, False)
    )
    same = torch.full((len(x),), 3)
    assert without(x, g['targets']) == one(x, g['targets'], same)
    assert torch.allclose(without(x, g['targets']), plain(x, g['targets']), atol=1e-6)
    without.update(x, g['targets'])
    one.update(x, g['targets'], same)
    assert torch.equal(without.centroids, one.centroids)
    if rule in ('cm', 'cm_hard', 'cm_hard_camera'):
        again = ClusterMemory(g['memory_before'], rule=rule.removesuffix('_camera'))
        again.update(x, g['targets'], g['camids'])
        assert torch.equal(without.centroids, again.centroids)


def test_reading_does_not_write(published):
    memory = ClusterMemory(published['memory_before'])
    before = memory.centroids.clone()
    memory(torch.tensor(published['inputs']), published['targets'], published['camids'])
    assert torch.equal(memory.centroids, before) and not list(memory.parameters())


def test_own_copy_and_state(published):
    start = torch.tensor(published['memory_before'])
    memory = ClusterMemory(start)
    memory.update(torch.tensor(published['inputs']), published['targets'], published['camids'])
    assert torch.equal(start, torch.tensor(published['memory_before']))
    other = ClusterMemory(start)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.centroids, memory.centroids) and torch.equal(
        copy.deepcopy(memory).centroids, memory.centroids
    )
    assert torch.allclose(memory.centroids.norm(dim=1), torch.ones(24), atol=1e-6)


def test_same_sample_as_centroid():
    "x equal to its centroid and to its camera's centre: d = 0, nothing divides by 0."
    c = F.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    for rule in RULES:
        memory = ClusterMemory(c, rule=rule)
        memory.update(torch.cat([c, -c]), [0, 1, 2, 0, 1, 2], [0] * 6)
        assert memory.centroids.isfinite().all()
        memory.update(c, [0, 1, 2], [0, 1, 2])
        assert memory.centroids.isfinite().all()


@pytest.mark.parametrize(
    'x, y, camids, message',
    [
        (torch.randn(4, 5), [0] * 4, [0] * 4, r'x must be \(B, 6\) with B > 0, got shape \(4, 5\)'),
        (torch.randn(6), [0], [0], r'got shape \(6,\)'),
        (torch.randn(0, 6), [], [], r'got shape \(0, 6\)'),
        (torch.tensor(1.0), [0], [0], r'got shape \(\)'),
        (torch.randn(4, 6), [0, 1, 3, 0], [0] * 4, r'y must be in \[0, 3\), got 0 to 3'),
        (torch.randn(4, 6), [0, -1, 2, 0], [0] * 4, r'got -1 to 2'),
        (torch.randn(4, 6), [[0, 1, 2, 0]], [0] * 4, r'y must be \(4,\), got shape \(1, 4\)'),
        (torch.randn(4, 6), [0, 1, 2, 0], [0] * 3, r'camids must be \(4,\), got shape \(3,\)'),
        (torch.randn(4, 6), torch.zeros(4), [0] * 4, 'y must be integers, got torch.float32'),
        (
            torch.randn(4, 6),
            [0] * 4,
            torch.ones(4, dtype=torch.bool),
            'camids must be integers, got torch.bool',
        ),
        (torch.tensor([[float('nan')] * 6, [1.0] * 6]), [0, 0], [0, 0], '1 of 2 rows with NaN'),
        (torch.tensor([[float('inf')] * 6]), [0], [0], '1 of 1 rows with NaN or infinity'),
    ],
)
def test_bad_batches(x, y, camids, message):
    memory = ClusterMemory(torch.eye(6)[:3])
    for call in (memory, memory.update):
        with pytest.raises(ValueError, match=message):
            call(x, y, camids)


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(centroids=torch.zeros(0, 4)), 'centroids must be'),
        (dict(centroids=torch.ones(4)), 'centroids must be'),
        (dict(centroids=torch.eye(3) / 0), 'finite'),
        (dict(temperature=0), 'temperature'),
        (dict(temperature=float('nan')), 'temperature'),
        (dict(momentum=1.5), 'momentum'),
        (dict(rule='CM'), "got 'CM'"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        ClusterMemory(**{'centroids': torch.eye(3), **bad})


class Count(TorchDispatchMode):
    "Counts tensor operations, and among them transfers of a value to the host."

    def __init__(self):
        super().__init__()
        self.all, self.transfers = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.transfers += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('rule', RULES)
def test_cost_does_not_grow_with_clusters_or_samples(rule):
    """As many operations and transfers for 64 clusters as for 4: no loop over clusters. Only sequential
    rules know how often a cluster is updated."""

    def cost(clusters, per_cluster=8):
        y = torch.arange(clusters).repeat_interleave(per_cluster)
        cams = torch.arange(len(y)) % 4
        memory = ClusterMemory(torch.randn(clusters, 16), rule=rule)
        x = torch.randn(len(y), 16)
        memory(x, y, cams), memory.update(x, y, cams)
        with Count() as c:
            memory(x, y, cams), memory.update(x, y, cams)
        return c.all, c.transfers

    assert cost(4) == cost(64)
    if rule not in ('cm',):
        assert cost(4) == cost(4, 16)
    assert cost(64)[1] <= 6


def test_repeats_exactly(published):
    "The same bits every time, with one thread as with two."
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            memory = ClusterMemory(published['memory_before'])
            memory.update(torch.tensor(published['inputs']), published['targets'], published['camids'])
            seen.append(memory.centroids)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_runs_with_deterministic_algorithms(published):
    "Nothing here is on PyTorch's list of operations without a deterministic form."
    torch.use_deterministic_algorithms(True)
    try:
        for rule in RULES:
            memory = ClusterMemory(published['memory_before'], rule=rule)
            x = torch.tensor(published['inputs'], requires_grad=True)
            memory(x, published['targets'], published['camids']).backward()
            memory.update(x, published['targets'], published['camids'])
    finally:
        torch.use_deterministic_algorithms(False)


def test_many_clusters():
    "A global batch of 2,048 against 10,000 clusters, some with all their images in one."
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.randint(0, 10_000, (1_900,), generator=g), torch.full((148,), 5)])
    x, cams = torch.randn(2_048, 32, generator=g), torch.randint(0, 15, (2_048,), generator=g)
    for rule in RULES:
        memory = ClusterMemory(torch.randn(10_000, 32, generator=g), rule=rule)
        assert memory(x, y, cams).isfinite()
        memory.update(x, y, cams)
        assert torch.allclose(memory.centroids.norm(dim=1), torch.ones(10_000), atol=1e-5)


def test_entropy_leaves_outliers_out():
    clusters, bits, weights = camera_entropy(
        np.array([-1, 4, 4, -1, 2], np.int32), np.array([0, 1, 2, 3, 3], np.int8)
    )
    assert clusters.tolist() == [2, 4] and bits.tolist() == [0, 1] and abs(weights.mean().item() - 1) < 1e-6


# properties, on drawn examples


def batch(seed, size, clusters=5, cameras=4, d=8):
    "Embeddings, clusters, cameras, and the memory they meet."
    rng = np.random.default_rng(seed)
    x = F.normalize(torch.tensor(rng.normal(size=(size, d)), dtype=torch.float32), dim=1)
    return (
        x,
        torch.tensor(rng.integers(0, clusters, size)),
        torch.tensor(rng.integers(0, cameras, size)),
        torch.tensor(rng.normal(size=(clusters, d)), dtype=torch.float32),
    )


def after(memory, x, y, camids):
    "Loss of a batch, and the centroids that its update leaves."
    loss = memory(x, y, camids)
    memory.update(x, y, camids)
    return loss, memory.centroids


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


drawn = dict(seed=st.integers(0, 10**6), size=st.integers(1, 40), rule=st.sampled_from(list(RULES)))


@settings(max_examples=60)
@given(**drawn)
def test_the_numbers_of_clusters_and_cameras_are_only_names(seed, size, rule):
    x, y, camids, centroids = batch(seed, size)
    number = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    loss, moved = after(ClusterMemory(centroids, rule=rule), x, y, camids)
    renamed = torch.empty_like(centroids).index_copy_(0, number, centroids)  # centroid j is now number[j]
    other_loss, other = after(ClusterMemory(renamed, rule=rule), x, number[y], 70 - 3 * camids)
    close(other_loss, loss)
    close(other[number], moved)


@settings(max_examples=60)
@given(**drawn)
def test_the_order_of_a_batch_matters_to_sequential_rules_alone(seed, size, rule):
    x, y, camids, centroids = batch(seed, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    # they take samples in turn: another order, but turns of another cluster may come between
    if rule in ('cm', 'cm_camera', 'cm_hard_camera'):
        order = torch.cat([(y == j).nonzero()[:, 0] for j in range(5)])
    loss, moved = after(ClusterMemory(centroids, rule=rule), x, y, camids)
    other_loss, other = after(ClusterMemory(centroids, rule=rule), x[order], y[order], camids[order])
    close(other_loss, loss)
    close(other, moved)


@settings(max_examples=60)
@given(
    **drawn
    | dict(rule=st.sampled_from(['cm_hard', 'tccl_camera', 'hd_camera', 'cm_camera', 'cm_hard_camera']))
)
def test_a_batch_said_twice_says_the_same(seed, size, rule):
    """Copies of images, beside their originals: ties to the first. The rule `cm` takes each copy for a
    further update."""
    x, y, camids, centroids = batch(seed, size)
    loss, moved = after(ClusterMemory(centroids, rule=rule), x, y, camids)
    other_loss, other = after(
        ClusterMemory(centroids, rule=rule), *(a.repeat_interleave(2, 0) for a in (x, y, camids))
    )
    close(other_loss, loss)
    close(other, moved)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40))
def test_camera_entropy_does_not_know_names_or_order(seed, size):
    """Weights have mean 1 and rise with entropy; images named or ordered otherwise, or all of them twice,
    have the same."""
    _, y, camids, _ = batch(seed, size)
    clusters, bits, weights = camera_entropy(y, camids)
    assert (
        weights.mean().item() == pytest.approx(1, abs=1e-5) and (bits >= 0).all() and (bits <= 2 + 1e-5).all()
    )
    assert (weights[bits.argsort()].diff() >= -1e-6).all()
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    for other in (
        camera_entropy(y[order], camids[order]),
        camera_entropy(y, 5 - camids),
        camera_entropy(y + 11, camids),
        camera_entropy(y.repeat(2), camids.repeat(2)),
    ):
        close(other[1], bits)
        close(other[2], weights)
    others, reversed_bits, _ = camera_entropy(40 - y, camids)
    assert torch.equal(others.flip(0), 40 - clusters)
    close(reversed_bits.flip(0), bits)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), equal=st.booleans())
def test_cie_is_plain_where_all_clusters_are_alike(seed, size, equal):
    """Every camera once in every cluster: weights of 1, the mean of the losses. A cluster of one camera
    counts for less, never for nothing."""
    x, y, camids, centroids = batch(seed, size)
    if equal:
        x, y, camids = x.repeat(20, 1)[:20], torch.arange(20) % 5, torch.arange(20) // 5
    cie, plain = (ClusterMemory(centroids, camera_weight=w)(x, y, camids) for w in (True, False))
    weights = camera_entropy(y, camids)[2]
    if equal:
        close(cie, plain)
    losses = torch.stack(
        [
            ClusterMemory(centroids, camera_weight=False)(x[i : i + 1], y[i : i + 1], camids[i : i + 1])
            for i in range(len(x))
        ]
    )
    own = dict(zip(camera_entropy(y, camids)[0].tolist(), weights.tolist()))
    close(cie, (torch.tensor([own[j] for j in y.tolist()]) * losses).mean())
    assert (weights > 0).all()
