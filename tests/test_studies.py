"Studies against the published tables, and against everything that can stop them."

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ccc.runs import read_metrics
from ccc.studies import (
    NETWORKS,
    STUDIES,
    Planned,
    ablate,
    find_runs,
    fitted,
    known_pace,
    outlook,
    pace_key,
    paired,
    plan,
    results,
    run_key,
    scores,
    sole_worker,
    study_base,
    study_configs,
    study_rows,
    study_table,
    train_words,
    warmup_key,
)

TABLES = {'1': 'clusterers', '2': 'rules', '4': 'backbones'}
NAMES = dict(
    resnet50=('resnet50', 'V1'), resnet50_v2=('resnet50', 'V2'), resnet_ibn50a=('resnet_ibn50a', 'V1')
)


def published():
    with open(Path(__file__).parent / 'golden' / 'published_tables.csv') as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize('table', TABLES)
def test_every_published_row_is_a_row_of_its_study(table):
    base = study_base('market1501')
    ours = {run_key(c) for _, c in study_rows(TABLES[table], base)}
    for r in published():
        if r['table'] != table or r['dataset'] != 'market1501':
            continue
        arch, weights = NAMES[r['backbone']]
        row = dict(
            clustering=r['clusterer'],
            cm_mode=r['memory_rule'],
            loss_with_camera=r['cie'] == '1',
            warmup_with_dbscan=r['dbscan_warmup'] != '0',
            arch=arch,
            resnet_pretrained=weights,
        )
        assert run_key(replace(base, **row)) in ours, row


def test_no_row_is_missing_from_the_published_tables_but_those_of_our_networks():
    count = {t: sum(r['table'] == t and r['dataset'] == 'veri' for r in published()) for t in TABLES}
    own = 3 * sum(n['arch'] in ('small', 'timm:tf_efficientnet_lite0') for n in NETWORKS)
    assert (
        count
        == {'1': len(STUDIES['clusterers']), '2': len(STUDIES['rules']), '4': len(STUDIES['backbones']) - own}
        == {'1': 8, '2': 8, '4': 9}
    )


@pytest.mark.parametrize('dataset', ['city', 'market1501', 'msmt17', 'veri'])
def test_rows_of_a_study_differ_and_seeds_follow_the_base(dataset):
    for name in STUDIES:
        configs = study_configs(name, study_base(dataset, seed=7), seeds=2)
        assert len(configs) == 2 * len(STUDIES[name]) == len(set(map(run_key, configs))) and {
            c.seed for c in configs
        } == {7, 8}


def test_clusters_are_scaled_only_off_the_benchmarks():
    row = dict(num_clusters=1500)
    assert fitted(row, study_base('market1501')) == fitted(row, study_base('msmt17')) == row
    assert fitted(row, study_base('market1501', subset_ids=100, num_clusters=100))['num_clusters'] == 200


def test_other_networks_are_short_on_the_city_alone():
    rows = STUDIES['backbones']
    epochs = {r['arch']: fitted(r, study_base('city')).get('num_epochs') for r in rows}
    assert epochs.pop('small') is None and set(epochs.values()) == {4}
    # who says how long or which network is taken at their word
    for asked in (dict(num_epochs=2), dict(num_epochs=30), dict(arch='timm:tf_efficientnet_lite0')):
        assert all('num_epochs' not in fitted(r, study_base('city', **asked)) for r in rows)
    assert all(
        fitted(r, study_base('market1501', subset_ids=100)) == fitted(r, study_base('veri')) == r
        for r in rows
    )


def test_what_does_not_shape_the_weights_makes_no_other_run():
    a = study_base('city')
    assert run_key(a) == run_key(
        replace(a, log_dir='elsewhere', maps=True, num_workers=3, notes='x', eval_step_epoch=1)
    )
    assert (
        run_key(a) != run_key(replace(a, num_epochs=11))
        and run_key(a) != run_key(replace(a, seed=2))
        and run_key(a) != run_key(replace(a, lr=1e-3))
    )


def test_a_plan_puts_those_first_who_leave_a_warm_up_to_others(tmp_path):
    keys, base = set(), study_base('city')
    planned = plan(study_configs('all', base), base, tmp_path)
    new = [not (warmup_key(p.config) in keys or keys.add(warmup_key(p.config))) for p in planned]
    assert new == sorted(new, reverse=True) and 0 < sum(new) < len(new)


