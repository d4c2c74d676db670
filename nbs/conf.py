"""The documentation: every notebook as it is stored, on one site that can be searched.

    python -m sphinx -W --keep-going -qE -b html nbs _docs/html

No notebook is executed. `_sphinx/pages.py` says what of a notebook is shown, `_sphinx/parts.py` in which order,
and `_sphinx/names.py` makes the page of public names.
"""

import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / '_sphinx'))
import names  # noqa: E402
import pages  # noqa: E402
import parts  # noqa: E402

settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(HERE.parent / 'settings.ini', encoding='utf-8')
settings = settings['DEFAULT']

project = settings['title']
author = settings['author']
copyright = settings['copyright'].replace('%(author)s', author)
version = release = settings['version']
language = 'en'

extensions = ['myst_nb', 'sphinx_design']
root_doc = 'index'
source_suffix = {'.ipynb': 'myst-nb', '.md': 'myst-nb'}
exclude_patterns = ['_*', 'tutorials/runs', '**/.ipynb_checkpoints']

nb_execution_mode = 'off'
nb_ipywidgets_js = {}  # these come from another host, and a stored page has no live widget
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 4

html_theme = 'sphinx_book_theme'
html_title = f'{project} {version}'
html_static_path = ['_sphinx/static']
html_css_files = ['site.css']
html_copy_source = True
html_show_sphinx = False
html_use_index = False
html_theme_options = dict(
    home_page_in_toc=False,
    show_navbar_depth=1,
    show_toc_level=2,
    use_fullscreen_button=False,
    navbar_persistent=[],
    pygments_light_style='a11y-high-contrast-light',
    pygments_dark_style='a11y-high-contrast-dark',
)

# Formulas are drawn without a network: the package holds MathJax, and only what one page needs is taken.
MATHJAX = Path(find_spec('sphinx-mathjax-offline').submodule_search_locations[0]) / 'static/mathjax'
mathjax_path = 'mathjax/tex-chtml-full.js'
mathjax3_config = dict(options=dict(enableMenu=False))


def copy_mathjax(app, error):
    "One script and its fonts, beside the other static files."
    from sphinx.util.fileutil import copy_asset

    if error is None:
        target = Path(app.outdir) / '_static/mathjax'
        fonts = 'output/chtml/fonts'
        copy_asset(MATHJAX / 'tex-chtml-full.js', target)
        copy_asset(MATHJAX / fonts, target / fonts)


def read_source(app, docname, source):
    "The text of a page, before it is parsed."
    path = Path(app.env.doc2path(docname))
    if docname == 'names':
        source[0] += names.as_markdown(HERE)
    if path.suffix == '.ipynb':
        source[0] = pages.as_page(source[0], path, HERE.parent)
    if docname == root_doc:
        source[0] = pages.with_cell(source[0], parts.as_markdown(HERE))


def setup(app):
    app.connect('source-read', read_source)
    app.connect('build-finished', copy_mathjax)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
