"The report of a run that knows nothing: no identities, cameras, maps or images, and no weights."
import json
import re
from dataclasses import asdict

import numpy as np
import pytest

from ccc.cli import main
from ccc.config import Config
from ccc.report import epochs_table, open_run, settings_table, write_report


@pytest.fixture
def bare(tmp_path):
    run = tmp_path/'bare'
    (run/'labels').mkdir(parents=True)
    config = asdict(Config(dataset='folder', root_dir=str(tmp_path/'gone')))
    (run/'config.json').write_text(json.dumps(dict(config=config, seed=1, commit=None, data=dict(fingerprint='x', train=40), versions=dict(python='3'), device='cpu', processes=1)))
    rng = np.random.default_rng(0)
    for e in range(2):
        np.savez(run/f'labels/epoch_{e:03d}.npz', labels=rng.integers(-1, 4, 40), confidence=rng.random(40))
    (run/'metrics.jsonl').write_text('{"epoch": 0, "n_clusters": 4, "n_outliers": 3, "loss": 1.5, "seconds": {"train": 1.0}}\n')
    return run


def test_what_is_missing_is_said(bare):
    told, history, dataset, trainer, missing = open_run(bare)
    assert dataset is None and trainer is None and history.maps is None
    assert [any(word in line for line in missing) for word in ('images are not at hand', 'no checkpoint', 'no identities', 'no cameras', 'maps=False')] == [True] * 5
    assert 'fingerprint x' in settings_table(told) and '| 1 | 4 | 3 | 1.500 | 1 |' in epochs_table(history.rows)


def test_report_of_a_run_that_knows_nothing(bare, capsys):
    assert main(['report', str(bare), '--out', str(bare/'r.html'), '--no-network']) == 0
    assert capsys.readouterr().out.strip() == f'written: {bare/"r.html"}'
    text = (bare/'r.html').read_text()
    assert text.count('data:image/png') >= 4 and 'no cameras' in text and 'class="jp-RenderedText jp-OutputArea-output" data-mime-type="application/vnd.jupyter.error"' not in text
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', text)


def test_no_run(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match='folder of a run'):
        write_report(tmp_path)
    assert main(['report', str(tmp_path)]) == 2 and 'config.json' in capsys.readouterr().err
