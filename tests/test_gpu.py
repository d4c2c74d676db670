"The path of a GPU, on any machine: a device made of real numbers refuses what CUDA refuses and counts kernels and synchronisations."
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ccc.backbone import InstanceBatchNorm, build_backbone
from ccc.config import Config
from ccc.engine import extract_embeddings, fetch_images, make_engine, settle_images, unused_parameters
from ccc.memory import RULES, ClusterMemory
from fake_device import DEVICE, fake_gpu
from test_training import tiny_data, tiny_net

TIMM = 'timm:convnext_atto'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp('images'))


@pytest.fixture
def gpu(monkeypatch):
    with fake_gpu(monkeypatch) as counts: yield counts


# the device itself

def test_the_fake_device_refuses_what_cuda_refuses(gpu):
    a = torch.arange(6., device='cuda:0')
    assert a.is_cuda and a.device == DEVICE and (a * 2).is_cuda and torch.zeros_like(a).is_cuda and not a.cpu().is_cuda
    with pytest.raises(RuntimeError, match='same device'): a + torch.ones(6)
    with pytest.raises(RuntimeError, match='same device'): torch.cat([a, torch.ones(6)])
    with pytest.raises(TypeError, match='numpy'): a.numpy()
    assert (a + torch.tensor(1.)).is_cuda                        # a single number may lie anywhere


def test_the_fake_device_counts(gpu):
    a = torch.ones(4).to('cuda:0', non_blocking=True)
    gpu.start()
    b = a * 2
    assert (gpu.kernels, gpu.syncs) == (1, 0)
    for wait in (lambda: float(b.sum()), lambda: b.tolist(), lambda: b.cpu(), lambda: b.nonzero(), lambda: bool((b > 1).all()), lambda: b[b > 1], lambda: torch.unique(b),
                 lambda: torch.ones(3).to('cuda:0'), lambda: torch.tensor([1.], device='cuda:0'), lambda: b[torch.tensor([0, 1])]):
        gpu.start(), wait()
        assert gpu.syncs == 1, gpu.by_place()


def test_gradients_pass(gpu):
    w = torch.randn(3, device='cuda:0', requires_grad=True)
    (w ** 2).sum().backward()
    assert w.grad.is_cuda and torch.equal(w.grad.cpu(), 2 * w.detach().cpu())


# the engine

def test_each_engine_is_where_it_was_asked_to_be(gpu):
    "Accelerate keeps its state for the whole process: after a run on a CPU one on a GPU stayed on the CPU, silently; the other way round it raised."
    first, second, third = (make_engine(Config(device=d)) for d in ('cpu', 'cuda', 'cpu'))
    assert (first.device.type, second.device, third.device.type) == ('cpu', DEVICE, 'cpu')


def test_a_device_that_processes_do_not_have_is_refused(gpu, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    with pytest.raises(ValueError, match='got device=cuda for processes on cpu'): make_engine(Config(device='cuda'))


def test_processes_that_have_joined_stay_where_they_are(gpu):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        assert make_engine(Config(device='cpu')).device.type == 'cpu'
        with pytest.raises(ValueError, match='got device=cuda for processes on cpu'): make_engine(Config(device='cuda'))
    finally: torch.distributed.destroy_process_group()


def test_settings_of_a_launcher_have_no_effect_and_that_is_said(gpu, monkeypatch):
    for name, value in dict(MIXED_PRECISION='fp16', GRADIENT_ACCUMULATION_STEPS='4', DYNAMO_BACKEND='INDUCTOR').items(): monkeypatch.setenv(f'ACCELERATE_{name}', value)
    with pytest.warns(UserWarning, match='ACCELERATE_MIXED_PRECISION=fp16, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, ACCELERATE_DYNAMO_BACKEND=INDUCTOR'):
        engine = make_engine(Config(device='cuda'))
    assert engine.scaler is None and engine.gradient_accumulation_steps == 1 and engine.state.dynamo_plugin.backend.value == 'NO'
    w = torch.ones(1, device='cuda:0', requires_grad=True)
    engine.backward(w.sum())
    assert w.grad.item() == 1                                    # an fp16 configuration made it 65,536


def test_a_launcher_that_shares_out_the_network_is_refused(monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    with pytest.raises(ValueError, match='ACCELERATE_USE_FSDP=true'): make_engine(Config(device='cpu'))


# images and layout

def test_images_are_fetched_in_one_copy(gpu):
    images = torch.randint(0, 256, (40, 3, 8, 4), dtype=torch.uint8)
    positions = np.array([3, 1, 3, 39])
    for home in ('device', 'pinned'):
        settled = settle_images(images, home, DEVICE)
        gpu.start()
        batch = fetch_images(settled, positions, DEVICE)
        assert batch.is_cuda and gpu.syncs == 0 and gpu.operations['copy to the device'] == 1, gpu.by_place()
        assert torch.equal(batch.cpu(), images[positions])


def test_batches_of_extraction_are_of_one_size(gpu):
    "cuDNN looks for kernels anew for each size of batch."
    plain, images, sizes = tiny_net(), torch.randint(0, 256, (37, 3, 16, 8), dtype=torch.uint8), []
    net = copy.deepcopy(plain).to(DEVICE)
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    engine = make_engine(Config(device='cuda'))
    x = extract_embeddings(net, images.to(DEVICE), 16, engine)
    assert sizes == [16, 16, 16] and x.shape == (37, 16)
    np.testing.assert_allclose(x, extract_embeddings(plain, images, 16, make_engine(Config(device='cpu'))), atol=1e-6)


def test_instance_norm_keeps_the_layout():
    "In channels-last every convolution of an IBN network gets its maps in channels-last."
    layer, x = InstanceBatchNorm(8), torch.randn(4, 8, 6, 5)
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last) and layer(x).is_contiguous()
    torch.testing.assert_close(last, layer(x), atol=1e-6, rtol=0)
    net, seen = build_backbone('resnet_ibn50a', weights=None).to(memory_format=torch.channels_last), []
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d): m.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last)))
    net(torch.randn(2, 3, 32, 16).to(memory_format=torch.channels_last))
    assert len(seen) == 53 and all(seen)


