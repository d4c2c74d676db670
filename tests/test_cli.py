"The command line: options under their published names, errors of one line, small commands end to end."

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from ccc.cli import main, train_options
from ccc.config import Config, changes
from ccc.experiments import recipe
from test_faults import claimed

PUBLISHED = '''dataset root-dir arch resnet-pretrained pooling-type height width batch-size num-instances num-workers iters num-epochs seed notes cm-mode cm-temperature cm-momentum
    loss-with-camera no-cam num-clusters cluster-min-instances dbscan-eps jaccard-k1 jaccard-k2 no-jaccard hdc-init hdc-similarity hdc-max-iter hdc-outlier hdc-centroids hdc-normalize
    threshold hdc-camera-version warmup-iters warmup-with-dbscan warmup-factor warmup-version warmup-lr-factor lr lr-weight-decay lr-steps lr-gamma eval-start-epoch eval-step-epoch
    eval-and-ckpt eval-dist rerank ckpt-dir log-dir'''.split()
TINY = (
    'train --subset-ids 6 --height 16 --width 8 --num-clusters 6 --jaccard-k1 8 --batch-size 16'
    ' --num-instances 4 --iters 1 --num-epochs 2 --warmup-iters 0 --num-workers 1 --no-maps --device cpu'
    ' --arch resnet18'
).split()


def shell(*args, **env):
    return subprocess.run(
        [sys.executable, '-m', 'ccc', *args],
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=120,
    )


with (Path(__file__).parent / 'published_options.csv').open() as table:
    TABLE = {row['option']: row for row in csv.DictReader(table)}
EXAMPLES = dict(integer=('64', 64), number=('0.25', 0.25), text=("it's here", "it's here"), flag=(None, True))


def published_values(option):
    """(word on the command line or None for a flag, what the setting then is) of every published value;
    one example where any number or text will do."""
    told = TABLE[option]['values']
    return (
        [EXAMPLES[told]]
        if told in EXAMPLES
        else [(v, v) for v in (part.split(': ')[0] for part in told.split(' | '))]
    )


def test_the_table_has_every_published_option_and_default():
    assert TABLE.keys() == set(PUBLISHED) and len(PUBLISHED) == 49
    for option, row in TABLE.items():
        here = getattr(Config(), option.replace('-', '_'))
        told = {'off': False, 'none': None if option == 'threshold' else 'none'}.get(
            row['default'], row['default']
        )
        assert (float(told) if type(here) in (int, float) else told) == here, option
    assert sum(len(published_values(o)) for o in PUBLISHED) == 66


@pytest.mark.parametrize('option', PUBLISHED)
@pytest.mark.parametrize('form', ['hyphens', 'underscores'])
def test_every_published_value_is_accepted(option, form):
    name = option.replace('-', '_')
    for word, value in published_values(option):
        said = [f'--{option if form == "hyphens" else name}', *([] if word is None else [word])]
        start = [] if option == 'dataset' else ['--dataset', 'market1501']
        config = train_options([*start, *said]).config
        assert (
            getattr(config, name) == value
            and type(getattr(config, name)) is type(value)
            and changes(config) == ({} if value == getattr(Config(), name) else {name: value})
        )


def test_all_published_options_together():
    words = [
        w
        for option in PUBLISHED
        for w in (
            f'--{option}',
            *([published_values(option)[-1][0]] if TABLE[option]['values'] != 'flag' else []),
        )
    ]
    config = train_options(words).config
    assert all(getattr(config, o.replace('-', '_')) == published_values(o)[-1][1] for o in PUBLISHED)


def test_where_options_start_from():
    assert train_options([]).config == recipe('city')
    assert train_options(['--dataset', 'msmt17']).config == Config(dataset='msmt17')
    assert train_options(['--dataset=veri', '--num_clusters=5']).config == Config(
        dataset='veri', num_clusters=5
    )
    assert train_options(['--iters', '7', '--recipe', 'veri-hdc']).config == recipe('veri-hdc', iters=7)
    assert train_options(['--recipe', 'veri-hdc', '--no-hdc-outlier', '--threshold', '0.5']).config == recipe(
        'veri-hdc', hdc_outlier=False, threshold=0.5
    )
    assert train_options(['--dataset', 'folder', '--root-dir', 'x']).config.root_dir == 'x'


