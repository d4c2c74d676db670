"""How fast training is: steps in every arithmetic, augmentation against torchvision, an epoch of the Market-1501 recipe by stage.

    python tests/benchmarks/training.py steps     # images a second, ms a step, share of the measured matrix peak, with and without bf16, channels last, compile
    python tests/benchmarks/training.py augment   # the batched augmentation against torchvision, an image at a time
    python tests/benchmarks/training.py epoch --root DATA   # one epoch by stage, and what 60 of them take; without --root on as many random images

Prints markdown tables. On a machine without a GPU say --arch resnet18 --height 64 --width 32 --batch-size 64 --steps 5.
"""
import argparse
import itertools
import os
import platform
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch

from ccc.config import Config
from ccc.data import ReIDDataset, Split, apply_augmentation, draw_augmentation
from ccc.engine import measured_peak, training_flops
from ccc.experiments import recipe
from ccc.labels import PseudoLabels
from ccc.training import Stages, Trainer

COUNTS = dict(train=(12936, 751), query=(3368, 750), gallery=(15913, 750))


def machine():
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no GPU'
    return f'{gpu}, {len(os.sched_getaffinity(0))} CPU cores in use ({platform.machine()}), torch {torch.__version__}, {torch.get_num_threads()} threads'


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


def random_market(scale=1.):
    "As many images, people and cameras as Market-1501, in noise: what it costs does not depend on what is to be seen."
    rng, parts = np.random.default_rng(0), []
    for n, ids in COUNTS.values():
        n = int(n * scale)
        parts.append(Split(np.arange(n).astype(str), rng.integers(0, max(2, int(ids * scale)), n), rng.integers(0, 6, n)))
    return ReIDDataset('random', '.', *parts)


def random_images(n, config):
    return torch.randint(0, 256, (n, 3, config.height, config.width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def steps(args, config):
    "One row for each arithmetic: time of a training step after some to warm up."
    data = random_market(max(.02, args.batch_size / 12936))
    n = len(data.train)
    labels = PseudoLabels((np.arange(n) % (n // 16)).astype(np.int32), np.ones(n, np.float32), None)
    print('| precision | channels last | compile | images/s | ms/step | share of peak | memory GB |\n|---|---|---|---|---|---|---|')
    for precision, last, compiled in itertools.product(('fp32', 'bf16'), ('off', 'on'), (False, True)):
        if compiled and args.no_compile: continue
        t = Stages(replace(config, precision=precision, channels_last=last, compile=compiled, iters=args.warmup), data)
        t._images['train'] = random_images(n, config).to(t.engine.device)
        own = replace(labels, centroids=np.random.default_rng(0).normal(size=(n // 16, t.net.dim)).astype(np.float32))
        if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
        t.train_epoch(own)
        t.config.iters, start = args.steps, (wait(), time.perf_counter())[1]
        t.train_epoch(own)
        wait()
        took = (time.perf_counter() - start) / args.steps
        share = training_flops(t.net, config.height, config.width) * config.batch_size / took / measured_peak(t.engine.device, precision)
        memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float('nan')
        print(f'| {precision} | {last} | {compiled} | {config.batch_size / took:.0f} | {1000 * took:.1f} | {share:.0%} | {memory:.1f} |', flush=True)
    for precision in ('fp32', 'bf16'): print(f'\nmeasured {precision} matrix product: {measured_peak(t.engine.device, precision) / 1e12:.2f} TFLOP/s')


def augmentation(args, config):
    "Images a second of the batch and of torchvision's transforms, from decoded uint8 to the normalised float batch."
    from torchvision import transforms as T
    device = torch.device('cuda' if torch.cuda.is_available() and args.device != 'cpu' else 'cpu')
    images = random_images(args.batch_size, config).to(device)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    one = T.Compose([T.RandomHorizontalFlip(), T.Pad(10), T.RandomCrop((config.height, config.width)), T.ConvertImageDtype(torch.float32), T.Normalize(mean, std), T.RandomErasing(.5, (.02, .4), (.3, 1 / .3), mean)])
    def batched(): return apply_augmentation(images, draw_augmentation(len(images), config.height, config.width))
    def single(): return torch.stack([one(u) for u in images])
    ours = device.type == 'cpu' and torch.get_num_threads() == 1       # then CPU time, which other programs on the machine do not change
    clock = time.process_time if ours else time.perf_counter
    times = {batched: [], single: []}
    for _ in range(args.steps + 1):
        for f in times:                                                # in turn: both meet the same neighbours
            start = clock(); f(); wait()
            times[f].append(clock() - start)
    for f, name in ((batched, 'batched'), (single, 'torchvision, an image at a time')):
        print(f'{name:34} {len(images) / np.median(times[f][1:]):8.0f} images/s   (median of {args.steps}, {device.type}, {"CPU time of one thread" if ours else "wall time"})')


def epoch(args, config):
    "Two epochs, the second one by stage; the first pays for compiling and for looking for kernels."
    with tempfile.TemporaryDirectory() as logs:
        config = replace(config, num_epochs=60, log_dir=logs, warmup_with_dbscan=False, warmup_iters=0, **({} if args.root is None else dict(root_dir=args.root)))
        t = Trainer(config, random_market(args.scale) if args.root is None else None)
        if args.root is None: t._images = {s: random_images(len(getattr(t.dataset, s)), config).to(t.engine.device) for s in ('train', 'query', 'gallery')}
        t.start()
        for _ in range(2):
            row = t.step()
            t.record(row)
        t.evaluate()
        seconds = t.seconds
        print('| stage | seconds |\n|---|---|', *(f'| {k} | {v:.2f} |' for k, v in seconds.items()), sep='\n')
        each, rated = sum(v for k, v in seconds.items() if k not in ('evaluate', 'decode')), 13
        print(f'\n{row["speed"]}\n60 epochs and {rated} evaluations: {(60 * each + rated * seconds["evaluate"]) / 60:.1f} minutes')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['steps', 'augment', 'epoch'])
    p.add_argument('--arch', default='resnet50')
    p.add_argument('--height', type=int, default=256)
    p.add_argument('--width', type=int, default=128)
    p.add_argument('--batch-size', type=int, default=256)
    p.add_argument('--steps', type=int, default=40)
    p.add_argument('--warmup', type=int, default=10)
    p.add_argument('--iters', type=int, default=200)
    p.add_argument('--scale', type=float, default=1., help='share of Market-1501 when images are random')
    p.add_argument('--device', default=None)
    p.add_argument('--compile', action='store_true', help='of the epoch')
    p.add_argument('--no-compile', action='store_true', help='of the steps')
    p.add_argument('--root', help='folder of Market-1501')
    args = p.parse_args()
    config = recipe('market1501-hdc', arch=args.arch, resnet_pretrained='none', height=args.height, width=args.width, batch_size=args.batch_size, iters=args.iters,
                    device=args.device, image_cache='none', compile=args.compile, maps=False, num_clusters=int(750 * args.scale) if args.root is None else 750)
    print(f'{args.what}: {config.arch} {config.height}x{config.width}, batch {config.batch_size}; {machine()}\n')
    dict(steps=steps, augment=augmentation, epoch=epoch)[args.what](args, config)
