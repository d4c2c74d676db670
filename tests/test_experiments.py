"Recipes against the published table of settings, and commands that lead back to them."

import shlex
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from ccc.cli import train_options
from ccc.config import Config, changes, deciding
from ccc.experiments import RECIPES, command, recipe, start

PUBLISHED = {  # dataset: height, width, K, iterations
    'market1501': (256, 128, 750, 200),
    'msmt17': (256, 128, 1000, 400),
    'veri': (224, 224, 1000, 400),
}


@pytest.mark.parametrize('dataset', PUBLISHED)
@pytest.mark.parametrize('clustering', ['hdc', 'dbscan', 'kmeans'])
def test_published_settings(dataset, clustering):
    c = recipe(f'{dataset}-{clustering}')
    assert (c.dataset, c.clustering, c.recipe) == (dataset, clustering, f'{dataset}-{clustering}')
    assert (c.height, c.width, c.num_clusters, c.iters) == PUBLISHED[dataset]
    assert (
        c.num_epochs,
        c.batch_size,
        c.num_instances,
        c.warmup_iters,
        c.lr_steps,
        c.eval_step_epoch,
        c.bn_chunks,
    ) == (60, 256, 16, 10, 20, 5, 2)
    assert (c.arch, c.resnet_pretrained, c.pooling_type, c.cm_mode, c.hdc_init, c.hdc_similarity) == (
        'resnet50',
        'V1',
        'gem',
        'hd_camera',
        'k-means++2',
        'Euler Cosine',
    )
    assert (
        c.loss_with_camera
        and c.warmup_with_dbscan
        and c.hdc_outlier
        and c.hdc_centroids
        and not c.no_cam
        and not c.no_jaccard
    )


def test_the_script_of_veri_keeps_peripheral_objects():
    assert changes(recipe('veri-hdc-script'), recipe('veri-hdc')) == dict(hdc_outlier=False)


def test_published_defaults():
    c = Config()
    assert (
        c.dataset,
        c.root_dir,
        c.num_workers,
        c.num_epochs,
        c.seed,
        c.threshold,
        c.hdc_max_iter,
        c.cluster_min_instances,
    ) == ('market1501', '~/Dataset', 32, 70, 999, None, 80, 4)
    assert (
        c.jaccard_k1,
        c.jaccard_k2,
        c.dbscan_eps,
        c.lr,
        c.lr_weight_decay,
        c.lr_gamma,
        c.cm_temperature,
        c.cm_momentum,
    ) == (30, 6, 0.6, 3.5e-4, 5e-4, 0.1, 0.05, 0.1)
    assert (
        c.warmup_factor,
        c.warmup_version,
        c.warmup_lr_factor,
        c.eval_start_epoch,
        c.eval_dist,
        c.ckpt_dir,
        c.log_dir,
        c.notes,
    ) == (0.1, 'v1', 1, 0, 'none', 'ckpt', 'logs', '')
    flags = (
        'loss_with_camera no_cam no_jaccard hdc_outlier hdc_centroids hdc_normalize warmup_with_dbscan'
        ' eval_and_ckpt rerank'.split()
    )
    assert not any(getattr(c, f) for f in flags)


# The commands of the method's README, put together from the settings it publishes (its text is not in this
# repository). A pasted line keeps the variable before it: that is the shell's.
MARKET = """CUDA_VISIBLE_DEVICES=0,1 python CCC/main.py --dataset market1501 --arch resnet50 --resnet-pretrained V1 --pooling-type gem --height 256 --width 128 --batch-size 256
    --num-instances 16 --iters 200 --num-epochs 60 --cm-mode hd_camera --loss-with-camera --num-clusters 750 --hdc-init k-means++2 --hdc-outlier --hdc-centroids --warmup-with-dbscan"""
MSMT = """CUDA_VISIBLE_DEVICES=0,1 python CCC/main.py --dataset msmt17 --iters 400 --num-epochs 60 --loss-with-camera --num-clusters 1000 --hdc-outlier --hdc-centroids --warmup-with-dbscan"""
VERI = """CUDA_VISIBLE_DEVICES=0,1 python CCC/main.py --dataset veri --height 224 --width 224 --iters 400 --num-epochs 60 --loss-with-camera --num-clusters 1000 --hdc-outlier
    --hdc-centroids --warmup-with-dbscan"""