@pytest.mark.parametrize(
    'line,says',
    [
        ('train --num-cluster 3', '--num-clusters'),
        ('train --iters x', '--iters'),
        ('train --clustering ward', 'ward'),
        ('train --dataset duke', 'duke'),
        ('train --recipe r', "got 'r'"),
        ('train --batch-size 10', '--batch-size 10'),
        ('train --resume here --lr 1', 'got here'),
        ('train --resume', '--resume'),
        ('train --resnet-pretrained', 'Missing'),
        ('evaluate', 'run'),
        ('evaluate nowhere', 'nowhere'),
        ('data --dataset market1501 --root-dir nowhere', 'nowhere'),
        ('fly', "got 'fly'"),
    ],
)
@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_an_error_is_one_line(line, says, encoding, capsys, monkeypatch):
    monkeypatch.delenv('CCC_DEBUG', raising=False)
    import tyro._fmtlib

    monkeypatch.setattr(tyro._fmtlib, '_should_use_utf8_drawing_chars', lambda: encoding == 'utf-8')
    assert main(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == '' and said.err.count('\n') == 1 and says in said.err, said.err


def test_help_and_version(capsys):
    assert main([]) == 0 and 'ccc evaluate' in capsys.readouterr().out
    assert main(['--version']) == 0 and capsys.readouterr().out.strip() == __import__('ccc').__version__
    with pytest.raises(SystemExit) as stop:
        main(['train', '--help'])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert (
        all(f'--{option}' in said for option in PUBLISHED)
        and '--resume' in said
        and 'EPOCHS of warm-up' in said
    )


def test_help_needs_no_torch():
    code = (
        "import sys; from ccc.cli import main; main(['--help']); main(['train', '--print-config']);"
        " sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0


def test_print_config(capsys):
    assert main('train --recipe msmt17-kmeans --print-config'.split()) == 0
    said = capsys.readouterr().out
    assert "* clustering              'kmeans'" in said and said.strip().endswith(
        'ccc train --dataset msmt17 --clustering kmeans --num-clusters 1000 --hdc-outlier --hdc-centroids'
        ' --loss-with-camera --iters 400 --num-epochs 60 --warmup-with-dbscan'
    )


def test_commands_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CCC_DEBUG', '1')
    assert main(['data', '--subset-ids', '6']) == 0 and 'train' in capsys.readouterr().out
    assert main(TINY) == 0
    assert 'kept in logs/city-seed999' in capsys.readouterr().out
    assert main(['train', '--resume', 'logs/city-seed999']) == 0 and '2 epochs' in capsys.readouterr().out
    assert (
        main(['evaluate', 'logs/city-seed999', '--rerank', '--best']) == 0
        and 're-ranked: mAP' in capsys.readouterr().out
    )
    assert main(['suggest', '--run', 'logs/city-seed999']) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith('epoch 2:') and train_options(
        ['--recipe', 'city', *told[-1].split()]
    ).config.dbscan_eps == float(told[1].split(':')[0].removeprefix('eps '))
    shutil.rmtree('logs/city-seed999/checkpoints')  # nothing left that could look at the images
    with pytest.raises(ValueError, match='needs a checkpoint'):
        main(['suggest', '--run', 'logs/city-seed999'])
    for other, said in (
        (['--lr', '1'], 'a change of lr from'),
        (['--recipe', 'city'], 'got also --recipe'),
        (['--dataset', 'veri'], 'a change of dataset from'),
        (['--pattern', 'x'], 'pattern must have a group'),
    ):
        for command in (['suggest', '--run'], ['train', '--resume'], ['evaluate']):
            words = (
                [*command, 'logs/city-seed999', *other]
                if command[-1].startswith('--')
                else ['evaluate', 'logs/city-seed999', *other]
            )
            with pytest.raises(ValueError, match=said):
                main(words)
    for text in (
        '{}',
        'null',
        '[' * 100_000,
        '{"config": {"colour": 1}, "data": {}}',
        '{"config":',
        '{"config": [], "data": {}}',
        '\0',
    ):
        Path('logs/city-seed999/config.json').write_text(text)
        for command in (['suggest', '--run'], ['train', '--resume'], ['evaluate']):
            with pytest.raises(ValueError, match='config.json must hold'):
                main([*command, 'logs/city-seed999'])


def test_module_runs():
    done = shell('train', '--iters', '0')
    assert done.returncode == 2 and done.stderr == 'ccc train: --iters must be above 0, got --iters 0\n'


def test_ablate_says_what_it_would_do(tmp_path, capsys):
    line = (
        f'ablate rules --seeds 1 --log-dir {tmp_path} --device cpu --subset-ids 6 --num-clusters 6'
        ' --jaccard-k1 6 --height 32 --width 16 --batch-size 16 --iters 1 --num-epochs 1 --warmup-iters 0'
    )
    assert main([*line.split(), '--dry-run']) == 0
    said = capsys.readouterr().out
    assert said.count('missing') == 8 and '8 of 8 runs to do' in said and not list(tmp_path.iterdir())
    assert (
        main(line.replace('--seeds 1', '--seeds 0').split()) == 2
        and 'at least 1, got 0' in capsys.readouterr().err
    )
    assert main(['ablate', 'colours']) == 2 and 'colours' in capsys.readouterr().err


def test_torchrun_without_a_gpu_trains_one_run_together(tmp_path):
    "Two processes are one run of two, not two runs that overwrite each other's numbers."
    import torch

    if torch.cuda.is_available():
        pytest.skip('a GPU is here: torchrun trains on it')
    words = [w for w in TINY if w not in ('--device', 'cpu')]
    launch = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        '-m',
        'ccc',
    ]
    surroundings = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1]), OMP_NUM_THREADS='1')
    done = subprocess.run(
        [*launch, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=surroundings
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (config,) = tmp_path.glob('logs/*/config.json')
    assert json.loads(config.read_text())['processes'] == 2 and done.stdout.count('kept in logs/') == 1


# damaged inputs of every command


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    "A tiny finished run, and a folder of crops."
    place = tmp_path_factory.mktemp('damaged')
    here = os.getcwd()
    os.chdir(place)
    try:
        assert main(TINY) == 0
    finally:
        os.chdir(here)
    from ccc.data import load_dataset

    (place / 'crops').mkdir()
    for i, path in enumerate(load_dataset('city').query.paths[:6]):
        shutil.copy(path, place / 'crops' / f'{i}.jpg')
    return place


DAMAGES = {
    'null': ('config.json', b'null'),
    'nested deep': ('config.json', b'[' * 100_000),
    'no settings': ('config.json', b'{"data": {}}'),
    'settings of a wrong type': ('config.json', b'{"config": {"lr": "much"}, "data": {"train": 3}}'),
    'no text': ('config.json', b'\xff\xfe\x00'),
    'a folder': ('config.json', None),
    'labels that claim three billion': ('labels/epoch_001.npz', claimed(3_000_000_000)),
    'metrics of another kind': ('metrics.jsonl', b'[1]\n{"epoch": 1}\n'),
    'no checkpoint': ('checkpoints/epoch_001.pt', b'junk'),
}
COMMANDS = {
    'evaluate': 'evaluate RUN',
    'suggest': 'suggest --run RUN',
    'resume': 'train --resume RUN --num-epochs 3',
    'report': 'report RUN --no-network',
    'label': 'label crops RUN',
    'search': 'search crops crops RUN',
    'export': 'export RUN out.safetensors crops',
}


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_run_is_one_line_or_does_no_harm(damage, command, whole_run, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('CCC_DEBUG', raising=False)
    run, (name, content) = tmp_path / 'run', DAMAGES[damage]
    shutil.copytree(whole_run / 'logs/city-seed999', run)
    shutil.copytree(whole_run / 'crops', tmp_path / 'crops')
    if damage == 'no checkpoint':
        shutil.rmtree(run / 'checkpoints')
    elif content is None:
        (run / name).unlink()
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    monkeypatch.setattr(
        'nbclient.NotebookClient.execute',
        lambda self: pytest.skip('the report does not read this file before it runs'),
    )
    code = main(COMMANDS[command].replace('RUN', 'run').split())
    said = capfd.readouterr().err
    assert 'Traceback' not in said
    if code:
        assert (
            code == 2
            and said.strip().splitlines()[-1].startswith(f'ccc {COMMANDS[command].split()[0]}: ')
            and len(said.strip().splitlines()[-1]) < 700
        ), said
    needs = (
        ('evaluate', 'suggest', 'resume', 'report')
        if name == 'config.json'
        else ('evaluate', 'suggest', 'label', 'search', 'export')
        if damage == 'no checkpoint'
        else ()
    )
    if command in needs:
        assert code == 2, 'a run that cannot be read was used'
    assert 'not foreseen' not in said, said


FOREIGN = {
    'label crops RUN --out mine': ('mine.csv', 'mine.html'),
    'search crops crops RUN --save mine.faiss': ('mine.faiss', 'mine.json'),
    'export RUN mine.safetensors crops': ('mine.safetensors', 'mine.md'),
}


@pytest.mark.parametrize('words', FOREIGN)
def test_a_file_of_somebody_else_stays_without_force(words, whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('CCC_DEBUG', raising=False)
    shutil.copytree(whole_run / 'crops', tmp_path / 'crops')
    command = words.replace('RUN', str(whole_run / 'logs/city-seed999')).split()
    for name in FOREIGN[words]:
        (tmp_path / name).write_text('somebody wrote this')
        assert main(command) == 2
        said = capsys.readouterr().err
        assert name in said and '--force' in said and said.count('\n') == 1, said
        assert (tmp_path / name).read_text() == 'somebody wrote this' and sorted(
            p.name for p in tmp_path.glob('mine*')
        ) == [name]
        (tmp_path / name).unlink()
    (tmp_path / FOREIGN[words][1]).write_text('somebody wrote this')
    assert main([*command, '--force']) == 0
    assert (tmp_path / FOREIGN[words][1]).read_bytes() != b'somebody wrote this'


def test_every_option_says_what_it_is(capsys):
    "The words of `ccc train --help` stand for every setting, not only its default."
    with pytest.raises(SystemExit):
        train_options(['--help'])
    text = ' '.join(capsys.readouterr().out.replace('│', ' ').split())
    for f in fields(Config):
        option = f.name.replace('_', '-')
        at = re.search(f'--{option}( [A-Z]+ | {{|, --no-{option} )', text)
        after = text[at.start() :].split('(default')[0]
        words = [w for w in after.split() if not w.startswith('-') and not w.isupper() and '{' not in w]
        assert len(words) >= 2, (f.name, after)
