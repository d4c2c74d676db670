"Settings that cannot be right are refused at once: a table over every field of `Config`."

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from ccc.cli import main
from ccc.config import Config

NAN, INF = float('nan'), float('inf')
FREE = {'notes', 'hdc_camera_version'}  # any text is right
ZERO_IS_RIGHT = set(
    'pad lr_weight_decay lr_gamma warmup_iters warmup_factor warmup_lr_factor eval_start_epoch seed threshold'
    ' cm_momentum'.split()
)
HINTS = {f.name: get_type_hints(Config)[f.name] for f in fields(Config)}


def kind(hint):
    "Words of choice, or the type of a field, and whether none is right."
    args = get_args(hint)
    if args and all(isinstance(a, str) for a in args):
        return 'choice', False
    optional = type(None) in args
    return next(t for t in args or (hint,) if t is not type(None)).__name__, optional


def wrong(name):
    "Values that cannot be right for a field."
    what, optional = kind(HINTS[name])
    values = [b'bytes', [1], {'a': 1}, 3j]
    if not optional:
        values.append(None)
    if what == 'choice':
        values += ['banana', '', 'NONE', 3, True, NAN]
    if what == 'bool':
        values += [0, 1, 2, 'yes', 'False', NAN]
    if what == 'int':
        values += [-1, -(10**30), 10**30, 1.5, 3.0, NAN, INF, '3', True]
    if what == 'float':
        values += [-1.0, -1e-9, NAN, INF, -INF, 1e300, 10**400, '0.1', True]
    if what in ('int', 'float') and name not in ZERO_IS_RIGHT:
        values.append(0)
    if what == 'str':
        values += [3, True, NAN, 'a\0b']
    if what == 'str' and name not in FREE | {'recipe', 'device', 'pattern'}:
        values += ['', '  ']
    return values + dict(
        device=['banana', 'gpu', 'cuda:', 'cuda:x', 'CPU', ''],
        arch=['resnet', 'timm:', 'ResNet50'],
        recipe=['<b>', '../x'],
        pattern=['(', '(?P<pid>', 'x', '(?P<pid>\\d+)'],
        seed=[2**32],
        height=[10**9],
        dbscan_eps=[1.1],
        cm_momentum=[1.1],
        subset_ids=[10**9],
        jaccard_k1=[10**9],
    ).get(name, [])


CASES = [(name, value) for name in HINTS for value in wrong(name)]


@pytest.mark.parametrize('name, value', CASES, ids=[f'{n}={str(v)[:20]!r}' for n, v in CASES])
def test_a_setting_that_cannot_be_right_is_refused(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    message = str(error.value)
    assert name in message and '\n' not in message and len(message) < 600, message


def test_the_table_is_about_every_field():
    assert {name for name, _ in CASES} == set(HINTS) and len(CASES) > 600
    Config()  # and the defaults are right


@pytest.mark.parametrize(
    'words, option',
    [
        ('--seed 1e20', '--seed'),
        ('--lr-gamma inf', '--lr-gamma'),
        ('--cm-temperature 1e300', '--cm-temperature'),
        ('--lr 1e300', '--lr'),
        ('--lr nan', '--lr'),
        ('--subset-ids 1000000000', '--subset-ids'),
        ('--pattern (', '--pattern'),
        ('--height 0', '--height'),
        ('--height 1000000000', '--height'),
        ('--jaccard-k1 1000000000', '--jaccard-k1'),
        ('--device banana', '--device'),
        ('--device cuda:1', '--device'),
        ('--threshold nan', '--threshold'),
        ('--num-epochs -1', '--num-epochs'),
        ('--log-dir=', '--log-dir'),
        ('--image-cache=', '--image-cache'),
        ('--image-cache FILE', '--image-cache'),
        ('--log-dir FILE', '--log-dir'),
        ('--ckpt-dir FILE/x', '--ckpt-dir'),
        ('--batch-size 10', '--batch-size'),
        ('--dbscan-eps 0', '--dbscan-eps'),
    ],
)
def test_the_command_names_the_option(words, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('CCC_DEBUG', raising=False)
    (tmp_path / 'FILE').write_text('somebody wrote this')
    assert main(['train', *words.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith('ccc train: ') and message.count('\n') == 1 and option in message, message
    assert (tmp_path / 'FILE').read_text() == 'somebody wrote this' and not (tmp_path / 'logs').exists()
