"""ResNet-50 at the size of the published runs, from random weights, on one CPU core: what each stage of an epoch of Market-1501 would take.

OMP_NUM_THREADS=1 python tests/benchmarks/full_size_cpu.py     # about a minute
"""

import resource
import time

import torch

from ccc.engine import extract_embeddings, make_engine, measured_peak, training_flops
from ccc.experiments import recipe
from ccc.training import Chunked, make_network

torch.set_num_threads(1)
config = recipe('market1501-hdc', resnet_pretrained='none', batch_size=32, device='cpu')
net = make_network(config).to(memory_format=torch.channels_last)
embed, optimizer, engine = Chunked(net, 2), torch.optim.Adam(net.parameters(), lr=1e-4), make_engine(config)
pixels = torch.randint(0, 256, (96, 3, 256, 128), dtype=torch.uint8)
batch = torch.randn(32, 3, 256, 128).contiguous(memory_format=torch.channels_last)


def rate(images, times, work):
    "Images a second, after one turn to warm up."
    work()
    start = time.perf_counter()
    for _ in range(times):
        work()
    return images * times / (time.perf_counter() - start)


def step():
    optimizer.zero_grad()
    embed(batch).sum().backward()
    optimizer.step()


seen = rate(96, 1, lambda: extract_embeddings(net, pixels, 32, engine))
net.train()
learnt = rate(32, 3, step)
operations, peak = training_flops(net, 256, 128), measured_peak(torch.device('cpu'))
print(
    f'train {learnt:.2f} images/s, embed {seen:.2f} images/s, {operations / 1e9:.1f} thousand million'
    f' operations an image, {learnt * operations / peak:.0%} of the peak, peak memory'
    f' {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB'
)
print(
    f'an epoch in minutes: embed {12936 / seen / 60:.0f}, train {200 * 256 / learnt / 60:.0f}, evaluate'
    f' {(3368 + 15913) / seen / 60:.0f}'
)
