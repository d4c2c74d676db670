"Pictures: what the notebook does not show of maps, sampling, panels, image grids and run folders."

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ccc import viz


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(6), 10)
    return (rng.normal(size=(6, 8))[y] + 0.2 * rng.normal(size=(60, 8))).astype(np.float32), y


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'labels').mkdir()
    rng = np.random.default_rng(0)
    for epoch in range(3):
        labels = rng.integers(-1, 4, 50).astype(np.int32)
        np.savez(
            tmp_path / f'labels/epoch_{epoch:03d}.npz',
            labels=labels,
            confidence=rng.random(50, dtype=np.float32),
            map=rng.normal(size=(20, 2)).astype(np.float32),
            map_index=np.sort(rng.choice(50, 20, replace=False)),
        )
    return tmp_path


def drawn(fig):
    "The figure really renders; its axes that show something."
    fig.canvas.draw()
    return [ax for ax in fig.axes if ax.has_data()]


def test_import_is_light():
    code = (
        "import sys, ccc.viz; print([m for m in ('matplotlib', 'umap', 'torch', 'sklearn', 'scipy', 'PIL') if"
        " m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


def test_map_needs_no_spread():
    "Few points, equal points, one column: a finite map all the same."
    for x in [np.zeros((1, 3)), np.eye(2), np.ones((4, 2)), np.ones((12, 3)), np.arange(12.0)[:, None]]:
        at = viz.umap_map(x)
        assert at.shape == (len(x), 2) and np.isfinite(at).all() and at.dtype == np.float32


def test_map_from_tensor_and_from_a_start(points):
    x, _ = points
    at = viz.umap_map(torch.tensor(x))
    assert np.array_equal(at, viz.umap_map(x))
    again = viz.umap_map(x, init=at)
    assert np.linalg.norm(again - again.mean(0) - (at - at.mean(0)), axis=1).mean() < 3 * at.std()
    assert viz.umap_map(torch.tensor(x, dtype=torch.bfloat16)).shape == (60, 2)


def test_pca_signs_do_not_depend_on_the_solver(points):
    x, _ = points
    assert np.allclose(viz._pca(x), viz._pca(x.astype(np.float64)), atol=1e-3)


@pytest.mark.parametrize(
    'bad, message', [(dict(n_neighbors=1), 'at least 2'), (dict(init=np.zeros((3, 2))), 'init must be')]
)
def test_map_errors(points, bad, message):
    with pytest.raises(ValueError, match=message):
        viz.umap_map(points[0], **bad)


def test_sampling_is_uniform():
    hits = sum(np.isin(np.arange(100), viz.sample_points(100, 20, seed)) for seed in range(500))
    assert abs(hits - 100).max() < 45  # mean 100, standard deviation 9
    assert len(viz.sample_points(100, None)) == 100 and len(viz.sample_points(0, 5)) == 0


def test_panels_only_for_what_is_given(points):
    x, y = points
    at = x[:, :2]
    assert len(drawn(viz.plot_umap(xy=at))) == 1
    assert len(drawn(viz.plot_umap(xy=at, labels=y))) == 1
    assert len(drawn(viz.plot_umap(xy=at, confidence=np.linspace(0, 1, 60)))) == 2  # with its colour bar
    assert (
        len(drawn(viz.plot_umap(xy=at, labels=y, confidence=np.linspace(0, 1, 60), camids=y % 3, pids=y)))
        == 5
    )
    assert not __import__('matplotlib.pyplot').pyplot.get_fignums()  # nothing left open


def test_outliers_lie_underneath(points):
    x, y = points
    y = np.where(np.arange(60) % 7 == 0, -1, y)
    ax = viz.plot_umap(xy=x[:, :2], labels=y).axes[0]
    outliers, *clusters = ax.collections
    assert len(outliers.get_offsets()) == (y < 0).sum()
    assert all(c.get_zorder() > outliers.get_zorder() for c in clusters)
    assert sum(len(c.get_offsets()) for c in clusters) == (y >= 0).sum()


def test_only_outliers(points):
    none = np.full(60, -1)
    drawn(viz.plot_umap(xy=points[0][:, :2], labels=none, confidence=np.zeros(60)))
    drawn(viz.plot_confidence(np.zeros(60), none))
    drawn(viz.show_clusters(np.zeros((60, 3, 8, 4), np.uint8), none, np.zeros(60)))


def test_sample_is_said_and_followed(points):
    x, y = points
    fig = viz.plot_umap(xy=x[:, :2], labels=y, max_points=25, title='t')
    assert fig.get_suptitle() == 't · 25 of 60 points, drawn at random'
    assert sum(len(c.get_offsets()) for c in fig.axes[0].collections) == 25
    assert viz.plot_umap(xy=x[:, :2], labels=y).get_suptitle() == ''


def test_every_camera_has_a_map_of_its_own(points):
    ax = viz.plot_umap(xy=points[0][:, :2], camids=np.arange(60) % 20).axes[0]
    assert [t.get_text() for t in ax.texts] == [f'{c}: 5%' for c in range(20)]
    assert [len(c.get_offsets()) for c in ax.collections] == [57, 3] * 20  # pale: all others; blue: its own


def test_tensors_everywhere(points):
    x, y = map(torch.tensor, points)
    drawn(viz.plot_umap(xy=x[:, :2], labels=y.int(), confidence=torch.rand(60), camids=y, pids=y))
    drawn(viz.plot_camera_entropy(torch.arange(3), torch.rand(3), torch.ones(3)))


@pytest.mark.parametrize(
    'bad', [dict(labels=np.zeros(3)), dict(confidence=np.zeros((60, 1))), dict(camids=[0]), dict(pids=[])]
)
def test_lengths_are_checked(points, bad):
    with pytest.raises(ValueError, match=f'{next(iter(bad))} must hold one value for each of the 60 points'):
        viz.plot_umap(xy=points[0][:, :2], **bad)


def test_following_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    for _ in range(50):
        before, after = rng.integers(-1, 5, 40), rng.integers(-1, 7, 40)
        followed = viz._follow(after, before)
        assert ((followed < 0) == (after < 0)).all()
        pairs = set(zip(after[after >= 0], followed[after >= 0]))
        assert len({a for a, _ in pairs}) == len({f for _, f in pairs}) == len(pairs)  # one to one
    assert (viz._follow(np.full(4, -1), np.arange(4)) == -1).all()
    assert (viz._follow(np.arange(4), np.full(4, -1)) == np.arange(4)).all()


def test_evolution_with_and_without_metrics(run):
    assert len(drawn(viz.plot_evolution(run))) == 3 * 2 + 1 + 1  # maps, colour bar, counts
    lines = [dict(epoch=e, mAP=0.1 * e if e % 2 else None, rank1=0.2, clusters=4) for e in range(3)]
    (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    assert len(drawn(viz.plot_evolution(str(run), max_epochs=2))) == 2 * 2 + 1 + 2


def test_evolution_of_one_epoch_all_outliers(run):
    for f in sorted((run / 'labels').glob('*.npz'))[1:]:
        f.unlink()
    one = dict(np.load(run / 'labels/epoch_000.npz'))
    np.savez(run / 'labels/epoch_000.npz', **{**one, 'labels': np.full(50, -1)})
    drawn(viz.plot_evolution(run))


def test_evolution_of_a_killed_run_and_of_one_without_maps(run):
    (run / 'metrics.jsonl').write_text('{"epoch": 0, "nmi": 0.5}\n{"epoch": 1, "nm')
    drawn(viz.plot_evolution(run))
    arrays = dict(np.load(run / 'labels/epoch_001.npz'))
    del arrays['map']
    np.savez(run / 'labels/epoch_001.npz', **arrays)
    with pytest.raises(ValueError, match=r'maps=True\), got none in epochs \[1\]'):
        viz.plot_evolution(run)


def test_images_of_every_kind(tmp_path):
    a = np.random.default_rng(0).integers(0, 256, (2, 96, 48, 3), dtype=np.uint8)
    Image.fromarray(a[1]).save(tmp_path / 'a.png')
    kinds = [
        a,
        a.transpose(0, 3, 1, 2),
        torch.tensor(a.transpose(0, 3, 1, 2)),
        a / 255,
        [Image.fromarray(i) for i in a],
        ['', tmp_path / 'a.png'],
        ['', str(tmp_path / 'a.png')],
        SimpleNamespace(image=lambda i: Image.fromarray(a[i])),
    ]
    for images in kinds:
        assert abs(viz.image_pixels(images, 1).astype(int) - a[1]).max() <= 1


def test_rows_of_clusters():
    labels, home, sure = (
        np.array([0, 0, -1, 1, 1, -1]),
        np.array([0, 0, 0, 1, 1, 1]),
        np.array([0.1, 0.9, 0.8, 0.6, 0.7, 0.2]),
    )
    rows = viz._cluster_rows(labels, sure, home, None, 5)
    assert [list(at) for _, at in rows] == [[4, 3, 5], [1, 0, 2]]  # surer cluster first, outliers last
    rows = viz._cluster_rows(labels, sure, None, [0], 5)
    assert [list(at) for _, at in rows] == [[1, 0], [2, 5]]  # outliers in a row of their own


def test_ranking_skips_what_evaluation_skips():
    order, skipped = viz.rank_gallery(
        np.array([0.1, 0.4, 0.2, 0.3]),
        0,
        np.array([7]),
        np.array([7, 7, 8, 7]),
        np.array([0]),
        np.array([0, 1, 0, 0]),
    )
    assert list(order) == [2, 1] and list(skipped) == [True, False, False, True]


def test_ranking_draws_rows_or_all():
    rng = np.random.default_rng(0)
    split = lambda n: SimpleNamespace(
        image=lambda i: np.zeros((8, 4, 3), np.uint8),
        pids=rng.integers(0, 3, n),
        camids=rng.integers(0, 2, n),
    )
    q, g, d = split(5), split(9), rng.random((5, 9))
    names = lambda fig: [ax.get_title() for ax in fig.axes]
    assert names(viz.show_ranking(q, g, d, [4, 1])) == names(viz.show_ranking(q, g, d[[4, 1]], [4, 1]))
    with pytest.raises(ValueError, match=r'distmat must be \(5, 9\)'):
        viz.show_ranking(q, g, d.T)


def test_hardest_errors_against_sorting():
    rng = np.random.default_rng(1)
    q_pids, g_pids, q_camids, g_camids = (
        rng.integers(0, k, n) for k, n in [(4, 12), (4, 30), (3, 12), (3, 30)]
    )
    d = rng.random((12, 30))
    found, margins = viz.hardest_errors(d, q_pids, g_pids, q_camids, g_camids, n=12)
    wrong = []
    for i in range(12):
        order, _ = viz.rank_gallery(d[i], i, q_pids, g_pids, q_camids, g_camids)
        if g_pids[order[0]] != q_pids[i] and (g_pids[order] == q_pids[i]).any():
            wrong.append(i)
    assert sorted(found) == wrong and (np.diff(margins) <= 0).all() and (margins > 0).all()


def islands(k, each=12, seed=0):
    "Labels and a map of `k` clusters, some alone and some in a crowd."
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, k, each * k)
    return labels, 8 * rng.normal(size=(k + 1, 2))[labels] + 0.3 * rng.normal(size=(len(labels), 2))


def simulated(colours, eye):
    """Colours as a dichromat sees them (Machado et al. 2009, by colorspacious), as points of a space in
    which equal distances look equally different."""
    from colorspacious import cspace_convert

    if eye:
        colours = cspace_convert(
            colours, {'name': 'sRGB1+CVD', 'cvd_type': eye, 'severity': 100}, 'sRGB1'
        ).clip(0, 1)
    return cspace_convert(colours, 'sRGB1', 'CAM02-UCS')


def closest(labels, xy):
    """Pairs of clusters that touch: the clusters of points that are among the three nearest of each
    other's, and each cluster's nearest by centre."""
    inside = labels >= 0
    at, y = xy[inside], labels[inside]
    near = ((at[:, None] - at) ** 2).sum(-1).argsort(1)[:, 1:4]
    pairs = {tuple(sorted((a, b))) for a, row in zip(y, y[near]) for b in row if a != b}
    ids = np.unique(y)
    centres = np.array([at[y == j].mean(0) for j in ids])
    gaps = ((centres[:, None] - centres) ** 2).sum(-1)
    np.fill_diagonal(gaps, np.inf)
    return np.array(sorted(pairs | {tuple(sorted((a, b))) for a, b in zip(ids, ids[gaps.argmin(1)])}))


@pytest.mark.parametrize('k', [90, 300])
def test_every_cluster_has_a_colour(k):
    labels, xy = islands(k)
    for colours in (
        viz.cluster_colors(labels),
        viz.cluster_colors(labels, xy),
        viz.cluster_colors(torch.tensor(labels), torch.tensor(xy)),
    ):
        assert colours.shape == (k, 3) and (colours >= 0).all() and (colours <= 1).all()
        assert len(np.unique((255 * colours).round(), axis=0)) == k  # still different in a stored picture
        seen = simulated(colours, None)
        gaps = np.linalg.norm(seen[:, None] - seen, axis=-1) + 99 * np.eye(k)
        assert gaps.min() > 6
        for taken in ([1, 1, 1], [0, 0, 0], [154 / 255] * 3):  # paper, ink, outliers
            assert np.linalg.norm(seen - simulated(np.array([taken]), None), axis=1).min() > 6
    assert np.array_equal(viz.cluster_colors(labels, xy), viz.cluster_colors(labels, xy))


@pytest.mark.parametrize('k', [40, 90, 300])
@pytest.mark.parametrize('seed', [0, 1])
def test_neighbours_are_told_apart_by_all_eyes(k, seed):
    labels, xy = islands(k, seed=seed)
    a, b = closest(labels, xy).T
    colours, markers = viz.cluster_colors(labels, xy), np.array(viz.cluster_markers(labels, xy))
    same_shape = markers[a] == markers[b]
    assert same_shape.mean() < 0.02 and 'x' not in markers
    for eye in (None, 'deuteranomaly', 'protanomaly', 'tritanomaly'):
        seen = simulated(colours, eye)
        gaps = np.linalg.norm(seen[a] - seen[b], axis=1)
        assert (gaps[same_shape] > 5).all()  # colour or shape
        assert (gaps > 5).mean() > 0.97  # and nearly always colour alone
    seen = simulated(colours, None)
    hue = np.degrees(np.arctan2(seen[:, 2], seen[:, 1]))
    assert np.median(np.abs((hue[a] - hue[b] + 180) % 360 - 180)) > 110  # of any two: 90


def test_colours_stay_through_the_epochs():
    "Every epoch has as many colours as clusters; the last epoch's are the same whatever came before."
    rng = np.random.default_rng(0)
    labels = viz.follow_clusters([rng.integers(-1, 30, 400) for _ in range(6)])
    maps = rng.normal(size=(6, 400, 2))
    for xy in (maps, maps[-1], None):
        colours = viz.cluster_colors(labels, xy)
        for epoch in labels:
            ids = np.unique(epoch[epoch >= 0])
            assert len(np.unique(colours[ids], axis=0)) == len(ids)
        ids = np.unique(labels[-1][labels[-1] >= 0])
        assert np.array_equal(
            colours[ids], viz.cluster_colors(labels[-1], None if xy is None else maps[-1])[ids]
        )


def test_colours_of_few_of_none_and_of_very_many():
    assert viz.cluster_colors([-1, -1]).shape == (0, 3) and viz.cluster_markers([-1, -1]) == []
    assert (
        len(viz.cluster_colors([0, 0, 4], np.zeros((3, 2))))
        == len(viz.cluster_markers([0, 0, 4], np.zeros((3, 2))))
        == 5
    )
    many = viz.cluster_colors(np.arange(2500))
    assert len(np.unique(many[:2000], axis=0)) == 2000 and np.isfinite(many).all()


@pytest.mark.parametrize('k', [90, 300])
def test_a_map_shows_every_cluster_in_its_colour(k):
    labels, xy = islands(k, each=6)
    for n, said in ((len(labels), ''), (500, f'500 of {len(labels):,} points, drawn at random')):
        fig = viz.plot_umap(xy=xy, labels=labels, max_points=n)
        crosses, *dots = fig.axes[0].collections
        kept = viz.sample_points(len(labels), n)
        assert fig.get_suptitle() == said
        assert (
            sum(len(d.get_offsets()) for d in dots) == (labels[kept] >= 0).sum()
            and len(crosses.get_offsets()) == (labels[kept] < 0).sum()
        )
        colours = np.unique(np.concatenate([d.get_facecolors() for d in dots]).round(4), axis=0)
        assert len(colours) == len(np.unique(labels[kept][labels[kept] >= 0]))
        # none in the grey of outliers
        assert not np.isclose(colours[:, :3], 154 / 255, atol=0.02).all(1).any()


def test_all_points_up_to_two_thousand():
    xy = np.random.default_rng(0).normal(size=(2001, 2))
    assert viz.plot_umap(xy=xy[:2000]).get_suptitle() == ''
    assert viz.plot_umap(xy=xy).get_suptitle() == '2,000 of 2,001 points, drawn at random'


def crop_boxes(fig):
    "(left, right, bottom, top) of the crops of an atlas, in pixels of its canvas."
    return np.array([image.get_extent() for image in fig.axes[0].images])


def overlaps(boxes):
    left, right, bottom, top = boxes.T
    wide = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    high = np.minimum(top[:, None], top) - np.maximum(bottom[:, None], bottom)
    return int(((wide > 0) & (high > 0)).sum() - len(boxes)) // 2


@pytest.mark.parametrize('k, shown', [(5, 5), (90, 90), (300, 120)])
@pytest.mark.parametrize('shape', [(24, 12), (16, 16)])
def test_thumbnails_do_not_overlap(k, shown, shape):
    labels, xy = islands(k)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *shape, 3), dtype=np.uint8)
    fig = viz.plot_atlas(images, xy=xy, labels=labels, confidence=np.linspace(0, 1, len(labels)))
    fig.canvas.draw()
    boxes = crop_boxes(fig)
    assert len(boxes) == shown and overlaps(boxes) == 0
    assert ((boxes[:, 3] - boxes[:, 2]) >= 40).all()  # of 990 across: readable at page width
    (left, right), (bottom, top) = fig.axes[0].get_xlim(), fig.axes[0].get_ylim()
    assert (
        (boxes[:, 0] >= left).all()
        and (boxes[:, 1] <= right).all()
        and (boxes[:, 2] >= bottom).all()
        and (boxes[:, 3] <= top).all()
    )
    drawn = [tuple(p.get_edgecolor()[:3]) for p in fig.axes[0].patches]
    assert len(set(drawn)) == shown  # each in the colour of its cluster
    if shown < k:
        assert f'{shown} of {k} clusters' in fig.axes[0].get_title()


