"""The parts of the site and the order of their pages. A new page that is not named here comes last in the part
that its name suggests."""

import re

PARTS = {
    'Start here': 'self guide results scale names responsible_use',
    'Tutorials': 'step_through evolution change_one_part own_images tracker paper market1501 benchmarks',
    'The method, stage by stage': '01_data 01a_city 02_backbone 03_neighbors 04_hdc 05_labels 06_memory'
    ' 06a_confidence 07_evaluation',
    'Training and runs': '08a_config 08f_epoch 08_training 08e_parts 08d_runs 08c_engine 08g_faults',
    'Using a model': '08b_model 01b_folder',
    'Experiments': '09_experiments 09b_studies 09c_choosing',
    'Pictures': '00_viz 05a_evolution 05b_widgets 06b_figures 09a_report',
    'Command line': '10_cli options 10b_main',
    'Under the hood': '02a_gate 02b_rows 03a_neighbors_kernels 03b_neighbors_torch 04a_hdc_kernels 04b_hdc_torch'
    ' 04c_hdc_distances 07a_evaluation_kernels 00a_writing 10a_init contributing changelog',
}


def part_of(page):
    "The part of a page that `PARTS` does not name yet: a lettered notebook is a detail of its module."
    if page.startswith('tutorials/'):
        return 'Tutorials'
    return 'Under the hood' if re.match(r'\d\d[a-z]', page) else 'Start here'


def stored_pages(notebooks):
    "All notebooks and Markdown files, as Sphinx calls them."
    paths = [*notebooks.glob('*.ipynb'), *notebooks.glob('tutorials/*.ipynb'), *notebooks.glob('*.md')]
    return sorted(path.relative_to(notebooks).with_suffix('').as_posix() for path in paths)


def arranged(
    notebooks,  # the folder `nbs`
) -> dict:  # part -> its pages
    "The pages of each part; ValueError for a place without a page."
    pages = {
        part: [f'tutorials/{name}' if part == 'Tutorials' else name for name in names.split()]
        for part, names in PARTS.items()
    }
    placed = {page for part in pages.values() for page in part} - {'self'} | {'index'}
    stored = stored_pages(notebooks)
    if placed - set(stored):
        raise ValueError(f'nbs has no pages {sorted(placed - set(stored))}, which PARTS in {__file__} names')
    for page in stored:
        if page not in placed:
            pages[part_of(page)].append(page)
    return pages


def entry(page):
    "A line of a table of contents; `self` is the page that holds it, the start page."
    return 'Start <self>' if page == 'self' else page


def as_markdown(
    notebooks,  # the folder `nbs`
):
    "One table of contents for each part."
    return '\n\n'.join(
        '\n'.join(['```{toctree}', ':hidden:', f':caption: {part}', '', *map(entry, pages), '```'])
        for part, pages in arranged(notebooks).items()
    )