TINY = dict(
    subset_ids=8,
    num_clusters=8,
    jaccard_k1=10,
    height=32,
    width=16,
    iters=3,
    num_epochs=3,
    warmup_iters=1,
    batch_size=32,
    device='cpu',
    image_cache='none',
)
SCRIPT = '''
import sys
from dataclasses import replace
from ccc.studies import ablate, study_base
base = study_base('city', **{tiny})
try: ablate([replace(base, clustering=c) for c in ('kmeans', 'dbscan')], base, sys.argv[1])
except ValueError as e: sys.exit(str(e))
'''.replace('{tiny}', repr(TINY))


def begin(folder):
    return subprocess.Popen(
        [sys.executable, '-c', SCRIPT, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(happens, seconds=300):
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until, 'did not happen'
        time.sleep(0.05)


def numbers(folder):
    drop = ('seconds', 'speed')
    return {
        key: [{k: v for k, v in r.items() if k not in drop} for r in read_metrics(run)]
        for key, run in find_runs(folder).items()
    }


def free(folder):
    try:
        with sole_worker(folder):
            return True
    except ValueError:
        return False


def test_killed_stopped_and_gone_on_with(tmp_path):
    clean, folder = begin(tmp_path / 'clean'), tmp_path / 'hit'
    output = clean.communicate(timeout=400)[0]
    assert clean.returncode == 0, output
    killed = begin(folder)
    wait_for(lambda: any(read_metrics(r) for r in find_runs(folder).values()))
    killed.kill()
    wait_for(lambda: free(folder))  # its run lives on until it is finished
    stopped = begin(folder)
    wait_for(lambda: len(find_runs(folder)) == 2)
    stopped.send_signal(signal.SIGTERM)
    output = stopped.communicate(timeout=400)[0]
    assert stopped.returncode != 0 and 'runs under way are saved' in output, output
    last = begin(folder)
    output = last.communicate(timeout=400)[0]
    assert last.returncode == 0, output
    assert numbers(folder) == numbers(tmp_path / 'clean') and len(numbers(folder)) == 2


def test_a_run_left_behind_holds_the_folder(tmp_path):
    base = study_base('city', **TINY)
    with sole_worker(tmp_path) as lock:
        left_behind = subprocess.Popen(['sleep', '600'], pass_fds=(lock,))
    try:
        with pytest.raises(ValueError, match='one worker at a time'):
            ablate([base], base, tmp_path)
    finally:
        left_behind.kill()
        left_behind.wait()
    with sole_worker(tmp_path):
        pass  # free again


def test_a_run_that_crashes_is_left_out_and_the_others_go_on(tmp_path):
    base = study_base('city', **TINY)
    bad = replace(base, num_clusters=10_000)
    left_out = ablate([bad, base], base, tmp_path)
    assert (
        list(left_out) == ['num_clusters=10000 seed 1']
        and '--num-clusters must not exceed' in left_out['num_clusters=10000 seed 1']
    )
    runs = results(tmp_path)
    assert list(runs) == [run_key(base)] and scores(base, runs).keys() == {1} and scores(bad, runs) == {}
    assert 'finished' in outlook(plan([base], base, tmp_path), tmp_path)


def fake(folder, config, score, epochs=None, data='one'):
    run = folder / f'{len(list(folder.glob("*")))}' / 'run'
    run.mkdir(parents=True)
    (run / 'config.json').write_text(json.dumps(dict(config=vars(config), data=dict(fingerprint=data))))
    rows = [
        dict(epoch=e, mAP=score + (0.01 if e == 0 else 0), rank1=score)
        for e in range(epochs or config.num_epochs)
    ]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def test_the_table_holds_what_was_run_and_nothing_else(tmp_path):
    base = study_base('city')
    fake(tmp_path, base, 0.5)
    fake(tmp_path, replace(base, seed=2), 0.6)
    fake(tmp_path, replace(base, clustering='kmeans'), 0.4, epochs=3)  # not finished
    lines = study_table('clusterers', base, results(tmp_path))
    filled = [l for l in lines[1:-1] if '  ' in l]
    assert len(filled) == 1 and 'clustering=hdc, loss_with_camera=True, warmup_with_dbscan=True' in filled[0]
    assert filled[0].split()[-10:] == ['55.0', '±', '7.1', '55.0', '±', '7.1', '56.0', '±', '7.1', '2']


def test_runs_from_other_data_are_not_mixed(tmp_path):
    base = study_base('city')
    fake(tmp_path, base, 0.5)
    fake(tmp_path, replace(base, seed=2), 0.6, data='another')
    with pytest.raises(ValueError, match='the same data'):
        results(tmp_path)
    assert len(results(tmp_path, [base])) == 1  # another base beside it does not matter


def test_another_evaluation_is_another_run(tmp_path):
    base = study_base('city')
    fake(tmp_path, base, 0.5)
    for other in (replace(base, rerank=True), replace(base, eval_dist='Cosine')):
        assert plan([other], base, tmp_path)[0].left == base.num_epochs and not scores(
            other, results(tmp_path)
        )


def test_of_two_the_same_the_one_with_more_epochs_counts(tmp_path):
    base = study_base('city')
    fake(tmp_path, base, 0.5)
    fake(tmp_path, base, 0.9, epochs=3)
    assert plan([base], base, tmp_path)[0].left == 0 and scores(base, results(tmp_path)) == {1: 0.5}


@pytest.mark.parametrize(
    'text', ['{}', '{"config": {"from_the_future": 1}}', '{"config": {"iters": 0}}', '{"conf']
)
def test_settings_that_cannot_be_read_are_left_alone(tmp_path, text):
    base = study_base('city')
    fake(tmp_path, base, 0.5)
    (tmp_path / 'other' / 'run').mkdir(parents=True)
    (tmp_path / 'other' / 'run' / 'config.json').write_text(text)
    with pytest.warns(UserWarning, match='left alone'):
        assert len(find_runs(tmp_path)) == 1


def test_a_run_that_cannot_start_stops_nothing_else(tmp_path, monkeypatch):
    import ccc.studies as studies

    def refused(*_, **__):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(studies.subprocess, 'Popen', refused)
    base = study_base('city', device='cpu')
    left_out = ablate([replace(base, seed=s) for s in (1, 2, 3)], base, tmp_path, jobs=1)
    assert len(left_out) == 3 and all('Too many open files' in why for why in left_out.values())
    with sole_worker(tmp_path):
        pass


def test_checkpoints_elsewhere_are_kept_apart():
    base = study_base('city', ckpt_dir='somewhere')
    words = [
        train_words(Planned(replace(base, clustering=c), ''), base, Path('x')) for c in ('hdc', 'kmeans')
    ]
    assert len({w[w.index('--ckpt-dir') + 1] for w in words}) == 2


def test_pace_counts_the_epochs_that_were_trained(tmp_path):
    kind = pace_key(study_base('city'), 2)
    (tmp_path / 'pace.jsonl').write_text(
        '\n'.join(
            json.dumps(dict(kind=kind, epochs=e, seconds=s)) for e, s in ((10, 20), (8, 8), (0, 3), (10, 30))
        )
        + '\n'
    )
    assert known_pace(tmp_path) == {kind: 2.0} and kind != pace_key(study_base('city'), 1)


def test_best_is_not_last(tmp_path):
    fake(tmp_path, study_base('city'), 0.5)
    r = next(iter(results(tmp_path).values()))
    assert (r.last['mAP'], r.best['mAP'], r.best['epoch']) == (0.5, 0.51, 0)


def test_pairs_are_pairs():
    d = paired(
        {('hdc', 1): 0.3, ('hdc', 2): 0.5, ('kmeans', 1): 0.1},
        {('hdc', 1): 0.2, ('hdc', 2): 0.2, ('dbscan', 1): 0.9},
    )
    assert (
        d.n == 2
        and d.mean == pytest.approx(0.2)
        and d.low == pytest.approx(0.1)
        and d.high == pytest.approx(0.3)
    )
    assert paired({1: 0.2, 2: 0.3}, {1: 0.1, 2: 0.2}).n == 2


def test_several_gpus_have_one_run_each_at_a_time(tmp_path, monkeypatch):
    import ccc.studies as studies

    busy, most, gpus = set(), [], []

    class Process:
        def __init__(self, words, env, **_):
            self.gpu = env['CUDA_VISIBLE_DEVICES']
            assert self.gpu not in busy
            busy.add(self.gpu)
            most.append(len(busy))
            gpus.append(self.gpu)

        def wait(self):
            time.sleep(0.1)
            busy.discard(self.gpu)
            return 1

    monkeypatch.setattr(studies, 'visible_gpus', lambda config: ['0', '3'])
    monkeypatch.setattr(studies.subprocess, 'Popen', Process)
    base = study_base('city')
    left_out = ablate([replace(base, seed=s) for s in range(6)], base, tmp_path)
    assert len(left_out) == len(gpus) == 6 and set(gpus) == {'0', '3'} and max(most) == 2
