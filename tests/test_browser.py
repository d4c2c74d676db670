"""The tutorials as a reader meets them: JupyterLab in a headless Chromium, every cell run, a slider moved, a cluster opened.

Without Chromium the test is skipped; with CCC_BROWSER=required (as CI sets it) that is a failure. Screenshots go to CCC_SCREENSHOTS, or to pytest's folder.
"""

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import nbformat
import pytest

import browser
from browser import free_port

ROOT = Path(__file__).parent.parent
missing = [
    name
    for name in ('jupyterlab', 'websocket', 'plotly', 'anywidget', 'ipywidgets')
    if importlib.util.find_spec(name) is None
]
reason = (
    'no Chromium on this machine (apt-get install chromium)'
    if browser.CHROMIUM is None
    else f'{", ".join(missing)} not installed (pip install -e ".[dev]")'
    if missing
    else None
)
if reason and os.environ.get('CCC_BROWSER') == 'required':
    raise RuntimeError(f'the browser test must run here (CCC_BROWSER=required): {reason}')
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or '')


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a copy of the notebooks, so that running them leaves no trace."
    folder = tmp_path_factory.mktemp('lab')
    shutil.copytree(
        ROOT / 'nbs', folder / 'root' / 'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints')
    )
    with browser.jupyterlab(folder / 'root', folder, free_port()) as address:
        yield address, folder / 'root'


@pytest.fixture
def page(tmp_path):
    with browser.chromium(tmp_path, free_port()) as page:
        yield page


@pytest.fixture
def shot(page, tmp_path, request):
    "Takes a screenshot under a name."
    folder = Path(os.environ.get('CCC_SCREENSHOTS', tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def take(name):
        page.shot(folder / f'{name}.png')
        assert (folder / f'{name}.png').stat().st_size > 20_000, 'the screenshot is empty'

    return take


def move(page, label, key='ArrowLeft', code=37):
    "Moves the slider with this label by one stop, by the keyboard, and returns what it read before."
    box = (
        '[...document.querySelectorAll(".widget-hslider")].filter(e =>'
        f' e.querySelector(".widget-label")?.textContent === "{label}").at(-1)'
    )
    x, y, w, h = page.place(f'{box}?.querySelector(".noUi-handle")')
    before = page.js(f'{box}.querySelector(".widget-readout").textContent')
    page.click(x + w / 2, y + h / 2)
    page.key(key, code)
    page.until(f'{box}.querySelector(".widget-readout").textContent !== "{before}"', 30)
    return before


def open_cluster(page):
    "Points at dots of the left map until one answers, then clicks; returns what the opened cluster says."
    x, y, w, h = page.place('document.querySelector(".gl-container canvas")')
    for row in (0.5, 0.4, 0.6, 0.3, 0.7):
        for column in range(10, 50, 2):
            page.click(x + w * column / 100, y + h * row)
            time.sleep(0.15)
            if page.js('document.querySelector(".ccc-cluster") !== null'):
                return page.js('document.querySelector(".ccc-cluster").textContent')
    raise AssertionError('no dot of the map could be clicked')


def show_crops(page):
    "Turns the crops of the map on; the boxes (x, y, width, height) in which the page draws them."
    x, y, w, h = page.place(
        '[...document.querySelectorAll("button")].find(e => e.textContent.trim() === "crops on the map")'
    )
    page.click(x + w / 2, y + h / 2)
    page.until('document.querySelectorAll(".imagelayer-above image, .layer-above image").length >= 2', 60)
    time.sleep(1)
    return page.js(
        '[...document.querySelectorAll(".imagelayer-above image, .layer-above image")].map(e =>'
        ' e.getBoundingClientRect()).map(r => [r.x, r.y, r.width, r.height])'
    )


def overlaps(boxes, slack=1):
    "How many pairs of boxes share more than a pixel each way."
    return sum(
        min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]) > slack
        and min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) > slack
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def test_step_through(lab, page, shot):
    "Every cell runs; each control draws its picture again, and so does the switch between the networks."
    address, _ = lab
    page.open(address, 'nbs/tutorials/step_through.ipynb')
    assert page.run_all(900) == []
    for label in ('k1', 'eps', 'round', 'n_sigma', 'stage'):
        panel = (
            '[...document.querySelectorAll(".widget-vbox")].filter(e =>'
            f' [...e.querySelectorAll(".widget-label")].some(l => l.textContent === "{label}")).at(-1)'
        )
        before = page.js(f'[{panel}.querySelector("img").src, {panel}.querySelector("pre").textContent]')
        move(page, label)
        page.until(f'{panel}.querySelector("img").src !== "{before[0]}"', 60)  # the consequence is drawn
        page.until(f'{panel}.querySelector("pre").textContent !== {json.dumps(before[1])}', 60)
        shot(f'step_through_{label}')


