"The drawn city: same pictures for the same numbers, whole folders only, every knob turns."

from dataclasses import replace

import numpy as np
import pytest

import ccc.city
from ccc.city import CAMERAS, City, city_folder, city_plan, render, write_city

TINY = City(n_train=2, n_test=2, n_distractors=1, n_junk=1)


def test_plan_is_fair():
    plan = city_plan(City())
    assert len({p[1] for p in plan if p[0] == 'query'}) == sum(p[0] == 'query' for p in plan) and len(
        {p[:2] for p in plan}
    ) == len(plan)
    train = [p for p in plan if p[0] == 'bounding_box_train']
    assert 850 <= len(train) <= 900 and {p[3] for p in train} == set(range(6))
    assert all(len({p[3] for p in train if p[2] == pid}) >= 4 for pid in range(1, 61))
    gallery = {(p[2], p[3]) for p in plan if p[0] == 'bounding_box_test'}
    assert all(any(g[0] == p[2] and g[1] != p[3] for g in gallery) for p in plan if p[0] == 'query')


def test_nobody_dresses_alike():
    people = {City().person(p) for p in range(1, 101)}
    assert len(people) == 100


@pytest.mark.parametrize(
    'knob', ['cast', 'light', 'blur', 'noise', 'occlusion', 'variety', 'loose', 'scenery', 'zoom']
)
def test_every_knob_turns(knob):
    values = (1, 1.3) if knob == 'zoom' else (0, 1)
    pictures = [np.stack([render(replace(TINY, **{knob: v}), 1, c) for c in range(6)]) for v in values]
    assert (pictures[0] != pictures[1]).any()
    assert city_folder(replace(TINY, **{knob: values[0]})) != city_folder(replace(TINY, **{knob: values[1]}))


def test_all_kinds_of_pictures():
    for pid in (-1, 0, 7):
        for camid in range(len(CAMERAS)):
            assert render(TINY, pid, camid, 2).size == (64, 128)
    assert (np.asarray(render(TINY, 0, 0, 0)) != np.asarray(render(TINY, 0, 0, 1))).any()


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*a):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(ccc.city, 'render', fail)
        with pytest.raises(KeyboardInterrupt):
            write_city(TINY, tmp_path / 'x', progress=False)
    assert list(tmp_path.iterdir()) == []
    # the second finds the first's
    assert write_city(TINY, tmp_path / 'x', progress=False) == write_city(
        TINY, tmp_path / 'x', progress=False
    )
    assert (
        len(list((tmp_path / 'x').rglob('*.jpg'))) == len(city_plan(TINY))
        and len(list(tmp_path.iterdir())) == 1
    )
