"HDC: golden runs round by round, both ways; the start, empty clusters, copies, ties, K near N."

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from conftest import golden
from hypothesis import assume, example, given, settings, strategies as st
from scipy.sparse import csr_array
from sklearn.utils.estimator_checks import parametrize_with_checks

from ccc import hdc
from ccc.hdc import HDC, METRICS, CentroidDistances, hdc_rounds, nearest_start, pairwise_distance
from ccc.neighbors import jaccard_distance, to_dense

CASES = {
    'jaccard_eulercosine': {},
    'jaccard_cosine': dict(metric='cosine'),
    'jaccard_euclidean': dict(metric='euclidean'),
    'jaccard_eulercosine_fixed_threshold': dict(threshold=0.5),
    'jaccard_eulercosine_normalized': dict(normalize_centroids=True),
    'nojaccard_eulercosine': {},
    'relocation': {},
    'ties': {},
}


def golden_case(name):
    "The inputs and outputs of one golden run, keys without the case's name."
    arrays = golden('hdc_hard' if name in ('relocation', 'ties') else 'hdc')
    case = {k.removeprefix(name + '__'): v for k, v in arrays.items() if k.startswith(name + '__')}
    return {'features': arrays.get('features'), 'jaccard': arrays.get('jaccard')} | case


def graph_of(name, g):
    return (
        pairwise_distance(g['features'], g['features'], normalize=True)
        if name.startswith('nojaccard')
        else g['jaccard']
    )


