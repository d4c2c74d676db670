"""CPU time of `model.embed(frame, boxes=…)` against the bare network on images that are ready, interleaved
in one process: python tests/benchmarks/embed_overhead.py [arch]"""

import sys
import time

import numpy as np
import torch

from ccc.config import Config
from ccc.model import from_network, describe
from ccc.training import make_network

torch.set_num_threads(1)
for arch, height, width in (
    [(sys.argv[1], 256, 128)]
    if len(sys.argv) > 1
    else [('resnet50', 256, 128), ('resnet18', 256, 128), ('resnet18', 64, 32)]
):
    config = Config(arch=arch, resnet_pretrained='none', height=height, width=width, device='cpu')
    net = make_network(config)
    model = from_network(net, describe(net, config, 'random'), 'cpu')
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 255, (1080, 1920, 3), dtype=np.uint8)
    corners = rng.integers(0, (1700, 700), (16, 2))
    boxes = np.hstack([corners, corners + rng.integers((60, 150), (140, 350), (16, 2))])
    ready, times = torch.randn(16, 3, height, width), dict(embed=[], bare=[])

    def bare():
        with torch.inference_mode():
            model.module.net(ready)

    for i in range(8):
        for name, call in (('embed', lambda: model.embed(frame, boxes=boxes)), ('bare', bare)):
            start = time.process_time()
            call()
            if i:
                times[name].append(time.process_time() - start)  # the first one warms up
    embed, network = np.median(times['embed']), np.median(times['bare'])
    print(
        f'{arch} {height}x{width}, 16 boxes of a 1920x1080 frame: embed {embed:.3f} s, bare network'
        f' {network:.3f} s of CPU, ratio {embed / network:.3f}'
    )
