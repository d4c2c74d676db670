"What a reader sees of a stored notebook."

import json
import os
import re
from pathlib import Path

import names

FOLDED = 20  # lines; longer export cells show only whose source they are
WIDTH = 110  # characters that fit a page
DIRECTIVE = re.compile(r'#\|\s*(\w[\w-]*):?\s*(.*)')
LINK = re.compile(r'(?<=\]\()([\w./-]+)(?=(#[\w-]*)?\))')


def directives(source):
    "The flags of a cell, name to value, and its code without them."
    lines = source.splitlines()
    matches = [DIRECTIVE.fullmatch(line.strip()) for line in lines]
    flags = {match[1]: match[2].strip('"\'') for match in matches if match}
    code = '\n'.join(line for line, match in zip(lines, matches) if not match)
    return flags, code.strip('\n')


def text_cell(text, cell_id):
    return dict(cell_type='markdown', id=cell_id, metadata={}, source=text)


def is_prose(cell):
    "Whether the long lines that a cell prints are sentences, not rows: these have wide gaps between columns."
    texts = [o.get('text') or o.get('data', {}).get('text/plain', '') for o in cell['outputs']]
    lines = [line.strip() for text in texts for line in ''.join(text).splitlines()]
    return not any(len(re.findall(r'\S {2,}', line)) > 2 for line in lines if len(line) > WIDTH)


def summary(code):
    "What stands in the place of a folded cell."
    defined = names.defined_names(code) or names.defined_names(code, private=True)
    return f'source of {", ".join(defined)}' if defined else 'imports'


def code_cell(cell, flags, code):
    "A code cell without flags, with the tags and words that MyST-NB goes by."
    tags, words = ['wrap'] if is_prose(cell) else [], {}
    defined = [] if 'exporti' in flags else names.defined_names(code)
    if flags.get('echo') == 'false':
        tags.append('remove-input')
    elif flags.keys() & {'export', 'exporti'} and code.count('\n') >= FOLDED:
        tags.append('hide-input')
        title = summary(code)
        words = dict(code_prompt_show=title, code_prompt_hide=title)
    if 'fig-alt' in flags:
        words['image'] = dict(alt=flags['fig-alt'])
    return dict(cell, source=code, metadata=dict(tags=tags, mystnb=words)), defined


def linked(
    text,
    path,  # of the notebook
    root,  # of the repository
):
    """Links as the site needs them: the README's are relative to the top of the repository, and two of its
    files are pages here."""

    def target(match):
        link = Path(os.path.normpath(path.parent / match[1]))
        if not link.exists():
            link = root / match[1]
        for page in ('CONTRIBUTING', 'CHANGELOG'):
            if link == root / f'{page}.md':
                link = root / f'nbs/{page.lower()}.md'
        return os.path.relpath(link, path.parent) if link.exists() else match[0]

    return LINK.sub(target, text)


def plain_fences(text):
    "Code fences without a language hold shell lines and sketches: they are not coloured as Python."
    lines, inside = text.split('\n'), False
    for k, line in enumerate(lines):
        if line.startswith('```'):
            if line.strip() == '```' and not inside:
                lines[k] = '```text'
            inside = not inside
    return '\n'.join(lines)


def as_page(text, path, root):  # JSON of a notebook -> JSON of what is shown of it
    """No flags, no hidden cells, long export cells folded; an anchor where a public name is made."""
    notebook = json.loads(text)
    module = names.module_of(notebook)
    cells = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            cells.append(dict(cell, source=plain_fences(linked(source, path, root))))
            continue
        flags, code = directives(source)
        if 'hide' in flags or not code:
            continue
        shown, defined = code_cell(cell, flags, code)
        if 'export' in flags and defined:
            anchors = '\n'.join(f'({names.anchor(module, name)})=' for name in defined)
            cells.append(text_cell(anchors, f'{cell["id"]}-names'))
        cells.append(shown)
    return json.dumps(dict(notebook, cells=cells))


def with_cell(text, markdown):  # JSON of a notebook -> the same, with one cell more
    notebook = json.loads(text)
    return json.dumps(dict(notebook, cells=[*notebook['cells'], text_cell(markdown, 'parts')]))
