"Evolution, confidence, widgets: what the notebooks do not show of odd runs, many points and errors."

import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ccc import confidence, evolution, widgets


def write(run, epochs=3, n=50, m=20, seed=0, maps=True, cameras=True, labels=None):
    (run / 'labels').mkdir(parents=True)
    rng = np.random.default_rng(seed)
    index = np.sort(rng.choice(n, m, replace=False))
    for e in range(epochs):
        arrays = dict(
            labels=rng.integers(-1, 4, n).astype(np.int32) if labels is None else labels,
            confidence=rng.random(n, dtype=np.float32),
        )
        if maps:
            arrays |= dict(map=rng.normal(size=(m, 2)).astype(np.float32), map_index=index)
        if maps and cameras:
            arrays |= dict(camids=rng.integers(0, 3, m))
        np.savez(run / f'labels/epoch_{e:03d}.npz', **arrays)
    return run


def drawn(fig):
    fig.canvas.draw()
    return fig


def test_cameras_from_the_files_are_known_only_on_the_map(tmp_path):
    h = evolution.read_history(write(tmp_path))
    assert (h.camids >= 0).sum() == 20 and (np.flatnonzero(h.camids >= 0) == h.index).all()
    assert 0 <= evolution.label_signs(h)['camera_nmi'][0] <= 1
    drawn(evolution.plot_camera_matrix(h.labels[0], h.camids))


def test_maps_of_different_images_are_refused(tmp_path):
    write(tmp_path)
    arrays = dict(np.load(tmp_path / 'labels/epoch_001.npz'))
    np.savez(tmp_path / 'labels/epoch_001.npz', **arrays | dict(map_index=arrays['map_index'][::-1]))
    with pytest.raises(ValueError, match='different map_index'):
        evolution.read_history(tmp_path)


def test_one_epoch_and_only_outliers(tmp_path):
    h = evolution.read_history(write(tmp_path, epochs=1, labels=np.full(50, -1)))
    with np.errstate(all='raise'):
        flow = evolution.label_flow(h.labels[0], h.labels[0])
    assert flow['out'] == 50 and not len(flow['died']) and flow['churn'] == 1
    drawn(evolution.plot_signs(h))
    assert Image.open(io.BytesIO(evolution.animate_evolution(h, width=300))).format == 'PNG'
    with pytest.raises(ValueError, match='at least two epochs, got 1'):
        evolution.plot_flow(h)
    assert 'outliers' in widgets.Explorer(h).text.value or '50 outliers' in widgets.Explorer(h).text.value


def test_flow_counts_every_image_once():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = rng.integers(-1, 6, 80), rng.integers(-1, 6, 80)
        flow = evolution.label_flow(a, b)
        assert sum(flow[k] for k in ('stay', 'change', 'fall_out', 'come_back', 'out')) == 80


def test_a_sample_is_said_in_the_animation_and_the_view(tmp_path):
    h = evolution.read_history(write(tmp_path))
    assert evolution._sample_note(h) == '20 of 50 images, drawn at random'
    view = widgets.Explorer(h, max_points=10)
    assert '10 of 50 images, drawn at random' in view.text.value and len(view.figure.data[0].x) == 10
    view.show(epoch=0, right='camera')
    assert np.allclose(view.figure.data[1].x, h.maps[0][np.searchsorted(h.index, view.index), 0])


def test_outliers_keep_their_cross_in_every_colouring(tmp_path):
    h = evolution.read_history(
        write(tmp_path), SimpleNamespace(pids=np.arange(50) % 30, camids=np.arange(50) % 12)
    )
    for kind in ('cluster', 'confidence', 'camera', 'person'):
        marker, out = widgets._marker(h, kind, 0, h.index, 6), h.labels[0, h.index] < 0
        assert (marker['symbol'][out] == 4).all() and (marker['symbol'][~out] != 4).all()


def test_hundred_thousand_images(tmp_path):
    h = evolution.read_history(write(tmp_path, epochs=2, n=100_000, m=1000))
    drawn(evolution.plot_signs(h))
    drawn(evolution.plot_flow(h))
    assert '1,000 of 100,000 images' in widgets.Explorer(h).text.value


def test_views_need_nothing_to_be_imported():
    code = (
        "import sys, ccc.widgets, ccc.evolution; print([m for m in ('plotly', 'ipywidgets', 'anywidget',"
        " 'matplotlib', 'torch') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == '[]'
    )


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'plotly', None)
    monkeypatch.setitem(sys.modules, 'plotly.graph_objects', None)
    with pytest.raises(ImportError, match=r"pip install 'ccc-reid\[notebook\]'"):
        widgets.controls(lambda: None)


def test_limits_are_those_of_hdc():
    from ccc.hdc import peripheral_objects

    rng = np.random.default_rng(0)
    labels, h = rng.integers(0, 9, 200).astype(np.int32), rng.random(200).astype(np.float32)
    _, _, limit = confidence.peripheral_limits(labels, h, 1.0)
    assert ((h > limit[labels].astype(np.float32)) == peripheral_objects(labels, h, 9, 1.0)).all()


