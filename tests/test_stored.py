"""The runs whose numbers the notebooks print are what the code makes: `.ci/stored.py` trains their first
epochs again."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ccc import parts
from ccc.config import NUMERICS

spec = importlib.util.spec_from_file_location('stored', Path(__file__).parents[1] / '.ci/stored.py')
stored = sys.modules['stored'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stored)


def test_every_stored_run_is_of_the_training_that_stands():
    for path in stored.STORED.glob('**/config.json'):
        assert json.loads(path.read_text()).get('numerics') == NUMERICS, path
    for name, chosen in stored.SETS.items():
        for config in chosen.configs():
            assert stored.stored_run(name, config).is_dir(), (name, config)


@pytest.mark.parametrize('name', stored.SETS)
def test_the_first_epochs_come_out_as_stored(name, monkeypatch):
    why = stored.SETS[name].needs()
    if why:
        pytest.skip(why)
    monkeypatch.chdir(stored.ROOT)
    assert stored.check([name]) == []


def test_another_augmentation_turns_it_red(monkeypatch):
    "Random erasing left out, everything else alike: the losses of the first epochs say so."
    real = parts.augment
    monkeypatch.setattr(
        parts, 'augment', lambda images, generator, **options: real(images, generator, erase=0, **options)
    )
    said = stored.check_run(stored.STUDY, stored.stored_run('study', stored.STUDY))
    assert any('loss' in line for line in said), said


def test_other_numerics_turn_it_red(monkeypatch):
    monkeypatch.setattr(stored, 'NUMERICS', NUMERICS + 1)
    assert stored.check_run(stored.STUDY, stored.stored_run('study', stored.STUDY)) == [
        f'it was made under NUMERICS {NUMERICS}, the code has {NUMERICS + 1}'
    ]


def test_a_run_of_another_seed_turns_it_red():
    said = stored.check_run(replace(stored.STUDY, seed=2), stored.stored_run('study', stored.STUDY))
    assert said, 'the comparison cannot fail'