PASTED = {
    'market1501-hdc': MARKET,
    'msmt17-hdc': MSMT,
    'veri-hdc': VERI,
    'veri-hdc-script': VERI.replace(' --hdc-outlier', ''),
} | {
    f'{dataset}-{clustering}': line.replace('CCC/main.py', f'CCC/main_{clustering}.py')
    for dataset, line in [('market1501', MARKET), ('msmt17', MSMT), ('veri', VERI)]
    for clustering in ('dbscan', 'kmeans')
}


def ours(line):
    "The pasted line as the issue says: `ccc train` for the program, the two other programs as an option."
    line = line.replace('python CCC/main.py', 'ccc train')
    for clustering in ('dbscan', 'kmeans'):
        line = line.replace(f'python CCC/main_{clustering}.py', f'ccc train --clustering {clustering}')
    return line


@pytest.mark.parametrize('name', PASTED)
def test_a_published_command_is_its_recipe(name):
    variable, program, command, *options = shlex.split(ours(PASTED[name]))
    assert (variable, program, command) == ('CUDA_VISIBLE_DEVICES=0,1', 'ccc', 'train')
    pasted = train_options(options).config
    assert asdict(pasted) | dict(recipe=name) == asdict(recipe(name))
    assert (name == 'veri-hdc-script') == (not pasted.hdc_outlier)


def test_the_pasted_commands_are_all_the_benchmark_recipes():
    assert (
        PASTED.keys()
        == {
            n
            for n in RECIPES
            if n not in ('city', 'city-study', 'market1501-vit')
            and not n.endswith(('cluster-contrast', 'spcl-like'))
        }
        and len({str(recipe(n)) for n in PASTED}) == 10
    )


@pytest.mark.parametrize('clustering', ['dbscan', 'kmeans'])
def test_options_of_hdc_may_be_left_out_where_there_is_no_hdc(clustering):
    "The other two programs may have been called without them: what is trained is the same."
    idle = 'hdc_outlier', 'hdc_centroids'
    line = ours(PASTED[f'msmt17-{clustering}']).replace(' --hdc-outlier', '').replace(' --hdc-centroids', '')
    assert deciding(train_options(shlex.split(line)[3:]).config, idle) == deciding(
        recipe(f'msmt17-{clustering}'), idle
    )


def test_a_published_command_in_a_shell():
    """Word for word through a real shell, its variable before it; `--print-config` in place of hours of
    training."""
    line = (
        ours(VERI).replace('\n', ' \\\n').replace('ccc train', f'{shlex.quote(sys.executable)} -m ccc train')
    )
    output = subprocess.run(
        line + ' --print-config', shell=True, capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == command(recipe('veri-hdc'))


@pytest.mark.parametrize('name', RECIPES)
def test_a_command_leads_back_to_its_recipe(name):
    assert train_options(shlex.split(command(recipe(name)))[2:]).config == recipe(name)
    assert train_options(['--recipe', name]).config == recipe(name)


def test_every_setting_can_be_written_as_an_option(tmp_path):
    other = dict(bool=lambda v: not v, int=lambda v: 2 * v, float=lambda v: v / 2)
    for name, value in vars(start('msmt17')).items():
        if name in ('recipe', 'dataset'):
            continue
        changed = other[type(value).__name__](value) if type(value).__name__ in other else None
        if changed is None:
            continue
        settings = {name: changed} | (
            dict(batch_size=4 * changed) if name in ('num_instances', 'bn_chunks') else {}
        )
        config = replace(start('msmt17'), **settings)
        assert train_options(shlex.split(command(config))[2:]).config == config, name


def test_unknown_recipe():
    with pytest.raises(ValueError, match="got 'duke'"):
        recipe('duke')
    with pytest.raises(TypeError):
        recipe('city', num_cluster=3)
