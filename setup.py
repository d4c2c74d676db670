"settings.ini -> setuptools, and every exported `ccc/_*_kernels.py` -> a compiled extension of the same name."

import os
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=['='], interpolation=None)
config.read(ROOT / 'settings.ini', encoding='utf-8')
config = config['DEFAULT']


def lines(key):
    "The entries of one setting, a line each: requirements with markers hold spaces."
    return [line.strip() for line in config.get(key, '').splitlines() if line.strip()]


def kernels():
    """The notebooks' kernels, compiled with OpenMP where the compiler has it; CCC_KERNELS=bounds or
    address builds them checked (`tests/checked.sh`)."""
    from Cython.Build import cythonize

    openmp = {'win32': ['/openmp'], 'darwin': []}.get(sys.platform, ['-fopenmp'])
    kind = os.environ.get('CCC_KERNELS', 'fast')
    optimise = ['/O2'] if sys.platform == 'win32' else ['-O3'] if kind == 'fast' else ['-O1', '-g']
    if kind == 'address':
        openmp = [*openmp, '-fsanitize=address']
    checks = kind == 'bounds'
    extensions = [
        Extension(
            f'ccc.{path.stem}',
            [f'ccc/{path.name}'],
            extra_compile_args=optimise + openmp,
            extra_link_args=[] if sys.platform == 'win32' else openmp,
        )
        for path in sorted((ROOT / 'ccc').glob('_*_kernels.py'))
    ]
    return cythonize(
        extensions,
        build_dir=f'build/cython-{kind}',
        language_level=3,
        compiler_directives=dict(
            boundscheck=checks, wraparound=False, cdivision=True, initializedcheck=checks
        ),
    )


class BuildWithTutorials(build_py):
    "A wheel has the tutorials, and the runs that they read, beside the modules: `ccc lab` copies them."

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / 'ccc/tutorials'
            shutil.rmtree(target, ignore_errors=True)
            unwanted = shutil.ignore_patterns('.ipynb_checkpoints', '__pycache__', 'logs')
            shutil.copytree(ROOT / 'nbs/tutorials', target, ignore=unwanted)


setup(
    name=config['lib_name'],
    version=config['version'],
    description=config['description'],
    author=config['author'],
    author_email=config['author_email'],
    url=config['git_url'],
    keywords=config['keywords'],
    license='Apache-2.0',
    python_requires='>=' + config['min_python'],
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['ccc', 'ccc.*']),
    package_data={'ccc': ['report.ipynb', 'city.npz', 'city_*.safetensors']},
    zip_safe=False,
    install_requires=lines('requirements'),
    extras_require={
        extra: lines(f'{extra}_requirements')
        for extra in ('dev', 'timm', 'track', 'tables', 'export', 'notebook', 'cluster', 'docs')
    },
    entry_points={'console_scripts': lines('console_scripts'), 'nbdev': ['ccc=ccc._modidx:d']},
    ext_modules=kernels(),
    cmdclass={'build_py': BuildWithTutorials},
)