@pytest.mark.parametrize('rule', ['hd_camera', 'cm', 'tccl_camera'])
def test_chd_of_one_image_and_one_camera(rule):
    z = np.eye(3, dtype=np.float32)[:1]
    assert confidence.rule_choices(z, [0], np.eye(3)[1])[rule] in ([0], [-1])
    d, s, h = confidence.harmonic_scores(z, [0], np.eye(3, dtype=np.float32)[0])
    assert np.allclose([d[0], s[0], h[0]], [0, 2, 0])
    drawn(confidence.plot_chd(z, [0], np.eye(3)[1]))


def test_every_picture_is_scaled_to_its_own_cloud(tmp_path):
    """The first cloud is a fifth as wide as the last, and as wide on the film; dots keep the colour of
    their cluster."""
    run = write(tmp_path)
    for e, wide in enumerate((1, 3, 5)):
        arrays = dict(np.load(run / f'labels/epoch_{e:03d}.npz'))
        np.savez(run / f'labels/epoch_{e:03d}.npz', **arrays | dict(map=wide * arrays['map'] + 100 * e))
    h = evolution.read_history(run)
    film, colours = evolution._Film(h, 720), {}
    for moment, _ in evolution._moments(h, 2, 0.7):
        film.draw(*moment)
        ax, crosses, dots = film.clouds[0]
        at = np.concatenate([crosses.get_offsets(), dots.get_offsets()])
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert 0.9 < max(np.ptp(at[:, 0]) / (right - left), np.ptp(at[:, 1]) / (top - bottom)) < 1
        assert (
            left < at[:, 0].min()
            and at[:, 0].max() < right
            and bottom < at[:, 1].min()
            and at[:, 1].max() < top
        )
        shown = h.labels[moment[0], h.index]
        for j, colour in zip(shown[shown >= 0], dots.get_facecolors()):
            assert tuple(colour) == colours.setdefault(j, tuple(colour))
    assert len(set(colours.values())) == len(colours)


def test_a_film_shows_the_clusters_in_their_own_colours(tmp_path):
    "A palette of mixtures made greys of some clusters."
    run = write(tmp_path, n=400, m=400)
    for e in range(3):
        arrays = dict(np.load(run / f'labels/epoch_{e:03d}.npz'))
        np.savez(run / f'labels/epoch_{e:03d}.npz', **arrays | dict(labels=np.arange(400) % 40))
    h = evolution.read_history(run)
    played = Image.open(io.BytesIO(evolution.animate_evolution(h, between=0)))
    pixels = {tuple(p) for p in np.asarray(played.convert('RGB')).reshape(-1, 3).tolist()}
    colours = np.round(255 * evolution.cluster_colors(h.labels[:, h.index], h.maps)).astype(int)
    assert len(colours) == 40 and {tuple(c) for c in colours.tolist()} <= pixels


def test_the_numbers_beside_the_film(tmp_path):
    import json

    h = evolution.read_history(
        write(tmp_path), SimpleNamespace(pids=np.arange(50) % 30, camids=np.arange(50) % 12)
    )
    h.rows[:] = [json.loads('{"epoch": 0, "mAP": null}'), dict(epoch=2, mAP=0.1234)]
    film = evolution._Film(h, 720)
    names, last = [n for n, _ in film.numbers[0]], dict(film.numbers[2])
    assert names == [
        'epoch',
        'clusters',
        'outliers',
        'AMI, people',
        'AMI, cameras',
        'own camera, 15 nearest',
        'the same by chance',
    ]
    assert (
        last['epoch'] == '3 of 3'
        and last['mAP'] == '12.3%'
        and last['outliers'] == str((h.labels[2] < 0).sum())
    )


@pytest.mark.parametrize('kind', ['png', 'gif', 'webp'])
def test_a_film_is_720_pixels_wide_in_every_kind(tmp_path, kind):
    h = evolution.read_history(write(tmp_path, epochs=2))
    played = Image.open(evolution.save_film(h, tmp_path / f'film.{kind}', between=1, width=720))
    assert played.size[0] == 720 and played.n_frames == 3 and played.format == kind.upper()


def test_a_video_needs_ffmpeg_and_says_so(tmp_path, monkeypatch):
    from matplotlib.animation import FFMpegWriter

    h = evolution.read_history(write(tmp_path, epochs=2))
    if FFMpegWriter.isAvailable():
        for name in ('film.mp4', 'film.webm'):
            assert evolution.save_film(h, tmp_path / name, between=1, width=361).stat().st_size > 1000
    monkeypatch.setattr(FFMpegWriter, 'isAvailable', classmethod(lambda cls: False))
    with pytest.raises(
        FileNotFoundError, match='other.mp4 needs the program ffmpeg, which is not installed here'
    ):
        evolution.save_film(h, tmp_path / 'other.mp4')
    with pytest.raises(ValueError, match="kind must be 'png', 'gif' or 'webp'; got 'mpg'"):
        evolution.animate_evolution(h, kind='mpg')
