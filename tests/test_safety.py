"""No input makes a kernel read or write beyond its buffers: any legal form of the same numbers gives the same result, any other is a ValueError of one line.
`tests/checked.sh` runs this file, too, on kernels with bounds checks and under AddressSanitizer."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings, strategies as st

from ccc import _evaluation_kernels, _hdc_kernels, _neighbors_kernels
from ccc.data import toy_embeddings
from ccc.evaluation import evaluate_embeddings, rerank, rerank_features, squared_distances
from ccc.hdc import CEILING, HDC, hdc_rounds
from ccc.labels import build_graph, make_labels
from ccc.memory import ClusterMemory, camera_entropy
from ccc.neighbors import encode, jaccard_distance, jaccard_from_weights, k_reciprocal, knn, to_dense

ROOT = Path(__file__).parent.parent
X, PIDS, CAMIDS = toy_embeddings()
GRAPH = jaccard_distance(X, 10, 4)
REFERENCE = HDC(6, random_state=0).fit(X, graph=GRAPH)
# the last two: what Cython says to a word, or to 2**70, in place of an int
REFUSED = (ValueError, TypeError, OverflowError)


def read_only(a):
    "The same numbers in memory that cannot be written to."
    a = a.copy()
    a.flags.writeable = False
    return a


def frozen_csr(graph):
    return sp.csr_array(
        tuple(read_only(a) for a in (graph.data, graph.indices, graph.indptr)), shape=graph.shape
    )


def wide(graph):
    out = sp.csr_array(graph.shape, dtype=np.float32)
    out.data, out.indices, out.indptr = (
        graph.data,
        graph.indices.astype(np.int64),
        graph.indptr.astype(np.int64),
    )
    return out


def in_parts(graph, times):
    "Every pair stored several times, as parts that add up to it; the parts of a row in any order."
    rng = np.random.default_rng(times)
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    order = np.lexsort((rng.random(len(rows) * times), np.tile(rows, times)))
    data, columns = (
        np.tile(graph.data / np.float32(times), times)[order],
        np.tile(graph.indices, times)[order],
    )
    return sp.csr_array((data, columns, graph.indptr * times), shape=graph.shape)


def mapped(graph, folder):
    parts = []
    for name, a in dict(data=graph.data, indices=graph.indices, indptr=graph.indptr).items():
        np.save(folder / f'{name}.npy', a)
        parts.append(np.load(folder / f'{name}.npy', mmap_mode='r'))
    return sp.csr_array(tuple(parts), shape=graph.shape)


def stale_flags(graph):
    "A matrix that claims to be canonical, and is not."
    out = in_parts(graph, 2)
    out.has_canonical_format = out.has_sorted_indices = True
    return out


FORMS = {
    'halves': lambda g: in_parts(g, 2),
    'fifty parts': lambda g: in_parts(g, 50),
    'claims': stale_flags,
    'sorted': lambda g: g.sorted_indices(),
    'coo': sp.coo_array,
    'coo matrix': sp.coo_matrix,
    'csc': sp.csc_array,
    'csr matrix': sp.csr_matrix,
    'lil': sp.lil_array,
    'dok': sp.dok_array,
    'bsr of 1': lambda g: sp.bsr_array(g, blocksize=(1, 1)),
    '64 bits': wide,
    'read-only': frozen_csr,
    'float64': lambda g: g.astype(np.float64),
    'other bytes': lambda g: sp.csr_array((g.data.astype('>f4'), g.indices, g.indptr), shape=g.shape),
    'dense': to_dense,
    'dense F': lambda g: np.asfortranarray(to_dense(g)),
    'dense float64': lambda g: to_dense(g).astype(float),
    'list': lambda g: to_dense(g).tolist(),
    'table': lambda g: pd.DataFrame(to_dense(g)),
    'dense tensor': lambda g: torch.tensor(to_dense(g), requires_grad=True),
    'strides': lambda g: np.repeat(np.repeat(to_dense(g), 2, 0), 2, 1)[::2, ::2],
}


@pytest.mark.parametrize('form', FORMS)
def test_a_graph_in_any_form_gives_the_same_labels(form):
    graph = FORMS[form](GRAPH.copy())
    before = (
        [a.copy() for a in (graph.data, graph.indices, graph.indptr)] if hasattr(graph, 'indptr') else None
    )
    fit = HDC(6, random_state=0).fit(X, graph=graph)
    for name in ('labels_', 'init_indices_', 'n_iter_'):
        np.testing.assert_array_equal(getattr(fit, name), getattr(REFERENCE, name))
    np.testing.assert_allclose(fit.confidence_, REFERENCE.confidence_, atol=1e-6)
    np.testing.assert_array_equal(
        make_labels(X, 'dbscan', graph=graph).labels, make_labels(X, 'dbscan', graph=GRAPH).labels
    )
    if before:
        [
            np.testing.assert_array_equal(a, b)
            for a, b in zip(before, (graph.data, graph.indices, graph.indptr))
        ]


def test_a_mapped_graph_and_a_graph_without_its_diagonal(tmp_path):
    np.testing.assert_array_equal(
        HDC(6, random_state=0).fit(X, graph=mapped(GRAPH, tmp_path)).labels_, REFERENCE.labels_
    )
    bare = GRAPH.tocoo()
    off = bare.row != bare.col
    bare = sp.csr_array((bare.data[off], (bare.row[off], bare.col[off])), shape=GRAPH.shape)
    starts = REFERENCE.init_indices_
    np.testing.assert_array_equal(
        HDC(6, init=starts).fit(X, graph=bare).labels_, HDC(6, init=starts).fit(X, graph=GRAPH).labels_
    )


@pytest.mark.parametrize(
    'form', [sp.dia_array, lambda g: sp.bsr_array(g, blocksize=(16, 16))], ids=['dia', 'bsr']
)
def test_formats_that_pad_with_zeros_say_so(form):
    "No pair is at distance 0 here: then nothing is lost."
    graph = GRAPH.copy()
    graph.data = np.maximum(graph.data, np.float32(1e-4))
    want = HDC(6, random_state=0).fit(X, graph=graph)
    with pytest.warns(UserWarning, match='taken for padding'):
        fit = HDC(6, random_state=0).fit(X, graph=form(graph))
    np.testing.assert_array_equal(fit.labels_, want.labels_)


def altered(**parts):
    "A CSR of GRAPH with some of its arrays exchanged, past SciPy's own checks."
    out = GRAPH.copy()
    for name, change in parts.items():
        a = getattr(out, name).copy()
        setattr(out, name, change(a))
    return out


def put(i, value):
    def change(a):
        a[i] = value
        return a

    return change


ILLEGAL = {
    'column -1': dict(indices=put(5, -1)),
    'column N': dict(indices=put(5, len(X))),
    'column 2**31 - 1': dict(indices=put(-1, 2**31 - 1)),
    'offsets fall': dict(indptr=put(3, 10**6)),
    'offsets begin late': dict(indptr=put(0, 4)),
    'offsets below 0': dict(indptr=put(1, -7)),
    'offsets end late': dict(indptr=put(-1, 10**6)),
    'few offsets': dict(indptr=lambda a: a[:-1]),
    'few columns': dict(indices=lambda a: a[:-3]),
    'few values': dict(data=lambda a: a[:-3]),
    'NaN': dict(data=put(7, np.nan)),
    'infinity': dict(data=put(7, np.inf)),
    'above 1': dict(data=put(7, 1.5)),
    'below 0': dict(data=put(7, -0.1)),
    'complex': dict(data=lambda a: a + 1j),
    'words': dict(data=lambda a: a.astype(object)),
}


@pytest.mark.parametrize('form', ILLEGAL)
def test_a_graph_that_is_none_is_refused(form):
    for call in (
        lambda: HDC(6, random_state=0).fit(X, graph=altered(**ILLEGAL[form])),
        lambda: make_labels(X, 'hdc', n_clusters=4, graph=altered(**ILLEGAL[form])),
        lambda: make_labels(X, 'dbscan', graph=altered(**ILLEGAL[form])),
        lambda: next(hdc_rounds(X, altered(**ILLEGAL[form]), np.arange(4))),
    ):
        with pytest.raises(ValueError) as e:
            call()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'graph',
    [
        GRAPH[:-1],
        GRAPH[:, :-1],
        np.ones(4),
        np.ones((2, 2)),
        [[1, 2], [3]],
        'graph',
        np.full(GRAPH.shape, np.nan),
        np.full(GRAPH.shape, 'a'),
        np.ma.masked_less(to_dense(GRAPH), 0.5),
        to_dense(GRAPH) + 1j,
        in_parts(GRAPH, 2) * 3,
    ],
)
def test_other_things_are_no_graph(graph):
    with pytest.raises(ValueError, match='graph'):
        HDC(6, random_state=0).fit(X, graph=graph)


# drawn matrices, sound and unsound, at the kernels themselves


@st.composite
def csr_arrays(draw, n=st.integers(1, 12)):
    "(offsets, columns, values, rows): often sound, often not."
    rows, rng = draw(n), np.random.default_rng(draw(st.integers(0, 10**6)))
    counts = rng.integers(0, draw(st.sampled_from([1, 4, 30])), rows)
    indptr = np.r_[0, counts.cumsum()]
    indices = rng.integers(0, rows, indptr[-1])
    data = rng.uniform(0.01, 0.6, len(indices)).astype(np.float32)
    fault = draw(st.sampled_from(['', '', '', 'column', 'offset', 'end', 'value', 'length']))
    if fault == 'column' and len(indices):
        indices[rng.integers(len(indices))] = rng.choice([-1, rows, -(2**31), 2**31 - 1])
    if fault == 'offset':
        indptr[rng.integers(len(indptr))] += rng.choice([-5, 1, 400])
    if fault == 'end':
        indptr[-1] += 50
    if fault == 'value' and len(data):
        data[rng.integers(len(data))] = rng.choice([0, -1, np.nan, np.inf, 1e-44, 3e38])
    if fault == 'length':
        indices = indices[: len(indices) // 2]
    return indptr.astype(np.int64), indices.astype(np.int32), data, rows


def survives(call):
    "Whatever the input: a result, or a refusal in one line."
    try:
        return call()
    except REFUSED as e:
        assert '\n' not in str(e)


@settings(max_examples=200)
@given(a=csr_arrays(), b=csr_arrays(), seed=st.integers(0, 10**6))
def test_no_matrix_harms_a_kernel(a, b, seed):
    (ip, ix, v, n), (cp, cx, cv, m), rng = a, b, np.random.default_rng(seed)
    ranked = rng.integers(
        rng.choice([0, 0, -1]), n + rng.choice([0, 0, 1]) or 1, (n, rng.integers(1, 9))
    ).astype(np.int32)
    x = rng.normal(size=(rng.choice([n, n, 1]), 3)).astype(np.float32)
    survives(lambda: _neighbors_kernels.reciprocal_sets(ranked, int(rng.integers(-1, 9)), 2))
    survives(lambda: _neighbors_kernels.set_distances(x, ip, ix, 2))
    survives(lambda: _neighbors_kernels.mean_of_nearest(ranked, ip, ix, v, int(rng.integers(0, 9)), 2))
    for limit in (1.0, 0.5, float('nan')):
        counts = np.zeros(n + 1, np.int64)
        survives(
            lambda: _neighbors_kernels.count_pairs(
                ip, ix, v, cp, cx, cv, 0, int(rng.choice([n, n + 1])), limit, counts
            )
        )
        offsets = counts.cumsum() if rng.integers(2) else np.sort(rng.integers(0, 40, n + 1))
        offsets[0] = 0
        size = max(int(offsets[-1]), 0)
        survives(
            lambda: _neighbors_kernels.fill_pairs(
                ip,
                ix,
                v,
                cp,
                cx,
                cv,
                0,
                n,
                limit,
                offsets,
                np.zeros(size, np.int64),
                np.zeros(size, np.float32),
            )
        )
    for index in (np.int32, np.int64):
        labels = rng.integers(-1, 3, n).astype(np.int32)
        order = np.argsort(labels, kind='stable')[np.count_nonzero(labels < 0) :].astype(np.int32)
        start = np.r_[0, np.bincount(labels[labels >= 0], minlength=3).cumsum()]
        if rng.integers(2):
            order = rng.permutation(order)
        survives(
            lambda: _hdc_kernels.assign(
                ip.astype(index),
                ix.astype(index),
                v,
                labels,
                rng.random(n).astype(np.float32),
                order,
                start,
                CEILING,
                2,
            )
        )
        survives(
            lambda: _hdc_kernels.stored_twice(ip.astype(index), ix.astype(index), int(rng.integers(1, 14)), 2)
        )
    out = np.zeros((n, rng.integers(1, 14)), np.float32)
    survives(lambda: _evaluation_kernels.blend_rows(ip, ix, v, cp, cx, cv, 0.3, out, 2))
    distmat = rng.random((n, m)).astype(np.float32)
    survives(
        lambda: _evaluation_kernels.rank_rows(
            distmat,
            rng.integers(0, m + rng.integers(2), m),
            rng.integers(-1, m, n),
            rng.integers(0, m + 2, n),
            rng.integers(0, 3, n),
            rng.integers(0, 3, m),
        )
    )


@settings(max_examples=150)
@given(a=csr_arrays(n=st.integers(6, 12)), seed=st.integers(0, 10**6))
def test_any_sparse_matrix_is_fitted_as_its_sum_or_refused(a, seed):
    ip, ix, v, n = a
    graph = sp.csr_array((n, n), dtype=np.float32)
    graph.data, graph.indices, graph.indptr = v, ix, ip.astype(np.int32)
    x = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    fit = survives(lambda: HDC(3, random_state=0, max_iter=5).fit(x, graph=graph))
    survives(lambda: make_labels(x, 'dbscan', graph=graph))
    survives(lambda: jaccard_from_weights(graph))
    if fit is None:
        return
    rows = np.repeat(np.arange(n), np.diff(ip))
    total, stored = np.zeros((n, n)), np.zeros((n, n), bool)
    np.add.at(total, (rows, ix), v.astype(float))
    stored[rows, ix] = True
    dense = np.where(stored, total, 1).astype(np.float32)
    assert dense.max() <= 1 and dense.min() >= 0
    np.testing.assert_array_equal(HDC(3, random_state=0, max_iter=5).fit(x, graph=dense).labels_, fit.labels_)


def test_a_kernel_notices_offsets_that_are_not_its_counts():
    V = k_reciprocal(X, knn(X, 11)[1])
    V.sort_indices()
    C = V.tocsc()
    parts = [a for W in (V, C) for a in (W.indptr.astype(np.int64), W.indices.astype(np.int32), W.data)]
    offsets = np.arange(len(X) + 1)
    with pytest.raises(ValueError, match='count_pairs counted'):
        _neighbors_kernels.fill_pairs(
            *parts, 0, len(X), 1.0, offsets, np.zeros(len(X), np.int64), np.zeros(len(X), np.float32)
        )


def test_kernels_without_a_gate_are_not_used(tmp_path):
    "A build from before there was one shadows the source that has one."
    script = (
        "import sys, types; import ccc; sys.modules['ccc._neighbors_kernels'] = ccc._neighbors_kernels ="
        " types.ModuleType('ccc._neighbors_kernels'); import ccc.neighbors"
    )
    run = subprocess.run(
        [sys.executable, '-c', script],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p)),
        capture_output=True,
        text=True,
    )
    assert run.returncode and 'build_ext --inplace' in run.stderr.splitlines()[-1]


# embeddings of any size, in any form


@pytest.mark.parametrize('power', [-120, -70, -30, 0, 30, 62, 66, 100, 120])
def test_neighbours_do_not_know_the_scale(power):
    """A power of two changes no digit: not the neighbours, not the ranking. Distances beyond float32 are
    infinite."""
    x = (
        X * np.float32(2.0) ** power
        if power < 0
        else X * np.float32(2 ** min(power, 60)) * np.float32(2 ** max(power - 60, 0))
    )
    distances, ids = knn(x, 7)
    np.testing.assert_array_equal(ids, knn(X, 7)[1])
    with np.errstate(over='ignore', under='ignore'):
        np.testing.assert_allclose(
            distances, np.ldexp(knn(X, 7)[0].astype(float), 2 * power).astype(np.float32), rtol=1e-6
        )
    assert np.isfinite(jaccard_distance(x, 10, 4).data).all()
    q = np.arange(len(x)) % 3 == 0
    ids = PIDS[q], PIDS[~q], CAMIDS[q], CAMIDS[~q]
    for kind in (np.asarray, torch.tensor):
        assert (
            evaluate_embeddings(kind(x[q]), kind(x[~q]), *ids).mAP
            == evaluate_embeddings(X[q], X[~q], *ids).mAP
        )
    np.testing.assert_allclose(rerank_features(x[:40], x[40:]), rerank_features(X[:40], X[40:]), atol=1e-6)


@pytest.mark.parametrize('scale', [1e19, 1e30, 3e37])
def test_labels_of_embeddings_whose_means_would_not_be_finite_are_refused(scale):
    huge = X / abs(X).max() * np.float32(scale)
    for method in ('hdc', 'dbscan', 'kmeans'):
        with pytest.raises(ValueError, match='norms up to'):
            make_labels(huge, method, n_clusters=4)
    with pytest.raises(ValueError, match='norms up to'):
        HDC(4).fit(huge)


def test_rows_that_squares_would_lose_are_fitted_all_the_same():
    fit = HDC(6, random_state=0).fit(X * np.float32(1e-25))
    assert len(set(fit.assignments_)) == 6 and np.isfinite(fit.confidence_).all()
    small, plain = (
        HDC(6, random_state=0, metric='cosine').fit(x).labels_ for x in (X * np.float32(2**-90), X)
    )
    assert (small == plain).mean() > 0.95


BAD_EMBEDDINGS = [
    np.full((9, 3), np.nan),
    np.full((9, 3), 1e300),
    np.ones((9, 3), complex),
    np.ones(9),
    np.ones((9, 0)),
    np.ones((3, 3, 3)),
    [['a', 'b']] * 9,
    [[1], [1, 2]],
    None,
    sp.eye_array(9).tocsr(),
    np.ma.masked_less(np.arange(27.0).reshape(9, 3), 3),
    torch.full((9, 3), float('inf')),
    np.full((9, 3), None),
]


@pytest.mark.parametrize('x', BAD_EMBEDDINGS, ids=range(len(BAD_EMBEDDINGS)))
@pytest.mark.parametrize(
    'call',
    [
        lambda x: knn(x, 2),
        lambda x: jaccard_distance(x, 2, 1),
        lambda x: make_labels(x, 'hdc', n_clusters=2),
        lambda x: make_labels(x, 'kmeans', n_clusters=2),
        lambda x: build_graph(x),
        lambda x: HDC(2).fit(x),
        lambda x: evaluate_embeddings(x, np.ones((9, 3)), [1] * 9, [1] * 9, [0] * 9, [1] * 9),
        lambda x: rerank_features(x, np.ones((9, 3)), 2, 1),
        lambda x: k_reciprocal(x, np.arange(9)[:, None], 1),
    ],
    ids=range(9),
)
def test_other_things_are_no_embeddings(x, call):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(REFUSED):
            call(x)


@pytest.mark.parametrize(
    'form',
    [
        np.asfortranarray,
        read_only,
        lambda x: x.astype(np.float64),
        lambda x: x.tolist(),
        pd.DataFrame,
        lambda x: torch.tensor(x, requires_grad=True),
        lambda x: np.repeat(x, 2, 1)[:, ::2],
        lambda x: x.astype('>f4'),
        lambda x: read_only(x)[::-1][::-1],
    ],
    ids=range(9),
)
def test_embeddings_in_any_form_give_the_same(form):
    np.testing.assert_array_equal(knn(form(X), 7)[1], knn(X, 7)[1])
    np.testing.assert_array_equal(jaccard_distance(form(X), 10, 4).data, GRAPH.data)
    np.testing.assert_array_equal(
        make_labels(form(X), 'hdc', n_clusters=6, random_state=0).labels,
        make_labels(X, 'hdc', n_clusters=6, random_state=0).labels,
    )
    np.testing.assert_array_equal(
        evaluate_embeddings(form(X), form(X), PIDS, PIDS, CAMIDS, CAMIDS).ap,
        evaluate_embeddings(X, X, PIDS, PIDS, CAMIDS, CAMIDS).ap,
    )


@pytest.mark.parametrize('index', ['ivf', 'hnsw'])
@pytest.mark.parametrize('k', [5, 61, 200])
def test_approximate_searches_are_complete(index, k, capsys):
    "Norms over orders of magnitude leave most of FAISS's lists nearly empty."
    rng = np.random.default_rng(k)
    x = (rng.normal(size=(900, 24)) * np.exp(2.5 * rng.normal(size=(900, 1)))).astype(np.float32)
    distances, ids = knn(x, k, index)
    assert (
        ids.min() >= 0
        and ids.max() < len(x)
        and np.isfinite(distances).all()
        and (np.diff(distances, axis=1) >= 0).all()
    )
    assert all(len(set(row)) == k for row in ids) and (ids[:, 0] == np.arange(len(x))).all()
    assert np.isfinite(jaccard_distance(x, k - 1, 4, index=index).data).all()


@pytest.mark.parametrize(
    'ranked',
    [
        [[0, 1]] * 2,
        [[0, -1], [1, 0]],
        [[0, 2], [1, 0]],
        [[0, 2**40], [1, 0]],
        [[0.0, 1], [1, 0]],
        [[0, 1], [1, np.nan]],
        [],
        [0, 1],
        [['a', 'b']] * 2,
    ],
)
def test_ranks_that_are_none_are_refused(ranked):
    for call in (
        lambda: k_reciprocal(np.eye(2), ranked, 1),
        lambda: encode(ranked, lambda p, i: np.zeros(len(i)), 1),
    ):
        with pytest.raises(ValueError, match='ranked'):
            call()


@pytest.mark.parametrize(
    'distances',
    [
        lambda p, i: np.full(len(i), np.nan),
        lambda p, i: np.full(len(i), -1e3),
        lambda p, i: np.full(len(i), np.inf),
        lambda p, i: np.zeros(len(i) + 1),
    ],
)
def test_encoding_by_distances_that_are_none_is_refused(distances):
    with pytest.raises(ValueError, match='distances'), np.errstate(all='ignore'):
        encode(knn(X, 5)[1], distances, 2)


def test_weights_in_any_form_give_the_same_and_stay_as_they_were():
    V = k_reciprocal(X, knn(X, 11)[1], 4)
    want = to_dense(jaccard_from_weights(V.copy()))
    for form in (
        frozen_csr,
        wide,
        sp.coo_array,
        sp.csc_array,
        sp.lil_array,
        lambda V: in_parts(V, 3),
        lambda V: V.astype(float),
        lambda V: V.toarray(),
    ):
        W = form(V.copy())
        before = W.indices.copy() if hasattr(W, 'indices') else None
        np.testing.assert_allclose(to_dense(jaccard_from_weights(W)), want, atol=1e-6)
        if before is not None:
            np.testing.assert_array_equal(W.indices, before)
    for wrong in (V * -1, V * np.nan, V * 3, V[:-1], V * 1j):
        with pytest.raises(ValueError):
            jaccard_from_weights(wrong)
    tiny = V.copy()
    tiny.data[::3] = 1e-44  # subnormal: 0 to a processor that is set to think so
    assert np.isfinite(jaccard_from_weights(tiny).data).all()


# settings

WRONG_NUMBERS = [np.nan, 'a', None, 1j, True, [1]]


@pytest.mark.parametrize(
    'name',
    [
        'n_sigma',
        'threshold',
        'n_clusters',
        'max_iter',
        'min_iter',
        'patience',
        'k1',
        'k2',
        'metric',
        'ceiling',
        'outliers',
        'normalize_centroids',
        'init',
    ],
)
def test_hdc_refuses_what_no_setting_can_be(name):
    for value in [*WRONG_NUMBERS, -1, np.inf, -np.inf, -0.5]:
        if (name, value) in [('threshold', None)] or (
            value is True and name in ('outliers', 'normalize_centroids')
        ):
            continue
        with pytest.raises(ValueError, match=name):
            HDC(**dict(n_clusters=4) | {name: value}).fit(X, graph=GRAPH)
    for value in (np.nan, np.inf, -1.0, 'a'):
        if name in ('n_sigma', 'threshold'):
            with pytest.raises(ValueError, match=name):
                next(hdc_rounds(X, GRAPH, np.arange(4), **{name: value}))
            with pytest.raises(ValueError, match=name):
                make_labels(X, 'hdc', n_clusters=4, hdc_options={name: value})


@pytest.mark.parametrize(
    'name',
    [
        'min_instances',
        'n_clusters',
        'eps',
        'k1',
        'k2',
        'method',
        'index',
        'jaccard',
        'own_centroids',
        'hdc_options',
    ],
)
def test_label_makers_refuse_what_no_setting_can_be(name):
    for value in [*WRONG_NUMBERS, -1, np.inf, 'x']:
        if (name, value) == ('hdc_options', None) or (value is True and name in ('jaccard', 'own_centroids')):
            continue
        with pytest.raises(ValueError):
            make_labels(X, **dict(method='hdc', n_clusters=4) | {name: value})
    with pytest.raises(ValueError, match='hdc_options'):
        make_labels(X, 'hdc', n_clusters=4, hdc_options=dict(sigma=1))


def test_searches_refuse_what_no_setting_can_be():
    for value in [*WRONG_NUMBERS, 0, -1, 2.5, '3', 10**9]:
        for call in (
            lambda: knn(X, value),
            lambda: jaccard_distance(X, value, 1),
            lambda: jaccard_distance(X, 5, value),
            lambda: rerank_features(X[:9], X[9:], value, 1),
            lambda: rerank_features(X[:9], X[9:], 5, value),
        ):
            with pytest.raises(ValueError):
                call()
    for value in (np.nan, -1, 'a', None):
        with pytest.raises(ValueError, match='limit'):
            jaccard_distance(X, 5, 2, limit=value)
        with pytest.raises(ValueError, match='lambda_value'):
            rerank_features(X[:9], X[9:], 5, 2, value)
    for threads in (0, 1, 3, 10**6, -1):
        np.testing.assert_array_equal(jaccard_distance(X, 10, 4, n_threads=threads).data, GRAPH.data)


# tables of distances


def test_tables_whose_squares_are_not_finite_are_refused():
    tables = squared_distances(X[:9], X[9:]), squared_distances(X[:9], X[:9]), squared_distances(X[9:], X[9:])
    for value in (np.nan, np.inf, 1e25, -1e25):
        for t in range(3):
            wrong = [a.copy() for a in tables]
            wrong[t][1, 2] = value
            with pytest.raises(ValueError, match='squares are finite'):
                rerank(*wrong, 5, 2)
    with pytest.raises(ValueError, match='matrix'):
        rerank(tables[0][0], *tables[1:], 5, 2)


@pytest.mark.parametrize('seed', range(12))
def test_reranking_twice_is_the_same_where_images_are_copies(seed):
    "Both ways, on tables from a product and on exact ones, and equal distances by index."
    rng = np.random.default_rng(seed)
    n, d = rng.integers(12, 50), rng.integers(2, 100)
    x = rng.normal(size=(n, d)).astype(np.float32)
    x = (x / np.linalg.norm(x, axis=1, keepdims=True) if seed % 3 else x)[rng.integers(0, n, 3 * n)]
    q, g, k1 = x[: n // 2], x[n // 2 :], int(rng.integers(2, 16))
    k2, sparse = int(rng.integers(1, min(6, k1) + 1)), None
    exact = lambda a, b: np.square(a[:, None] - b[None]).sum(2)
    sparse = rerank_features(q, g, k1, k2)
    for distances in (squared_distances, exact):
        np.testing.assert_allclose(
            rerank(distances(q, g), distances(q, q), distances(g, g), k1, k2), sparse, atol=5e-6
        )


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(3, 200),
    d=st.integers(1, 6),
    k=st.integers(1, 150),
    torch_search=st.booleans(),
)
def test_equal_distances_go_by_index(seed, n, d, k, torch_search):
    "Coordinates on a grid: distances are exact, and many are equal."
    x, k = (np.random.default_rng(seed).integers(-2, 3, (n, d)) / 4).astype(np.float32), min(k, n)
    slow = np.square(x[:, None] - x[None]).sum(2)
    slow[np.arange(n), np.arange(n)] = -1
    with pytest.MonkeyPatch.context() as patch:
        if torch_search:
            patch.setitem(sys.modules, 'faiss', None)
        np.testing.assert_array_equal(knn(x, k)[1], np.argsort(slow, axis=1, kind='stable')[:, :k])


# the memory


def test_the_memory_takes_any_integers_and_nothing_else():
    z = torch.nn.functional.normalize(torch.tensor(X[:20]), dim=1)
    memory = ClusterMemory(torch.tensor(X[:5]))
    y, camids = np.arange(20) % 5, np.arange(20) % 3
    want = memory(z, torch.tensor(y), torch.tensor(camids))
    for kind in (np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64):
        assert memory(z, y.astype(kind), camids.astype(kind)) == want
    assert (
        memory(z, y.tolist(), camids.tolist()) == want
        and memory(z, torch.tensor(y, dtype=torch.uint8), torch.tensor(camids, dtype=torch.uint8)) == want
    )
    for wrong in (
        y - 1,
        y + 1,
        y.astype(float),
        y > 2,
        y[:-1],
        y[:, None],
        y.astype(str),
        y.astype(complex),
        [None] * 20,
        [2**70] * 20,
        np.full(20, 2**64 - 1, np.uint64),
        'y',
        None,
    ):
        for call in (memory.forward, memory.update):
            with pytest.raises(ValueError):
                call(z, wrong, camids)
    for wrong in (camids.astype(float), camids[:-1], ['a'] * 20, camids > 1):
        with pytest.raises(ValueError, match='camids'):
            memory(z, y, wrong)
        with pytest.raises(ValueError, match='camids'):
            camera_entropy(y, wrong)
    for wrong in (z * float('nan'), z * 1e30, z[:, :-1], z[0], z.long(), z.numpy(), z.to(torch.complex64)):
        with pytest.raises(ValueError, match='x must'):
            memory(wrong, y, camids)
    for name in ('temperature', 'momentum'):
        for value in (np.nan, np.inf, -1, 'a', None):
            pytest.raises(ValueError, ClusterMemory, torch.eye(3), **{name: value}).match(name)
    for wrong in (
        [['a']],
        np.eye(3) * np.nan,
        np.zeros((2, 2)),
        np.eye(2) * 1e30,
        np.eye(2, dtype=complex),
        np.eye(2, dtype=bool),
        None,
    ):
        with pytest.raises(ValueError, match='centroids'):
            ClusterMemory(wrong)


# after a fork


def forked_work(results, explicit):
    "What a DataLoader worker or a fork pool might do with ccc."
    n = dict(n_threads=2) if explicit else {}
    results.put(
        [
            jaccard_distance(X, 10, 4, **n).nnz,
            int(HDC(6, random_state=0).fit(X, graph=GRAPH).labels_.sum()),
            make_labels(X, 'kmeans', n_clusters=6, random_state=0).n_clusters,
            make_labels(X, 'dbscan').n_clusters,
            evaluate_embeddings(X, X, PIDS, PIDS, CAMIDS, CAMIDS, **n).mAP,
            float(rerank_features(X[:40], X[40:], **n).sum()),
            evaluate_embeddings(torch.tensor(X), torch.tensor(X), PIDS, PIDS, CAMIDS, CAMIDS).mAP,
        ]
    )


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
@pytest.mark.parametrize('explicit', [False, True])
def test_a_forked_child_of_a_process_that_used_threads_works(explicit):
    script = f'''
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import warnings; warnings.simplefilter('ignore')
import multiprocessing as mp, queue
import torch, test_safety as t
class Here(list):
    put = list.append
here = Here(); t.forked_work(here, False); torch.randn(900, 900) @ torch.randn(900, 900)
context = mp.get_context('fork'); results = context.Queue()
child = context.Process(target=t.forked_work, args=(results, {explicit})); child.start()
try: assert results.get(timeout=90) == here[0]
except queue.Empty: print('hang'); sys.exit(3)
finally: child.kill()
print('equal')
'''
    two = dict(os.environ, OMP_NUM_THREADS='2', PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    run = subprocess.run([sys.executable, '-c', script], env=two, capture_output=True, text=True, timeout=180)
    assert run.returncode == 0 and 'equal' in run.stdout, run.stdout + run.stderr


@pytest.mark.skipif('CCC_KERNELS' in os.environ, reason='this is that build')
@pytest.mark.skipif(sys.platform == 'win32', reason='a shell script')
def test_kernels_with_bounds_checks_pass_the_quick_part():
    run = subprocess.run(
        ['bash', ROOT / 'tests' / 'checked.sh', 'bounds', 'quick'], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
