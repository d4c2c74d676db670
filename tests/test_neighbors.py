"Neighbours and the Jaccard graph: golden values both ways, FAISS = torch, copies, threads, index types."

import sys

import numpy as np
import pytest
from conftest import golden
from hypothesis import assume, given, strategies as st
from scipy.sparse import csr_array

from ccc import neighbors
from ccc.neighbors import jaccard_distance, jaccard_from_weights, k_reciprocal, knn, to_dense


@pytest.mark.parametrize('k1, k2', [(30, 6), (20, 6), (20, 1)])
def test_golden_jaccard(k1, k2, both_ways):
    both_ways(neighbors, '_neighbors_kernels')
    g = golden('jaccard')
    graph = jaccard_distance(g['features'], k1, k2)
    np.testing.assert_allclose(to_dense(graph), g[f'jaccard_k1_{k1}_k2_{k2}'], atol=1e-5)
    assert graph.data.max() < 1 and graph.indices.dtype == graph.indptr.dtype == np.int32


def test_number_of_threads_changes_nothing():
    x = golden('jaccard')['features']
    one, many = jaccard_distance(x, n_threads=1), jaccard_distance(x, n_threads=5)
    for a, b in [(one.indptr, many.indptr), (one.indices, many.indices), (one.data, many.data)]:
        np.testing.assert_array_equal(a, b)


def test_kernels_take_64_bit_offsets():
    x = golden('jaccard')['features']
    V = k_reciprocal(x, knn(x, 31)[1])
    narrow = jaccard_from_weights(V)
    wide = csr_array(V.shape, dtype=np.float32)
    wide.data, wide.indices, wide.indptr = V.data, V.indices.astype(np.int64), V.indptr.astype(np.int64)
    np.testing.assert_array_equal(to_dense(jaccard_from_weights(wide)), to_dense(narrow))


def test_without_faiss_torch_finds_the_same(monkeypatch):
    x = golden('jaccard')['features']
    distances, indices = knn(x, 31)
    monkeypatch.setitem(sys.modules, 'faiss', None)  # `import faiss` now fails
    torch_distances, torch_indices = knn(x, 31)
    np.testing.assert_allclose(torch_distances, distances, atol=1e-5)
    np.testing.assert_array_equal(torch_indices, indices)


def test_copies_do_not_push_a_sample_out_of_its_own_list():
    x = np.repeat(np.eye(3, dtype=np.float32), 20, axis=0)
    distances, indices = knn(x, 5)
    np.testing.assert_array_equal(indices[:, 0], np.arange(60))
    np.testing.assert_array_equal(distances, 0)
    assert all(len(set(row)) == 5 for row in indices)
    blocks = to_dense(jaccard_distance(x, k1=19, k2=6))
    assert (blocks[:20, 20:] == 1).all()


@pytest.mark.parametrize(
    'call, rule',
    [
        (lambda x: knn(x, 0), 'k counts the sample itself'),
        (lambda x: knn(x[:, 0], 1), r'\(N, D\)'),
        (lambda x: knn(x * np.nan, 2), 'finite'),
        (lambda x: jaccard_distance(x, k1=len(x)), 'k1=500'),
        (lambda x: jaccard_distance(x, 5, 7), 'k2=7'),
    ],
)
def test_errors_name_the_rule(call, rule):
    with pytest.raises(ValueError, match=rule):
        call(golden('jaccard')['features'])


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
@pytest.mark.parametrize('k1, k2', [(30, 6), (20, 6), (20, 1)])
def test_golden_jaccard_on_tensors(k1, k2, device):
    torch = pytest.importorskip('torch')
    if device == 'cuda' and not torch.cuda.is_available():
        pytest.skip('no GPU that torch can see')
    from ccc import _neighbors_torch

    g = golden('jaccard')
    graph = _neighbors_torch.jaccard_distance(torch.from_numpy(g['features']).to(device), k1, k2)
    host = csr_array(
        tuple(neighbors.as_numpy(a) for a in (graph.data, graph.indices, graph.indptr)), shape=graph.shape
    )
    np.testing.assert_allclose(to_dense(host), g[f'jaccard_k1_{k1}_k2_{k2}'], atol=1e-5)
    if device == 'cuda':
        assert neighbors.jaccard_distance(torch.from_numpy(g['features']).cuda(), k1, k2).data.is_cuda


@pytest.mark.parametrize('limit', [0.3, 0.6])
def test_a_limit_keeps_exactly_the_pairs_under_it(limit, both_ways):
    both_ways(neighbors, '_neighbors_kernels')
    x = golden('jaccard')['features']
    whole, thin = to_dense(jaccard_distance(x)), jaccard_distance(x, limit=limit)
    np.testing.assert_array_equal(to_dense(thin), np.where(whole <= limit, whole, 1))


def test_blocks_of_rows_change_nothing():
    x = golden('jaccard')['features']
    V = k_reciprocal(x, knn(x, 31)[1])
    one, many = jaccard_from_weights(V), jaccard_from_weights(V, block=37)
    for name in ('indptr', 'indices', 'data'):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name))


def test_everybody_meets_everybody():
    "Rows of N pairs: the kernel's scratch must hold them all."
    x = golden('jaccard')['features'][:40]
    assert jaccard_distance(np.repeat(x, 2, axis=0) * 1e-3, 60, 40).nnz == 80**2


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    import psutil

    x = golden('jaccard')['features']
    V = k_reciprocal(x, knn(x, 31)[1])
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: type('m', (), {'available': 10_000})())
    with pytest.raises(MemoryError, match='500 samples.*stored pairs.*free'):
        jaccard_from_weights(V)
    with pytest.raises(MemoryError, match='nearest neighbours'):
        knn(x, 31)


