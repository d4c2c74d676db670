"""Choosing without labels: the measure by its definition, what is chosen on toys, from run folders alone,
errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from sklearn.metrics import silhouette_samples

from ccc.choosing import label_quality, suggest_epoch, suggest_n_clusters, suggest_eps, suggest_run
from ccc.data import toy_embeddings
from ccc.hdc import as_graph
from ccc.labels import make_labels
from ccc.neighbors import jaccard_distance
from ccc.runs import read_metrics, write_metrics

RUN = Path(__file__).parent.parent / 'nbs/tutorials/runs/city'


@given(seed=st.integers(0, 10**6), n=st.integers(4, 40))
def test_quality_is_the_mean_silhouette_of_scikit_learn(seed, n):
    "Of the members, on the dense distances; outliers count 0; names and order of samples do not matter."
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.integers(1, 9, (n, n)) / 8, 1).astype(np.float32)
    dense, labels, order = upper + upper.T, rng.integers(-1, 4, n), rng.permutation(n)
    members = labels >= 0
    quality = label_quality(as_graph(dense, n), labels)
    apart = 1 < len(np.unique(labels[members])) < members.sum()
    assert quality == pytest.approx(
        (
            silhouette_samples(dense[np.ix_(members, members)], labels[members], metric='precomputed').sum()
            / n
            if apart
            else 0
        ),
        abs=1e-5,
    )
    assert label_quality(
        as_graph(dense[np.ix_(order, order)], n), np.where(members, 9 - labels, -1)[order]
    ) == pytest.approx(quality, abs=1e-6)


def test_plain_groups_are_found():
    "Twelve people, well apart: the suggested radius and K both give twelve clusters."
    x, pids, _ = toy_embeddings(n_ids=12, camera_shift=0.3, noise=0.3)
    s = suggest_n_clusters(x, [6, 9, 12, 16, 24], 'kmeans', k1=20, k2=4)
    assert s.value == 12 and s.at == 2 and 'edge' not in str(s)
    eps = suggest_eps(x, k1=20, k2=4)
    assert (
        make_labels(x, 'dbscan', eps=eps.value, k1=20, k2=4).n_clusters == 12
        and eps.counts['n_clusters'][eps.candidates.index(eps.value)] == 12
    )
    s = suggest_n_clusters(x, k1=20, k2=4)
    assert s.value == 12 and s.candidates == [8, 10, 12, 14, 17]


def test_clusters_are_looked_for_where_outliers_would_bring_them():
    "Candidates lie around DBSCAN's number, divided by the share of images in clusters."
    x, _, _ = toy_embeddings(n_ids=30, camera_shift=0.8, noise=1.1)
    eps, s = suggest_eps(x, k1=20, k2=4), suggest_n_clusters(x, k1=20, k2=4)
    n, out = (eps.counts[k][eps.at] for k in ('n_clusters', 'n_outliers'))
    assert out > len(x) / 5 and s.candidates[2] == round(n / (1 - out / len(x))) > n
    assert 'at the edge' in str(suggest_n_clusters(x, [3, 6], 'kmeans', k1=20, k2=4))


def test_a_graph_at_hand_is_used_and_the_same():
    x = toy_embeddings()[0]
    graph = jaccard_distance(x, 10, 4)
    with_graph, without = suggest_eps(x, graph=graph), suggest_eps(x, k1=10, k2=4)
    np.testing.assert_array_equal(with_graph.scores, without.scores)
    assert with_graph.value == without.value


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda x: suggest_eps(x, []), r'got \[\]'),
        (lambda x: suggest_eps(x, [0.5, 1.2]), '1.2'),
        (lambda x: suggest_n_clusters(x, [1]), '2..N'),
        (lambda x: suggest_n_clusters(x, [5, 10_000]), 'N=240'),
        (
            lambda x: suggest_n_clusters(np.eye(240, dtype=np.float32), k1=2, k2=1),
            'two clusters, got at most 0 from 240 images',
        ),
        (lambda x: suggest_epoch([]), 'none'),
        (lambda x: suggest_run([RUN, RUN.parent]), 'as many images'),
    ],
)
def test_errors_name_the_rule(call, says):
    with pytest.raises(ValueError, match=says):
        call(toy_embeddings()[0])


def test_a_run_folder_without_evaluations_or_identities_is_enough(tmp_path):
    "Rows that say nothing of people or mAP: the same suggestions; only rows for the epoch."
    blind = tmp_path / 'blind'
    shutil.copytree(RUN, blind)
    known = ('nmi', 'ari', 'purity', 'mAP', 'mINP', 'rank1', 'rank5', 'rank10')
    rows = [{k: v for k, v in r.items() if k not in known} for r in read_metrics(RUN)]
    write_metrics(blind, rows)
    np.testing.assert_array_equal(suggest_epoch(blind).scores, suggest_epoch(RUN).scores)
    assert suggest_epoch(rows).value == suggest_epoch(RUN).value == 15 and 'epoch 16' in str(
        suggest_epoch(RUN)
    )
    np.testing.assert_array_equal(
        suggest_run([blind, RUN], 'ab').scores, suggest_run([RUN, RUN], 'ab').scores
    )
    with pytest.raises(ValueError, match='silhouette'):
        write_metrics(blind, [{k: v for k, v in r.items() if k != 'silhouette'} for r in rows])
        suggest_run([blind, RUN])
