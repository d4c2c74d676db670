"""The site: built by the one command from the notebooks as they are stored, complete, without a request to
another host, searchable, and with no code cut off.

The tests in a browser are skipped without Chromium; with CCC_BROWSER=required (as CI sets it) that is a failure.
Screenshots go to CCC_SCREENSHOTS, or to pytest's folder.
"""

import ast
import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import browser

ROOT = Path(__file__).parent.parent
needed = ['sphinx', 'myst_nb', 'sphinx_book_theme', 'sphinx_design', 'sphinx-mathjax-offline']
missing = [name for name in needed if importlib.util.find_spec(name) is None]
reason = f'{", ".join(missing)} not installed (pip install -e ".[docs]")' if missing else None
no_browser = 'no Chromium on this machine' if browser.CHROMIUM is None else None
if importlib.util.find_spec('websocket') is None:
    no_browser = 'websocket-client is not installed (pip install -e ".[dev]")'
if (reason or no_browser) and os.environ.get('CCC_BROWSER') == 'required':
    raise RuntimeError(f'the site must be tested here (CCC_BROWSER=required): {reason or no_browser}')
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or '')
in_browser = pytest.mark.skipif(no_browser is not None, reason=no_browser or '')
COMMAND = 'python -m sphinx -W --keep-going -qE -b html nbs _docs/html'
WIDTH = 1200  # pixels of the window
LINE = 110  # characters of code


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the built site; a warning of Sphinx fails it."
    folder = tmp_path_factory.mktemp('site') / 'html'
    words = COMMAND.replace('_docs/html', str(folder)).split()
    command = [sys.executable, *words[1:]]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder


@pytest.fixture(scope='module')
def helpers():
    "The modules that `nbs/conf.py` is made of."
    sys.path.insert(0, str(ROOT / 'nbs/_sphinx'))
    try:
        import names
        import pages
        import parts
    finally:
        sys.path.pop(0)
    return names, pages, parts


def test_one_command_builds_it():
    for name in ('nbs/conf.py', 'CONTRIBUTING.md', '.github/workflows/site.yml'):
        assert COMMAND in (ROOT / name).read_text(), name


def notebook(*cells):
    "JSON of a notebook: strings are code, other cells are given whole."
    whole = [
        c if isinstance(c, dict) else dict(cell_type='code', id=f'c{i}', metadata={}, outputs=[], source=c)
        for i, c in enumerate(cells)
    ]
    return json.dumps(dict(cells=whole, metadata={}, nbformat=4, nbformat_minor=5))


def test_what_is_shown_of_a_notebook(helpers):
    _, pages, _ = helpers
    long = '#| export\n' + 'def long():\n' + '    x = 1\n' * 30
    text = notebook(
        '#| default_exp m', '#| hide\n1', '#| echo: false\n2', '#| export\ndef f():\n    pass', long
    )
    cells = json.loads(pages.as_page(text, ROOT / 'nbs/m.ipynb', ROOT))['cells']
    assert [c['source'].splitlines()[0] for c in cells] == [
        '2',
        '(ccc.m.f)=',
        'def f():',
        '(ccc.m.long)=',
        'def long():',
    ]
    tags = [c['metadata'].get('tags', []) for c in cells]
    assert 'remove-input' in tags[0] and 'hide-input' not in tags[2] and 'hide-input' in tags[4]
    assert cells[4]['metadata']['mystnb']['code_prompt_show'] == 'source of long'


def test_links_of_the_readme_lead_to_pages(helpers):
    _, pages, _ = helpers
    path = ROOT / 'nbs/index.ipynb'
    for link, target in (
        ('CONTRIBUTING.md', 'contributing.md'),
        ('04_hdc.ipynb#membership', '04_hdc.ipynb#membership'),
        ('LICENSE', '../LICENSE'),
        ('https://example.invalid', 'https://example.invalid'),
    ):
        assert pages.linked(f'[a]({link})', path, ROOT) == f'[a]({target})'


