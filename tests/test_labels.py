"Label makers: the small-cluster filter against golden values, thinned DBSCAN, corners, diagnosis."

from itertools import permutations

import numpy as np
import pytest
from conftest import golden
from hypothesis import assume, given, settings, strategies as st
from sklearn.cluster import DBSCAN

from ccc import labels
from ccc.data import toy_embeddings
from ccc.labels import PseudoLabels, camera_bias, churn, diagnose, drop_small_clusters, make_labels, within
from ccc.memory import ClusterMemory
from ccc.neighbors import jaccard_distance, to_dense


@pytest.mark.parametrize('least', [4, 8, 12])
def test_golden_small_cluster_filter(least):
    import torch

    g = golden('small_cluster_filter')
    labels, centroids = drop_small_clusters(g['labels_before'], g['centroids_before'], least)
    np.testing.assert_array_equal(labels, g[f'min_instances_{least}__labels'])
    assert len(centroids) == g[f'min_instances_{least}__n_clusters']
    memory = ClusterMemory(torch.from_numpy(centroids))
    np.testing.assert_allclose(memory.centroids, g[f'min_instances_{least}__memory'], atol=1e-5)


@pytest.mark.parametrize('eps', [0.3, 0.5, 0.7])
def test_dbscan_on_the_thinned_graph_is_dbscan(eps):
    x = golden('jaccard')['features']
    graph = jaccard_distance(x)
    dense = DBSCAN(eps=eps, min_samples=4, metric='precomputed').fit_predict(to_dense(graph))
    np.testing.assert_array_equal(make_labels(x, 'dbscan', eps=eps, graph=graph).labels, dense)
    assert within(graph, eps).data.max() <= eps


@pytest.mark.parametrize('method', ['hdc', 'dbscan', 'kmeans'])
def test_same_seed_same_labels(method):
    x = toy_embeddings()[0]
    a, b = (make_labels(x, method, n_clusters=12, k1=10, k2=4, random_state=3) for _ in range(2))
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.centroids, b.centroids)
    assert a.labels.dtype == np.int32 and 0 <= a.confidence.min() <= a.confidence.max() <= 1


def test_nothing_to_find():
    "Points on their own: no DBSCAN cluster, and an object that says so."
    lonely = make_labels(np.eye(30, dtype=np.float32), 'dbscan', k1=2, k2=1, eps=0.1)
    assert lonely.n_clusters == 0 and lonely.n_outliers == 30 and lonely.centroids.shape == (0, 30)
    assert np.isnan(diagnose(lonely, pids=np.arange(30))['nmi'])


def test_all_clusters_too_small():
    x = toy_embeddings(n_ids=4, n_cameras=2, per_camera=2)[0]
    assert make_labels(x, 'kmeans', min_instances=50, n_clusters=4).n_clusters == 0


def test_churn_matches_clusters_whatever_their_names():
    labels = np.random.default_rng(0).integers(0, 9, 500)
    assert churn((labels + 4) % 9, labels) == 0
    assert churn(np.where(np.arange(500) < 50, (labels + 1) % 9, labels), labels) == pytest.approx(0.1)
    assert churn(np.full(5, -1), np.zeros(5, int)) == 1


def test_centroids_of_hdc():
    x = toy_embeddings()[0]
    own, means = (
        make_labels(x, 'hdc', n_clusters=12, k1=10, k2=4, random_state=0, own_centroids=o)
        for o in (True, False)
    )
    np.testing.assert_array_equal(own.labels, means.labels)
    # peripheral objects are outliers: the same
    np.testing.assert_allclose(own.centroids, means.centroids, atol=1e-6)
    kept = [
        make_labels(
            x,
            'hdc',
            n_clusters=12,
            k1=10,
            k2=4,
            random_state=0,
            own_centroids=o,
            hdc_options=dict(outliers=False),
        )
        for o in (True, False)
    ]
    assert np.abs(kept[0].centroids - kept[1].centroids).max() > 1e-3  # kept members move the mean