def test_no_room_is_said_and_nothing_overlaps():
    corners = viz.crop_places(np.full((9, 2), 50.0), np.zeros((0, 2)), (100, 100), np.array([40, 40]))
    assert np.isnan(corners).any(1).sum() >= 5  # no more than four fit
    one = corners[~np.isnan(corners).any(1)]
    assert overlaps(np.stack([one[:, 0], one[:, 0] + 40, one[:, 1], one[:, 1] + 40], 1)) == 0


def test_atlas_shows_the_surest_member_of_a_cluster_or_cell(points, monkeypatch):
    x, y = points
    asked = []
    real = viz.image_pixels
    monkeypatch.setattr(
        viz, 'image_pixels', lambda images, i, *a: asked.append(int(i)) or real(images, i, *a)
    )
    images, sure = np.zeros((60, 8, 4, 3), np.uint8), np.random.default_rng(1).random(60)
    viz.plot_atlas(images, xy=x[:, :2], labels=y, confidence=sure)
    assert sorted(asked) == sorted(int(np.flatnonzero(y == j)[sure[y == j].argmax()]) for j in range(6))
    asked.clear()
    viz.plot_atlas(images, x, confidence=sure, cells=3)
    assert sure.argmax() in asked and len(asked) <= 9
    asked.clear()
    viz.plot_atlas(np.zeros((600, 8, 4, 3), np.uint8), xy=x[:, :2], labels=y, index=10 * np.arange(60))
    assert all(i % 10 == 0 for i in asked) and len(asked) == 6
    # no cluster: no crop, still a map
    assert len(drawn(viz.plot_atlas(images, xy=x[:, :2], labels=np.full(60, -1)))) == 1
    with pytest.raises(ValueError, match="got 'cluster'"):
        viz.plot_atlas(images, x, by='cluster')