def test_evolution(lab, page, shot):
    address, _ = lab
    page.open(address, 'nbs/tutorials/evolution.ipynb')
    assert page.run_all(900) == []
    text = (
        '[...document.querySelectorAll(".widget-html-content")].map(e => e.textContent).find(t =>'
        ' t.startsWith("epoch "))'
    )
    assert page.js(text).startswith('epoch 16')
    move(page, 'epoch')
    page.until(f'{text}.startsWith("epoch 15")', 60)
    shot('evolution_slider')
    crops = show_crops(page)
    assert len(crops) >= 10 and overlaps(crops) == 0
    shot('evolution_atlas')
    opened = open_cluster(page)  # dots under and beside the crops still answer
    assert 'in epoch 15' in opened
    assert page.js('document.querySelectorAll(".ccc-cluster img").length') >= 1
    # the hovered image's card
    assert page.js(
        '[...document.querySelectorAll(".widget-html-content")].some(e => e.textContent.includes("path") &&'
        ' e.querySelector("img"))'
    )
    page.place('document.querySelector(".ccc-cluster")')
    shot('evolution_cluster')


MANY = '''import numpy as np
from ccc.widgets import explore_map
rng = np.random.default_rng(0)
labels = rng.integers(-1, 750, 12_936)
xy = 40 * rng.normal(size=(751, 2))[labels] + rng.normal(size=(12_936, 2))
class Split:
    pids, camids = labels, rng.integers(0, 6, 12_936)
    def image(self, i): return np.full((64, 32, 3), i % 255, np.uint8)'''


LATE = """(() => { const Blob = window.Blob; window.Blob = class extends Blob { constructor(parts, options) {
    const text = parts?.[0]; super(typeof text === 'string' && text.length > 1e6 ? ['await new Promise(done => setTimeout(done, 4000));\\n', text] : parts, options) } } })()"""


def test_points_appear_on_a_page_that_is_slow_to_load_plotly(lab, page, shot):
    """anywidget waits two seconds for a widget's code, then drops what the kernel has sent: a busy machine
    showed empty axes. Here the code is 4 s late."""
    address, root = lab
    cells = [nbformat.v4.new_code_cell(f'{MANY}\nexplore_map(xy[:500], labels[:500])')]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells,
            metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        ),
        root / 'late.ipynb',
    )
    page.open(address, 'late.ipynb')
    page.js(LATE)
    assert page.run_all(120) == []
    page.until('document.querySelectorAll(".gl-container canvas").length >= 2', 60)
    assert page.js('document.querySelector(".js-plotly-plot").data.map(d => d.x.length)') == [500, 500]
    shot('late_points')


def test_twelve_thousand_points(lab, page, shot):
    """As many images as Market-1501 has for training: the view is there within five seconds, answers to
    the pointer, and the page keeps drawing."""
    address, root = lab
    cells = [
        nbformat.v4.new_code_cell(source)
        for source in (
            MANY,
            'explore_map(xy, labels, rng.random(12_936), Split())',
            'explore_map(xy, labels, rng.random(12_936), Split())',
        )
    ]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells,
            metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        ),
        root / 'many.ipynb',
    )
    page.open(address, 'many.ipynb')
    seconds = []
    for k in (0, 1, 2):
        start = time.monotonic()
        page.js(
            f"(() => {{ const n = {browser.PANEL}.content; n.deselectAll(); n.activeCellIndex = {k};"
            " jupyterapp.commands.execute('notebook:run-cell'); return true })()"
        )
        page.until(
            f"{browser.PANEL}.content.widgets[{k}].promptNode?.textContent.match(/\\d/) !== null &&"
            f" document.querySelectorAll('.gl-container').length >= {k}",
            120,
        )
        seconds.append(time.monotonic() - start)
    print(
        f'view of 12,936 points open after {seconds[1]:.1f} s, the first of the session, which loads plotly'
        f' into kernel and page; the next after {seconds[2]:.1f} s'
    )
    # of the machine at its pace; the first is reported above
    assert seconds[2] < float(os.environ.get('CCC_OPEN_SECONDS', 5))
    shot('many_points')
    page.js(
        '''window.gaps = []; (() => { let last = performance.now(); const draw = () => { const now = performance.now(); gaps.push(now - last); last = now; requestAnimationFrame(draw) }; draw() })()'''
    )
    x, y, w, h = page.place('document.querySelector(".gl-container canvas")')
    for step in range(40):
        page.mouse(x + w * 0.1 + 4 * step, y + h * 0.5)
    page.until(
        '[...document.querySelectorAll(".widget-html-content")].some(e => e.textContent.includes("path"))', 10
    )
    gaps = sorted(page.js('window.gaps'))
    print(
        f'{len(gaps)} frames under the moving pointer, median {gaps[len(gaps) // 2]:.0f} ms, longest'
        f' {gaps[-1]:.0f} ms'
    )
    assert gaps[len(gaps) // 2] < 500  # WebGL on the CPU; on a graphics card it is the screen's own rate
    assert 'in epoch 1' in open_cluster(page)
    # the clicked point's ring and path, on both maps
    page.until('document.querySelectorAll(".shapelayer path").length >= 4', 60)