def test_kmeans_of_tensors_is_faiss_own():
    "The road of a GPU, walked on a CPU: plausible clusters, the same for the same seed, nothing printed."
    torch = pytest.importorskip('torch')
    x, pids, _ = toy_embeddings()
    first, again = (labels._kmeans(torch.from_numpy(x), 12, 4, 0) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert diagnose(first[0], pids)['nmi'] > 0.7 and first[2].shape == (first[0].max() + 1, x.shape[1])


def test_dbscan_gets_a_thin_graph(monkeypatch):
    "Pairs beyond eps are never stored, and change nothing."
    x, seen = toy_embeddings()[0], []
    whole = make_labels(x, 'dbscan', eps=0.5, graph=jaccard_distance(x, 30, 6))
    thinned = labels._thinned
    monkeypatch.setattr(
        labels,
        '_thinned',
        lambda blocks, *rest: seen.append(blocks[0].data.max()) or thinned(blocks, *rest),
    )
    np.testing.assert_array_equal(make_labels(x, 'dbscan', eps=0.5).labels, whole.labels)
    assert seen[0] <= 0.5


# properties, on drawn examples

seeds, sizes = st.integers(0, 10**6), st.integers(1, 60)


def drawn_labels(rng, n, k=6):
    "Labels with outliers, some numbers left out."
    return rng.integers(-1, rng.integers(1, k + 1), n).astype(np.int32)


def renamed(rng, labels):
    "The same clusters under other numbers, neither in order nor without gaps."
    numbers = rng.choice(1000, labels.max(initial=0) + 1, replace=False)
    return np.where(labels < 0, -1, numbers[labels])


def same_partition(a, b):
    "Whether two labellings differ in the numbers of clusters alone."
    return len(set(zip(a, b))) == len(set(a)) == len(set(b)) and ((a < 0) == (b < 0)).all()


def same_report(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_allclose(a[k], b[k], atol=1e-9, err_msg=k)


@settings(max_examples=40)
@given(seed=seeds, n=sizes)
def test_a_diagnosis_does_not_know_names_or_order(seed, n):
    "Clusters, people and cameras renamed, images in another order: the same report."
    rng = np.random.default_rng(seed)
    labels, before, pids, camids = (
        drawn_labels(rng, n),
        drawn_labels(rng, n),
        rng.integers(0, 5, n),
        rng.integers(0, 4, n),
    )
    told, order = diagnose(labels, pids, camids, before), rng.permutation(n)
    # ARI counts pairs, and AMI expects less agreement by chance of more images
    by_size = dict(ari=0, ami=0, camera_ami=0)
    same_report(told, diagnose(renamed(rng, labels), pids, camids, before))
    same_report(told, diagnose(labels, pids, camids, renamed(rng, before)))
    same_report(told, diagnose(labels, 7 - pids, 90 + 3 * camids, before))
    same_report(told, diagnose(labels[order], pids[order], camids[order], before[order]))
    # every image twice
    same_report(
        told
        | dict(
            n_outliers=2 * told['n_outliers'],
            largest=2 * told['largest'],
            median_size=2 * told['median_size'],
            **by_size,
        ),
        diagnose(*(np.tile(a, 2) for a in (labels, pids, camids, before))) | by_size,
    )


@settings(max_examples=100)
@given(seed=seeds, n=sizes)
def test_churn_is_the_best_of_all_matchings(seed, n):
    "Its slow twin tries every one-to-one renaming."
    rng = np.random.default_rng(seed)
    now, before = drawn_labels(rng, n, 4), drawn_labels(rng, n, 4)
    assert churn(now, renamed(rng, now)) == (0 if (now >= 0).any() else 1)
    both = (now >= 0) & (before >= 0)
    best = max((np.array(names)[before[both]] == now[both]).sum() for names in permutations(range(5), 4 + 1))
    assert churn(now, before) == pytest.approx(1 - best / both.sum() if both.any() else 1)
    assert (
        churn(now, before)
        == churn(before, now)
        == pytest.approx(churn(renamed(rng, now), renamed(rng, before)))
    )


@settings(max_examples=100)
@given(seed=seeds, n=sizes, least=st.integers(1, 8))
def test_the_small_cluster_filter_keeps_order(seed, n, least):
    rng = np.random.default_rng(seed)
    labels, order = drawn_labels(rng, n), rng.permutation(n)
    centroids = rng.normal(size=(labels.max(initial=0) + 1, 3))
    kept, left = drop_small_clusters(labels, centroids, least)
    assert (
        set(kept[kept >= 0]) == set(range(len(left)))
        and (np.bincount(kept[kept >= 0], minlength=len(left)) >= least).all()
    )
    np.testing.assert_array_equal(drop_small_clusters(labels[order], centroids, least)[0], kept[order])
    np.testing.assert_array_equal(drop_small_clusters(kept, left, least)[0], kept)  # nothing more to drop
    of = {int(a): int(b) for a, b in zip(labels, kept) if b >= 0}
    assert sorted(of, key=of.get) == sorted(of) and all(
        (left[b] == centroids[a]).all() for a, b in of.items()
    )


@given(seed=seeds, n=sizes)
def test_camera_entropy_does_not_know_names_or_order(seed, n):
    rng = np.random.default_rng(seed)
    labels, camids, order = drawn_labels(rng, n), rng.integers(0, 4, n), rng.permutation(n)
    # numbered without gaps
    labels = np.where(labels < 0, -1, np.unique(labels, return_inverse=True)[1] - (labels.min() < 0))
    assume((labels >= 0).any())
    bits, numbers = PseudoLabels(labels, None, None).camera_entropy(camids), rng.permutation(labels.max() + 1)
    np.testing.assert_allclose(
        PseudoLabels(labels[order], None, None).camera_entropy(9 - camids[order]), bits, atol=1e-12
    )
    np.testing.assert_allclose(
        PseudoLabels(np.where(labels < 0, -1, numbers[labels]), None, None).camera_entropy(camids)[numbers],
        bits,
        atol=1e-12,
    )


def tied_distances(rng, n, levels=5):
    "A symmetric graph of few different distances, as an array."
    upper = np.triu(rng.integers(1, levels + 1, (n, n)) / levels, 1).astype(np.float32)
    return upper + upper.T


@settings(max_examples=60)
@given(seed=seeds, n=st.integers(4, 50), eps=st.sampled_from([0.2, 0.4]), least=st.integers(1, 6))
def test_dbscan_in_another_order(seed, n, eps, least):
    """Outliers and cores fall alike; a border sample may belong to another of the clusters it touches, for
    the first to reach it takes it."""
    rng = np.random.default_rng(seed)
    x, graph, order = rng.normal(size=(n, 3)).astype(np.float32), tied_distances(rng, n), rng.permutation(n)
    plain = make_labels(x, 'dbscan', least, eps=eps, graph=graph).labels
    shuffled = np.empty(n, int)
    shuffled[order] = make_labels(
        x[order], 'dbscan', least, eps=eps, graph=graph[np.ix_(order, order)]
    ).labels
    near = graph <= np.float32(eps)
    core = near.sum(1) >= least
    np.testing.assert_array_equal(plain < 0, shuffled < 0)
    np.testing.assert_array_equal(plain < 0, ~(near & core).any(1))
    if core.any():
        assert same_partition(plain[core], shuffled[core])
    for result in (plain, shuffled):
        for i in np.flatnonzero((result >= 0) & ~core):
            assert result[i] in result[near[i] & core]


@given(seed=seeds, n=st.integers(4, 25), method=st.sampled_from(['dbscan', 'hdc', 'kmeans']))
def test_copies_of_an_image_get_one_label(seed, n, method):
    """Every image three times. HDC: where it has not had to fill an empty cluster, which splits copies if
    there are too few images; K is small here."""
    rng = np.random.default_rng(seed)
    x, graph = rng.normal(size=(n, 4)).astype(np.float32), tied_distances(rng, n)
    made = make_labels(
        np.repeat(x, 3, axis=0),
        method,
        1,
        n_clusters=2,
        eps=0.3,
        graph=np.kron(graph, np.ones((3, 3), np.float32)),
        random_state=seed,
    )
    for a in (made.labels, made.confidence):
        np.testing.assert_allclose(a.reshape(n, 3), np.repeat(a[::3, None], 3, axis=1), atol=1e-6)


@given(seed=seeds, n=st.integers(6, 40), k=st.integers(1, 6))
def test_kmeans_ends_where_it_says(seed, n, k):
    """Each sample is nearest to its own centroid, each centroid is the mean of its members: whatever the
    start."""
    x = np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)
    made = make_labels(x, 'kmeans', 1, n_clusters=k, random_state=seed)
    d = np.linalg.norm(x[:, None] - made.centroids, axis=2)
    np.testing.assert_allclose(d[np.arange(n), made.labels], d.min(1), atol=1e-5)
    # scikit-learn stops when little moves
    np.testing.assert_allclose(made.centroids, [x[made.labels == j].mean(0) for j in range(k)], atol=0.05)


@given(
    seed=seeds,
    k=st.integers(1, 6),
    members=st.integers(1, 6),
    method=st.sampled_from(['dbscan', 'kmeans', 'hdc']),
)
def test_groups_far_apart_are_found_in_any_order(seed, k, members, method):
    "The start is drawn, and by position; where groups are plain, positions do not matter."
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(k), members + 1))
    x = (np.eye(8)[groups] + 1e-3 * rng.normal(size=(len(groups), 8))).astype(np.float32)
    assert same_partition(
        make_labels(
            x, method, 2, n_clusters=k, k1=members, k2=1, random_state=seed, hdc_options=dict(outliers=False)
        ).labels,
        groups,
    )


