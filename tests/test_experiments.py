"Recipes against the published table of settings, and commands that lead back to them."
import shlex
from dataclasses import replace

import pytest

from ccc.cli import train_options
from ccc.config import Config, changes
from ccc.experiments import RECIPES, command, recipe, start

PUBLISHED = {  # dataset: height, width, K, iterations
    'market1501': (256, 128, 750, 200), 'msmt17': (256, 128, 1000, 400), 'veri': (224, 224, 1000, 400)}


@pytest.mark.parametrize('dataset', PUBLISHED)
@pytest.mark.parametrize('clustering', ['hdc', 'dbscan', 'kmeans'])
def test_published_settings(dataset, clustering):
    c = recipe(f'{dataset}-{clustering}')
    assert (c.dataset, c.clustering, c.recipe) == (dataset, clustering, f'{dataset}-{clustering}')
    assert (c.height, c.width, c.num_clusters, c.iters) == PUBLISHED[dataset]
    assert (c.num_epochs, c.batch_size, c.num_instances, c.warmup_iters, c.lr_steps, c.eval_step_epoch, c.bn_chunks) == (60, 256, 16, 10, 20, 5, 2)
    assert (c.arch, c.resnet_pretrained, c.pooling_type, c.cm_mode, c.hdc_init, c.hdc_similarity) == ('resnet50', 'V1', 'gem', 'hd_camera', 'k-means++2', 'Euler Cosine')
    assert c.loss_with_camera and c.warmup_with_dbscan and c.hdc_outlier and c.hdc_centroids and not c.no_cam and not c.no_jaccard


def test_the_script_of_veri_keeps_peripheral_objects():
    assert changes(recipe('veri-hdc-script'), recipe('veri-hdc')) == dict(hdc_outlier=False)


def test_published_defaults():
    c = Config()
    assert (c.dataset, c.root_dir, c.num_workers, c.num_epochs, c.seed, c.threshold, c.hdc_max_iter, c.cluster_min_instances) == ('market1501', '~/Dataset', 32, 70, 999, None, 80, 4)
    assert (c.jaccard_k1, c.jaccard_k2, c.dbscan_eps, c.lr, c.lr_weight_decay, c.lr_gamma, c.cm_temperature, c.cm_momentum) == (30, 6, .6, 3.5e-4, 5e-4, .1, .05, .1)
    assert (c.warmup_factor, c.warmup_version, c.warmup_lr_factor, c.eval_start_epoch, c.eval_dist, c.ckpt_dir, c.log_dir, c.notes) == (.1, 'v1', 1, 0, 'none', 'ckpt', 'logs', '')
    flags = 'loss_with_camera no_cam no_jaccard hdc_outlier hdc_centroids hdc_normalize warmup_with_dbscan eval_and_ckpt rerank'.split()
    assert not any(getattr(c, f) for f in flags)


@pytest.mark.parametrize('name', RECIPES)
def test_a_command_leads_back_to_its_recipe(name):
    assert train_options(shlex.split(command(recipe(name)))[2:]).config == recipe(name)
    assert train_options(['--recipe', name]).config == recipe(name)


def test_every_setting_can_be_said(tmp_path):
    other = dict(bool=lambda v: not v, int=lambda v: 2 * v, float=lambda v: v / 2)
    for name, value in vars(start('msmt17')).items():
        if name in ('recipe', 'dataset'): continue
        told = other[type(value).__name__](value) if type(value).__name__ in other else None
        if told is None: continue
        settings = {name: told} | (dict(batch_size=4 * told) if name in ('num_instances', 'bn_chunks') else {})
        config = replace(start('msmt17'), **settings)
        assert train_options(shlex.split(command(config))[2:]).config == config, name


def test_unknown_recipe():
    with pytest.raises(ValueError, match="got 'duke'"): recipe('duke')
    with pytest.raises(TypeError): recipe('city', num_cluster=3)
