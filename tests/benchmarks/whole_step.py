"""One whole label step, as the trainer runs it: seconds of each stage, and the most memory a process took.

`label_step.py --n` starts it, by itself or once for each process under `torchrun`. The first process prints a line that begins with `result`, in JSON. Memory is counted
from the start of the step: what imports and embeddings take is given beside it. Of the memory, `anonymous` is what a process cannot give back; pages of mapped files,
which the operating system can take at any time, are the rest.
"""

import argparse
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from label_step import agreement, embeddings  # noqa: E402


def people(source, n):
    "(N,) who is on each image."
    if not source.isdigit():
        return np.load(source)['pids']
    # as of `embeddings`
    return np.repeat(np.arange(-(-n // 18)), 18)[np.random.default_rng(0).permutation(-(-n // 18) * 18)[:n]]


class Memory:
    "The most memory of this process, looked at ten times a second; bytes."

    def __init__(self):
        self.start = self.now()
        self.most = dict(self.start)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def now(self):
        lines = Path('/proc/self/status').read_text().splitlines()
        sizes = dict(line.split(':') for line in lines if line.startswith(('VmRSS', 'RssAnon')))
        return {name: int(size.split()[0]) * 1024 for name, size in sizes.items()}

    def watch(self):
        while not self.done.wait(0.1):
            self.most = {name: max(size, self.most[name]) for name, size in self.now().items()}

    def stop(self):
        self.done.set()
        self.thread.join()
        return dict(
            peak=self.most['VmRSS'],
            peak_anonymous=self.most['RssAnon'],
            before=self.start['VmRSS'],
            step=self.most['VmRSS'] - self.start['VmRSS'],
        )


class Stages:
    "Seconds and calls of each stage, from stopwatches around the library's own functions."

    def __init__(self):
        self.seconds, self.calls = {}, {}

    @contextmanager
    def stage(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start
        self.calls[name] = self.calls.get(name, 0) + 1

    def watch(self, owner, function, name):
        "Puts a stopwatch around a function of a module or a class."
        real = getattr(owner, function)

        def timed(*args, **kwargs):
            with self.stage(name):
                return real(*args, **kwargs)

        setattr(owner, function, timed)


def measure(source, index, noise, memory):
    "One label step of HDC with the defaults; a dict for JSON."
    from ccc import _neighbors_search, hdc, labels, neighbors
    from ccc.rows import Processes, TorchProcesses

    several = int(os.environ.get('WORLD_SIZE', 1)) > 1
    if several:
        import torch.distributed as dist

        dist.init_process_group('gloo')
    processes = TorchProcesses() if several else Processes()
    x, k, kind = embeddings(source, noise, 64)
    hdc.HDC(2, k1=3).fit(x[:64])  # imports are nobody's work
    processes.largest(0)
    stages = Stages()
    stages.watch(neighbors, 'nearest', 'k-NN')
    stages.watch(neighbors, 'encode', 'encoding')
    stages.watch(neighbors, '_pairs', 'Jaccard')
    stages.watch(hdc, 'graph_plusplus', 'starts')
    stages.watch(hdc, 'nearest_start', 'first labels')
    stages.watch(hdc.CentroidDistances, 'membership', 'memberships')
    stages.watch(hdc, '_nearest_cluster', 'assignment')
    stages.watch(hdc, 'refill', 'empty clusters')
    stages.watch(hdc, '_means', 'means')
    if memory is not None:
        room = labels.jaccard_rows
        labels.jaccard_rows = lambda *args, **kwargs: room(*args, memory=int(memory * 1e9), **kwargs)
    recall, measured = [], _neighbors_search._recall
    _neighbors_search._recall = lambda *args: recall.append(measured(*args)) or recall[-1]
    watched, start, cpu = Memory(), time.perf_counter(), time.process_time()
    with stages.stage('graph'):
        graph = labels.build_graph(x, index=index, processes=processes)
    made = labels.make_labels(x, 'hdc', n_clusters=k, graph=graph, random_state=0, processes=processes)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peaks = watched.stop()
    pairs = int(processes.gather(np.array([graph.nnz])).sum())
    everyone = {name: processes.gather(np.array([size])).tolist() for name, size in peaks.items()}
    result = dict(
        source=kind,
        n=len(x),
        d=x.shape[1],
        k=k,
        noise=noise if kind == 'made' else None,
        index=index,
        processes=processes.count,
        threads=len(os.sched_getaffinity(0))
        if 'OMP_NUM_THREADS' not in os.environ
        else int(os.environ['OMP_NUM_THREADS']),
        seconds=seconds,
        cpu_seconds=float(processes.gather(np.array([cpu])).sum()),
        stages=stages.seconds,
        rounds=stages.calls['means'],
        recall=recall[0] if recall else None,
        pairs=pairs,
        on_disk=graph.on_disk,
        clusters=made.n_clusters,
        outliers=made.n_outliers,
        ari=agreement(made.labels, people(source, len(x))),
        bytes=everyone,
    )
    return result, made, processes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source')
    parser.add_argument('--index', default='exact')
    parser.add_argument('--noise', type=float, default=0.5)
    parser.add_argument('--memory', type=float)
    parser.add_argument('--labels')
    args = parser.parse_args()
    result, made, processes = measure(args.source, args.index, args.noise, args.memory)
    if processes.rank:
        return
    if args.labels:
        np.savez(args.labels, labels=made.labels, confidence=made.confidence, centroids=made.centroids)
    print('result', json.dumps(result), flush=True)


if __name__ == '__main__':
    main()
