"""What another number of threads changes in the first epochs of the stored runs: the tolerance of `.ci/stored.py check`.

python tests/benchmarks/threads.py [EPOCHS]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / '.ci'))
import stored  # noqa: E402

from ccc.training import Trainer  # noqa: E402


def rows(config, threads, epochs):
    "The first epochs on so many threads."
    torch.set_num_threads(threads)
    trainer = Trainer(replace(config, maps=False))
    return [trainer.step() for _ in range(epochs)]


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else stored.CHECKED_EPOCHS
for name in ('city', 'study'):
    for config in stored.SETS[name].checked():
        one, two = (rows(config, threads, epochs) for threads in (1, 2))
        for a, b in zip(one, two):
            mAP = f', mAP {100 * a["mAP"]:.2f} and {100 * b["mAP"]:.2f} %' if 'mAP' in a else ''
            print(
                f'{name}, epoch {a["epoch"] + 1}: loss {a["loss"]:.4f} on one thread, {b["loss"]:.4f} on two'
                f' ({abs(a["loss"] / b["loss"] - 1):.2%}){mAP}',
                flush=True,
            )