@pytest.mark.parametrize('index', ['ivf', 'hnsw'])
def test_approximate_neighbours_report_their_recall(index, capsys):
    x = np.repeat(golden('jaccard')['features'], 8, axis=0) + 0.05 * np.random.default_rng(0).normal(
        size=(4000, golden('jaccard')['features'].shape[1])
    ).astype(np.float32)
    exact, approximate = knn(x, 11)[1], knn(x, 11, index)[1]
    printed = float(capsys.readouterr().out.split('%')[0].split(':')[1]) / 100
    measured = np.mean([len(set(a) & set(b)) / 11 for a, b in zip(exact, approximate)])
    assert abs(printed - measured) < 0.03 and measured > 0.8


# properties, on drawn examples


def points(seed, n, d=6):
    "Unit vectors with some structure: n points around a few directions."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(max(2, n // 6), d))[rng.integers(0, max(2, n // 6), n)] + 0.5 * rng.normal(
        size=(n, d)
    )
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def no_ties(x):
    "Whether no two distances from one point are so close that the order of adding could exchange them."
    d = np.sort(np.square(x[:, None].astype(float) - x[None]).sum(2), axis=1)
    return np.diff(d, axis=1).min() > 1e-6


@given(seed=st.integers(0, 10**6), n=st.integers(8, 40), k1=st.integers(1, 12), k2=st.integers(1, 6))
def test_the_order_of_samples_does_not_matter(seed, n, k1, k2):
    "A graph of permuted samples is the permuted graph; the order of adding may move a last bit."
    k1 = min(k1, n - 1)
    k2 = min(k2, k1 + 1)
    x, order = points(seed, n), np.random.default_rng(seed).permutation(n)
    assume(no_ties(x))
    graph, shuffled = jaccard_distance(x, k1, k2), jaccard_distance(x[order], k1, k2)
    assert graph.nnz == shuffled.nnz
    np.testing.assert_allclose(to_dense(shuffled), to_dense(graph)[np.ix_(order, order)], atol=1e-6)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(4, 30),
    copies=st.integers(1, 6),
    k1=st.integers(1, 20),
    k2=st.integers(1, 6),
)
def test_any_graph_is_symmetric_with_a_zero_diagonal(seed, n, copies, k1, k2):
    "With copies, too, where neighbours tie."
    x = points(seed, n)[np.random.default_rng(seed).integers(0, n, n + copies)]
    k1 = min(k1, len(x) - 1)
    graph = jaccard_distance(x, k1, min(k2, k1 + 1))
    dense = to_dense(graph)
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_allclose(np.diag(dense), 0, atol=1e-6)
    assert (
        0 <= graph.data.min()
        and graph.data.max() < 1
        and (graph.diagonal() >= 0).all()
        and graph.nnz >= len(x)
    )


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(12, 30),
    setting=st.sampled_from([(1, 1), (1, 2), (5, 1), (5, 3), (9, 4)]),
)
def test_every_image_stored_three_times_changes_nothing(seed, n, setting):
    """Three times the images and three times the list lengths: copies are at distance 0, and all others as far apart as before.
    Lists must not cut through the copies of an image: 3 (k1 + 1) and 3 (half + 1) are again of the form k1' + 1 and half' + 1 for these k1.
    """
    k1, k2 = setting
    x = points(seed, n)
    assume(no_ties(x))
    once, thrice = (
        to_dense(jaccard_distance(x, k1, k2)),
        to_dense(jaccard_distance(np.repeat(x, 3, axis=0), 3 * k1 + 2, 3 * k2)),
    )
    np.testing.assert_allclose(thrice, np.kron(once, np.ones((3, 3))), atol=2e-6)
    assert np.diag(thrice, 1)[::3].max() < 2e-6


@given(seed=st.integers(0, 10**6), n=st.integers(3, 40), repeats=st.integers(1, 5), k=st.integers(1, 12))
def test_neighbours_are_the_nearest_whatever_ties_there_are(seed, n, repeats, k):
    """Coordinates on a coarse grid and copies: the distances are those of the slow search, each sample is
    its own first, nobody comes twice."""
    x = np.repeat(np.random.default_rng(seed).integers(-2, 3, (n, 3)).astype(np.float32) / 4, repeats, axis=0)
    k = min(k, len(x))
    distances, indices = knn(x, k)
    slow = np.square(x[:, None] - x[None]).sum(2)
    np.testing.assert_allclose(distances, np.sort(slow, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(slow, indices, 1), distances, atol=1e-6)
    np.testing.assert_array_equal(indices[:, 0], np.arange(len(x)))
    assert all(len(set(row)) == k for row in indices)


def test_the_search_does_not_depend_on_the_number_of_threads():
    "With 256 coordinates the product of two threads had other last bits than that of one."
    faiss = pytest.importorskip('faiss')
    x = np.random.default_rng(0).normal(size=(3000, 256)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    before, results = faiss.omp_get_max_threads(), []
    try:
        for n in (1, 2, 3):
            faiss.omp_set_num_threads(n)
            results.append(knn(x, 31))
    finally:
        faiss.omp_set_num_threads(before)
    for distances, ids in results[1:]:
        np.testing.assert_array_equal(ids, results[0][1])
        np.testing.assert_array_equal(distances, results[0][0])
