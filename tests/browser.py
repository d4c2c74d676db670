"""A JupyterLab and a headless Chromium for the browser test: a notebook is opened, run, clicked and
photographed as a reader would."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(
    (
        path
        for name in ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
        if (path := shutil.which(name))
    ),
    None,
)

SETTINGS = {
    # no questions in front of the notebook
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    'notebook-extension/tracker': dict(windowingMode='none'),
}  # cells out of sight are in the page, too
PANEL = "[...jupyterapp.shell.widgets('main')].find(w => w.context?.path.endsWith('.ipynb'))"


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait(condition, seconds, what):
    "Asks until the answer is true; AssertionError with `what` when the seconds are over."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            answer = condition()
        except (OSError, ValueError):
            answer = None
        if answer:
            return answer
        time.sleep(0.25)
    raise AssertionError(f'waited {seconds} s for {what}')


@contextmanager
def process(command, log, **options):
    "A program that runs while the block does; what it says goes to the file `log`."
    with open(log, 'wb') as out:
        running = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **options)
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


def read(url):
    return json.load(urllib.request.urlopen(url, timeout=5))


@contextmanager
def jupyterlab(root, folder, port):
    "JupyterLab on the notebooks under `root`; its settings stay in `folder`."
    own = {
        name: str(folder / name)
        for name in (
            'JUPYTER_CONFIG_DIR',
            'JUPYTERLAB_SETTINGS_DIR',
            'JUPYTERLAB_WORKSPACES_DIR',
            'IPYTHONDIR',
        )
    }
    for name, settings in SETTINGS.items():
        file = folder / 'JUPYTERLAB_SETTINGS_DIR' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    command = [
        sys.executable,
        '-m',
        'jupyter',
        'lab',
        '--allow-root',
        '--no-browser',
        f'--port={port}',
        '--ServerApp.port_retries=0',
        '--ServerApp.token=',
        '--ServerApp.password=',
        '--expose-app-in-browser',
        f'--ServerApp.root_dir={root}',
    ]
    with process(command, folder / 'lab.log', env=os.environ | own):
        wait(lambda: read(f'http://127.0.0.1:{port}/api'), 180, 'JupyterLab')
        yield f'http://127.0.0.1:{port}'


@contextmanager
def chromium(folder, port, size=(1400, 1800)):
    "A page in a headless Chromium; WebGL is computed on the CPU."
    command = [
        CHROMIUM,
        '--headless=new',
        '--no-sandbox',
        '--use-angle=swiftshader',
        '--enable-unsafe-swiftshader',
        '--disable-dev-shm-usage',
        '--no-first-run',
        '--disable-background-networking',
        '--disable-component-update',
        '--disable-sync',
        f'--user-data-dir={folder / "profile"}',
        f'--remote-debugging-port={port}',
        '--remote-allow-origins=*',
        f'--window-size={size[0]},{size[1]}',
        'about:blank',
    ]
    with process(command, folder / 'chromium.log'):
        pages = wait(
            lambda: [t for t in read(f'http://127.0.0.1:{port}/json') if t['type'] == 'page'], 180, 'Chromium'
        )
        yield Page(pages[0]['webSocketDebuggerUrl'])


class Page:
    "A tab of Chromium, by its DevTools protocol."

    def __init__(self, address):
        import websocket

        self.socket, self.count = websocket.create_connection(address, timeout=120), 0
        self.events = []  # what the browser has told between its answers
        self.call('Page.enable')

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if 'method' in message:
                self.events.append(message)
            if message.get('id') == self.count:
                if 'error' in message:
                    raise AssertionError(f'{method}: {message["error"]}')
                return message['result']

    def js(self, expression):
        "The value of a JavaScript expression."
        answer = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in answer:
            raise AssertionError(
                f'{expression}: {answer["exceptionDetails"].get("exception", {}).get("description")}'
            )
        return answer['result'].get('value')

    def until(self, expression, seconds=30):
        return wait(lambda: self.js(expression), seconds, expression)

    def place(self, find):
        "Scrolls to the middle of the element that the expression `find` gives, and says where it is then."
        found = (
            f'(() => {{ const e = {find}; if (!e) return null; e.scrollIntoView({{block: "center"}}); return'
            ' true })()'
        )
        wait(lambda: self.js(found), 30, find)
        time.sleep(0.5)
        return self.js(
            f'(() => {{ const r = ({find}).getBoundingClientRect(); return [r.x, r.y, r.width, r.height]'
            ' })()'
        )

    def mouse(self, x, y, *kinds):
        for kind in kinds or ('mouseMoved',):
            self.call(
                'Input.dispatchMouseEvent',
                type=kind,
                x=x,
                y=y,
                button='none' if kind == 'mouseMoved' else 'left',
                clickCount=0 if kind == 'mouseMoved' else 1,
            )
            time.sleep(0.05)

    def click(self, x, y):
        self.mouse(x, y, 'mouseMoved', 'mousePressed', 'mouseReleased')

    def key(self, key, code):
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def shot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png')['data']))

    def open(self, lab, notebook):
        """Opens a notebook in JupyterLab, in a workspace of its own, all cells drawn so that they can be
        found."""
        self.call('Page.navigate', url=f'{lab}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}')
        self.until(
            "typeof jupyterapp !== 'undefined' && document.querySelector('.jp-Notebook .jp-Cell') !== null",
            180,
        )
        wait(
            lambda: self.accept() or self.js(f"{PANEL}?.sessionContext.session?.kernel?.status === 'idle'"),
            180,
            'a kernel',
        )

    def accept(self):
        "Answers the question in front of the notebook, if there is one, by its first choice."
        self.js("document.querySelector('.jp-Dialog .jp-mod-accept')?.click()")

    def run_all(self, seconds):
        """Runs every cell and returns the errors; the promise of the command is not awaited, it outlives
        the socket."""
        self.js("(() => { jupyterapp.commands.execute('notebook:run-all-cells'); return true })()")
        cells = (
            f"{PANEL}.content.widgets.filter(w => w.model.type === 'code' &&"
            " w.model.sharedModel.source.trim())"
        )
        errors = (
            f"{cells}.flatMap(w => w.model.outputs.toJSON().filter(o => o.output_type === 'error').map(o =>"
            " o.ename + ': ' + o.evalue))"
        )
        done = (
            f'{errors}.length || {cells}.every(w => w.model.executionState !== "running" &&'
            ' w.promptNode?.textContent.match(/\\d/))'
        )
        wait(lambda: self.js(done), seconds, 'all cells')
        return self.js(errors)
