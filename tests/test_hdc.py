"HDC: golden runs round by round, both ways; the start, empty clusters, copies, ties, K near N."
import numpy as np
import pytest
from conftest import golden
from sklearn.utils.estimator_checks import parametrize_with_checks

from ccc import hdc
from ccc.hdc import HDC, METRICS, CentroidDistances, hdc_rounds, nearest_start, pairwise_distance
from ccc.neighbors import jaccard_distance

CASES = {'jaccard_eulercosine': {}, 'jaccard_cosine': dict(metric='cosine'), 'jaccard_euclidean': dict(metric='euclidean'),
         'jaccard_eulercosine_fixed_threshold': dict(threshold=0.5), 'jaccard_eulercosine_normalized': dict(normalize_centroids=True),
         'nojaccard_eulercosine': {}, 'relocation': {}, 'ties': {}}


def golden_case(name):
    "The inputs and outputs of one golden run, keys without the case's name."
    arrays = golden('hdc_hard' if name in ('relocation', 'ties') else 'hdc')
    case = {k.removeprefix(name + '__'): v for k, v in arrays.items() if k.startswith(name + '__')}
    return {'features': arrays.get('features'), 'jaccard': arrays.get('jaccard')} | case


def graph_of(name, g):
    return pairwise_distance(g['features'], g['features'], normalize=True) if name.startswith('nojaccard') else g['jaccard']


@pytest.mark.parametrize('metric', METRICS)
def test_golden_distances(metric):
    g = golden('distances')
    np.testing.assert_allclose(pairwise_distance(g['x'], g['y'], metric, normalize=True), g[metric], atol=1e-5)
    np.testing.assert_allclose(pairwise_distance(g['x'], g['y'], metric), g[metric + '_raw'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_golden_rounds(name, both_ways):
    both_ways(hdc, '_hdc_kernels')
    g = golden_case(name)
    rounds = hdc_rounds(g['features'], graph_of(name, g), g['init_indices'], **CASES[name])
    for labels, kept, shift, r in zip(g['labels_trace'], g['pod_trace'], g['shift'], rounds):
        np.testing.assert_array_equal(r.labels, labels)
        np.testing.assert_array_equal(np.where(r.peripheral, -1, r.labels), kept)
        assert abs(r.shift - shift) < 1e-5
    np.testing.assert_allclose(r.centroids, g['centroids'], atol=1e-5)


@pytest.mark.parametrize('name', CASES)
def test_golden_fit(name):
    g = golden_case(name)
    fit = HDC(len(g['init_indices']), init=g['init_indices'], **CASES[name]).fit(g['features'], graph=graph_of(name, g))
    assert fit.n_iter_ == g['n_iter']
    np.testing.assert_array_equal(fit.labels_, g['labels_with_outliers'])
    np.testing.assert_array_equal(fit.assignments_, g['labels'])
    np.testing.assert_allclose(fit.cluster_centers_, g['centroids'], atol=1e-5)


@pytest.fixture(params=['cpu', 'cuda'])
def device(request):
    torch = pytest.importorskip('torch')
    if request.param == 'cuda' and not torch.cuda.is_available(): pytest.skip('no GPU that torch can see')
    return request.param


@pytest.mark.parametrize('name', [n for n in CASES if not n.startswith('nojaccard')])
def test_golden_rounds_on_tensors(name, device):
    "The torch parts, on a CPU where there is no GPU: the same rounds."
    import torch
    from ccc._neighbors_torch import DeviceGraph
    g = golden_case(name)
    sparse, x = hdc.as_graph(g['jaccard'], len(g['features'])), torch.from_numpy(g['features']).to(device)
    graph = DeviceGraph(*(torch.from_numpy(part).to(device) for part in (sparse.indptr.astype(np.int64), sparse.indices, sparse.data)), sparse.shape)
    for labels, kept, shift, r in zip(g['labels_trace'], g['pod_trace'], g['shift'], hdc_rounds(x, graph, g['init_indices'], **CASES[name])):
        np.testing.assert_array_equal(r.labels, labels)
        np.testing.assert_array_equal(np.where(r.peripheral, -1, r.labels), kept)
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
    membership = CentroidDistances(g['features'], 'euler_cosine').membership(g['features'][g['init_indices']], labels)
    np.testing.assert_allclose(membership, arrays['first_iter__membership'][np.arange(len(labels)), labels], atol=1e-5)
    H = arrays['first_iter__discrepancy']
    nearest, smallest, total, discrepancy_to = hdc._nearest_cluster(hdc.kernels.assign, hdc.discrepancies(graph), labels, membership, len(g['init_indices']))
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
    "Starts 0 and 1 are copies: both first labels go to cluster 0, cluster 1 is empty, and sample 0 stands in for it."
    x = golden_case('relocation')['features'].copy()
    x[1] = x[0]
    for fit in (HDC(20, init=np.arange(20)).fit(x), HDC(20, init=np.arange(20), max_iter=1).fit(x)):
        assert np.bincount(fit.assignments_, minlength=20).min() >= 1


def test_samples_without_a_neighbour_in_any_cluster():
    x = np.repeat(np.eye(6, dtype=np.float32), 10, axis=0)      # six groups that share nothing, three starts
    first = HDC(3, init=[0, 10, 20], k1=5, k2=1).fit(x)
    apart = HDC(3, init=[0, 10, 20], k1=5, k2=1, ceiling='outlier').fit(x)
    assert min(first.n_ceiling_, apart.n_ceiling_) >= 30
    assert (first.assignments_[30:] == 0).all() and (apart.labels_[30:] == -1).all() and (apart.assignments_ >= 0).all()


def test_largest_distance_is_exact_while_columns_are_skipped():
    rng = np.random.default_rng(0)
    x, c = (rng.normal(size=(n, 16)).astype(np.float32) for n in (300, 200))
    for metric in METRICS:
        distances = CentroidDistances(x, metric, block=64)
        for step in (1, .1, 1e-3, 1e-4, 0):
            c = c + step * rng.normal(size=c.shape).astype(np.float32) * (np.arange(200) < 100)[:, None]
            expected = 2 if metric == 'cosine' else pairwise_distance(x, c, metric).max()
            assert abs(distances.largest(distances.lift(c)) - expected) < 1e-4 * expected
        if metric == 'euclidean': assert distances.n_columns < 5 * 200 and distances.n_pairs < 300 * 200 / 10   # Euler's bound is loose where coordinates are not small


def test_permuting_samples_permutes_labels():
    g = golden_case('jaccard_eulercosine')
    x, order = g['features'], np.random.default_rng(1).permutation(len(g['features']))
    graph = jaccard_distance(x)
    plain = HDC(25, init=g['init_indices'], max_iter=5).fit(x, graph=graph)
    shuffled = HDC(25, init=np.argsort(order)[g['init_indices']], max_iter=5).fit(x[order], graph=jaccard_distance(x[order]))
    assert (plain.labels_[order] == shuffled.labels_).mean() > .99
