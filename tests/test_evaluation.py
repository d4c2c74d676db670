"Golden mAP, CMC and re-ranked distances; ties, corners and types; compiled and interpreted."
import numpy as np
import pytest
import torch
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
        if not match.any(): continue
        stranger = d[~match]
        rows.append((average_precision_score(match, -d), 1 + (stranger <= d[match].min()).sum(),
                     match.sum() / (match.sum() + (stranger <= d[match].max()).sum())))
    return np.array(rows).T


def random_case(seed, n_q=25, n_g=150, levels=None, n_ids=8, dtype=np.float32):
    rng = np.random.default_rng(seed)
    distmat = rng.random((n_q, n_g)) if levels is None else rng.integers(0, levels, (n_q, n_g)) / levels
    return distmat.astype(dtype), rng.integers(0, n_ids, n_q), rng.integers(0, n_ids, n_g), rng.integers(0, 3, n_q), rng.integers(0, 3, n_g)


def check(result, expected):
    ap, first, inp = expected
    valid = result.first_rank > 0
    np.testing.assert_allclose(result.ap[valid], ap, atol=1e-12, rtol=0)
    np.testing.assert_array_equal(result.first_rank[valid], first)
    np.testing.assert_allclose(result.inp[valid], inp, atol=1e-12, rtol=0)
    np.testing.assert_allclose([result.mAP, result.mINP], [ap.mean(), inp.mean()], atol=1e-12)
    np.testing.assert_allclose(result.cmc, [(first <= k).mean() for k in range(1, len(result.cmc) + 1)], atol=1e-12)


def test_golden_ranking(both_ways):
    both_ways(evaluation, '_evaluation_kernels')
    result = evaluate_ranking(CASE['distmat'], *IDS)
    assert result.mAP == pytest.approx(CASE['mAP'], abs=1e-6) and result.n_valid == 57 and result.n_query == 60
    np.testing.assert_allclose(result.cmc, CASE['cmc'], atol=1e-9)
    check(result, reference(CASE['distmat'], *IDS))


def test_golden_rerank(both_ways, monkeypatch):
    if both_ways(evaluation, '_evaluation_kernels') == 'interpreted':
        monkeypatch.setattr(neighbors, 'kernels', interpreted('_neighbors_kernels'))
    tables = tuple(CASE[k].copy() for k in ('distmat', 'qq', 'gg'))
    again = rerank(*tables)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, CASE['reranked'], atol=1e-5, rtol=0)
    for table, key in zip(tables, ('distmat', 'qq', 'gg')): np.testing.assert_array_equal(table, CASE[key])   # inputs left alone
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
    case = random_case(1, n_q=12, n_g=900, n_ids=3, levels=levels)    # some 200 matches a query: binary search
    check(evaluate_ranking(*case), reference(*case))
    case = random_case(1, n_q=3, n_g=9000, n_ids=4, levels=levels)    # and several stretches of the row
    check(evaluate_ranking(*case), reference(*case))
    case = random_case(2, n_q=12, n_g=9000, n_ids=300, levels=levels)
    check(evaluate_ranking(*case), reference(*case))


def test_float32_and_float64_and_threads_agree_to_the_bit():
    case = random_case(2, n_q=40, n_g=2000)
    results = [evaluate_ranking(d, *case[1:], n_threads=t) for d in (case[0], case[0].astype(np.float64), torch.tensor(case[0])) for t in (1, 2, 5)]
    for r in results[1:]:
        assert (r.mAP, r.mINP) == (results[0].mAP, results[0].mINP)
        np.testing.assert_array_equal(r.ap, results[0].ap)
        np.testing.assert_array_equal(r.cmc, results[0].cmc)


def test_the_order_of_the_gallery_does_not_matter():
    distmat, q_pids, g_pids, q_camids, g_camids = random_case(3, levels=10)
    p = np.random.default_rng(0).permutation(len(g_pids))
    a, b = evaluate_ranking(distmat, q_pids, g_pids, q_camids, g_camids), evaluate_ranking(distmat[:, p], q_pids, g_pids[p], q_camids, g_camids[p])
    np.testing.assert_array_equal(a.ap, b.ap)
    np.testing.assert_array_equal(a.first_rank, b.first_rank)
    c = evaluate_ranking(distmat, -7 * q_pids, -7 * g_pids, q_camids + 90, g_camids + 90)    # names of people and cameras neither
    np.testing.assert_array_equal(a.ap, c.ap)


