"The report of a run that knows nothing: no identities, cameras, maps or images, and no weights."

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from dataclasses import asdict

import numpy as np
import pytest

from ccc.cli import main
from ccc.config import Config
from ccc.report import epochs_table, open_run, settings_table, write_report


@pytest.fixture
def bare(tmp_path):
    run = tmp_path / 'bare'
    (run / 'labels').mkdir(parents=True)
    config = asdict(Config(dataset='folder', root_dir=str(tmp_path / 'gone')))
    (run / 'config.json').write_text(
        json.dumps(
            dict(
                config=config,
                seed=1,
                commit=None,
                data=dict(fingerprint='x', train=40),
                versions=dict(python='3'),
                device='cpu',
                processes=1,
            )
        )
    )
    rng = np.random.default_rng(0)
    for e in range(2):
        np.savez(run / f'labels/epoch_{e:03d}.npz', labels=rng.integers(-1, 4, 40), confidence=rng.random(40))
    (run / 'metrics.jsonl').write_text(
        '{"epoch": 0, "n_clusters": 4, "n_outliers": 3, "loss": 1.5, "seconds": {"train": 1.0}}\n'
    )
    return run


def test_what_is_missing_is_said(bare):
    told, history, dataset, trainer, missing = open_run(bare)
    assert dataset is None and trainer is None and history.maps is None
    assert [
        any(word in line for line in missing)
        for word in ('images are not at hand', 'no checkpoint', 'no identities', 'no cameras', 'maps=False')
    ] == [True] * 5
    assert 'fingerprint x' in settings_table(told) and '| 1 | 4 | 3 | 1.500 | 1 |' in epochs_table(
        history.rows
    )


def test_report_of_a_run_that_knows_nothing(bare, capsys):
    assert main(['report', str(bare), '--out', str(bare / 'r.html'), '--no-network']) == 0
    assert capsys.readouterr().out.strip() == f'written: {bare / "r.html"}'
    text = (bare / 'r.html').read_text()
    assert (
        text.count('data:image/png') >= 4
        and 'no cameras' in text
        and 'class="jp-RenderedText jp-OutputArea-output" data-mime-type="application/vnd.jupyter.error"'
        not in text
    )
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', text)


def test_no_run(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match='folder of a run'):
        write_report(tmp_path)
    assert main(['report', str(tmp_path)]) == 2 and 'config.json' in capsys.readouterr().err


TAG = '<b id="theirs" onclick="x()">'


class Tags(HTMLParser):
    "The tags of a page that are theirs: by their attributes, and whether an address was made a link."

    def __init__(self, text):
        super().__init__()
        self.theirs = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        if (
            own.get('id') == 'theirs'
            or 'onclick' in own
            and 'x()' in own['onclick']
            or str(own.get('href') or own.get('src')).startswith('http://evil')
        ):
            self.theirs.append((tag, attributes))


def theirs(run, text):
    "The run under a name, with settings and notes, that are markup."
    moved = run.with_name(f'{text} & [l](evil.example) $x^')
    run.rename(moved)
    known = json.loads((moved / 'config.json').read_text())
    known['config'] |= dict(
        dataset='folder',
        notes=f'{text}\n\n# head\n<script>theirs()</script>',
        arch=f'timm:{text}',
        root_dir=f'gone/{text}|http://evil.example',
    )
    known |= dict(
        commit=text, device=f'![{text}](http://evil.example/x.png)', versions={text: f'</td>{text}'}
    )
    known['data']['fingerprint'] = text
    (moved / 'config.json').write_text(json.dumps(known))
    return moved


MODULES = (
    'ccc numpy torch nbformat nbclient ipykernel ipykernel_launcher IPython sitecustomize usercustomize'
    ' matplotlib json traitlets startup ipython_config ipython_kernel_config plotly'.split()
)


@pytest.mark.parametrize(
    'launch',
    [[str(Path(sys.executable).with_name('ccc'))], [sys.executable, '-m', 'ccc']],
    ids=['script', 'module'],
)
def test_a_run_is_data(bare, tmp_path, launch):
    "No file of a run or of the working folder is imported, and no text of them is markup."
    run, here = theirs(bare, TAG), tmp_path / 'here'
    here.mkdir()
    for folder in (run, here):
        for name in MODULES:
            # `python -m ccc` itself looks for ccc in the working folder: Python's rule
            if folder == run or launch[1:] == [] or name != 'ccc':
                (folder / f'{name}.py').write_text(f'open({str(tmp_path / "it_ran")!r}, "a").write(__file__)')
        (folder / 'profile_default/startup').mkdir(parents=True)
        (folder / 'profile_default/startup/0.py').write_text(
            f'open({str(tmp_path / "it_ran")!r}, "a").write("profile")'
        )
    env = os.environ | dict(PYTHONSTARTUP=str(here / 'startup.py'), IPYTHONDIR=str(here))
    done = subprocess.run(
        [*launch, 'report', str(run), '--out', str(tmp_path / 'r.html'), '--no-network'],
        capture_output=True,
        text=True,
        cwd=here,
        env=env,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / 'it_ran').exists(), (tmp_path / 'it_ran').read_text()
    text = (tmp_path / 'r.html').read_text()
    assert Tags(text).theirs == [] and '<script>theirs' not in text and '&lt;b id=' in text
    # nothing is left behind
    assert sorted(p.name for p in here.iterdir()) == sorted(
        [*(f'{m}.py' for m in MODULES if (here / f'{m}.py').exists()), 'profile_default']
    )


def test_a_file_that_is_not_ours_stays(bare, capsys):
    out = bare / 'report.html'
    out.write_text('my notes')
    assert main(['report', str(bare), '--no-network']) == 2
    said = capsys.readouterr().err
    assert '--force' in said and said.count('\n') == 1 and out.read_text() == 'my notes'
    assert main(['report', str(bare), '--no-network', '--force']) == 0 and 'ccc-seal' in out.read_text()
    assert main(['report', str(bare), '--no-network']) == 0  # ours: made anew
    assert (
        main(['report', str(bare), '--no-network', '--out', str(bare / 'labels')]) == 2
        and 'folder' in capsys.readouterr().err
    )


@pytest.fixture
def two_epochs(tmp_path):
    "The stored run of the city, its first two epochs."
    run = tmp_path / 'city'
    shutil.copytree(Path(__file__).parent.parent / 'nbs/tutorials/runs/city', run)
    for file in sorted((run / 'labels').glob('*.npz'))[2:]:
        file.unlink()
    lines = (run / 'metrics.jsonl').read_text().splitlines(keepends=True)
    (run / 'metrics.jsonl').write_text(''.join(lines[:2]))
    return run


def test_images_of_a_run_are_blurred_on_demand(two_epochs):
    plain, blurred = (open_run(two_epochs, network=False, blur_faces=blur)[1].split for blur in (False, True))
    assert len(blurred.pids) == len(plain.pids)
    seen, hidden = np.asarray(plain.image(0)).astype(int), np.asarray(blurred.image(0)).astype(int)
    changed = np.abs(seen - hidden).mean((1, 2)) > 0
    quarter = round(len(seen) / 4)
    assert changed[:quarter].all() and not changed[quarter + 1 :].any()


def test_report_shows_an_atlas(two_epochs):
    out = write_report(two_epochs, network=False, blur_faces=True)
    text = out.read_text()
    assert 'Who is on the map?' in text and 'The upper quarter of every image is blurred' in text
