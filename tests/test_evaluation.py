"Golden mAP, CMC and re-ranked distances; ties, corners and types; compiled and interpreted."

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from sklearn.metrics import average_precision_score

from ccc import evaluation, neighbors
from ccc.data import toy_embeddings
from ccc.evaluation import evaluate_embeddings, evaluate_ranking, rerank, rerank_features, squared_distances
from conftest import golden, interpreted

CASE = golden('evaluation')
IDS = tuple(CASE[k] for k in ('query_pids', 'gallery_pids', 'query_camids', 'gallery_camids'))


def reference(distmat, q_pids, g_pids, q_camids, g_camids):
    "(AP, rank of the first match, INP) of each valid query; a tie counts against the query."
    rows = []
    for d, pid, camid in zip(distmat, q_pids, q_camids):
        use = ~((g_pids == pid) & (g_camids == camid))
        match, d = (g_pids == pid)[use], d[use]
        if not match.any():
            continue
        stranger = d[~match]
        rows.append(
            (
                average_precision_score(match, -d),
                1 + (stranger <= d[match].min()).sum(),
                match.sum() / (match.sum() + (stranger <= d[match].max()).sum()),
            )
        )
    return np.array(rows).T


def random_case(seed, n_q=25, n_g=150, levels=None, n_ids=8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    distmat = rng.random((n_q, n_g)) if levels is None else rng.integers(0, levels, (n_q, n_g)) / levels
    return (
        distmat.astype(dtype),
        rng.integers(0, n_ids, n_q),
        rng.integers(0, n_ids, n_g),
        rng.integers(0, 3, n_q),
        rng.integers(0, 3, n_g),
    )


def check(result, expected):
    ap, first, inp = expected
    valid = result.first_rank > 0
    np.testing.assert_allclose(result.ap[valid], ap, atol=1e-12, rtol=0)
    np.testing.assert_array_equal(result.first_rank[valid], first)
    np.testing.assert_allclose(result.inp[valid], inp, atol=1e-12, rtol=0)
    np.testing.assert_allclose([result.mAP, result.mINP], [ap.mean(), inp.mean()], atol=1e-12)
    np.testing.assert_allclose(
        result.cmc, [(first <= k).mean() for k in range(1, len(result.cmc) + 1)], atol=1e-12
    )


def test_golden_ranking(both_ways):
    both_ways(evaluation, '_evaluation_kernels')
    result = evaluate_ranking(CASE['distmat'], *IDS)
    assert (
        result.mAP == pytest.approx(CASE['mAP'], abs=1e-6) and result.n_valid == 57 and result.n_query == 60
    )
    np.testing.assert_allclose(result.cmc, CASE['cmc'], atol=1e-9)
    check(result, reference(CASE['distmat'], *IDS))


def test_golden_rerank(both_ways, monkeypatch):
    if both_ways(evaluation, '_evaluation_kernels') == 'interpreted':
        monkeypatch.setattr(neighbors, 'kernels', interpreted('_neighbors_kernels'))
    tables = tuple(CASE[k].copy() for k in ('distmat', 'qq', 'gg'))
    again = rerank(*tables)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, CASE['reranked'], atol=1e-5, rtol=0)
    for table, key in zip(tables, ('distmat', 'qq', 'gg')):
        np.testing.assert_array_equal(table, CASE[key])  # inputs left alone
    result = evaluate_ranking(again, *IDS)
    assert result.mAP == pytest.approx(CASE['reranked_mAP'], abs=1e-5)
    np.testing.assert_allclose(result.cmc[[0, 4, 9]], CASE['reranked_cmc'], atol=1e-9)


@pytest.mark.parametrize('levels', [None, 40, 3, 1])
def test_ties_as_in_scikit_learn(both_ways, levels):
    both_ways(evaluation, '_evaluation_kernels')
    case = random_case(0, levels=levels)
    check(evaluate_ranking(*case), reference(*case))


@pytest.mark.parametrize('levels', [None, 50])
def test_many_matches_take_the_other_road(levels):
    case = random_case(1, n_q=12, n_g=900, n_ids=3, levels=levels)  # some 200 matches a query: binary search
    check(evaluate_ranking(*case), reference(*case))
    case = random_case(1, n_q=3, n_g=9000, n_ids=4, levels=levels)  # and several stretches of the row
    check(evaluate_ranking(*case), reference(*case))
    case = random_case(2, n_q=12, n_g=9000, n_ids=300, levels=levels)
    check(evaluate_ranking(*case), reference(*case))


