"The page of public names, read from the notebooks' export cells: the library is written from these."

import ast
import json
import re

import parts

VALUE = 70  # characters of a constant's value that stand in for a sentence


def cell_flags(source):
    return set(re.findall(r'(?m)^#\|\s*(\w+)', source))


def module_of(notebook):  # dict -> the module that a notebook is exported to, or None
    for cell in notebook['cells']:
        match = re.search(r'(?m)^#\|\s*default_exp (\S+)', ''.join(cell['source']))
        if match and cell['cell_type'] == 'code':
            return match[1]
    return None


def anchor(module, name):
    "Sphinx ignores case in anchors, and `Index` and `index` are two names."
    return f'ccc.{module}.{name}' + ('-capital' if name[0].isupper() else '')


def targets(node):
    "The names that a statement binds, if it is one of those that nbdev exports."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        flat = [t for target in node.targets for t in getattr(target, 'elts', [target])]
    else:
        flat = [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in flat if isinstance(target, ast.Name)]


def is_patch(node):
    "Whether a function becomes a method of another cell's class (fastcore's `patch`)."
    return any('patch' in ast.unparse(d) for d in getattr(node, 'decorator_list', ()))


def defined_names(code, private=False):
    "What an export cell adds to its module."
    bound = [name for node in ast.parse(code).body if not is_patch(node) for name in targets(node)]
    return [name for name in bound if private or not name.startswith('_')]


def first_sentence(text):
    text = re.sub(r'\s+', ' ', text).strip()
    return re.split(r'(?<=[.!?])\s+(?=[A-Z`])', text)[0]


def comment_at(node, lines):
    "What the comment on a statement's line says, or those above it."
    start = lines[node.lineno - 1]
    beside = re.search(r'(?<=  # ).*', start) or re.search(r'(?<=  # ).*', lines[node.end_lineno - 1])
    if beside:
        return beside[0]
    above, k = [], node.lineno - 2
    while k >= 0 and lines[k].startswith('#') and not lines[k].startswith('#|'):
        above.insert(0, lines[k].strip('# '))
        k -= 1
    return ' '.join(above)


def value(node):
    "What a constant or a function of one line is, as it is written: in place of a sentence that nobody wrote."
    expression = getattr(node.body[-1] if isinstance(node, ast.FunctionDef) else node, 'value', None)
    text = re.sub(r'\s+', ' ', ast.unparse(expression)) if expression else ''
    return f'`{text if len(text) <= VALUE else text[:VALUE].rstrip() + " …"}`' if text else ''


def sentences(code):
    "Public names of an export cell and what is said of each."
    lines = code.splitlines()
    for node in ast.parse(code).body:
        if is_patch(node):
            continue
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        text = ast.get_docstring(node) if documented else comment_at(node, lines)
        for name in targets(node):
            if not name.startswith('_'):
                yield name, first_sentence(text) if text else value(node)


def public_names(notebook):  # dict -> list of (name, sentence)
    found = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and 'export' in cell_flags(source):
            found += sentences(source)
    return found


def plain(text):
    "A sentence as Markdown that says the same: only code between backticks keeps its meaning."
    pieces = re.split(r'(`[^`]+`)', text)
    return ''.join(
        p.replace('|', r'\|') if p.startswith('`') else re.sub(r'([\\*_$<>\[\]{}|#~^])', r'\\\1', p)
        for p in pieces
    )


def title_of(notebook):
    return ''.join(notebook['cells'][0]['source']).splitlines()[0].strip('# ')


def as_markdown(
    notebooks,  # the folder `nbs`
):
    "A table for each module, in the order of the site."
    text = []
    for page in (page for pages in parts.arranged(notebooks).values() for page in pages):
        path = notebooks / f'{page}.ipynb'
        notebook = json.loads(path.read_text(encoding='utf-8')) if path.exists() else None
        module = notebook and module_of(notebook)
        if not module or module.startswith('_'):
            continue
        rows = [
            f'| [`{name}`](#{anchor(module, name)}) | {plain(sentence)} |'
            for name, sentence in public_names(notebook)
        ]
        heading = f'## `ccc.{module}`\n\n[{title_of(notebook)}](/{page}.ipynb)'
        text.append('\n'.join([f'{heading}\n\n| name | what it is |\n| --- | --- |', *rows]))
    return '\n\n' + '\n\n'.join(text) + '\n'