def test_faces_are_blurred_on_demand():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 64, 32, 3), dtype=np.uint8)
    seen = [
        np.asarray(
            viz.plot_atlas(images, xy=np.zeros((1, 2)), blur_faces=blur).axes[0].images[0].get_array()
        ).astype(int)
        for blur in (False, True)
    ]
    changed = np.abs(seen[0] - seen[1]).mean((1, 2))
    # the upper quarter of 220 rows, and nothing below
    assert changed[:50].min() > 20 and changed[60:].max() == 0


def test_the_camera_map_says_how_far_neighbours_follow_cameras():
    "Two clouds, one a camera: all neighbours are the own camera's, where chance would give about half."
    rng = np.random.default_rng(0)
    camids = np.repeat([0, 1], 40)
    xy = rng.normal(size=(80, 2)) + 50 * camids[:, None]
    title = ' '.join(viz.plot_umap(xy=xy, camids=camids).axes[0].get_title().split())
    assert 'Of the 15 nearest dots, own camera: 100%, chance: 49%' in title


@pytest.mark.parametrize(
    'panels', [('labels',), ('labels', 'confidence'), ('labels', 'camids', 'pids'), 'all']
)
def test_clouds_fill_their_panels_and_titles_stay_apart(panels):
    rng = np.random.default_rng(0)
    at = rng.normal(size=(600, 2)) * [3, 2]
    known = dict(
        labels=rng.integers(-1, 40, 600),
        confidence=rng.random(600),
        camids=rng.integers(0, 6, 600),
        pids=rng.integers(0, 40, 600),
    )
    fig = viz.plot_umap(xy=at, **{k: v for k, v in known.items() if panels == 'all' or k in panels})
    fig.draw_without_rendering()  # lays out
    axes = [ax for ax in fig.axes if ax.get_title()]
    titles = [ax.title.get_window_extent() for ax in axes]
    assert all(t.x0 >= 0 and t.x1 <= fig.bbox.width and t.y1 <= fig.bbox.height for t in titles)
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
    assert not any(t.overlaps(ax.get_window_extent()) for t in titles for ax in axes)
    for ax in axes:
        low, high = ax.transData.transform(ax.dataLim.get_points())
        box = ax.get_window_extent()
        assert (high[0] - low[0]) / box.width > 0.85 and (high[1] - low[1]) / box.height > 0.85