def test_float32_and_float64_and_threads_agree_to_the_bit():
    case = random_case(2, n_q=40, n_g=2000)
    results = [
        evaluate_ranking(d, *case[1:], n_threads=t)
        for d in (case[0], case[0].astype(np.float64), torch.tensor(case[0]))
        for t in (1, 2, 5)
    ]
    for r in results[1:]:
        assert (r.mAP, r.mINP) == (results[0].mAP, results[0].mINP)
        np.testing.assert_array_equal(r.ap, results[0].ap)
        np.testing.assert_array_equal(r.cmc, results[0].cmc)


def test_the_order_of_the_gallery_does_not_matter():
    distmat, q_pids, g_pids, q_camids, g_camids = random_case(3, levels=10)
    p = np.random.default_rng(0).permutation(len(g_pids))
    a, b = (
        evaluate_ranking(distmat, q_pids, g_pids, q_camids, g_camids),
        evaluate_ranking(distmat[:, p], q_pids, g_pids[p], q_camids, g_camids[p]),
    )
    np.testing.assert_array_equal(a.ap, b.ap)
    np.testing.assert_array_equal(a.first_rank, b.first_rank)
    # names of people and cameras neither
    c = evaluate_ranking(distmat, -7 * q_pids, -7 * g_pids, q_camids + 90, g_camids + 90)
    np.testing.assert_array_equal(a.ap, c.ap)


def test_input_forms():
    distmat, *ids = random_case(4)
    want = evaluate_ranking(distmat, *ids).mAP
    assert evaluate_ranking(np.asfortranarray(distmat), *(a.astype(np.int32) for a in ids)).mAP == want
    frozen = distmat.copy()
    frozen.flags.writeable = False
    assert evaluate_ranking(frozen, *(a.tolist() for a in ids)).mAP == want
    assert evaluate_ranking(distmat * 1000 // 1, *ids).mAP == pytest.approx(
        evaluate_ranking((distmat * 1000).astype(int), *ids).mAP
    )
    infinite = np.where(distmat > 0.9, np.inf, distmat)
    assert evaluate_ranking(infinite, *ids).n_valid > 0


def test_corners():
    one = evaluate_ranking([[0.5]], [1], [1], [0], [1], max_rank=3)
    assert (
        one.mAP == one.mINP == 1
        and one.cmc.tolist() == [1, 1, 1]
        and str(one).startswith('mAP 100.0% Rank-1 100.0%')
    )
    far = evaluate_ranking(np.arange(9.0)[None], [1], [2] * 8 + [1], [0], [1] * 9, max_rank=5)
    assert far.cmc.tolist() == [0] * 5 and far.first_rank.tolist() == [9]
    with pytest.raises(ValueError, match='no query has a match'):
        evaluate_ranking([[0.5]], [1], [1], [0], [0])
    with pytest.raises(ValueError, match='no query has a match'):
        evaluate_ranking(np.zeros((0, 4)), [], [1] * 4, [], [0] * 4)
    with pytest.raises(ValueError, match='max_rank'):
        evaluate_ranking([[0.5]], [1], [1], [0], [1], max_rank=0)
    with pytest.raises(ValueError, match='distmat must be'):
        evaluate_ranking([0.5], [1], [1], [0], [1])
    with pytest.raises(ValueError, match='g_camids'):
        evaluate_ranking([[0.5]], [1], [1], [0], [1, 2])
    with pytest.raises(ValueError, match='NaN'):
        evaluate_ranking([[np.nan, 1]], [1], [1, 2], [0], [1, 1])
    with pytest.raises(ValueError, match='NaN'):
        evaluate_ranking([[1, np.nan]], [1], [1, 2], [0], [1, 1])


def toy():
    x, pids, camids = toy_embeddings(camera_shift=0.9, noise=0.9, seed=3)
    q = np.arange(len(x)) % 5 == 0
    return x[q], x[~q], (pids[q], pids[~q], camids[q], camids[~q])


@pytest.mark.parametrize('block', [1, 13, 1000])
@pytest.mark.parametrize('kind', [np.asarray, torch.tensor])
@pytest.mark.parametrize('reranked', [False, True])
def test_blocks_are_the_whole(block, kind, reranked):
    q, g, ids = toy()
    tables = squared_distances(q, g), squared_distances(q, q), squared_distances(g, g)
    whole = evaluate_ranking(rerank(*tables) if reranked else tables[0], *ids)
    parts = evaluate_embeddings(kind(q), kind(g), *ids, block=block, rerank=reranked)
    np.testing.assert_allclose(parts.ap, whole.ap, atol=1e-6)
    np.testing.assert_allclose(parts.cmc, whole.cmc, atol=1e-9)


