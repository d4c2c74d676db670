"""The networks stored with the package: what the run's metrics say, of the training that stands, and a start from
which an epoch helps."""

import json
from pathlib import Path

import pytest
import torch

from ccc.config import NUMERICS
from ccc.stages import STAGES, city_network, stage_facts, stage_file, stages_config
from ccc.training import Trainer, read_metrics

ROOT = Path(__file__).parents[1]
RUN = ROOT / 'nbs/tutorials/runs/stages/base/seed999'
ROUNDING = 1e-3  # of mAP, by float16: 0.0002 was measured


@pytest.fixture
def threads():
    "Sets the number of threads, and sets it back."
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('stage', [s for s, epochs in STAGES.items() if epochs])
def test_a_stored_network_is_that_of_the_stored_run(stage):
    facts, row = stage_facts(stage), read_metrics(RUN)[STAGES[stage] - 1]
    assert facts['numerics'] == json.loads((RUN / 'config.json').read_text())['numerics'] == NUMERICS
    assert facts['epoch'] == row['epoch'] + 1 and facts['mAP'] == row['mAP']
    score = Trainer(stages_config(), net=city_network(stage)).evaluate().mAP
    assert abs(score - row['mAP']) < ROUNDING
    assert stage_file(stage).stat().st_size < 900_000


def test_the_untrained_network_is_that_of_a_new_run():
    ours, fresh = city_network('untrained'), Trainer(stages_config()).net
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), fresh.state_dict().values()))


@pytest.mark.parametrize('seed, n', [(1, 1), (2, 1), (3, 2)])
def test_two_epochs_from_half_way_raise_the_score(seed, n, threads):
    "What the tutorial ends with, with other seeds and numbers of threads."
    threads(n)
    trainer = Trainer(stages_config(seed=seed), net=city_network('half-way'))
    before = trainer.evaluate().mAP
    rows = [trainer.step() for _ in range(2)]
    assert rows[-1]['mAP'] > before + 0.04
    assert rows[-1]['purity'] > rows[0]['purity'] - 0.02


def test_a_stored_file_is_a_model():
    from ccc.model import load

    model = load(stage_file('trained'))
    assert model.info['arch'] == 'small' and model.info['dim'] == 256


def test_the_command_that_makes_them_writes_the_same_network(tmp_path, monkeypatch):
    "`write_stage` of a run whose last checkpoint is the stored network gives the file back."
    from safetensors.torch import load_file, save_file

    import ccc.stages as stages

    run = tmp_path / 'run'
    (run / 'checkpoints').mkdir(parents=True)
    metadata = json.loads((RUN / 'config.json').read_text())
    metadata['config']['ckpt_dir'] = 'ckpt'
    (run / 'config.json').write_text(json.dumps(metadata))
    (run / 'metrics.jsonl').write_bytes((RUN / 'metrics.jsonl').read_bytes())
    weights = {name: t.float() if t.ndim > 1 else t for name, t in load_file(stage_file('trained')).items()}
    save_file(weights, run / f'checkpoints/epoch_{STAGES["trained"] - 1:03d}.safetensors')
    stored, facts = load_file(stage_file('trained')), stage_facts('trained')
    monkeypatch.setattr(stages, 'stage_file', lambda stage: tmp_path / f'{stage}.safetensors')
    stages.write_stage('trained', run)
    written = load_file(tmp_path / 'trained.safetensors')
    assert written.keys() == stored.keys() and stages.stage_facts('trained') == facts
    assert all(torch.equal(written[name], stored[name]) for name in stored)
    assert {t.dtype for t in written.values() if t.ndim > 1} == {torch.float16}


def test_a_stage_that_is_none_is_refused():
    with pytest.raises(ValueError, match="got 'ripe'"):
        city_network('ripe')
    with pytest.raises(ValueError, match='to have a file'):
        stage_file('untrained')
