"""Times the label step against yardsticks of the same run.

    python tests/benchmarks/label_step.py [features.npz] [--clusters 750] [--rounds 15]

`features.npz` holds `features (N, D)`; without it, random identities under six cameras stand in (easier than real embeddings).
Yardsticks: FAISS's exact k-NN alone for the graph, one float32 product (N x 512) (512 x K) for a round of HDC.
"""
import argparse
import resource
import time

import numpy as np

from ccc.data import toy_embeddings
from ccc.hdc import graph_plusplus, hdc_rounds
from ccc.neighbors import jaccard_from_weights, k_reciprocal, knn


def timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('features', nargs='?')
    parser.add_argument('--clusters', type=int, default=750)
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args()
    x = np.load(args.features)['features'] if args.features else toy_embeddings(600, 6, 3, dim=256)[0]
    x = x.astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(len(x), 512)).astype(np.float32), rng.normal(size=(512, args.clusters)).astype(np.float32)
    product = min(timed(lambda: a @ b)[1] for _ in range(5))
    (_, ranked), neighbours = timed(lambda: knn(x, 31))
    V, encoding = timed(lambda: k_reciprocal(x, ranked))
    graph, jaccard = timed(lambda: jaccard_from_weights(V))
    starts, start = timed(lambda: graph_plusplus(graph, args.clusters, 0))
    rounds = hdc_rounds(x, graph, starts)
    times = [timed(lambda: next(rounds))[1] for _ in range(args.rounds)]
    whole = neighbours + encoding + jaccard
    print(f'N = {len(x)}, D = {x.shape[1]}, K = {args.clusters}, {graph.nnz / len(x):.0f} stored neighbours a row')
    for name, seconds, ratio in [('k-NN (FAISS)', neighbours, ''), ('k-reciprocal encoding', encoding, ''), ('Jaccard distances', jaccard, ''),
                                 ('graph, whole', whole, f'{whole / neighbours:.2f} x the k-NN'), ('one product', product, ''), ('k-means++ on the graph', start, ''),
                                 ('HDC round, median', np.median(times), f'{np.median(times) / product:.1f} x the product'),
                                 ('HDC round, slowest', max(times), f'{max(times) / product:.1f} x the product')]:
        print(f'{name:24}{seconds:8.2f} s   {ratio}')
    print(f'peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB')


if __name__ == '__main__':
    main()