@pytest.mark.parametrize('k1, k2, lambda_value', [(20, 6, 0.3), (20, 1, 0.0), (7, 3, 1.0), (239, 6, 0.3)])
def test_rerank_features_is_rerank(k1, k2, lambda_value):
    q, g, _ = toy()
    dense = rerank(
        squared_distances(q, g), squared_distances(q, q), squared_distances(g, g), k1, k2, lambda_value
    )
    sparse = rerank_features(q, g, k1, k2, lambda_value, block=17)
    np.testing.assert_allclose(sparse, dense, atol=2e-5)
    np.testing.assert_array_equal(sparse, rerank_features(q, g, k1, k2, lambda_value, block=17, n_threads=1))


def test_rerank_of_one_repeated_image_and_wrong_settings():
    x = np.ones((30, 4), np.float32) / 2
    assert np.isfinite(rerank_features(x[:5], x[5:], 5, 2)).all()
    assert np.isfinite(rerank(np.zeros((5, 25)), np.zeros((5, 5)), np.zeros((25, 25)), 5, 2)).all()
    for wrong, message in [
        (dict(k1=0), 'k1=0'),
        (dict(k1=30), 'k1=30'),
        (dict(k2=0), 'k2=0'),
        (dict(k1=3, k2=5), 'k2=5'),
        (dict(lambda_value=2), 'got 2'),
    ]:
        with pytest.raises(ValueError, match=message):
            rerank_features(x[:5], x[5:], **wrong)
    with pytest.raises(ValueError, match='must agree'):
        rerank(np.zeros((5, 25)), np.zeros((5, 5)), np.zeros((24, 25)))
    with pytest.raises(ValueError, match='got shapes'):
        evaluate_embeddings(x[:, :2], x, [1], [1], [1], [1])


def test_half_precision_embeddings():
    q, g, ids = toy()
    low = evaluate_embeddings(torch.tensor(q).bfloat16(), torch.tensor(g).bfloat16(), *ids)
    assert abs(low.mAP - evaluate_embeddings(q, g, *ids).mAP) < 0.05


# who and by which camera: one reader, one rule for each kind of value

PEOPLE = [1, 1, 2, 3, 300], [1, 2, 2, 3, 300, 7]  # queries, gallery
CAMERAS = [0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0]
TABLE = np.random.default_rng(5).random((5, 6)).astype(np.float32)
NAMES = {1: 'anna', 2: 'bo', 3: 'c', 300: 'd', 7: 'e'}
LIKE = [
    np.int16,
    np.uint16,
    np.int64,
    np.uint64,
    float,
    np.float32,
    list,
    tuple,
    torch.tensor,
    lambda a: torch.tensor(a, dtype=torch.float64),
    lambda a: np.array(a, object),
    lambda a: torch.tensor(a, dtype=torch.int16),
    lambda a: [NAMES[i] for i in a],
    lambda a: np.array([NAMES[i] for i in a], object),
    lambda a: np.array([NAMES[i] for i in a], 'S'),
    lambda a: np.array([NAMES[i] for i in a])[:, None][:, 0],
    lambda a: [2**62 + i for i in a],
    lambda a: [float(i) for i in a[:-1]] + a[-1:],
]


@pytest.mark.parametrize('like', LIKE, ids=range(len(LIKE)))
def test_identities_in_any_form_give_the_same(like):
    def kind(a):
        return (
            like(a)
            if like not in (np.int16, np.uint16, np.int64, np.uint64, float, np.float32)
            else np.array(a, like)
        )

    want = evaluate_ranking(TABLE, *PEOPLE, *CAMERAS)
    assert want.n_valid == 4
    same(want, evaluate_ranking(TABLE, *map(kind, PEOPLE), *CAMERAS))
    same(want, evaluate_ranking(TABLE, *PEOPLE, *([f'camera {i}' for i in c] for c in CAMERAS)))
    same(want, evaluate_ranking(TABLE, *PEOPLE, *(np.array(c, np.uint8) for c in CAMERAS)))


def test_numbers_of_different_types_are_the_same_people():
    want = evaluate_ranking(TABLE, *PEOPLE, *CAMERAS)
    q, g = PEOPLE
    for a, b in [(np.uint16, np.int8), (np.uint64, np.int64), (float, np.int32), (np.float32, np.uint64)]:
        same(
            want,
            evaluate_ranking(TABLE, np.array(q, a), np.array(g, np.int16 if b is np.int8 else b), *CAMERAS),
        )


