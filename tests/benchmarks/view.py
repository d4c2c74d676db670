"""CPU seconds that the kernel needs to open an interactive view of 12,936 points in 750 clusters.

python tests/benchmarks/view.py       # the first view of a process loads plotly; the others are what a reader waits for
pytest -s tests/test_browser.py -k twelve       # the same view in JupyterLab and a browser, seconds on the clock
"""

import time

import numpy as np

from ccc.widgets import explore_map

rng = np.random.default_rng(0)
labels = rng.integers(-1, 750, 12_936)
xy = 40 * rng.normal(size=(751, 2))[labels] + rng.normal(size=(12_936, 2))
confidence = rng.random(12_936)


class Split:
    pids, camids = labels, rng.integers(0, 6, 12_936)

    def image(self, i):
        return np.full((64, 32, 3), i % 255, np.uint8)


for k in range(4):
    start = time.process_time()
    panel = explore_map(xy, labels, confidence, Split())
    made = time.process_time() - start
    panel._repr_mimebundle_()  # what a notebook asks of a value that it shows
    print(f'view {k + 1}: made in {made:.2f} s, shown in {time.process_time() - start - made:.2f} s of CPU')
