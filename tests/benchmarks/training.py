"""How fast training is: steps in every arithmetic, augmentation against torchvision, an epoch of the Market-1501 recipe by stage.

    python tests/benchmarks/training.py steps     # images a second, ms a step, share of the measured matrix peak, with and without bf16, channels last, compile
    python tests/benchmarks/training.py augment   # the batched augmentation against torchvision, an image at a time
    python tests/benchmarks/training.py epoch --root DATA   # one epoch by stage, and what 60 of them take; without --root on as many random images
    PYTHONPATH=. python tests/benchmarks/training.py all   # on a GPU: its tests, the label step, steps with and without compile, 60 epochs at the size of Market-1501; at most 25 minutes
                                                            # (--minutes 9 where a command may take ten; the run then says of how many epochs it speaks)

Prints markdown tables. On a machine without a GPU say --arch resnet18 --height 64 --width 32 --batch-size 64 --steps 5.
"""

import argparse
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ccc.data import ReIDDataset, Split, apply_augmentation, draw_augmentation, toy_embeddings
from ccc.engine import arithmetic, measured_peak, training_flops
from ccc.experiments import recipe
from ccc.labels import PseudoLabels, build_graph, make_labels
from ccc.training import Trainer, augment_batch

HERE = Path(__file__).resolve().parent
COUNTS = dict(train=(12936, 751), query=(3368, 750), gallery=(15913, 750))


def machine():
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no GPU'
    return (
        f'{gpu}, {len(os.sched_getaffinity(0))} CPU cores in use ({platform.machine()}), torch'
        f' {torch.__version__}, {torch.get_num_threads()} threads'
    )


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_market(scale=1.0):
    """As many images, people and cameras as Market-1501, in noise: what it costs does not depend on what
    is to be seen."""
    rng, parts = np.random.default_rng(0), []
    for n, ids in COUNTS.values():
        n = int(n * scale)
        parts.append(
            Split(
                np.arange(n).astype(str), rng.integers(0, max(2, int(ids * scale)), n), rng.integers(0, 6, n)
            )
        )
    return ReIDDataset('random', '.', *parts)


def random_images(n, config):
    return torch.randint(
        0,
        256,
        (n, 3, config.height, config.width),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )


def people_images(split, config):
    "Images whose eight by four colours say who it is, in noise: enough for clusters to be found."
    g = torch.Generator().manual_seed(1)
    colours = torch.randint(40, 216, (int(split.pids.max()) + 1, 3, 8, 4), generator=g, dtype=torch.uint8)
    out = torch.empty(len(split), 3, config.height, config.width, dtype=torch.uint8)
    for lo in range(0, len(split), 1024):
        who = torch.from_numpy(np.asarray(split.pids[lo : lo + 1024]))
        large = torch.nn.functional.interpolate(colours[who].float(), size=(config.height, config.width))
        out[lo : lo + 1024] = (large + 20 * torch.randn(large.shape, generator=g)).clamp(0, 255)
    return out