def test_every_page_has_a_place(helpers, tmp_path, monkeypatch):
    _, _, parts = helpers
    pages = [page for part in parts.arranged(ROOT / 'nbs').values() for page in part]
    assert sorted(pages) == sorted({*parts.stored_pages(ROOT / 'nbs')} - {'index'} | {'self'})
    (tmp_path / 'tutorials').mkdir()
    for name in ('index', '04_a', '04x_b', 'guide', 'tutorials/c'):
        (tmp_path / f'{name}.ipynb').touch()
    monkeypatch.setattr(parts, 'PARTS', {'Start here': 'self', 'Tutorials': '', 'Under the hood': '04_a'})
    placed = parts.arranged(tmp_path)
    assert placed['Tutorials'] == ['tutorials/c'] and placed['Under the hood'] == ['04_a', '04x_b']
    assert placed['Start here'] == ['self', 'guide']
    monkeypatch.setitem(parts.PARTS, 'Tutorials', 'gone')
    with pytest.raises(ValueError, match='tutorials/gone'):
        parts.arranged(tmp_path)


def exported(module):
    "The names in `__all__` of a module that are made there, without importing it."
    statements = ast.parse((ROOT / f'ccc/{module}.py').read_text()).body
    made, public = set(), set()
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.Assign):
            made |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if ast.unparse(node.targets[0]) == '__all__':
                public = set(ast.literal_eval(node.value))
        elif isinstance(node, ast.AnnAssign):
            made.add(node.target.id)
    return made & public


def test_every_public_name_has_a_sentence_and_leads_to_its_cell(site, helpers):
    names, _, _ = helpers
    table = (site / 'names.html').read_text()
    rows = re.findall(r'<tr class="row-\w+"><td><p>(.*?)</p></td>\s*<td>(.*?)</td>', table, re.S)
    links = [(re.search(r'href="([^"#]+)#([^"]+)"', name), sentence) for name, sentence in rows]
    assert all(link and re.sub(r'<[^>]+>', '', sentence).strip() for link, sentence in links)
    modules = [p.stem for p in (ROOT / 'ccc').glob('*.py') if not p.stem.startswith('_')]
    assert {link[2] for link, _ in links} == {
        re.sub(r'[^a-z0-9]+', '-', names.anchor(module, name).lower()).strip('-')
        for module in modules
        for name in exported(module)
    }
    pages = {link[1]: (site / link[1]).read_text() for link, _ in links}
    assert [link[0] for link, _ in links if f'id="{link[2]}"' not in pages[link[1]]] == []


def test_no_flag_and_no_other_host_in_any_page(site):
    "Links may lead elsewhere; scripts, styles, fonts and pictures are part of the site."
    for path in site.rglob('*.html'):
        text = path.read_text()
        assert not re.search(r'#\|\s*(export|hide|echo|default_exp)', re.sub(r'<[^>]+>', '', text)), path.name
        assert not re.search(r'<(script|link|img|iframe|source)[^>]*(src|href)="(https?:)?//', text), (
            path.name
        )
    for path in site.rglob('*.css'):
        assert not re.search(r'(url\(|@import)\s*["\']?(https?:)?//', path.read_text()), path.name


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def address(site):
    handler = functools.partial(QuietHandler, directory=site)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp('chromium')
    with browser.chromium(folder, browser.free_port(), (WIDTH, 1400)) as page:
        page.call('Network.enable')
        yield page


def visit(page, url):
    page.call('Page.navigate', url=url)
    page.until(f'location.href.startsWith({url!r}) && document.readyState === "complete"')