# the memory

@pytest.mark.parametrize('rule', RULES)
def test_a_step_of_the_memory_waits_for_nothing(gpu, rule):
    "Clusters and cameras in main memory, embeddings on the device, no look at values: 0 synchronisations (18 before); the same numbers as on a CPU."
    g = torch.Generator().manual_seed(0)
    start, x = torch.randn(9, 16, generator=g), torch.randn(40, 16, generator=g)
    y, cams = torch.randint(0, 9, (40,), generator=g), torch.randint(0, 4, (40,), generator=g)
    plain, there = ClusterMemory(start, rule=rule), ClusterMemory(start, rule=rule, check=False).to(DEVICE)
    want = plain(x, y, cams)
    plain.update(x, y, cams)
    z = x.to(DEVICE)
    gpu.start()
    loss = there(z, y, cams)
    there.update(z, y, cams)
    assert gpu.syncs == 0, gpu.by_place()
    torch.testing.assert_close(loss.cpu(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(there.centroids.cpu(), plain.centroids, atol=1e-6, rtol=0)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), 1e38])
def test_embeddings_that_cannot_be_right_show_in_a_loss_of_nan(bad):
    "Where values are not looked at; norms beyond float32, too."
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    x[2] = bad
    for weight in (True, False): assert ClusterMemory(torch.eye(16)[:3], check=False, camera_weight=weight)(x, [0, 1, 2, 0, 1, 2], [0] * 6).isnan()
    assert ClusterMemory(torch.eye(16)[:3], check=False)(x.nan_to_num(0, 0, 0).clamp(-9, 9), [0, 1, 2, 0, 1, 2], [0] * 6).isfinite()


# several processes

def test_parameters_that_nothing_reaches():
    pytest.importorskip('timm')
    assert unused_parameters(build_backbone('resnet18', weights=None), 32, 16) == []
    assert unused_parameters(build_backbone(TIMM, weights=None, pooling='avg', size=(64, 32)), 64, 32) == ['trunk.head.norm.weight', 'trunk.head.norm.bias']


@pytest.mark.parametrize('what', ['unused', 'chunks'])
def test_two_processes(what):
    if what == 'unused': pytest.importorskip('timm')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('ACCELERATE', 'WORLD', 'RANK', 'LOCAL'))} | dict(OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, __file__, what], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('fine') == 2


def test_processes_wait_long_for_the_first_one(monkeypatch):
    "NCCL's own limit is ten minutes, less than decoding or re-ranking can take."
    asked = {}
    def joined(*args, **how):
        asked.update(how)
        raise ConnectionError
    monkeypatch.setattr(torch.distributed, 'init_process_group', joined)
    for name, value in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR='localhost', MASTER_PORT=29511).items(): monkeypatch.setenv(name, str(value))
    with pytest.raises(ConnectionError): make_engine(Config(device='cpu'))
    assert asked['timeout'].total_seconds() == 12 * 3600


def _unused():
    "Two steps of a network with parameters that its embeddings do not depend on; DDP died on the second."
    from ccc.engine import training_module
    config = Config(device='cpu', arch=TIMM, pooling_type='avg', resnet_pretrained='none', height=64, width=32, batch_size=8, num_instances=4, bn_chunks=2)
    engine = make_engine(config)
    torch.manual_seed(0)
    net = build_backbone(TIMM, weights=None, pooling='avg', size=(64, 32))
    embed = training_module(net, config, engine)
    for _ in range(3): engine.backward(embed(torch.randn(4, 3, 64, 32)).sum())
    os.write(1, b'fine\n')


def _chunks():
    with pytest.raises(ValueError, match='Launch at most 1 .*or give --bn-chunks 2'): make_engine(Config(device='cpu', bn_chunks=1))
    os.write(1, b'fine\n')


if __name__ == '__main__':
    from accelerate import debug_launcher
    debug_launcher(dict(unused=_unused, chunks=_chunks)[sys.argv[1]], (), 2)
