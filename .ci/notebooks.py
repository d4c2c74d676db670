"""Run notebooks in place and keep their outputs, or write README.md from nbs/index.ipynb.

python .ci/notebooks.py run nbs/04_hdc.ipynb ...   # a real kernel; cells that nbdev_test skips are left as they are
python .ci/notebooks.py readme
"""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from PIL import Image
from traitlets.config import Config


class SkippingClient(nbclient.NotebookClient):
    "Executes a notebook, leaving flagged cells and their stored outputs alone."

    flags = set(get_config().tst_flags.split())

    async def async_execute_cell(self, cell, *args, **kwargs):
        directives = set(re.findall(r'(?m)^#\|\s*([\w:]+(?:\s*false)?)', cell.source))
        if directives & self.flags or any(re.fullmatch(r'eval:\s*false', d) for d in directives):
            return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def shrink(notebook):
    "Stored pictures in 128 colours: less than half the bytes, and the same to the eye."
    for output in (
        o for cell in notebook.cells for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})
    ):
        stored, small = base64.b64decode(output.data['image/png']), io.BytesIO()
        if getattr(Image.open(io.BytesIO(stored)), 'is_animated', False):
            continue  # an animation keeps its frames
        Image.open(io.BytesIO(stored)).convert('RGB').quantize(
            128, Image.Quantize.MAXCOVERAGE, dither=0
        ).save(small, 'PNG', optimize=True)
        output.data['image/png'] = base64.b64encode(min(stored, small.getvalue(), key=len)).decode()


def still(notebook):
    """Widgets live in their kernel; what is stored is their picture, where they have one (a progress bar
    has none)."""
    view = 'application/vnd.jupyter.widget-view+json'
    notebook.metadata.pop('widgets', None)
    for cell in (c for c in notebook.cells if c.cell_type == 'code'):
        cell.outputs = [o for o in cell.outputs if set(o.get('data', {})) - {'text/plain'} != {view}]
        for output in cell.outputs:
            output.get('data', {}).pop(view, None)


def run(paths):
    for path in paths:
        notebook = nbformat.read(path, 4)
        SkippingClient(
            notebook,
            timeout=1200,
            kernel_name='python3',
            store_widget_state=False,
            resources={'metadata': {'path': str(Path(path).parent)}},
        ).execute()
        still(notebook)
        shrink(notebook)
        nbformat.write(notebook, path)
        subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', path], check=True)


def readme(notebook='nbs/index.ipynb', out='README.md', images='nbs/images'):
    "Needs no Quarto, which the package registries do not carry."
    nb = nbformat.read(notebook, 4)
    # nbdev_clean drops it; without it fences have no language
    nb.metadata['language_info'] = {'name': 'python'}
    for cell in nb.cells:
        if '#| echo: false' in cell.source:
            cell.metadata['transient'] = {'remove_source': True}
    alt_texts = [re.search(r'#\|\s*fig-alt:\s*"(.+)"\n', cell.source) for cell in nb.cells]
    for cell, alt in zip(nb.cells, alt_texts):
        cell.source = cell.source.replace(alt[0], '') if alt else cell.source
    exporter = MarkdownExporter(
        config=Config(RegexRemovePreprocessor=dict(enabled=True, patterns=[r'#\|\s*hide']))
    )
    text, resources = exporter.from_notebook_node(
        nb, resources={'output_files_dir': images, 'unique_key': 'readme'}
    )
    for path, data in resources['outputs'].items():
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(data)
    for cell, alt in enumerate(alt_texts):
        if alt:
            text = text.replace(f'![png]({images}/readme_{cell}_', f'![{alt[1]}]({images}/readme_{cell}_')
    text = re.sub(r'[ \t]+\n', '\n', text)
    text = re.sub(r'\n{3,}', '\n\n', text)
    # links in the index are relative to nbs/, in the README to the top
    text = re.sub(r'\]\(([\w/]+\.ipynb)\)', r'](nbs/\1)', text)
    Path(out).write_text(
        f'<!-- Generated from {notebook} by .ci/notebooks.py: edit that. -->\n{text.strip()}\n'
    )


if __name__ == '__main__':
    command, *paths = sys.argv[1:]
    run(paths) if command == 'run' else readme()