def shot(page, tmp_path, name):
    folder = Path(os.environ.get('CCC_SCREENSHOTS', tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.shot(folder / f'{name}.png')


@in_browser
def test_search_finds_camera_entropy(address, page, tmp_path):
    visit(page, f'{address}/index.html')
    shot(page, tmp_path, 'site_start')
    x, y, w, h = page.place('document.querySelector(".bd-sidebar-primary .search-button-field")')
    page.click(x + w / 2, y + h / 2)
    page.until('document.activeElement.type === "search"')
    page.call('Input.insertText', text='camera entropy')
    page.call('Input.dispatchKeyEvent', type='keyDown', key='Enter', windowsVirtualKeyCode=13, text='\r')
    page.until('location.pathname.endsWith("/search.html")')
    page.until('document.querySelectorAll("#search-results li a").length > 3')
    shot(page, tmp_path, 'site_search')
    hit = page.js('document.querySelector("#search-results li a").getAttribute("href").split(/[?#]/)[0]')
    page.js('document.querySelector("#search-results li a").click()')
    page.until(f'location.pathname.endsWith({hit!r}) && document.readyState === "complete"')
    assert 'camera entropy' in page.js('document.querySelector(".bd-article").textContent').lower()


@in_browser
def test_formulas_are_drawn_in_light_and_dark(address, page, tmp_path):
    colours = {}
    for mode in ('light', 'dark'):
        visit(page, f'{address}/04_hdc.html')
        page.js(f'localStorage.setItem("mode", "{mode}"); localStorage.setItem("theme", "{mode}")')
        visit(page, f'{address}/04_hdc.html?{mode}')
        page.until('document.querySelectorAll("mjx-container mjx-math").length > 3')
        assert page.js(
            'document.fonts.check("16px MJXTEX") && [...document.fonts].some(f => f.family === "MJXTEX" && f.status === "loaded")'
        )
        colours[mode] = [
            page.js(f'getComputedStyle(document.querySelector("{part}")).{kind}.match(/\\d+/g).map(Number)')
            for part, kind in (('body', 'backgroundColor'), ('mjx-container', 'color'))
        ]
        shot(page, tmp_path, f'site_{mode}')
    (paper, ink), (night, chalk) = colours['light'], colours['dark']
    assert min(paper) > 200 > max(ink) and max(night) < 60 < 150 < min(chalk)


CUT_OFF = (
    '[...document.querySelectorAll(".bd-article {}")].filter(e => e.scrollWidth > e.clientWidth + 1).length'
)
FITS = """(() => { const pre = [...document.querySelectorAll('div.cell_input pre')].find(e => e.offsetParent), probe = document.createElement('span');
    probe.textContent = 'm'.repeat(%d); probe.style.whiteSpace = 'pre'; pre.appendChild(probe);
    const style = getComputedStyle(pre), room = pre.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const needed = probe.getBoundingClientRect().width; probe.remove(); return room - needed })()"""


@in_browser
@pytest.mark.parametrize(
    'name', ['index', 'tutorials/step_through', '04_hdc', '08_training', '10_cli', 'names']
)
def test_no_code_is_cut_off(name, address, page, tmp_path):
    "All code of a page is in view at 1200 px, a line of 110 characters without a break; no page moves sideways."
    visit(page, f'{address}/{name}.html')
    shot(page, tmp_path, f'site_{Path(name).name}')
    assert page.js(CUT_OFF.format('div.cell_input pre')) == 0
    assert page.js('document.documentElement.scrollWidth <= innerWidth')
    assert page.js(CUT_OFF.format('table')) == 0
    if name != 'names':
        assert page.js(FITS % LINE) >= 0


@in_browser
def test_no_request_leaves_the_machine(address, page):
    "What the browser asks for: on these pages, and on those of the tests above."
    for name in ('index', 'tutorials/evolution', '05b_widgets', 'names', 'search'):
        visit(page, f'{address}/{name}.html')
    visit(page, f'{address}/04_hdc.html')
    page.until('document.querySelectorAll("mjx-container mjx-math").length > 3')
    events = [e for e in page.events if e['method'] == 'Network.requestWillBeSent']
    urls = [e['params']['request']['url'] for e in events]
    assert any('mathjax' in u for u in urls) and any(u.endswith('.woff') for u in urls)
    assert [u for u in urls if not u.startswith((address, 'data:', 'blob:'))] == []
