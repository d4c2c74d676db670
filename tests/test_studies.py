"Studies against the published tables, and against everything that can stop them."

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from ccc.runs import RunFolder, checkpoints, progress, read_metrics
from ccc.studies import (
    NETWORKS,
    STUDIES,
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
    run_settings,
    run_share,
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
    seen, base = set(), study_base('city')
    planned = plan(study_configs('all', base), base, tmp_path)
    new = [not (warmup_key(p.config) in seen or seen.add(warmup_key(p.config))) for p in planned]
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
# A study as it is typed, with rows of its own: two long runs, and a third that waits for a place.
COMMAND = """
import sys
import ccc.studies as studies
from ccc.cli import main
studies.STUDIES['clusterers'] = [dict(clustering=c, warmup_with_dbscan=False) for c in ('kmeans', 'dbscan')]
studies.STUDIES['clusterers'] += [dict(clustering='hdc', num_epochs=2)]
sys.exit(main(['ablate', 'clusterers', '--seeds', '1', *sys.argv[1:]]))
"""
LONG = TINY | dict(num_epochs=30)
BEGUN = []  # every study that was started here


@pytest.fixture(scope='module', autouse=True)
def processes():
    "Ends what a failed test has left, and removes what Ray wrote."
    with pytest.MonkeyPatch.context() as patch:
        ray = tempfile.mkdtemp(prefix='ray', dir='/tmp')  # the path of a socket must be short
        patch.setenv('RAY_TMPDIR', ray)
        yield
        for study in BEGUN:
            for process in left_of(study):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            study.wait()
        shutil.rmtree(ray, ignore_errors=True)


def begin(folder, *words, code=COMMAND):
    "A program in a session of its own. It prints to a file: what Ray leaves behind would hold a pipe open."
    settings = [word for n, v in LONG.items() for word in (f'--{n.replace("_", "-")}', str(v))]
    words = words if code != COMMAND else ('--log-dir', str(folder), *settings, *words)
    with open(folder / 'printed', 'w') as printed:
        study = subprocess.Popen(
            [sys.executable, '-c', code, *words],
            env=os.environ | dict(OMP_NUM_THREADS='1'),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    BEGUN.append(study)
    return study


def end_of(study, folder):
    "Exit code and what was printed."
    return study.wait(timeout=400), (folder / 'printed').read_text()


def left_of(study):
    "The processes of a study's session that have not ended, each with its command line."
    left = {}
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):  # it ends meanwhile, or belongs to somebody else
            if os.getsid(process.pid) == study.pid and process.status() != psutil.STATUS_ZOMBIE:
                left[process] = ' '.join(process.cmdline())
    return left


def wait_for(happens, seconds=300):
    until = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < until, 'did not happen'
        time.sleep(0.05)


def runs_in(folder):
    return find_runs(folder / 'ablate-city')


def numbers(folder):
    drop = ('seconds', 'speed')
    return {
        key: [{k: v for k, v in r.items() if k not in drop} for r in read_metrics(run)]
        for key, run in runs_in(folder).items()
    }


def epochs(folder):
    return {key: len(read_metrics(run)) for key, run in runs_in(folder).items()}


def free(folder):
    try:
        with sole_worker(folder / 'ablate-city'):
            return True
    except ValueError:
        return False


@pytest.fixture(scope='module')
def in_turn(tmp_path_factory):
    "The numbers of the study, one run after another."
    folder = tmp_path_factory.mktemp('in_turn')
    code, printed = end_of(begin(folder), folder)
    assert code == 0, printed
    assert sorted(epochs(folder).values()) == [2, 30, 30]
    return numbers(folder)


def test_killed_stopped_and_gone_on_with(tmp_path, in_turn):
    killed = begin(tmp_path)
    wait_for(lambda: any(epochs(tmp_path).values()))
    killed.kill()
    killed.wait()
    wait_for(lambda: free(tmp_path))
    stopped = begin(tmp_path)
    wait_for(lambda: len(runs_in(tmp_path)) == 2)
    stopped.send_signal(signal.SIGTERM)
    code, printed = end_of(stopped, tmp_path)
    assert code == 128 + signal.SIGTERM, printed
    assert 'stopped by SIGTERM; runs under way are saved' in printed
    wait_for(lambda: free(tmp_path))
    code, printed = end_of(begin(tmp_path), tmp_path)
    assert code == 0, printed
    assert numbers(tmp_path) == in_turn


def workers(study):
    "The processes in which Ray runs tasks for a study."
    return [process for process, line in left_of(study).items() if 'ray::train_run' in line]


@pytest.fixture(scope='module')
def killed_on_ray(tmp_path_factory):
    "A study on Ray of which a worker was killed, and later the study itself, and its folder."
    pytest.importorskip('ray')
    folder = tmp_path_factory.mktemp('killed')
    study = begin(folder, '--jobs', '1')
    wait_for(lambda: any(epochs(folder).values()))
    victims = workers(study)
    assert victims, 'no worker of Ray was seen'
    for victim in victims:
        victim.kill()
    psutil.wait_procs(victims, timeout=60)
    before = epochs(folder)
    wait_for(lambda: epochs(folder) != before)  # Ray has started the run again
    study.kill()
    study.wait()
    return study, folder


def test_the_runs_of_a_killed_study_end(killed_on_ray):
    study, folder = killed_on_ray
    wait_for(lambda: all('Agent' in line for line in left_of(study).values()), 60)
    assert free(folder)


def saved(run):
    "Epochs and steps that a run says it has saved, in the last line of its log."
    last = (run.parent / 'seed1.log').read_text().splitlines()[-1]
    said = re.match(r'stopped by SIGINT, saved after (\d+) epochs and (\d+) steps', last)
    assert said, last
    return int(said[1]), int(said[2])


def test_stopped_on_ray_and_gone_on_with(killed_on_ray, in_turn):
    """The study that was killed goes on: Ctrl-C as a terminal sends it, to all processes; SIGTERM to the
    study alone; then the end."""
    _, folder = killed_on_ray
    goal = {key: len(rows) for key, rows in in_turn.items()}
    for send, number in ((os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)):
        before = epochs(folder)
        places = min(2, sum(before.get(key, 0) < n for key, n in goal.items()))
        study = begin(folder, '--jobs', '2')

        def grown():
            assert study.poll() is None, (folder / 'printed').read_text()
            return [key for key, n in epochs(folder).items() if n > before.get(key, 0)]

        wait_for(lambda: len(grown()) >= places)
        under_way = grown()
        send(study.pid, number)
        code, printed = end_of(study, folder)
        assert code == 128 + number, printed
        assert f'stopped by {number.name}; runs under way are saved' in printed
        wait_for(lambda: not left_of(study), 30)
        stopped = [run for key, run in runs_in(folder).items() if key in under_way]
        stopped = [run for run in stopped if len(read_metrics(run)) < RunFolder(run).config.num_epochs]
        assert stopped, 'every run had ended before the signal came'
        for run in stopped:
            assert saved(run) == progress(checkpoints(run / 'checkpoints')[-1])
    code, printed = end_of(begin(folder, '--jobs', '2'), folder)
    assert code == 0, printed
    assert numbers(folder) == in_turn


def test_nothing_is_left_of_a_study_on_ray_that_was_killed(killed_on_ray):
    "Two agents of Ray try for a minute to tell their dead server that it is dead."
    study, _ = killed_on_ray
    wait_for(lambda: not left_of(study))


CLUSTER = """
import sys
from dataclasses import replace
import ray
from ray.cluster_utils import Cluster
import ccc.studies as studies
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
cluster.add_node(num_cpus=1)
base = studies.study_base('city', **{tiny})
real = studies.train_run
def noting(*given):
    import os, ray
    with open(os.path.join(given[2], 'nodes'), 'a') as nodes:
        print(ray.get_runtime_context().get_node_id(), file=nodes)
    return real(*given)
studies.train_run = noting
configs = [replace(base, clustering=c, warmup_with_dbscan=False) for c in ('kmeans', 'dbscan')]
sys.exit(str(studies.ablate(configs, base, sys.argv[1], address=cluster.address) or '') or 0)
""".replace('{tiny}', repr(TINY))


def test_two_nodes_both_get_work(tmp_path):
    pytest.importorskip('ray')
    code, printed = end_of(begin(tmp_path, str(tmp_path), code=CLUSTER), tmp_path)
    assert code == 0, printed
    assert len(set((tmp_path / 'nodes').read_text().split())) == 2
    assert len(find_runs(tmp_path)) == 2


def test_a_run_that_another_process_trains_is_left_alone(tmp_path):
    base = study_base('city', **TINY)
    (tmp_path / 'base').mkdir()
    with FileLock(tmp_path / 'base' / 'seed1.lock'):
        assert ablate([base], base, tmp_path) == {'base seed 1': 'another process is training it'}
    with sole_worker(tmp_path):
        with pytest.raises(ValueError, match='one worker at a time'):
            ablate([base], base, tmp_path)
    assert find_runs(tmp_path) == {}


def test_a_run_that_crashes_is_left_out_and_the_others_go_on(tmp_path):
    base = study_base('city', **TINY)
    bad = replace(base, num_clusters=10_000)
    left_out = ablate([bad, base], base, tmp_path)
    assert (
        list(left_out) == ['num_clusters=10000 seed 1']
        and 'num_clusters must not exceed' in left_out['num_clusters=10000 seed 1']
    )
    found = results(tmp_path)
    assert list(found) == [run_key(base)] and scores(base, found).keys() == {1} and scores(bad, found) == {}
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
    from ccc.training import Trainer

    def refused(*_, **__):
        raise OSError(24, 'Too many open files')

    monkeypatch.setattr(Trainer, 'fit', refused)
    base = study_base('city', **TINY)
    left_out = ablate([replace(base, seed=s) for s in (1, 2, 3)], base, tmp_path)
    assert len(left_out) == 3 and all('Too many open files' in why for why in left_out.values())
    with sole_worker(tmp_path):
        pass


def test_checkpoints_elsewhere_are_kept_apart():
    base = study_base('city', ckpt_dir='somewhere')
    places = [run_settings(replace(base, clustering=c), base, Path('x')) for c in ('hdc', 'kmeans')]
    assert len({place.ckpt_dir for place in places}) == 2


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


def test_a_run_has_its_share():
    "One GPU each, where there are some; else its part of the CPUs."
    base = study_base('city')
    eight = dict(CPU=16.0, GPU=8.0)
    assert run_share(eight, base, None) == dict(num_cpus=2, num_gpus=1)
    assert run_share(eight, replace(base, device='cpu'), 4) == dict(num_cpus=4, num_gpus=0)
    assert run_share(dict(CPU=2.0), base, 4) == dict(num_cpus=0.5, num_gpus=0)
    assert run_share(dict(CPU=2.0), base, None) == dict(num_cpus=1, num_gpus=0)


def test_everything_is_imported_without_what_only_unix_has():
    "What Windows and macOS lack is taken away; every module is still imported."
    code = """
import importlib, os, pathlib, sys, ccc
def import_all():
    for path in pathlib.Path(ccc.__file__).parent.glob('*.py'):
        if not path.stem.startswith('__'): importlib.import_module(f'ccc.{path.stem}')
import_all()                     # with everything that others need of this machine
for name in [name for name in sys.modules if name.startswith('ccc.') and '_kernels' not in name]:
    del sys.modules[name]
for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios'): sys.modules[name] = None
for name in ('sched_getaffinity', 'register_at_fork', 'fork', 'geteuid', 'uname'): delattr(os, name)
import_all()
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