def steps(args, config):
    "One row for each arithmetic: time of a training step after some to warm up."
    data = random_market(max(0.02, args.batch_size / 12936))
    n = len(data.train)
    labels = PseudoLabels((np.arange(n) % (n // 16)).astype(np.int32), np.ones(n, np.float32), None)
    print(
        '| precision | channels last | compile | images/s | ms/step | share of peak | memory GB'
        ' |\n|---|---|---|---|---|---|---|'
    )
    for precision, last, compiled in itertools.product(('fp32', 'bf16'), ('off', 'on'), (False, True)):
        if compiled and args.no_compile:
            continue
        t = Trainer(
            replace(config, precision=precision, channels_last=last, compile=compiled, iters=args.warmup),
            data,
        )
        t.images.decoded['train'] = random_images(n, config).to(t.engine.device)
        own = replace(
            labels, centroids=np.random.default_rng(0).normal(size=(n // 16, t.net.dim)).astype(np.float32)
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        t.train_epoch(own)
        t.config.iters, start = args.steps, (wait(), time.perf_counter())[1]
        t.train_epoch(own)
        wait()
        took = (time.perf_counter() - start) / args.steps
        share = (
            training_flops(t.net, config.height, config.width)
            * config.batch_size
            / took
            / measured_peak(t.engine.device, precision)
        )
        memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float('nan')
        print(
            f'| {precision} | {last} | {compiled} | {config.batch_size / took:.0f} | {1000 * took:.1f} |'
            f' {share:.0%} | {memory:.1f} |',
            flush=True,
        )
    for precision in ('fp32', 'bf16'):
        print(
            f'\nmeasured {precision} matrix product: {measured_peak(t.engine.device, precision) / 1e12:.2f}'
            ' TFLOP/s'
        )


def augmentation(args, config):
    """Images a second of the batch and of torchvision's transforms, from decoded uint8 to the normalised
    float batch."""
    from torchvision import transforms as T

    device = torch.device('cuda' if torch.cuda.is_available() and args.device != 'cpu' else 'cpu')
    images = random_images(args.batch_size, config).to(device)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    one = T.Compose(
        [
            T.RandomHorizontalFlip(),
            T.Pad(10),
            T.RandomCrop((config.height, config.width)),
            T.ConvertImageDtype(torch.float32),
            T.Normalize(mean, std),
            T.RandomErasing(0.5, (0.02, 0.4), (0.3, 1 / 0.3), mean),
        ]
    )

    def batched():
        return apply_augmentation(images, draw_augmentation(len(images), config.height, config.width))

    def single():
        return torch.stack([one(u) for u in images])

    # then CPU time, which other programs on the machine do not change
    ours = device.type == 'cpu' and torch.get_num_threads() == 1
    clock = time.process_time if ours else time.perf_counter
    times = {batched: [], single: []}
    for _ in range(args.steps + 1):
        for f in times:  # in turn: both meet the same neighbours
            start = clock()
            f()
            wait()
            times[f].append(clock() - start)
    for f, name in ((batched, 'batched'), (single, 'torchvision, an image at a time')):
        print(
            f'{name:34} {len(images) / np.median(times[f][1:]):8.0f} images/s   (median of {args.steps},'
            f' {device.type}, {"CPU time of one thread" if ours else "wall time"})'
        )


def epoch(args, config):
    "Two epochs, the second one by stage; the first pays for compiling and for looking for kernels."
    with tempfile.TemporaryDirectory() as logs:
        config = replace(
            config,
            num_epochs=60,
            log_dir=logs,
            warmup_with_dbscan=False,
            warmup_iters=0,
            **({} if args.root is None else dict(root_dir=args.root)),
        )
        t = Trainer(config, random_market(args.scale) if args.root is None else None)
        if args.root is None:
            t.images.decoded = {
                s: random_images(len(getattr(t.dataset, s)), config).to(t.engine.device)
                for s in ('train', 'query', 'gallery')
            }
        t.start()
        for _ in range(2):
            row = t.step()
            t.record(row)
        t.evaluate()
        seconds = t.state.seconds
        print('| stage | seconds |\n|---|---|', *(f'| {k} | {v:.2f} |' for k, v in seconds.items()), sep='\n')
        each, rated = sum(v for k, v in seconds.items() if k not in ('evaluate', 'decode')), 13
        print(
            f'\n{row["speed"]}\n60 epochs and {rated} evaluations:'
            f' {(60 * each + rated * seconds["evaluate"]) / 60:.1f} minutes'
        )


# all of it, on a GPU


def timed(f):
    "Value of f() and the seconds it took, the device's work included."
    wait()
    start = time.perf_counter()
    value = f()
    wait()
    return value, time.perf_counter() - start


def compiled_kernels():
    "Builds the kernels where there are none: a bare machine has a compiler and Cython."
    from ccc import _neighbors_kernels

    if not _neighbors_kernels.is_compiled():
        subprocess.run(
            [sys.executable, 'setup.py', '-q', 'build_ext', '--inplace'], cwd=HERE.parent.parent, check=True
        )
    return not _neighbors_kernels.is_compiled()


def gpu_tests():
    "The tests that need a GPU, and the last line of what pytest says."
    files = [HERE.parent / f'test_{name}.py' for name in ('engine', 'neighbors', 'hdc')]
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-q',
            '-p',
            'no:cacheprovider',
            *map(str, files),
            '-k',
            'gpu or cuda',
        ],
        capture_output=True,
        text=True,
    )
    return (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]


def label_step(n, device):
    """Seconds of the graph and of HDC on embeddings of n images that lie on the device, and the number of
    stored pairs."""
    x = torch.from_numpy(toy_embeddings(-(-n // 18), 6, 3, dim=min(512, n), noise=0.6)[0][:n]).to(device)
    options = dict(n_clusters=max(2, n // 18))
    for _ in range(2):
        graph, first = timed(lambda: build_graph(x))  # the first one pays for loading kernels
    labels, second = timed(lambda: make_labels(x, graph=graph, random_state=0, **options))
    return first, second, graph.nnz, labels.n_clusters


def step_rates(args, config, compiled):
    """Milliseconds of a training step: fetching and augmenting, then everything; images a second, share of
    the peak, memory."""
    data = random_market(max(0.02, args.batch_size / 12936))
    n = len(data.train)
    t = Trainer(replace(config, compile=compiled, iters=args.warmup), data)
    t.images.decoded['train'] = random_images(n, config).to(t.engine.device)
    labels = PseudoLabels(
        (np.arange(n) % (n // 16)).astype(np.int32),
        np.ones(n, np.float32),
        np.random.default_rng(0).normal(size=(n // 16, t.net.dim)).astype(np.float32),
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = timed(lambda: t.train_epoch(labels))[1]
    t.config.iters = args.steps
    took = timed(lambda: t.train_epoch(labels))[1] / args.steps
    batch, c = np.arange(config.batch_size) % n, config.bn_chunks
    images = (
        timed(
            lambda: [
                augment_batch(
                    t.images('train'),
                    batch,
                    [torch.Generator().manual_seed(k) for k in range(c)],
                    t.engine.device,
                )
                for _ in range(args.steps)
            ]
        )[1]
        / args.steps
    )
    share = (
        (training_flops(t.net, config.height, config.width) or 0)
        * config.batch_size
        / took
        / measured_peak(t.engine.device, arithmetic(config, t.engine.device)['precision'])
    )
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float('nan')
    return (
        f'{1000 * images:.1f} | {1000 * took:.1f} | {config.batch_size / took:.0f} | {share:.0%} |'
        f' {memory:.1f} | {start:.0f}'
    )


def whole_run(args, config, until):
    "As many of the epochs as the time allows, with evaluations and checkpoints; the sum of each stage."
    with tempfile.TemporaryDirectory() as logs:
        config = replace(
            config, num_epochs=args.epochs, log_dir=logs, compile=args.compile, warmup_with_dbscan=False
        )
        t = Trainer(config, random_market(args.scale))
        t.images.decoded = {
            s: people_images(getattr(t.dataset, s), config).to(t.engine.device)
            for s in ('train', 'query', 'gallery')
        }
        start, sums = time.perf_counter(), {}
        t.start()
        while t.epoch < args.epochs and (time.perf_counter() < until or not t.epoch):
            row, took = timed(t.step)
            kept = timed(lambda: t.keep(row))[1]
            for stage, seconds in (
                row['seconds']
                | {
                    'labels and numbers; the rest of the checkpoint before': kept,
                    'everything else': took - sum(row['seconds'].values()),
                }
            ).items():
                sums[stage] = sums.get(stage, 0) + seconds
        t.writer.wait()
        return t.epoch, time.perf_counter() - start, sums


def everything(args, config):
    "What a table of the GPU needs, in one go; the run gets the time that is left."
    begin, device = time.perf_counter(), torch.device(args.device or 'cuda')
    if compiled_kernels():
        os.execv(sys.executable, [sys.executable, *sys.argv])  # with the kernels that were just built
    if device.type == 'cuda':
        print(f'GPU tests: {gpu_tests()}\n', flush=True)
    print('| N | graph, s | HDC, s | stored pairs | clusters |\n|---|---|---|---|---|')
    for n in args.sizes:
        graph, cluster, pairs, clusters = label_step(n, device)
        print(f'| {n:,} | {graph:.2f} | {cluster:.2f} | {pairs:,} | {clusters:,} |', flush=True)
    print(
        '\n| compile | fetch and augment, ms | step, ms | images/s | share of peak | memory, GB | first'
        ' steps, s |\n|---|---|---|---|---|---|---|'
    )
    for compiled in (False,) if args.no_compile else (False, True):
        print(f'| {compiled} | {step_rates(args, config, compiled)} |', flush=True)
    epochs, seconds, sums = whole_run(args, config, begin + 60 * args.minutes)
    print(
        f'\n| stage of {epochs} epochs | seconds | seconds an epoch |\n|---|---|---|',
        *(f'| {stage} | {s:.1f} | {s / epochs:.2f} |' for stage, s in sums.items()),
        sep='\n',
    )
    told = 'measured' if epochs == args.epochs else f'from {epochs} epochs: the time was up'
    print(
        f'\n{args.epochs} epochs: {seconds / epochs * args.epochs / 60:.1f} minutes ({told}); all in'
        f' {(time.perf_counter() - begin) / 60:.1f} minutes',
        flush=True,
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['steps', 'augment', 'epoch', 'all'])
    p.add_argument('--arch', default='resnet50')
    p.add_argument('--height', type=int, default=256)
    p.add_argument('--width', type=int, default=128)
    p.add_argument('--batch-size', type=int, default=256)
    p.add_argument('--steps', type=int, default=40)
    p.add_argument('--warmup', type=int, default=10)
    p.add_argument('--iters', type=int, default=200)
    p.add_argument('--scale', type=float, default=1.0, help='share of Market-1501 when images are random')
    p.add_argument('--device', default=None)
    p.add_argument('--compile', action='store_true', help='of the epoch')
    p.add_argument('--no-compile', action='store_true', help='of the steps')
    p.add_argument('--root', help='folder of Market-1501')
    p.add_argument(
        '--sizes', type=int, nargs='*', default=[12936, 100000], help='of all: images of the label step'
    )
    p.add_argument('--epochs', type=int, default=60, help='of all: the run')
    p.add_argument(
        '--minutes', type=float, default=23.0, help='of all: after so many the run begins no further epoch'
    )
    p.add_argument('--tiny', action='store_true', help='of all: seconds on a CPU, to see that it works')
    args = p.parse_args()
    if args.what == 'all' and args.device != 'cpu' and not torch.cuda.is_available():
        sys.exit(
            'a GPU that torch can see is needed, and there is none; --tiny --device cpu tries the program'
        )
    if args.tiny:
        vars(args).update(
            arch='small',
            height=32,
            width=16,
            batch_size=32,
            steps=2,
            warmup=2,
            iters=2,
            scale=0.02,
            sizes=[200],
            epochs=2,
            no_compile=True,
        )
    config = recipe(
        'market1501-hdc',
        arch=args.arch,
        resnet_pretrained='none',
        height=args.height,
        width=args.width,
        batch_size=args.batch_size,
        iters=args.iters,
        device=args.device,
        image_cache='none',
        compile=args.compile,
        maps=False,
        num_clusters=int(750 * args.scale) if args.root is None else 750,
    )
    print(
        f'{args.what}: {config.arch} {config.height}x{config.width}, batch {config.batch_size}; {machine()}\n'
    )
    dict(steps=steps, augment=augmentation, epoch=epoch, all=everything)[args.what](args, config)
