"""What a large folder of one's own costs: 100,000 small files, one in twenty broken, five formats, odd names, loops of links.

python tests/benchmarks/folder.py [N] [FOLDER]     # FOLDER is kept; the default is made and removed
"""

import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ccc.data import load_dataset
from ccc.folder import check_images, keep_readable, walk_files

KINDS = [('.jpg', 'JPEG'), ('.png', 'PNG'), ('.webp', 'WEBP'), ('.bmp', 'BMP'), ('.gif', 'GIF')]
NAMES = [
    'plain',
    'two words',
    'ü人',
    '-rf',
    "quote'd",
    'new\nline',
    os.fsdecode(b'latin\xe9'),
    '#%&',
    'x' * 120,
    '<b>',
]


def make(root, n):
    "n files in 100 folders."
    rng, made = np.random.default_rng(0), []
    # 200 pictures of all sizes and formats, written again and again with other last bytes
    for i in range(200):
        image = Image.fromarray(rng.integers(0, 255, (8, 4, 3), dtype=np.uint8)).resize(
            (12 + i % 40, 32 + i % 80)
        )
        image.save(buffer := io.BytesIO(), KINDS[i % 5][1])
        made.append((KINDS[i % 5][0], buffer.getvalue()))
    for i in range(n):
        folder = root / f'{i % 100:02d}'
        if i < 100:
            folder.mkdir(parents=True)
        suffix, data = made[i % 200]
        (folder / f'{NAMES[i // 100 % 10]}_{i}{suffix}').write_bytes(
            data[: len(data) // 3] if i % 20 == 7 else data + i.to_bytes(4, 'big')
        )
    (root / '00/round').symlink_to(root)
    (root / '01/up').symlink_to(root.parent)


def timed(name, run, *args):
    before, start, own = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        time.perf_counter(),
        time.process_time(),
    )
    result = run(*args)
    spent, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f'{name:32}{spent:8.1f} s, {time.process_time() - own:6.1f} s of CPU   peak memory'
        f' {after / 1024:7.0f} MB (+{(after - before) / 1024:.0f})',
        flush=True,
    )
    return result


def index(n, dim=512, queries=100):
    "An index of n embeddings: making it, saving it, searching it."
    from ccc.model import Index

    x = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        made = timed(f'Index of {n:,} x {dim}', Index, x, [f'{i}.jpg' for i in range(n)], 'none')
        timed('save', made.save, Path(folder) / 'i.faiss')
        back = timed('load', Index.load, Path(folder) / 'i.faiss')
    assert (
        timed(f'search {queries}, k 10', back.search, x[:queries], 10)[1][:, 0] == np.arange(queries)
    ).all()


def main(n, root):
    if not root.exists():
        timed(f'make {n:,} files', make, root, n)
    print(f'{len(os.sched_getaffinity(0))} core')
    files = timed('walk', walk_files, root)
    data = timed('load_dataset (walks twice)', load_dataset, 'folder', root)
    check = timed('check_images (reads all)', check_images, data)
    kept = timed('keep_readable', keep_readable, data, check)
    print(check)
    index(n)
    assert (
        len(files) == len(data.train) == n
        and len(check.faults()) == n // 20
        and len(kept.train) == n - n // 20
    )


if __name__ == '__main__':
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    if len(sys.argv) > 2:
        main(n, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(n, Path(folder) / 'files')
