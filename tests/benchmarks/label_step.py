"""Every stage of the label step against its dense twin and against what the machine could do at best.

    python tests/benchmarks/label_step.py --n 100000 300000 1000000 [--index exact ivf] [--processes 1 2 4] [--features F.npz] [--out steps.json]

runs whole label steps of HDC as the trainer does (`whole_step.py`): D = 64, K = N / 20, less noise, as of a network that has learnt; in one process or shared out among
several, with the time of each stage, the peak memory of each process, and what the labels have in common with those of the first run of the same embeddings. Without `--n`
and with `--sizes` it looks into the stages:

    python tests/benchmarks/label_step.py [--features F.npz ...] [--sizes 3000 13000 33000 100000] [--twin-up-to 13000] [--out results.json]

`--features` holds `features (N, D)` of a real network; `--sizes` are made embeddings (D = 128, K = N / 20, 18 images a person under 6 cameras). Each runs in a
process of its own, whose peak memory is reported. `floor` is the time the multiply-adds or the bytes of a stage would take at the rate this machine reaches in the
same process on a plain matrix product, or on a plain copy; `exponent` the growth from the size before, of made embeddings. Twins run up to `--twin-up-to` samples.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import dense_twin  # noqa: E402


def timed(work, runs=1):
    "The result, and the seconds of the quickest run."
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def embeddings(source, noise=0.9, dim=128):
    "(N, D) float32 unit norm, K, and where they are from."
    from ccc.data import toy_embeddings

    if not source.isdigit():
        x = np.load(source)['features'].astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True), 750, 'real'
    n = int(source)
    return (
        toy_embeddings(-(-n // 18), 6, 3, dim=dim, noise=noise)[0][
            np.random.default_rng(0).permutation(-(-n // 18) * 18)[:n]
        ],
        n // 20,
        'made',
    )


def rates(n, k):
    "Multiply-adds a second of one product (N, 512) (512, K), and bytes a second of one copy."
    rng = np.random.default_rng(0)
    a, b, copy = (
        rng.normal(size=(min(n, 13000), 512)).astype(np.float32),
        rng.normal(size=(512, min(k, 750))).astype(np.float32),
        np.ones(2**26, np.float32),
    )
    target = np.empty_like(copy)
    return np.array(
        [
            a.size * b.shape[1] / timed(lambda: a @ b, 9)[1],
            2 * copy.nbytes / timed(lambda: np.copyto(target, copy), 5)[1],
        ]
    )


def ranking_stage(byte):
    """3,368 queries, 15,913 gallery images and their distances, against scikit-learn's average precision,
    a query at a time (100 of them)."""
    from sklearn.metrics import average_precision_score
    from ccc.evaluation import evaluate_ranking

    rng, shape = np.random.default_rng(0), (3368, 15913)
    distances = rng.random(shape, np.float32)
    (qp, gp), (qc, gc) = ([rng.integers(0, top, n) for n in shape] for top in (750, 6))

    def twin(i):
        valid = ~((gp == qp[i]) & (gc == qc[i]))
        return average_precision_score(gp[valid] == qp[i], -distances[i, valid])

    ours, seconds = timed(lambda: evaluate_ranking(distances, qp, gp, qc, gc))
    slow, slow_seconds = timed(lambda: [twin(i) for i in range(100)])
    assert np.allclose(ours.ap[:100], slow, atol=1e-6)
    return dict(seconds=seconds, floor=distances.nbytes / byte, twin=slow_seconds * shape[0] / 100)


def measure(source, twin, rounds, dbscan):
    "All stages on one set of embeddings."
    from ccc.hdc import converged, graph_plusplus, hdc_rounds, refill
    from ccc.labels import make_labels
    from ccc.neighbors import jaccard_from_weights, k_reciprocal, knn, to_dense

    x, k, kind = embeddings(source)
    n, d = x.shape
    before, runs = rates(n, k), 3 if n < 20000 else 1
    knn(x[:100], 5)  # imports are nobody's work
    (_, ranked), search = timed(lambda: knn(x, 31), runs)
    V, encode = timed(lambda: k_reciprocal(x, ranked), runs)
    graph, jaccard = timed(lambda: jaccard_from_weights(V), runs)
    products = int((np.bincount(V.indices, minlength=n).astype(np.int64) ** 2).sum())
    recall = {}
    begin, start = timed(lambda: graph_plusplus(graph, k, 0))
    found, times, generator = [], [], hdc_rounds(x, graph, begin)
    while len(found) < rounds:
        one, seconds = timed(lambda: next(generator))
        found.append(one), times.append(seconds)
        if converged([r.shift for r in found]):
            break
    mac, byte = np.maximum(before, rates(n, k))  # other people's work on the machine slows either
    # lists searched for mutual neighbours; weights averaged, written
    encode_bytes = n * 4 * (31 * 31 + 31 * 16 * 16) + V.nnz * 24
    graph_bytes = graph.data.nbytes + graph.indices.nbytes
    stages = {
        'k-NN': dict(seconds=search, floor=n * n * d / mac),
        'encoding': dict(seconds=encode, floor=encode_bytes / byte),
        'Jaccard': dict(seconds=jaccard, floor=(products * 12 + graph_bytes) / byte),
        'graph': dict(
            seconds=search + encode + jaccard,
            floor=n * n * d / mac + (encode_bytes + products * 12 + graph_bytes) / byte,
        ),
        'starts': dict(seconds=start, floor=k * (24 * n + 8 * (2 + np.log(k)) * graph.nnz / n) / byte),
        'HDC round': dict(seconds=float(np.median(times)), floor=n * 2 * d * k / mac + graph_bytes / byte),
        'HDC, all rounds': dict(
            seconds=sum(times), floor=len(times) * (n * 2 * d * k / mac + graph_bytes / byte)
        ),
        'label step': dict(seconds=search + encode + jaccard + start + sum(times)),
    }
    for index in ('ivf', 'hnsw') if n >= 30000 and n <= 100000 else ():
        found_near, stages[f'k-NN, {index}'] = (
            (run := timed(lambda: knn(x, 31, index)[1]))[0],
            dict(seconds=run[1]),
        )
        recall[index] = float(np.mean([np.isin(a, b).mean() for a, b in zip(ranked[::50], found_near[::50])]))
    stages['label step']['floor'] = sum(stages[s]['floor'] for s in ('graph', 'starts', 'HDC, all rounds'))
    about = dict(
        source=kind,
        n=n,
        recall=recall,
        d=d,
        k=k,
        rounds=len(found),
        neighbours_a_row=graph.nnz / n,
        product=n * 512 * k / mac,
        gflops=2 * mac / 1e9,
        gb_s=byte / 1e9,
        clusters=int(len(np.unique(found[-1].labels))),
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )
    if dbscan:
        about['dbscan_clusters'], stages['label step, DBSCAN'] = (
            (run := timed(lambda: make_labels(x, 'dbscan', eps=0.5)))[0].n_clusters,
            dict(seconds=run[1]),
        )
    if n <= twin:
        slow_ranked, stages['k-NN']['twin'] = timed(lambda: dense_twin.neighbours(x, 31))
        # ours: nearly equal distances may swap
        dense_V, stages['encoding']['twin'] = timed(lambda: dense_twin.encoding(x, ranked, 6))
        J, stages['Jaccard']['twin'] = timed(lambda: dense_twin.jaccard(dense_V))
        about['neighbours_equal'] = float(
            np.mean([len(set(a) & set(b)) / 31 for a, b in zip(slow_ranked, ranked)])
        )
        about['graph_difference'] = float(np.abs(J - to_dense(graph)).max())
        del dense_V
        slow_starts, stages['starts']['twin'] = timed(lambda: dense_twin.starts(J, k, 0))
        a, slow_times, labels, c, same = 1 - np.exp(-J), [], J[:, begin].argmin(1), x[begin], []
        for r in found[:3]:  # all rounds cost a dense twin the same
            (labels, H), seconds = timed(lambda: dense_twin.hdc_round(x, a, labels, c))
            labels, own = labels.astype(np.int32), H[np.arange(n), labels]
            refill(labels, own, H.sum(1, dtype=float) - own, k, lambda i, j: H[i, j])
            c, update = timed(lambda: dense_twin.centroids(x, labels, own, k))
            slow_times.append(seconds + update)
            same.append(float((labels == r.labels).mean()))
            labels, c = r.labels, r.centroids  # the next round is judged by itself
        about |= dict(starts_equal=float((slow_starts == begin).mean()), labels_equal=same)
        stages['graph']['twin'] = sum(stages[s]['twin'] for s in ('k-NN', 'encoding', 'Jaccard'))
        stages['HDC round']['twin'] = float(np.median(slow_times))
        stages['HDC, all rounds']['twin'] = stages['HDC round']['twin'] * len(found)
        stages['label step']['twin'] = sum(stages[s]['twin'] for s in ('graph', 'starts', 'HDC, all rounds'))
    if kind == 'real':
        stages['ranking'] = ranking_stage(byte)
    return dict(about, stages=stages)


def table(results):
    "Lines to print."
    made, last = [r for r in results if r['source'] == 'made'], None
    for r in results:
        s = r['stages']
        yield (
            f"\n{r['source']}: N = {r['n']:,}, D = {r['d']}, K = {r['k']}, {r['neighbours_a_row']:.0f} stored"
            f" neighbours a row, {r['rounds']} rounds; peak {r['peak_gb']:.2f} GB; graph"
            f" {s['graph']['seconds'] / s['k-NN']['seconds']:.2f} x k-NN, HDC round"
            f" {s['HDC round']['seconds'] / r['product']:.1f} x one product (N x 512)(512 x K)"
        )
        if 'labels_equal' in r:
            yield (
                f"twin: neighbours equal {r['neighbours_equal']:.4%}, graph differs by"
                f" {r['graph_difference']:.1e} at most, starts equal {r['starts_equal']:.2%}, labels of three"
                f" rounds equal {', '.join(f'{e:.2%}' for e in r['labels_equal'])}"
            )
        if r.get('recall'):
            yield 'approximate neighbours: ' + ', '.join(
                f'{index} finds {share:.2%}' for index, share in r['recall'].items()
            )
        yield f"{'stage':20}{'seconds':>10}{'x floor':>10}{'twin':>10}{'twin / ours':>13}{'exponent':>10}"
        for name, t in s.items():
            cells = [
                f"{t['seconds']:10.3f}",
                f"{t['seconds'] / t['floor']:10.1f}" if 'floor' in t else ' ' * 10,
                f"{t['twin']:10.1f}{t['twin'] / t['seconds']:13.1f}" if 'twin' in t else ' ' * 23,
                (
                    f"{np.log(t['seconds'] / last['stages'][name]['seconds']) / np.log(r['n'] / last['n']):10.2f}"
                    if r in made and last and name in last['stages']
                    else ''
                ),
            ]
            yield f'{name:20}' + ''.join(cells)
        if r in made:
            last = r


def whole_steps(sources, indices, counts, memory, out):
    "Runs of `whole_step.py`, one after the other; a line for each, and all of them in a file."
    results = []
    for source in sources:
        first = None
        for index, count in [(index, count) for index in indices for count in counts]:
            with tempfile.TemporaryDirectory() as folder:
                labels = Path(folder) / 'labels.npz'
                result = whole_step(source, index, count, memory, labels)
                made = dict(np.load(labels))
            first = first or made
            result['equal'] = {name: bool(np.array_equal(made[name], first[name])) for name in first}
            result['ari_with_first'] = agreement(made['labels'], first['labels'])
            results.append(result)
            print(step_line(result), flush=True)
            if out:
                Path(out).write_text(json.dumps(results, indent=1) + '\n')


def whole_step(source, index, count, memory, labels):
    "One run in a process of its own, or in several that share the cores of this machine."
    script = [
        str(Path(__file__).with_name('whole_step.py')),
        source,
        '--index',
        index,
        '--labels',
        str(labels),
    ]
    if memory is not None:
        script += ['--memory', str(memory)]
    launcher, env = [], dict(os.environ)
    if count > 1:
        launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(count)]
        env['OMP_NUM_THREADS'] = str(max(1, len(os.sched_getaffinity(0)) // count))
    command = [sys.executable, *launcher, *script]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(run.stdout.split('result ')[-1].splitlines()[0])


def agreement(labels, others):
    "Adjusted Rand index of the images that are in a cluster of both. (Mutual information takes hours to adjust.)"
    from sklearn.metrics import adjusted_rand_score

    both = (labels >= 0) & (others >= 0)
    return adjusted_rand_score(others[both], labels[both])


def step_line(r):
    "One run as a line to print."
    stages = ', '.join(f'{name} {seconds:.0f}' for name, seconds in r['stages'].items() if seconds >= 1)
    return (
        f"{r['source']} N = {r['n']:,} D = {r['d']} K = {r['k']:,}, {r['index']}, {r['processes']} processes of"
        f" {r['threads']} threads: {r['seconds']:.0f} s ({stages}), {r['rounds']} rounds, {r['pairs']:,} pairs"
        f"{' on disk' if r['on_disk'] else ''}; peak {max(r['bytes']['peak']) / 1e9:.2f} GB a process, anonymous"
        f" {max(r['bytes']['peak_anonymous']) / 1e9:.2f}, of the step {max(r['bytes']['step']) / 1e9:.2f}; equal to"
        f" the first run: {all(r['equal'].values())}, ARI {r['ari_with_first']:.4f}; ARI with people {r['ari']:.4f}"
        + (f"; {r['recall']:.1%} of the neighbours found" if r['recall'] is not None else '')
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--features', nargs='*', default=[])
    parser.add_argument('--sizes', nargs='*', default=['3000', '13000', '33000', '100000'])
    parser.add_argument('--twin-up-to', type=int, default=13000)
    parser.add_argument('--rounds', type=int, default=80)
    parser.add_argument('--without-dbscan', action='store_true')
    parser.add_argument('--n', nargs='*', help='made embeddings of these sizes, whole steps')
    parser.add_argument('--index', nargs='+', default=['exact'], help='whole steps: exact, ivf, hnsw')
    parser.add_argument('--processes', nargs='+', type=int, default=[1], help='whole steps: how many')
    parser.add_argument(
        '--memory', type=float, help='whole steps: gigabytes for the graph before it goes to disk'
    )
    parser.add_argument('--out')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return print(
            'result', json.dumps(measure(args.one, args.twin_up_to, args.rounds, not args.without_dbscan))
        )
    if args.n is not None:
        return whole_steps([*args.features, *args.n], args.index, args.processes, args.memory, args.out)
    results = []
    for source in [*args.features, *args.sizes]:
        run = subprocess.run(
            [
                sys.executable,
                __file__,
                '--one',
                source,
                '--twin-up-to',
                str(args.twin_up_to),
                '--rounds',
                str(args.rounds),
                *['--without-dbscan'] * args.without_dbscan,
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results.append(json.loads(run.stdout.split('result ')[-1]))
        print(*list(table(results))[-len(list(table(results[-1:]))) :], sep='\n', flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
