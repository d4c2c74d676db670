"""What the gate before the kernels costs, as a share of the label step: CPU time in one process, so that a busy machine does not matter.

    python tests/benchmarks/gate.py EMBEDDINGS.npz [--unchecked FOLDER] [--repeats 5]

The questions asked in NumPy are timed where they are asked. What is asked inside the loop of `assign` is not: with `--unchecked`, a folder
of kernels built before there was a gate, both builds take turns on the same input.
"""

import argparse
import importlib.machinery
import importlib.util
import time
from pathlib import Path

import numpy as np

from ccc import _gate, _hdc_kernels, hdc, neighbors
from ccc.labels import make_labels

SPENT = {}


def timed(module, name):
    "Count the CPU time of the outermost call of a gate function."
    function = getattr(module, name)

    def wrapper(*args, **kwargs):
        if SPENT.get('inside'):
            return function(*args, **kwargs)
        SPENT['inside'], start = True, time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT['inside'] = False
            SPENT[name] = SPENT.get(name, 0) + time.process_time() - start

    setattr(module, name, wrapper)


def unchecked(folder, name):
    "A kernel module from another build, beside the one in use."
    path = next(Path(folder).glob(f'{name}.*.so'))
    loader = importlib.machinery.ExtensionFileLoader(f'ccc.{name}', str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(f'ccc.{name}', loader))
    loader.exec_module(module)
    return module


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('embeddings')
    parser.add_argument('--unchecked')
    parser.add_argument('--repeats', type=int, default=5)
    options = parser.parse_args()
    with np.load(options.embeddings) as arrays:
        x = arrays['features'].astype(np.float32)
    graph = neighbors.jaccard_distance(x)
    captured = {}
    assign = _hdc_kernels.assign

    def capture(*args):
        captured['args'] = args
        return assign(*args)

    hdc.kernels = type(
        'kernels',
        (),
        dict(assign=staticmethod(capture), stored_twice=staticmethod(_hdc_kernels.stored_twice)),
    )
    list(zip(range(2), hdc.hdc_rounds(x, graph, np.arange(750))))
    hdc.kernels = _hdc_kernels
    for module, name in [
        (_gate, n)
        for n in (
            'embeddings',
            'within_squares',
            'finite_norms',
            'indices',
            'offsets',
            'same_length',
            'whole',
            'number',
        )
    ] + [(hdc, 'as_graph'), (neighbors, '_checked_ranks'), (neighbors, '_first_copies')]:
        timed(module, name)
    shares = []
    for _ in range(options.repeats):
        SPENT.clear()
        start = time.process_time()
        make_labels(x, 'hdc', n_clusters=750, random_state=0)
        whole = time.process_time() - start
        spent = {k: v for k, v in SPENT.items() if k != 'inside'}
        shares.append(
            (
                sum(v for k, v in spent.items() if k != '_first_copies') / whole,
                spent.get('_first_copies', 0) / whole,
            )
        )
        print(
            f'label step {whole:.2f} s; gate {shares[-1][0]:.2%}; search for copies {shares[-1][1]:.2%};',
            ', '.join(f'{k} {v * 1e3:.1f} ms' for k, v in spent.items()),
            flush=True,
        )
    print(
        f'N = {len(x)}: gate {np.median([a for a, _ in shares]):.2%} of the label step, search for copies'
        f' {np.median([b for _, b in shares]):.2%} (medians of {options.repeats})'
    )
    if not options.unchecked:
        return
    old, times = unchecked(options.unchecked, '_hdc_kernels').assign, ([], [])
    for _ in range(4 * options.repeats):
        for own, function in zip(times, (old, assign)):
            start = time.process_time()
            function(*captured['args'])
            own.append(time.process_time() - start)
    print(
        f'a call of assign: {np.median(times[1]) / np.median(times[0]) - 1:+.2%} (medians of'
        f' {4 * options.repeats}, in turn)'
    )


if __name__ == '__main__':
    main()