@pytest.mark.parametrize(
    'wrong, message',
    [
        ([1.5, 1, 2, 3, 300], '1.5'),
        ([np.nan, 1, 2, 3, 300], 'nan'),
        ([np.inf, 1, 2, 3, 300], 'inf'),
        ([None, 1, 2, 3, 300], 'None'),
        ([True] * 5, 'bool|True'),
        ([2**64, 1, 2, 3, 4], str(2**64)),
        (np.array([2**64 - 1] * 5, np.uint64), str(2**64 - 1)),
        (np.array([2**53 + 2.0] * 5), 'within'),
        (np.array([2**24 + 2] * 5, np.float32), 'float32'),
        (np.array([4096] * 5, np.float16), 'float16'),
        (torch.tensor([300.0] * 5, dtype=torch.bfloat16), 'bfloat16'),
        (['anna', 1, 2, 3, 4], '1|anna'),
        (list('abcde'), 'both'),
        ([1j] * 5, 'complex'),
        (np.array(['2020'] * 5, 'datetime64[Y]'), 'datetime64'),
        ([[1], [1], [2], [3], [4]], 'shape'),
        ([1, 2], 'shape'),
        ([[1], [1, 2]], 'pids'),
        (np.ma.masked_equal([1, 1, 2, 3, 4], 2), 'missing|mask'),
        (7, 'shape'),
    ],
)
def test_identities_that_are_none_are_refused_by_value(wrong, message):
    for call in (
        lambda: evaluate_ranking(TABLE, wrong, PEOPLE[1], *CAMERAS),
        lambda: evaluate_embeddings(TABLE, np.ones((6, 6)), wrong, PEOPLE[1], *CAMERAS),
    ):
        with pytest.raises(ValueError, match=message) as e:
            call()
        assert 'pids' in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(ValueError, match='camids'):
        evaluate_ranking(TABLE, *PEOPLE, wrong, CAMERAS[1])


@pytest.mark.parametrize(
    'kind', [np.array, lambda a: np.array(a, float), lambda a: [str(i) for i in a], torch.tensor]
)
def test_the_unknown_person_matches_nobody_and_is_spoken_of(kind):
    """-1 in the gallery is a stranger, -1 as a query is skipped; what was measured without either does not
    change."""
    q, g = [1, -1, 2, -1], [1, -1, 2, -1, 1]
    table, cameras = TABLE[:4, :5], ([0, 0, 1, 1], [1, 1, 0, 0, 1])
    with pytest.warns(UserWarning, match='2 of 4 queries are skipped; 2 of 5 gallery'):
        got = evaluate_ranking(table, kind(q), kind(g), *cameras)
    assert got.n_valid == 2 and got.n_query == 4 and (got.first_rank[[1, 3]] == 0).all()
    same(
        got,
        evaluate_ranking(table, kind(q), kind([i if i > 0 else 99 + n for n, i in enumerate(g)]), *cameras),
    )
    assert got.n_valid == 2
    far = evaluate_embeddings(np.eye(4, 3), np.eye(5, 3), [1, 4, 2, 5], [1, -1, 2, -1, 1], *cameras)
    assert far.n_valid == 2


def test_distances_keep_their_digits():
    "Two distances that float32 takes for equal are none to float64, in whatever they come."
    table, ids = np.array([[1 + 1e-12, 1.0]]), ([1], [2, 1], [0], [1, 1])
    for kind in (
        np.asarray,
        torch.tensor,
        lambda a: a.tolist(),
        lambda a: torch.tensor(a, requires_grad=True),
        np.asfortranarray,
    ):
        assert evaluate_ranking(kind(table), *ids).mAP == 1
    assert evaluate_ranking(np.array([[2**53, 2**53 - 1]]), *ids).mAP == 1
    with pytest.raises(ValueError, match='2\\*\\*53'):
        evaluate_ranking(np.array([[2**53 + 2, 2**53 + 1]]), *ids)
    if np.finfo(np.longdouble).nmant > 52:
        with pytest.raises(ValueError, match='fit float64'):
            evaluate_ranking(np.array([[1, 1]]) + np.longdouble(2) ** -60 * np.array([[1, 0]]), *ids)
    for wrong in ([['a', 'b']], [[1j, 2]], [[None, 1]], 'x', None):
        pytest.raises(ValueError, evaluate_ranking, wrong, *ids)


# properties, on drawn examples: any number of people, cameras and ties