@settings(max_examples=60)
@given(seed=seeds, n=sizes)
def test_camera_bias_is_that_of_a_loop(seed, n):
    """Its slow twin sorts all distances of every image; images of unknown cameras are as if they were not
    there."""
    rng = np.random.default_rng(seed)
    x, camids, k = rng.normal(size=(n, 3)), rng.integers(-1, 4, n), int(rng.integers(1, 20))
    x, c = (x, camids) if (camids >= 0).sum() > 1 else (x, np.abs(camids))
    known = np.flatnonzero(c >= 0)
    if len(known) < 2:
        return
    shares, chances = [], []
    for i in known:
        others = np.array([j for j in known if j != i])
        near = others[((x[others] - x[i]) ** 2).sum(1).argsort()[:k]]
        shares.append((c[near] == c[i]).mean())
        chances.append((c[others] == c[i]).mean())
    bias = camera_bias(x, c, k)
    np.testing.assert_allclose(bias[:2], (np.mean(shares), np.mean(chances)))
    assert bias.k == min(k, len(known) - 1) and camera_bias(x[known], c[known] + 7, k) == bias


def test_camera_bias_of_random_neighbourhoods_is_chance():
    rng = np.random.default_rng(0)
    bias = camera_bias(rng.normal(size=(3000, 8)), rng.choice(3, 3000, p=[0.7, 0.2, 0.1]))
    assert bias.chance == pytest.approx(0.54, abs=0.02) and bias.share == pytest.approx(bias.chance, abs=0.02)
    assert str(bias._replace(share=0.431, chance=0.166)) == 'own camera: 43% of the 15 nearest, by chance 17%'


@settings(max_examples=40)
@given(seed=seeds, n=sizes)
def test_agreement_above_chance_is_that_of_the_formula(seed, n):
    "AMI = (MI - E) / (mean entropy - E), with E the mean over clusters dealt out at random."
    from sklearn.metrics import mutual_info_score

    rng = np.random.default_rng(seed)
    labels, pids = rng.integers(0, 3, n), rng.integers(0, 3, n)
    top = (mutual_info_score(labels, labels) + mutual_info_score(pids, pids)) / 2
    dealt = [mutual_info_score(pids, rng.permutation(labels)) for _ in range(400)]
    if top - np.mean(dealt) < 0.2:
        return
    assert diagnose(labels, pids)['ami'] == pytest.approx(
        (mutual_info_score(pids, labels) - np.mean(dealt)) / (top - np.mean(dealt)), abs=0.12
    )