def test_input_forms():
    distmat, *ids = random_case(4)
    want = evaluate_ranking(distmat, *ids).mAP
    assert evaluate_ranking(np.asfortranarray(distmat), *(a.astype(np.int32) for a in ids)).mAP == want
    frozen = distmat.copy()
    frozen.flags.writeable = False
    assert evaluate_ranking(frozen, *(a.tolist() for a in ids)).mAP == want
    assert evaluate_ranking(distmat * 1000 // 1, *ids).mAP == pytest.approx(evaluate_ranking((distmat * 1000).astype(int), *ids).mAP)
    infinite = np.where(distmat > .9, np.inf, distmat)
    assert evaluate_ranking(infinite, *ids).n_valid > 0


def test_corners():
    one = evaluate_ranking([[.5]], [1], [1], [0], [1], max_rank=3)
    assert one.mAP == one.mINP == 1 and one.cmc.tolist() == [1, 1, 1] and str(one).startswith('mAP 100.0% Rank-1 100.0%')
    far = evaluate_ranking(np.arange(9.)[None], [1], [2] * 8 + [1], [0], [1] * 9, max_rank=5)
    assert far.cmc.tolist() == [0] * 5 and far.first_rank.tolist() == [9]
    with pytest.raises(ValueError, match='no query has a match'): evaluate_ranking([[.5]], [1], [1], [0], [0])
    with pytest.raises(ValueError, match='no query has a match'): evaluate_ranking(np.zeros((0, 4)), [], [1] * 4, [], [0] * 4)
    with pytest.raises(ValueError, match='max_rank'): evaluate_ranking([[.5]], [1], [1], [0], [1], max_rank=0)
    with pytest.raises(ValueError, match='distmat must be'): evaluate_ranking([.5], [1], [1], [0], [1])
    with pytest.raises(ValueError, match='g_camids'): evaluate_ranking([[.5]], [1], [1], [0], [1, 2])
    with pytest.raises(ValueError, match='NaN'): evaluate_ranking([[np.nan, 1]], [1], [1, 2], [0], [1, 1])
    with pytest.raises(ValueError, match='NaN'): evaluate_ranking([[1, np.nan]], [1], [1, 2], [0], [1, 1])


def toy():
    x, pids, camids = toy_embeddings(camera_shift=.9, noise=.9, seed=3)
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


@pytest.mark.parametrize('k1, k2, lambda_value', [(20, 6, .3), (20, 1, 0.), (7, 3, 1.), (239, 6, .3)])
def test_rerank_features_is_rerank(k1, k2, lambda_value):
    q, g, _ = toy()
    dense = rerank(squared_distances(q, g), squared_distances(q, q), squared_distances(g, g), k1, k2, lambda_value)
    sparse = rerank_features(q, g, k1, k2, lambda_value, block=17)
    np.testing.assert_allclose(sparse, dense, atol=2e-5)
    np.testing.assert_array_equal(sparse, rerank_features(q, g, k1, k2, lambda_value, block=17, n_threads=1))


def test_rerank_of_one_repeated_image_and_wrong_settings():
    x = np.ones((30, 4), np.float32) / 2
    assert np.isfinite(rerank_features(x[:5], x[5:], 5, 2)).all()
    assert np.isfinite(rerank(np.zeros((5, 25)), np.zeros((5, 5)), np.zeros((25, 25)), 5, 2)).all()
    for wrong, message in [(dict(k1=0), 'k1=0'), (dict(k1=30), 'k1=30'), (dict(k2=0), 'k2=0'), (dict(k1=3, k2=5), 'k2=5'), (dict(lambda_value=2), 'got 2')]:
        with pytest.raises(ValueError, match=message): rerank_features(x[:5], x[5:], **wrong)
    with pytest.raises(ValueError, match='must agree'): rerank(np.zeros((5, 25)), np.zeros((5, 5)), np.zeros((24, 25)))
    with pytest.raises(ValueError, match='got shapes'): evaluate_embeddings(x[:, :2], x, [1], [1], [1], [1])


def test_half_precision_embeddings():
    q, g, ids = toy()
    low = evaluate_embeddings(torch.tensor(q).bfloat16(), torch.tensor(g).bfloat16(), *ids)
    assert abs(low.mAP - evaluate_embeddings(q, g, *ids).mAP) < .05
