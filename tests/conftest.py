"Golden arrays and the interpreted twins of the compiled kernels, for every test file."

import importlib.util
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import ccc

# Drawn examples are the same in every run, here and in CI, and nothing is kept between runs.
hypothesis.settings.register_profile('same', deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile('same')
GOLDEN = Path(__file__).parent / 'golden'


def golden(name):
    "The arrays of `tests/golden/NAME.npz` as a dict."
    with np.load(GOLDEN / f'{name}.npz') as arrays:
        return dict(arrays)


def interpreted(name):
    "`ccc/NAME.py` as plain Python, whether or not its compiled form is installed."
    path = Path(ccc.__file__).parent / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'interpreted{name}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=['compiled', 'interpreted'])
def both_ways(request, monkeypatch):
    """Call it with a stage's module and its kernels' name: the test then runs on compiled and on
    interpreted kernels."""

    def use(stage, name):
        if request.param == 'interpreted':
            monkeypatch.setattr(stage, 'kernels', interpreted(name))
        else:
            assert stage.kernels.is_compiled(), (
                f'{name} is not compiled: run `python setup.py build_ext --inplace`'
            )
        return request.param

    return use
