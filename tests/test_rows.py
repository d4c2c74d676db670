"""Rows shared out among processes: labels of 1, 2 and 4 real processes are the same bits. Run as a script by
`torchrun`, it is one of them."""

import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from conftest import golden
from hypothesis import given, settings, strategies as st
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from ccc import labels, rows as sharing
from ccc.data import toy_embeddings
from ccc.hdc import HDC
from ccc.labels import make_labels
from ccc.neighbors import jaccard_distance, jaccard_rows
from ccc.rows import Processes, TorchProcesses, allocate_rows, run_in_threads

CASES = ['jaccard_eulercosine', 'jaccard_cosine', 'jaccard_euclidean', 'jaccard_eulercosine_normalized']
OPTIONS = {
    'jaccard_cosine': dict(metric='cosine'),
    'jaccard_euclidean': dict(metric='euclidean'),
    'jaccard_eulercosine_normalized': dict(normalize_centroids=True),
}


def embeddings():
    "1,000 made embeddings, some of them copies."
    x = toy_embeddings(n_ids=50, per_camera=5, dim=48, seed=4)[0]
    return np.concatenate([x[:990], x[:10]])


def everything(processes):
    "Arrays by name: the golden cases of HDC and each label maker, by these processes."
    g = golden('hdc')
    results = {}
    for name in CASES:
        # rows of the graph of the published system, shared out
        graph = shared_out(g['jaccard'], processes)
        fit = HDC(len(g[f'{name}__init_indices']), init=g[f'{name}__init_indices'], **OPTIONS.get(name, {}))
        fit.fit(g['features'], graph=graph)
        for attribute in ('assignments_', 'labels_', 'confidence_', 'cluster_centers_', 'shift_'):
            results[f'{name}.{attribute}'] = np.asarray(getattr(fit, attribute))
    x = embeddings()
    makers = {
        'hdc': dict(n_clusters=55),
        'random': dict(n_clusters=55, hdc_options=dict(init='random')),
        'k-means++-x': dict(n_clusters=55, hdc_options=dict(init='k-means++-x')),
        # more clusters than there are people: many are empty in passing
        'many': dict(n_clusters=250, own_centroids=False),
        'dbscan': dict(eps=0.5),
        'kmeans': dict(n_clusters=55),
        'dense': dict(n_clusters=55, jaccard=False),
    }
    for name, options in makers.items():
        method = name if name in ('dbscan', 'kmeans') else 'hdc'
        # these two are made by the first process alone, and add in another order with more threads
        with threadpool_limits(1 if name in ('kmeans', 'dense') else None):
            made = make_labels(x, method, random_state=3, processes=processes, **options)
        for attribute in ('labels', 'confidence', 'centroids'):
            results[f'{name}.{attribute}'] = getattr(made, attribute)
    return results


def shared_out(dense, processes):
    "This process's rows of a dense graph."
    lo, hi = processes.share(len(dense))
    mine = dense[lo:hi]
    stored = mine < 1
    indptr = np.r_[0, np.count_nonzero(stored, axis=1).cumsum()].astype(np.int32)
    block = sharing.Block(lo, indptr, np.nonzero(stored)[1].astype(np.int32), mine[stored].astype(np.float32))
    return sharing.GraphRows([block], dense.shape, processes)


