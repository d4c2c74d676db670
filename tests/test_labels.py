"Label makers: the small-cluster filter against golden values, thinned DBSCAN, corners, diagnosis."
import numpy as np
import pytest
from conftest import golden
from sklearn.cluster import DBSCAN

from ccc import labels
from ccc.data import toy_embeddings
from ccc.labels import churn, diagnose, drop_small_clusters, make_labels, within
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
    assert churn(np.where(np.arange(500) < 50, (labels + 1) % 9, labels), labels) == pytest.approx(.1)
    assert churn(np.full(5, -1), np.zeros(5, int)) == 1


def test_centroids_of_hdc():
    x = toy_embeddings()[0]
    own, means = (make_labels(x, 'hdc', n_clusters=12, k1=10, k2=4, random_state=0, own_centroids=o) for o in (True, False))
    np.testing.assert_array_equal(own.labels, means.labels)
    np.testing.assert_allclose(own.centroids, means.centroids, atol=1e-6)       # peripheral objects are outliers: the same
    kept = [make_labels(x, 'hdc', n_clusters=12, k1=10, k2=4, random_state=0, own_centroids=o, hdc_options=dict(outliers=False)) for o in (True, False)]
    assert np.abs(kept[0].centroids - kept[1].centroids).max() > 1e-3           # kept members move the mean


def test_kmeans_of_tensors_is_faiss_own():
    "The road of a GPU, walked on a CPU: plausible clusters, the same for the same seed, nothing printed."
    torch = pytest.importorskip('torch')
    x, pids, _ = toy_embeddings()
    first, again = (labels._kmeans(torch.from_numpy(x), 12, 4, 0) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    assert diagnose(first[0], pids)['nmi'] > .7 and first[2].shape == (first[0].max() + 1, x.shape[1])


def test_dbscan_gets_a_thin_graph(monkeypatch):
    "Pairs beyond eps are never stored, and change nothing."
    x, seen = toy_embeddings()[0], []
    whole = make_labels(x, 'dbscan', eps=.5, graph=jaccard_distance(x, 30, 6))
    monkeypatch.setattr(labels, 'within', lambda graph, eps: seen.append(graph.data.max()) or within(graph, eps))
    np.testing.assert_array_equal(make_labels(x, 'dbscan', eps=.5).labels, whole.labels)
    assert seen[0] <= .5
