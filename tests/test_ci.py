"""`.ci/chromium` on machines made of three lines each (with a browser, without one, where the
distribution's package is a stub), and what `tests/run.sh` leaves on the disk."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / '.ci/chromium'
pytestmark = pytest.mark.skipif(
    shutil.which('bash') is None or not SCRIPT.exists(), reason='needs bash and the sources'
)

BROWSER = '#!/bin/sh\necho "Chromium 1.2.3 built on Nothing"\n'
STUB = '#!/bin/sh\necho "Command requires the chromium snap to be installed" >&2\nexit 1\n'


def machine(folder, user='0', **programs):
    "A PATH with a few real tools and these programs, and what running the script on it gives."
    tools = folder / 'bin'
    tools.mkdir()
    for name in ('bash', 'env', 'grep', 'head', 'sh', 'cat', 'chmod'):
        (tools / name).symlink_to(shutil.which(name))
    for name, text in dict(id=f'#!/bin/sh\necho {user}\n', **programs).items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [shutil.which('bash'), SCRIPT], env=dict(PATH=str(tools)), capture_output=True, text=True
    )
    log = tools / 'log'
    return done, log.read_text().splitlines() if log.exists() else []


def apt(installed):
    "An apt-get that notes how it was called, and puts `installed` where Chromium goes."
    return (
        '#!/bin/sh\nbin=${0%/*}\necho "$DEBIAN_FRONTEND apt-get $*" >> "$bin/log"\ncase "$*" in *install*)'
        f' cat > "$bin/chromium" <<\'END\'\n{installed}END\nchmod +x "$bin/chromium";; esac\n'
    )


def test_a_browser_that_is_here_is_taken(tmp_path):
    done, log = machine(tmp_path, **{'google-chrome': BROWSER, 'apt-get': apt(BROWSER)})
    assert done.returncode == 0 and 'Chromium 1.2.3' in done.stdout and log == []


@pytest.mark.parametrize('user', ['0', '1000'])
def test_installs_one_where_there_is_none(tmp_path, user):
    sudo = (
        {'sudo': '#!/bin/sh\necho "sudo" >> "${0%/*}/log"\nunset DEBIAN_FRONTEND\nexec "$@"\n'}
        if user != '0'
        else {}
    )
    done, log = machine(tmp_path, user, **{'apt-get': apt(BROWSER)}, **sudo)
    assert done.returncode == 0 and 'Chromium 1.2.3' in done.stdout, done.stderr
    calls = [line for line in log if line != 'sudo']
    assert calls == [
        'noninteractive apt-get -qq update',
        'noninteractive apt-get -qq install -y --no-install-recommends chromium',
    ]
    assert log.count('sudo') == (2 if user != '0' else 0)


def test_a_stub_is_no_browser(tmp_path):
    done, log = machine(tmp_path, **{'chromium-browser': STUB, 'apt-get': apt(STUB)})
    assert done.returncode == 1 and 'no browser runs' in done.stderr and len(log) == 2


def test_failures_are_not_swallowed(tmp_path):
    assert machine(tmp_path, **{'apt-get': '#!/bin/sh\nexit 100\n'})[0].returncode == 100
    (other := tmp_path / 'other').mkdir()
    done, _ = machine(other)
    assert done.returncode == 1 and 'no apt-get' in done.stderr


@pytest.mark.parametrize('status', [0, 1])
def test_a_test_run_leaves_nothing_on_the_disk(tmp_path, status):
    """CI failed once on a disk that earlier runs had filled: whatever a notebook or a test leaves in the
    temporary folder goes with the run, passed or failed."""
    for name in ('tests', 'bin', 'tmp'):
        (tmp_path / name).mkdir()
    script = shutil.copy(SCRIPT.parent.parent / 'tests/run.sh', tmp_path / 'tests')
    leaves = '#!/bin/sh\nls "$TMPDIR" | wc -l >> "$LOG"\necho weights > "$TMPDIR/left.$$"\n'
    for name, code in dict(nbdev_test=0, python=status).items():
        (tmp_path / 'bin' / name).write_text(leaves + f'case "$*" in *pytest*) exit {code};; esac\n')
        (tmp_path / 'bin' / name).chmod(0o755)
    done = subprocess.run(
        ['bash', script],
        env=dict(
            PATH=f'{tmp_path}/bin:{os.environ["PATH"]}',
            TMPDIR=str(tmp_path / 'tmp'),
            LOG=str(tmp_path / 'log'),
        ),
    )
    assert done.returncode == status and not list((tmp_path / 'tmp').iterdir())
    # pytest starts without what the notebooks left
    assert (tmp_path / 'log').read_text().split() == ['0', '1', '0']