def assert_equal(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(results[name], value, err_msg=name)


@pytest.fixture(scope='module')
def expected():
    "What one process makes."
    return everything(Processes())


def test_one_process_is_golden(expected):
    g = golden('hdc')
    for name in CASES:
        np.testing.assert_array_equal(expected[f'{name}.assignments_'], g[f'{name}__labels'])


@pytest.mark.parametrize('count', [2, 4])
def test_processes_are_one(count, expected, tmp_path):
    "Real processes of `torch.distributed`; each writes what it made, and all of it is what one makes."
    command = f'-m torch.distributed.run --standalone --nproc_per_node {count} {__file__} {tmp_path}'
    env = os.environ | dict(OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, *command.split()], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(count):
        assert_equal(dict(np.load(tmp_path / f'{rank}.npz')), expected)


def test_without_a_seed_processes_agree():
    "Each process has a random generator of its own; the first one's counts."
    x = embeddings()
    for init in ('k-means++', 'k-means++-x', 'random'):
        options = dict(n_clusters=50, hdc_options=dict(init=init))
        made = run_in_threads(3, lambda p: make_labels(x, 'hdc', processes=p, **options))  # noqa: B023
        for other in made[1:]:
            np.testing.assert_array_equal(other.labels, made[0].labels)


def test_a_generator_goes_on():
    "Two fits with one generator have different starts, as in one process."
    x = embeddings()

    def twice(processes):
        random = np.random.RandomState(processes.rank)
        graph = jaccard_rows(x, processes=processes)
        return [HDC(30, max_iter=1, random_state=random).fit(x, graph=graph).init_indices_ for _ in range(2)]

    expected = twice(Processes())
    for starts in run_in_threads(3, twice):
        np.testing.assert_array_equal(starts, expected)
    assert not np.array_equal(*expected)


def test_processes_that_do_not_fit_together_are_refused():
    x = embeddings()
    with pytest.raises(RuntimeError, match='same labels'):
        run_in_threads(2, lambda p: labels._check_agreement(np.arange(9) + p.rank, p))
    with pytest.raises(ValueError, match='n_clusters must not exceed'):  # raised by the first, for all
        run_in_threads(2, lambda p: make_labels(x, 'kmeans', n_clusters=5000, processes=p))
    alone = make_labels(x, 'kmeans', n_clusters=50, random_state=0)
    on_graph = dict(n_clusters=50, random_state=0)  # k-means needs none; the first process runs it for all
    for made in run_in_threads(
        2, lambda p: make_labels(x, 'kmeans', graph=jaccard_rows(x, processes=p), **on_graph)
    ):
        np.testing.assert_array_equal(made.labels, alone.labels)
    with pytest.raises(ValueError, match='those that share the graph, 1 of them; got 2'):
        run_in_threads(2, lambda p: make_labels(x, 'hdc', n_clusters=9, graph=jaccard_rows(x), processes=p))


def test_ties_beyond_the_reservoir():
    "From 100 neighbours on FAISS leaves ties open: they are searched again, block by block."
    from ccc.neighbors import nearest

    x = np.random.default_rng(0).integers(0, 3, (600, 4)).astype(np.float32)
    x = np.unique(np.concatenate([x, x + 0.5, -x]), axis=0)
    whole = nearest(x, 101, 'exact')

    def part(processes):
        return nearest(x, 101, 'exact', processes.share(len(x)))

    for count in (2, 3):
        for a, b in zip(whole, map(np.concatenate, zip(*run_in_threads(count, part)))):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 400), st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1.0, 0.6]), st.booleans()
)
def test_any_rows_of_any_graph(n, count, seed, limit, in_files):
    "More processes than rows, copies, a graph in files: the rows are those of the whole graph."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)).astype(np.float32)[rng.integers(0, n, n)]
    k1, k2 = min(8, n - 1), min(3, n)
    whole = jaccard_distance(x, k1, k2, limit=limit)
    memory = 0 if in_files else None
    made = run_in_threads(count, lambda p: jaccard_rows(x, k1, k2, limit=limit, processes=p, memory=memory))
    blocks = [block for graph in made for block in graph.blocks]
    np.testing.assert_array_equal(np.concatenate([np.diff(b.indptr) for b in blocks]), np.diff(whole.indptr))
    np.testing.assert_array_equal(np.concatenate([b.indices for b in blocks]), whole.indices)
    np.testing.assert_array_equal(np.concatenate([b.data for b in blocks]), whole.data)


def test_a_graph_in_files_gives_the_same_labels(monkeypatch, tmp_path):
    "Many small blocks in two files without a name."
    x = embeddings()
    inside = make_labels(x, 'hdc', n_clusters=55, random_state=0, processes=Processes())
    monkeypatch.setattr(sharing, '_PAIRS_IN_A_BLOCK', 2000)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    graph = jaccard_rows(x, memory=0)
    assert len(graph.blocks) > 20 and graph.on_disk and isinstance(graph.blocks[0].data, np.memmap)
    assert os.name != 'posix' or not list(tmp_path.iterdir())
    outside = make_labels(x, 'hdc', n_clusters=55, random_state=0, graph=graph)
    np.testing.assert_array_equal(outside.labels, inside.labels)
    np.testing.assert_array_equal(outside.confidence, inside.confidence)
    np.testing.assert_array_equal(outside.centroids, inside.centroids)
    density = make_labels(x, 'dbscan', eps=0.5, graph=graph)
    np.testing.assert_array_equal(density.labels, make_labels(x, 'dbscan', eps=0.5).labels)


def test_one_process_in_memory_and_one_in_files():
    "Free memory is not the same for all; empty clusters need rows of each other."
    x, options = embeddings(), dict(n_clusters=250, random_state=3)
    alone = make_labels(x, 'hdc', **options)

    def mixed(processes):
        graph = jaccard_rows(x, processes=processes, memory=0 if processes.rank else None)
        return make_labels(x, 'hdc', graph=graph, **options), graph.on_disk

    for (made, on_disk), expected in zip(run_in_threads(2, mixed), (False, True)):
        assert on_disk == expected
        np.testing.assert_array_equal(made.labels, alone.labels)
        np.testing.assert_array_equal(made.confidence, alone.confidence)


def test_a_full_disk_is_named(monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    with pytest.raises(MemoryError, match='No space left on device.*TMPDIR'):
        allocate_rows(np.array([0, 10**6]), memory=0)


def test_rows_that_cut_a_block_are_refused():
    from ccc.neighbors import nearest

    with pytest.raises(ValueError, match='begin and end where blocks do'):
        nearest(embeddings(), 5, 'exact', (0, 7))


def test_a_sparse_matrix_with_empty_rows_is_turned():
    matrix = csr_array((np.ones(2, np.float32), ([3, 90], [99, 0])), shape=(100, 100))

    def turned(processes):
        lo, hi = processes.share(100)
        return sharing.transpose(matrix[lo:hi], processes).toarray()

    for count in (1, 3, 5):
        np.testing.assert_array_equal(np.concatenate(run_in_threads(count, turned)), matrix.toarray().T)


if __name__ == '__main__':  # started by a test above, once for each process
    import torch.distributed as dist

    dist.init_process_group('gloo')
    group = TorchProcesses()
    np.savez(f'{sys.argv[1]}/{group.rank}.npz', **everything(group))
    dist.destroy_process_group()