@st.composite
def rankings(draw):
    "A table of distances with its people and cameras, in which at least one query has a match."
    case = random_case(
        draw(st.integers(0, 10**6)),
        draw(st.integers(1, 8)),
        draw(st.integers(1, 60)),
        draw(st.sampled_from([None, 30, 3, 1])),
        draw(st.integers(1, 12)),
    )
    distmat, q_pids, g_pids, q_camids, g_camids = case
    assume(((q_pids[:, None] == g_pids) & (q_camids[:, None] != g_camids)).any())
    return case


def same(a, b):
    "Equal, query by query and to the bit."
    for name in ('ap', 'first_rank', 'inp', 'cmc'):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    assert (a.mAP, a.mINP, a.n_valid) == (b.mAP, b.mINP, b.n_valid)


@settings(max_examples=100)
@given(case=rankings())
def test_any_ranking_is_the_slow_one(case):
    check(evaluate_ranking(*case), reference(*case))


@settings(max_examples=60)
@given(case=rankings(), seed=st.integers(0, 10**6))
def test_a_ranking_does_not_know_order_or_names(case, seed):
    """The gallery in another order, people and cameras under other numbers, distances on another scale:
    the same to the bit, ties included."""
    (distmat, q_pids, g_pids, q_camids, g_camids), rng = case, np.random.default_rng(seed)
    plain, p = evaluate_ranking(*case), rng.permutation(len(g_pids))
    same(plain, evaluate_ranking(distmat[:, p], q_pids, g_pids[p], q_camids, g_camids[p]))
    # all but -1, nobody's name
    people, cameras = np.setdiff1d(np.arange(-50, 51), [-1])[rng.permutation(100)], rng.permutation(9)
    same(
        plain, evaluate_ranking(distmat, people[q_pids], people[g_pids], cameras[q_camids], cameras[g_camids])
    )
    same(plain, evaluate_ranking(8 * distmat, *case[1:]))
    order = rng.permutation(len(q_pids))
    shuffled = evaluate_ranking(distmat[order], q_pids[order], g_pids, q_camids[order], g_camids)
    np.testing.assert_array_equal(shuffled.ap, plain.ap[order])
    np.testing.assert_array_equal(shuffled.first_rank, plain.first_rank[order])
    assert shuffled.mAP == pytest.approx(plain.mAP, abs=1e-12)


@settings(max_examples=60)
@given(case=rankings(), seed=st.integers(0, 10**6))
def test_what_more_images_in_the_gallery_do(case, seed):
    """The query's person in the query's camera: nothing. A stranger nearer than all: every rank one lower.
    A copy of a stranger: never better."""
    (distmat, q_pids, g_pids, q_camids, g_camids), rng = case, np.random.default_rng(seed)
    i = rng.integers(len(q_pids))
    valid = evaluate_ranking(*case).first_rank[i] > 0
    assume(valid)
    one = lambda d, pids, cams: evaluate_ranking(
        d[None].astype(np.float32), q_pids[[i]], pids, q_camids[[i]], cams
    )
    plain = one(distmat[i], g_pids, g_camids)
    same(
        plain,
        one(
            np.append(distmat[i], rng.random()),
            np.append(g_pids, q_pids[i]),
            np.append(g_camids, q_camids[i]),
        ),
    )
    nearer = one(np.append(distmat[i], -1), np.append(g_pids, 99), np.append(g_camids, 0))
    assert nearer.first_rank[0] == plain.first_rank[0] + 1 and nearer.mAP < plain.mAP
    strangers = np.flatnonzero(g_pids != q_pids[i])
    assume(len(strangers))
    twice = np.append(np.arange(len(g_pids)), rng.choice(strangers))
    copied = one(distmat[i][twice], g_pids[twice], g_camids[twice])
    assert (
        copied.mAP <= plain.mAP and copied.mINP <= plain.mINP and copied.first_rank[0] >= plain.first_rank[0]
    )


@given(seed=st.integers(0, 10**6), n_q=st.integers(2, 6), n_g=st.integers(10, 30))
def test_reranking_does_not_know_order(seed, n_q, n_g):
    "Queries and gallery in other orders: the same distances between the same images."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_q + n_g, 5)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    d = np.sort(np.square(x[:, None].astype(float) - x[None]).sum(2), axis=1)
    assume(np.diff(d, axis=1).min() > 1e-6)
    q, g, p, o = x[:n_q], x[n_q:], rng.permutation(n_g), rng.permutation(n_q)
    np.testing.assert_allclose(
        rerank_features(q[o], g[p], 5, 3), rerank_features(q, g, 5, 3)[np.ix_(o, p)], atol=2e-6
    )
