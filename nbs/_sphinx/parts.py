"The parts of the site and the order of their pages."

PARTS = {
    'Start here': 'self responsible_use names',
    'Tutorials': 'step_through evolution change_one_part own_images tracker paper market1501 benchmarks',
    'The method, stage by stage': '01_data 01a_city 02_backbone 03_neighbors 04_hdc 05_labels 06_memory'
    ' 06a_confidence 07_evaluation',
    'Training and runs': '08a_config 08f_epoch 08_training 08e_parts 08d_runs 08c_engine 08g_faults',
    'Using a model': '08b_model 01b_folder',
    'Experiments': '09_experiments 09b_studies 09c_choosing',
    'Pictures': '00_viz 05a_evolution 05b_widgets 09a_report',
    'Command line': '10_cli options 10b_main',
    'Under the hood': '02a_gate 03a_neighbors_kernels 03b_neighbors_torch 04a_hdc_kernels 04b_hdc_torch'
    ' 07a_evaluation_kernels 00a_writing 10a_init contributing changelog',
}


def page_names(part):
    "The pages of a part, as Sphinx calls them."
    folder = 'tutorials/' if part == 'Tutorials' else ''
    return [folder + name for name in PARTS[part].split()]


def entry(page):
    "A line of a table of contents; `self` is the page that holds it, the start page."
    return 'Start <self>' if page == 'self' else page


def as_markdown(
    notebooks,  # the folder `nbs`
):
    "One table of contents for each part; ValueError for a notebook without a place or a place without a page."
    placed = [name for part in PARTS for name in page_names(part)]
    pages = [*notebooks.glob('*.ipynb'), *notebooks.glob('tutorials/*.ipynb'), *notebooks.glob('*.md')]
    stored = {path.relative_to(notebooks).with_suffix('').as_posix() for path in pages}
    if stored != set(placed) - {'self'} | {'index'}:
        wrong = sorted(stored ^ set(placed) - {'self', 'index'})
        raise ValueError(f'PARTS in nbs/_sphinx/parts.py and the pages in nbs must agree, differ in {wrong}')
    return '\n\n'.join(
        '\n'.join(['```{toctree}', ':hidden:', f':caption: {part}', '', *map(entry, page_names(part)), '```'])
        for part in PARTS
    )