@pytest.mark.parametrize('metric', METRICS)
def test_golden_distances(metric):
    g = golden('distances')
    np.testing.assert_allclose(
        pairwise_distance(g['x'], g['y'], metric, normalize=True), g[metric], atol=1e-5
    )
    np.testing.assert_allclose(
        pairwise_distance(g['x'], g['y'], metric), g[metric + '_raw'], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize('name', CASES)
def test_golden_rounds(name, both_ways):
    both_ways(hdc, '_hdc_kernels')
    g = golden_case(name)
    rounds = hdc_rounds(g['features'], graph_of(name, g), g['init_indices'], **CASES[name])
    for labels, expected, shift, r in zip(g['labels_trace'], g['pod_trace'], g['shift'], rounds):
        np.testing.assert_array_equal(r.labels, labels)
        np.testing.assert_array_equal(np.where(r.peripheral, -1, r.labels), expected)
        assert abs(r.shift - shift) < 1e-5
    np.testing.assert_allclose(r.centroids, g['centroids'], atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_golden_fit(name):
    g = golden_case(name)
    fit = HDC(len(g['init_indices']), init=g['init_indices'], **CASES[name]).fit(
        g['features'], graph=graph_of(name, g)
    )
    assert fit.n_iter_ == g['n_iter']
    np.testing.assert_array_equal(fit.labels_, g['labels_with_outliers'])
    np.testing.assert_array_equal(fit.assignments_, g['labels'])
    np.testing.assert_allclose(fit.cluster_centers_, g['centroids'], atol=1e-5)


@pytest.fixture(params=['cpu', 'cuda'])
def device(request):
    torch = pytest.importorskip('torch')
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU that torch can see')
    return request.param


@pytest.mark.parametrize('name', [n for n in CASES if not n.startswith('nojaccard')])
def test_golden_rounds_on_tensors(name, device):
    "The torch parts, on a CPU where there is no GPU: the same rounds."
    import torch
    from ccc._neighbors_torch import DeviceGraph

    g = golden_case(name)
    sparse, x = hdc.as_graph(g['jaccard'], len(g['features'])), torch.from_numpy(g['features']).to(device)
    graph = DeviceGraph(
        *(
            torch.from_numpy(part).to(device)
            for part in (sparse.indptr.astype(np.int64), sparse.indices, sparse.data)
        ),
        sparse.shape,
    )
    for labels, expected, shift, r in zip(
        g['labels_trace'], g['pod_trace'], g['shift'], hdc_rounds(x, graph, g['init_indices'], **CASES[name])
    ):
        np.testing.assert_array_equal(r.labels, labels)
        np.testing.assert_array_equal(np.where(r.peripheral, -1, r.labels), expected)
        assert abs(r.shift - shift) < 1e-5
    assert r.centroids.device.type == device
    fit = HDC(len(g['init_indices']), init=g['init_indices'], **CASES[name]).fit(x, graph=graph)
    np.testing.assert_array_equal(fit.labels_, g['labels_with_outliers'])
    np.testing.assert_allclose(fit.cluster_centers_, g['centroids'], atol=1e-5)


def test_golden_first_round():
    g, arrays = golden_case('jaccard_eulercosine'), golden('hdc')
    graph = hdc.as_graph(g['jaccard'], len(g['features']))
    labels = np.maximum(nearest_start(graph, g['init_indices']), 0)
    np.testing.assert_array_equal(labels, g['init_labels'])
    membership = CentroidDistances(g['features'], 'euler_cosine').membership(
        g['features'][g['init_indices']], labels
    )
    np.testing.assert_allclose(
        membership, arrays['first_iter__membership'][np.arange(len(labels)), labels], atol=1e-5
    )
    H = arrays['first_iter__discrepancy']
    nearest, smallest, total, discrepancy_to = hdc._nearest_cluster(
        hdc.kernels.assign,
        hdc.Discrepancies(hdc.rows_of(graph)),
        labels,
        membership,
        len(g["init_indices"]),
    )
    np.testing.assert_allclose(smallest, H.min(axis=1), atol=1e-5)
    np.testing.assert_allclose(total, H.sum(axis=1), rtol=1e-5)
    for i, j in np.random.default_rng(0).integers(0, [500, 25], (50, 2)):
        assert abs(discrepancy_to(i, j) - H[i, j]) < 1e-5


@parametrize_with_checks([HDC(), HDC(3, outliers=False)])
def test_scikit_learn_estimator(estimator, check):
    check(estimator)


@pytest.mark.parametrize('k', [399, 400])
def test_as_many_clusters_as_samples_ends(k):
    g = golden_case('relocation')
    fit = HDC(k, random_state=0, max_iter=5).fit(g['features'], graph=g['jaccard'])
    assert np.bincount(fit.assignments_, minlength=k).min() == 1


@pytest.mark.parametrize('init', ['k-means++', 'k-means++-x', 'random'])
def test_copies_of_one_image(init):
    x = np.ones((40, 8), np.float32) / np.sqrt(8)
    fit = HDC(5, init=init, random_state=0).fit(x)
    assert len(set(fit.init_indices_)) == 5 and np.bincount(fit.assignments_, minlength=5).min() >= 1
    assert np.isfinite(fit.confidence_).all() and np.isfinite(fit.cluster_centers_).all()


def test_a_start_that_loses_itself_to_a_copy_is_refilled():
    """Starts 0 and 1 are copies: both first labels go to cluster 0, cluster 1 is empty, and sample 0
    stands in for it."""
    x = golden_case('relocation')['features'].copy()
    x[1] = x[0]
    for fit in (HDC(20, init=np.arange(20)).fit(x), HDC(20, init=np.arange(20), max_iter=1).fit(x)):
        assert np.bincount(fit.assignments_, minlength=20).min() >= 1


def test_samples_without_a_neighbour_in_any_cluster():
    x = np.repeat(np.eye(6, dtype=np.float32), 10, axis=0)  # six groups that share nothing, three starts
    first = HDC(3, init=[0, 10, 20], k1=5, k2=1).fit(x)
    apart = HDC(3, init=[0, 10, 20], k1=5, k2=1, ceiling='outlier').fit(x)
    assert min(first.n_ceiling_, apart.n_ceiling_) >= 30
    assert (
        (first.assignments_[30:] == 0).all()
        and (apart.labels_[30:] == -1).all()
        and (apart.assignments_ >= 0).all()
    )


def test_largest_distance_is_exact_while_columns_are_skipped():
    rng = np.random.default_rng(0)
    x, c = (rng.normal(size=(n, 16)).astype(np.float32) for n in (300, 200))
    for metric in METRICS:
        distances = CentroidDistances(x, metric, block=64)
        for step in (1, 0.1, 1e-3, 1e-4, 0):
            c = c + step * rng.normal(size=c.shape).astype(np.float32) * (np.arange(200) < 100)[:, None]
            expected = 2 if metric == 'cosine' else pairwise_distance(x, c, metric).max()
            assert abs(distances.largest(distances.lift(c)) - expected) < 1e-4 * expected
        if metric == 'euclidean':
            # Euler's bound is loose where coordinates are not small
            assert distances.n_products < 5 * 200 * 300 and distances.n_pairs < 300 * 200 / 10


# properties, on drawn examples


def exact_points(seed, n, d=6):
    """Points whose coordinates are small multiples of 1/64: sums of any order are exact, so permuted
    samples have the same means to the bit."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(-24, 25, (max(2, n // 8), d))
    return ((centres[rng.integers(0, len(centres), n)] + rng.integers(-8, 9, (n, d))) / 64).astype(np.float32)


def graph_of_points(seed, x):
    """Their Jaccard graph, each distance shortened by a little of its own: a minimum of the same weight
    makes equal distances where it is the smaller on both sides, and ties are for other tests."""
    rng = np.random.default_rng(seed)
    dense = to_dense(
        jaccard_distance(x + 1e-3 * rng.normal(size=x.shape).astype(np.float32), min(8, len(x) - 1), 3)
    )
    shorter = np.triu(rng.uniform(0.9, 1, dense.shape), 1).astype(np.float32)
    # equal neighbours make distances of 0, which nothing shortens
    apart = np.maximum(dense, 0.02) * (shorter + shorter.T)
    return hdc.as_graph(np.where(dense < 1, apart, 1).astype(np.float32), len(x))


def tied_graph(seed, n, levels=4):
    "A symmetric graph of few different distances: ties everywhere, and pairs that share no neighbour."
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.integers(0, levels + 1, (n, n)) / levels, 1).astype(np.float32)
    return upper + upper.T


def fit_untouched(x, graph, starts, **options):
    """The fit, of examples in which no cluster was empty or had to be filled again: sample 0 stands for
    it, or who is moved depends on indices, as published."""
    real, nearest, moved = hdc.refill, hdc._nearest_cluster, []

    def watched(labels, *rest):
        before = labels.copy()
        real(labels, *rest)
        moved.append(not np.array_equal(before, labels))

    def looked_at(assign, a, labels, m, k):
        moved.append(len(np.unique(labels[labels >= 0])) < k)
        return nearest(assign, a, labels, m, k)

    with mock.patch.object(hdc, 'refill', watched), mock.patch.object(hdc, '_nearest_cluster', looked_at):
        fit = HDC(len(starts), init=starts, **options).fit(x, graph=graph)
    assert moved  # the watch is in place
    assume(not any(moved))
    return fit


drawn = dict(
    seed=st.integers(0, 10**6),
    n=st.integers(20, 60),
    k=st.integers(2, 6),
    metric=st.sampled_from(sorted(METRICS)),
)


@given(**drawn, n_sigma=st.sampled_from([0.0, 1.0, 2.0]))
# a start that loses its own sample to an equal one: its cluster is empty in the first round
@example(seed=477, n=51, k=5, metric='cosine', n_sigma=0.0)
def test_the_order_of_samples_does_not_matter(seed, n, k, metric, n_sigma):
    """The same graph and the same starts under other sample numbers: the same labels, discrepancies and
    centroids, to the bit."""
    x, rng = exact_points(seed, n), np.random.default_rng(seed)
    graph, order, starts = graph_of_points(seed, x), rng.permutation(n), rng.choice(n, k, replace=False)
    plain = fit_untouched(x, graph, starts, metric=metric, n_sigma=n_sigma)
    shuffled = fit_untouched(
        x[order], csr_array(graph[order][:, order]), np.argsort(order)[starts], metric=metric, n_sigma=n_sigma
    )
    for name in ('labels_', 'assignments_', 'discrepancy_', 'confidence_'):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(plain, name)[order], name)
    np.testing.assert_array_equal(shuffled.cluster_centers_, plain.cluster_centers_)
    assert shuffled.n_iter_ == plain.n_iter_ and shuffled.n_ceiling_ == plain.n_ceiling_


@given(**drawn)
def test_the_numbers_of_clusters_are_only_names(seed, n, k, metric):
    """The starts in another order: the same clusters under other numbers. Samples near none are left out:
    they would go to the first, whichever it is."""
    x, rng = exact_points(seed, n), np.random.default_rng(seed)
    graph, starts, name = graph_of_points(seed, x), rng.choice(n, k, replace=False), rng.permutation(k)
    plain, renamed = (
        fit_untouched(x, graph, s, metric=metric, ceiling='outlier') for s in (starts, starts[name])
    )
    back = np.append(name, -1)
    np.testing.assert_array_equal(back[renamed.labels_], plain.labels_)
    np.testing.assert_array_equal(renamed.discrepancy_, plain.discrepancy_)
    np.testing.assert_array_equal(renamed.cluster_centers_, plain.cluster_centers_[name])


@given(**drawn)
def test_copies_of_an_image_stay_together(seed, n, k, metric):
    "Every image stored three times: copies share label, discrepancy and confidence."
    x = exact_points(seed, n)
    graph = np.kron(to_dense(graph_of_points(seed, x)), np.ones((3, 3), np.float32))
    fit = fit_untouched(
        np.repeat(x, 3, axis=0),
        graph,
        3 * np.random.default_rng(seed).choice(n, k, replace=False),
        metric=metric,
    )
    for name in ('labels_', 'assignments_', 'discrepancy_', 'confidence_'):
        first, *others = getattr(fit, name).reshape(n, 3).T
        for other in others:
            np.testing.assert_array_equal(other, first, name)


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), k=st.integers(1, 40), levels=st.integers(1, 5))
def test_ties_of_the_start_go_to_the_lowest_cluster(seed, n, k, levels):
    graph, starts = (
        tied_graph(seed, n, levels),
        np.random.default_rng(seed).choice(n, min(k, n), replace=False),
    )
    to_starts = graph[:, starts]
    expected = np.where(to_starts.min(1) < 1, to_starts.argmin(1), -1)  # argmin: the first among equals
    np.testing.assert_array_equal(nearest_start(hdc.as_graph(graph, n), starts), expected)


@settings(max_examples=200)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40), k=st.integers(1, 10), levels=st.integers(1, 5))
def test_assignment_with_ties_is_the_dense_definition(seed, n, k, levels):
    """Representative: the member of largest h, the first among equals; label: the cluster of smallest H,
    ties to the lowest; -1 where all are at the ceiling."""
    rng, graph = np.random.default_rng(seed), tied_graph(seed, n, levels)
    labels, m = (
        rng.integers(0, min(k, n), n).astype(np.int32),
        rng.choice(np.float32([0.01, 0.1, 0.25, 0.5, 1]), n),
    )
    a = np.where(graph < 1, 1 - np.exp(-graph), hdc.CEILING).astype(np.float32)
    h = a * m / np.maximum(a + m, np.finfo(np.float32).tiny)
    members = [np.flatnonzero(labels == j) for j in range(k)]
    H = np.stack(
        [a[np.arange(n), own[h[:, own].argmax(1)]] if len(own) else np.full(n, np.inf) for own in members], 1
    )
    order, start = hdc.members_by_cluster(labels, m, k)
    sparse = hdc.discrepancies(hdc.as_graph(graph, n))
    nearest, smallest, total = hdc.kernels.assign(
        sparse.indptr, sparse.indices, sparse.data, labels, m, order, start, hdc.CEILING
    )
    np.testing.assert_array_equal(smallest, H.min(1))
    np.testing.assert_array_equal(nearest, np.where(H.min(1) < hdc.CEILING, H.argmin(1), -1))


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 40),
    share=st.floats(0, 1),
    levels=st.integers(1, 5),
    init=st.sampled_from(['k-means++', 'k-means++-x', 'random']),
    metric=st.sampled_from(sorted(METRICS)),
    ceiling=st.sampled_from(['first', 'outlier']),
)
def test_whatever_comes_in_a_partition_comes_out(seed, n, share, levels, init, metric, ceiling):
    """Copies, ties, any K up to N: no cluster is empty, a cluster keeps a member, confidence is a share,
    centroids are the means of the members that count."""
    rng = np.random.default_rng(seed)
    k, x = 1 + int(share * (n - 1)), exact_points(seed, n)[rng.integers(0, n, n)]
    fit = HDC(k, init=init, metric=metric, ceiling=ceiling, random_state=seed, max_iter=12).fit(
        x, graph=tied_graph(seed, n, levels)
    )
    inside = fit.labels_ >= 0
    assert (
        set(fit.labels_[inside]) == set(range(k))
        and (fit.assignments_ >= 0).all()
        and (fit.assignments_[inside] == fit.labels_[inside]).all()
    )
    assert (
        len(set(fit.init_indices_)) == k
        and 1 <= fit.n_iter_ <= 12
        and 0 <= fit.confidence_.min() <= fit.confidence_.max() <= 1
    )
    np.testing.assert_allclose(
        fit.cluster_centers_, [x[fit.labels_ == j].mean(0) for j in range(k)], atol=1e-6
    )


# the largest distance, from bounds


def moving_centroids(rng, c, rounds):
    "Centroids as rounds move them: some stand still, some go back, some jump, the others move a little."
    before = c
    for _ in range(rounds):
        yield c
        kind = rng.integers(0, 5, len(c))[:, None]
        step = rng.normal(size=c.shape) * 10.0 ** rng.integers(-6, 0, (len(c), 1))
        jump = rng.normal(size=c.shape)
        before, c = (
            c,
            np.select([kind < 2, kind == 2, kind == 3], [c, before, c + step], jump).astype(np.float32),
        )


def all_pairs(distances, f):
    "(N, K) distances by differences of lifted coordinates."
    n, k = len(distances.x), len(f)
    return distances.of_pairs(f, np.repeat(np.arange(n), k), np.tile(np.arange(k), n)).reshape(n, k)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    k=st.integers(1, 30),
    d=st.integers(1, 24),
    scale=st.sampled_from([0.05, 0.3, 2.0]),
    metric=st.sampled_from(['euler_cosine', 'euclidean']),
)
def test_bounds_hold_and_the_largest_distance_is_exact_to_the_bit(seed, n, k, d, scale, metric):
    rng = np.random.default_rng(seed)
    x, c = (scale * rng.normal(size=(m, d)).astype(np.float32) for m in (n, k))
    distances = CentroidDistances(x, metric, block=16)
    for moved in moving_centroids(rng, c / scale, 10):
        f = distances.lift(scale * moved)
        largest, of_columns = distances.largest(f), all_pairs(distances, f).max(0)
        assert largest == of_columns.max()
        norms, sums, _ = distances.known.at(f)
        e, exact_f = (z.astype(np.complex128) for z in (distances.lifted, f))
        assert ((abs(e[:, None] - exact_f) ** 2).sum(-1).max(0) <= norms).all()
        assert (distances.undo(of_columns) <= sums).all()


@pytest.mark.parametrize('metric', ['euler_cosine', 'euclidean'])
def test_settled_centroids_are_not_multiplied(metric):
    "What is multiplied: all at first, then only centroids that move, and none that go back and forth."
    rng = np.random.default_rng(0)
    x, c = (0.1 * rng.normal(size=(n, 32)).astype(np.float32) for n in (2000, 200))
    there, distances, columns = c.copy(), CentroidDistances(x, metric), []
    there[:20] += 0.1 * rng.normal(size=(20, 32)).astype(np.float32)
    for moved in (c, c, there, c, there, c, there):
        before = distances.n_products
        distances.largest(distances.lift(moved))
        columns.append((distances.n_products - before) / len(x))
    assert columns[0] == 200 and columns[1] == 0 and 0 < columns[2] <= 20
    assert columns[3:] == [0, 0, 0, 0]
    assert distances.n_pairs < 7 * 2000 * 200 / 100


def test_settled_centroids_get_exact_bounds_once():
    "The farthest pair comes nearer: all columns may now be the farthest. Two products settle it for good."
    rng = np.random.default_rng(0)
    x, c = (0.1 * rng.normal(size=(n, 32)).astype(np.float32) for n in (2000, 200))
    distances, columns = CentroidDistances(x, 'euler_cosine'), []
    for share in (1, 0.5, 0.4, 0.3, 0.2, 0.1):
        c[7] = share * np.float32(0.25)
        before = distances.n_products
        assert distances.largest(distances.lift(c)) == all_pairs(distances, distances.lift(c)).max()
        columns.append((distances.n_products - before) / len(x))
    assert columns[0] >= 200 and columns[2] > 200  # some twice
    assert max(columns[3:]) <= 1  # the one that moves


def test_a_loose_bound_leaves_too_many_pairs():
    """Coordinates over whole periods of the Euler cosine: ||e - f||^2 says little. The exact way of such
    tiles finds the same number from few pairs."""
    rng = np.random.default_rng(0)
    x, c = (rng.normal(size=(n, 6)).astype(np.float32) for n in (3000, 150))
    distances = CentroidDistances(x, 'euler_cosine')
    f = distances.lift(c)
    of_columns = all_pairs(distances, f).max(0)
    with mock.patch.object(distances, 'factors', wraps=distances.factors) as factors:
        assert distances.largest(f) == of_columns.max()
    assert factors.call_count > 2  # more than the tiles of the round
    norms, sums, _ = distances.known.at(f)
    assert (of_columns <= sums).all() and sums.max() < norms.min()
    assert distances.n_pairs < 3000 * 150 / 10


def test_copies_of_one_image_and_centroid():
    "Every pair is the farthest: no more is computed than where one is, and the result is the same."
    rng = np.random.default_rng(0)
    x, c = (np.tile(rng.normal(size=32).astype(np.float32), (n, 1)) for n in (3000, 300))
    for metric in ('euler_cosine', 'euclidean'):
        distances = CentroidDistances(x, metric)
        for _ in range(3):
            f = distances.lift(c)
            assert distances.largest(f) == distances.of_pairs(f, np.array([0]), np.array([0]))[0]
        assert distances.n_pairs < 3 * 3000 * 300 / 100


@pytest.mark.parametrize('metric', METRICS)
def test_shares_of_the_samples_find_the_common_maximum(metric):
    "Three processes, here threads, one of them without samples: memberships as of one process, to the bit."
    rng = np.random.default_rng(0)
    x, c = (0.2 * rng.normal(size=(n, 16)).astype(np.float32) for n in (500, 60))
    shares, labels = (slice(0, 200), slice(200, 200), slice(200, 500)), rng.integers(0, 60, 500)
    rounds = list(moving_centroids(rng, c, 6))
    values, barrier = [0.0] * 3, threading.Barrier(3, timeout=60)

    def process(i):
        n_calls = 0

        def agree(value):
            nonlocal n_calls
            n_calls += 1
            values[i] = float(value)
            barrier.wait()
            largest = max(values)
            barrier.wait()
            return largest

        distances = CentroidDistances(x[shares[i]], metric, agree=agree)
        return [distances.membership(moved, labels[shares[i]]) for moved in rounds], n_calls

    with ThreadPoolExecutor(3) as pool:
        memberships, n_calls = zip(*pool.map(process, range(3)))
    assert n_calls == ((0,) * 3 if metric == 'cosine' else (2 * len(rounds),) * 3)
    one = CentroidDistances(x, metric)
    for moved, *parts in zip(rounds, *memberships):
        together = np.concatenate(parts)
        assert together.dtype == np.float32
        np.testing.assert_array_equal(together, one.membership(moved, labels))
