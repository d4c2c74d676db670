"""Checkpoints with the key names and wrappings of other codebases: trunk, neck and GeM arrive, and the
embedding is the source's."""

import argparse
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ccc.backbone import build_backbone, load_weights, read_weights

IMAGES = torch.randn(3, 3, 64, 32, generator=torch.Generator().manual_seed(3))
# without ReLU between bn1 and max pooling
NUMBERED = dict(zip('conv1 bn1 layer1 layer2 layer3 layer4'.split(), '0 1 3 4 5 6'.split()))
WITH_RELU = dict(zip(NUMBERED, '0 1 4 5 6 7'.split()))


class Source:
    "A re-ID network of other people, written without `ccc.backbone`: its parts and its embedding."

    def __init__(self, arch='resnet18'):
        torch.manual_seed(5)
        self.net = torchvision.models.get_model(arch, weights=None)
        for m in self.net.layer4[0].modules():
            if isinstance(m, nn.Conv2d):
                m.stride = (1, 1)
        self.dim, self.p, self.neck = (
            self.net.fc.in_features,
            torch.tensor([2.5]),
            nn.BatchNorm1d(self.net.fc.in_features),
        )
        for m in [*self.net.modules(), self.neck]:
            if not isinstance(m, nn.modules.batchnorm._BatchNorm):
                continue
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.running_mean, 0, 0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
        self.net.eval(), self.neck.eval()
        self.trunk = {n: t for n, t in self.net.state_dict().items() if not n.startswith('fc.')}

    @torch.no_grad()
    def embed(self, images, gem=True, neck=True):
        n = self.net
        x = n.layer4(n.layer3(n.layer2(n.layer1(n.maxpool(n.relu(n.bn1(n.conv1(images))))))))
        x = x.clamp(min=1e-6).pow(self.p if gem else 3).mean((2, 3)).pow(1 / (self.p if gem else 3))
        return F.normalize(self.neck(x) if neck else x)


@pytest.fixture(scope='module')
def source():
    return Source()


def under(root, tensors):
    return {root + n: t for n, t in tensors.items()}


def numbered(tensors, numbers=NUMBERED):
    return {f'{numbers[n.split(".")[0]]}.{n.split(".", 1)[1]}': t for n, t in tensors.items()}


def cluster_contrast(s, root='module.', numbers=NUMBERED):
    return (
        under(f'{root}base.', numbered(s.trunk, numbers))
        | {f'{root}gap.p': s.p}
        | under(f'{root}feat_bn.', s.neck.state_dict())
        | {f'{root}classifier.weight': torch.randn(7, s.dim)}
    )


def fast_reid(s):
    pixels = dict(pixel_mean=torch.zeros(1, 3, 1, 1), pixel_std=torch.ones(1, 3, 1, 1))
    return (
        pixels
        | under('backbone.', s.trunk)
        | {'heads.weight': torch.randn(751, s.dim), 'heads.pool_layer.p': s.p}
        | under('heads.bottleneck.0.', s.neck.state_dict())
    )


def open_unreid(s, root='module.'):
    return (
        under(f'{root}backbone.', s.trunk)
        | {f'{root}global_pooling.p': s.p}
        | under(f'{root}head.feat_bn.', s.neck.state_dict())
    )


def wrong(tensors):
    return {n: torch.rand_like(t) if t.is_floating_point() else t for n, t in tensors.items()}


def transreid(s):
    return (
        under('base.', s.trunk)
        | {'gap.p': s.p}
        | under('bottleneck.', s.neck.state_dict())
        | {'classifier.weight': torch.randn(9, s.dim)}
    )


def ours(s):
    return under('trunk.', s.trunk) | {'pooling.p': s.p} | under('neck.', s.neck.state_dict())


def moco(s):
    return (
        {'module.queue': torch.randn(8, 4), 'module.queue_ptr': torch.zeros(1, dtype=torch.long)}
        | under('module.encoder_k.', wrong(s.trunk))
        | under('module.encoder_q.', s.trunk)
    )


ALL, TRUNK = ('trunk', 'pooling', 'neck'), ('trunk',)
PEERS = {  # name: (content of the file, parts that it has)
    'torchvision': (lambda s: s.net.state_dict(), TRUNK),
    'timm, training': (
        lambda s: dict(
            epoch=3,
            args=argparse.Namespace(lr=0.1, model='resnet18'),
            state_dict=wrong(s.net.state_dict()),
            state_dict_ema=s.net.state_dict(),
            metric=71.2,
        ),
        TRUNK,
    ),
    'cluster-contrast': (
        lambda s: dict(state_dict=cluster_contrast(s), epoch=50, best_mAP=np.float64(0.82)),
        ALL,
    ),
    'cluster-contrast, with ReLU numbered': (
        lambda s: dict(state_dict=cluster_contrast(s, numbers=WITH_RELU), best_mAP=np.float32(0.8)),
        ALL,
    ),
    'SpCL': (lambda s: dict(state_dict=cluster_contrast(s), epoch=4, best_mAP=0.7), ALL),
    '3C, names stripped': (
        lambda s: OrderedDict((n.strip('module.'), t) for n, t in cluster_contrast(s).items()),
        ALL,
    ),
    'ICE-like, nothing before layer1, stripped': (
        lambda s: {
            n.strip('module.'): t
            for n, t in (under('module.', s.trunk) | under('module.feat_bn.', s.neck.state_dict())).items()
        },
        ('trunk', 'neck'),
    ),
    'OpenUnReID': (
        lambda s: dict(state_dict=open_unreid(s), epoch=9, best_mAP=0.5, meta=dict(time='today')),
        ALL,
    ),
    'OpenUnReID, two networks': (
        lambda s: dict(state_dict_1=open_unreid(s), state_dict_2=wrong(open_unreid(s)), epoch=9),
        ALL,
    ),
    'OpenUnReID, mean network': (
        lambda s: dict(state_dict=wrong(open_unreid(s, 'module.net.')) | open_unreid(s, 'module.mean_net.')),
        ALL,
    ),
    'fast-reid': (lambda s: dict(model=fast_reid(s), optimizer=dict(state={}), iteration=100), ALL),
    'TransReID': (transreid, ALL),
    'torchreid': (
        lambda s: dict(
            state_dict=under('module.', s.net.state_dict()),
            epoch=60,
            rank1=np.float64(0.9),
            cmc=np.linspace(0, 1, 5),
            optimizer=dict(state={}),
        ),
        TRUNK,
    ),
    'MoCo': (lambda s: dict(epoch=200, arch='resnet18', state_dict=moco(s), optimizer=dict(state={})), TRUNK),
    'MoCo v3': (
        lambda s: dict(
            state_dict=under('module.momentum_encoder.', wrong(s.trunk))
            | under('module.base_encoder.', s.trunk)
        ),
        TRUNK,
    ),
    'DINO': (
        lambda s: dict(
            student=under('module.backbone.', wrong(s.trunk)),
            teacher=under('backbone.', s.trunk),
            args=argparse.Namespace(arch='resnet18'),
        ),
        TRUNK,
    ),
    'teacher in one dict': (lambda s: wrong(under('student.', ours(s))) | under('teacher.', ours(s)), ALL),
    'weight averaging': (lambda s: {'n_averaged': torch.tensor(5)} | under('module.', ours(s)), ALL),
    'EMA wrapper': (lambda s: dict(model=wrong(ours(s)), ema=dict(module=ours(s), updates=7)), ALL),
    'averaged beside trained': (
        lambda s: dict(model=wrong(ours(s)), swa_model=ours(s), best=np.int64(3)),
        ALL,
    ),
    'two networks and their averages': (
        lambda s: dict(state_dict_1=wrong(open_unreid(s)), state_dict_1_ema=open_unreid(s)),
        ALL,
    ),
    'Lightning': (
        lambda s: {
            'pytorch-lightning_version': '2.2',
            'epoch': 4,
            'hyper_parameters': dict(lr=np.float64(0.1)),
            'callbacks': dict(best=torch.tensor(0.4)),
            'state_dict': under('model.', transreid(s)),
        },
        ALL,
    ),
    'torch.compile': (lambda s: under('_orig_mod.', ours(s)), ALL),
    'torch.compile inside': (
        lambda s: {n.replace('base.', 'base._orig_mod.'): t for n, t in cluster_contrast(s).items()},
        ALL,
    ),
    'half precision': (
        lambda s: {n: t.half() if t.is_floating_point() else t for n, t in ours(s).items()},
        ALL,
    ),
    'ours': (ours, ALL),
    'ours, a checkpoint': (
        lambda s: dict(
            network=ours(s),
            memory=torch.rand(4, s.dim),
            labels=torch.arange(9),
            epoch=3,
            optimizer=dict(state={0: dict(step=torch.tensor(1.0))}),
        ),
        ALL,
    ),
    'ours, GeM power without an axis': (lambda s: ours(s) | {'pooling.p': s.p[0]}, ALL),
}


def arrived(net, source):
    "Which parts of the network are the source's."
    state, want = net.state_dict(), ours(source)
    same = lambda part: all(
        torch.allclose(state[n], t.to(state[n]), atol=1e-3)
        for n, t in want.items()
        if n.startswith(part) and 'num_batches' not in n
    )
    return tuple(part for part in ALL if same(part))


@pytest.mark.parametrize('name', PEERS)
def test_checkpoints_of_other_codebases(name, source, tmp_path, capsys):
    content, parts = PEERS[name]
    torch.save(content(source), tmp_path / 'peer.pth')
    net = build_backbone('resnet18', tmp_path / 'peer.pth')
    assert arrived(net, source) == parts and net.report.whole and net.report.by == 'name'
    assert f'{net.report}' in capsys.readouterr().out  # the report is printed
    with torch.no_grad():
        x = net.eval()(IMAGES)
    cosine = (
        (x * source.embed(IMAGES, 'pooling' in parts, False)).sum(1)
        if 'neck' not in parts
        else (x * source.embed(IMAGES, 'pooling' in parts)).sum(1)
    )
    assert cosine.min() > (0.999 if name == 'half precision' else 1 - 1e-5), (
        f'{name}: cosine {cosine.min():.6f}'
    )


@pytest.mark.parametrize('arch', ['resnet50', 'resnet_ibn50a'])
def test_bottleneck_and_instance_norms_by_number(arch, tmp_path):
    donor = build_backbone(arch, None)
    trunk = {n.removeprefix('trunk.'): t for n, t in donor.state_dict().items() if n.startswith('trunk.')}
    torch.save(under('module.base.', numbered(trunk, WITH_RELU)), tmp_path / 'peer.pth')
    net = build_backbone(arch, tmp_path / 'peer.pth')
    assert net.report.whole and all(torch.equal(net.trunk.state_dict()[n], t) for n, t in trunk.items())


def test_safetensors_and_old_torch_files(source, tmp_path):
    plain = {n: t.contiguous() for n, t in ours(source).items()}
    save_file(plain, tmp_path / 'a.SAFETENSORS')
    save_file(plain, tmp_path / 'called.pth')
    torch.save(
        dict(state_dict=plain, best=np.float64(1)),
        tmp_path / 'old.pth.tar',
        _use_new_zipfile_serialization=False,
    )
    for file in ('a.SAFETENSORS', 'called.pth', 'old.pth.tar'):
        assert arrived(build_backbone('resnet18', tmp_path / file), source) == ALL
    for file in ('empty.safetensors', 'empty.pth'):
        (tmp_path / file).write_bytes(b'')
        with pytest.raises(ValueError, match=file):
            read_weights(tmp_path / file)


class Payload:
    "What an attacker would put beside the weights."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_nothing_of_a_file_is_executed(source, tmp_path):
    torch.save(dict(state_dict=ours(source), best=Payload(tmp_path / 'owned')), tmp_path / 'bad.pth')
    with pytest.raises(
        ValueError, match=r'bad.pth cannot be read as plain tensors \(UnpicklingError: it holds a \S*open'
    ):
        read_weights(tmp_path / 'bad.pth')
    assert not (tmp_path / 'owned').exists()


@pytest.mark.parametrize(
    'content',
    [[], {}, {'epoch': 3}, {'state_dict': {}}, torch.zeros(3), {'optimizer': {'weight': torch.zeros(3)}}],
)
def test_files_without_named_tensors(content, tmp_path):
    torch.save(content, tmp_path / 'none.pth')
    with pytest.raises(ValueError, match='none.pth holds no named tensors'):
        read_weights(tmp_path / 'none.pth')


def test_numpy_1_names_of_scalars_are_allowed(source, tmp_path):
    torch.save(
        dict(state_dict=ours(source), best=np.float64(0.5), count=np.int64(3)),
        tmp_path / 'new.pth',
        _use_new_zipfile_serialization=False,
    )
    old = (
        (tmp_path / 'new.pth').read_bytes().replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')
    )
    (tmp_path / 'old.pth').write_bytes(old)
    assert (
        b'numpy.core.multiarray' in old
        and arrived(build_backbone('resnet18', tmp_path / 'old.pth'), source) == ALL
    )


PARTS = {
    'a smaller network': lambda s: Source('resnet34').net.state_dict(),
    'one tensor missing': lambda s: {n: t for n, t in s.trunk.items() if n != 'layer3.0.bn2.running_var'},
    'one tensor of another shape': lambda s: s.trunk | {'bn1.weight': torch.ones(65)},
    'one tensor of whole numbers': lambda s: s.trunk | {'bn1.weight': torch.ones(64, dtype=torch.int8)},
    'attention beside the blocks': lambda s: under(
        'backbone.', s.trunk | {'NL_2.0.theta.weight': torch.ones(4)}
    ),
    'more blocks': lambda s: under('base.', s.trunk | {'layer4.2.conv1.weight': torch.ones(4)}),
    'only one': lambda s: {'conv1.weight': s.trunk['conv1.weight'], 'foo': torch.ones(2)},
}


@pytest.mark.parametrize('name', PARTS)
def test_a_trunk_that_fits_in_part_is_refused(name, source, tmp_path):
    torch.save(dict(state_dict=PARTS[name](source)), tmp_path / 'part.pth')
    with pytest.raises(
        ValueError, match=r'part.pth \(state_dict\): weights must fit the whole trunk; .*--allow-partial'
    ) as error:
        build_backbone('resnet18', tmp_path / 'part.pth')
    assert '\n' not in str(error.value)
    net = build_backbone('resnet18', tmp_path / 'part.pth', allow_partial=True)
    assert not net.report.whole and torch.equal(net.trunk.conv1.weight, source.trunk['conv1.weight']) == (
        name != 'a smaller network'
    )


def test_a_refused_file_leaves_the_network_as_it_was(source):
    net = build_backbone('resnet18', None)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(ValueError):
        load_weights(net, PARTS['one tensor missing'](source))
    with pytest.raises(ValueError, match='finite.*trunk.bn1.bias'):
        load_weights(net, source.trunk | {'bn1.bias': torch.full((64,), torch.nan)})
    assert net.report is None and all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_the_report_is_by_part(source):
    report = load_weights(
        build_backbone('resnet18', None),
        open_unreid(source) | {'module.classifier.weight': torch.ones(2)},
        'peer',
    )
    lines = str(report).splitlines()
    assert lines[0] == "peer: 105 tensors loaded by name, names after 'backbone.'"
    assert [line.split()[:4] for line in lines[1:4]] == [
        ['trunk', '100', 'of', '100'],
        ['pooling', '1', 'of', '1'],
        ['neck', '4', 'of', '4'],
    ]
    assert lines[4].split() == ['dropped', '1:', 'classifier.weight']


def test_norms_of_projection_heads_are_no_neck(source):
    simsiam = (
        under('encoder.', source.trunk)
        | under('encoder.fc.1.', source.neck.state_dict())
        | under('predictor.1.', source.neck.state_dict())
    )
    report = load_weights(build_backbone('resnet18', None), simsiam)
    assert report.whole and set(report.missing) == {
        'pooling.p',
        'neck.weight',
        'neck.bias',
        'neck.running_mean',
        'neck.running_var',
    }


def test_average_pooling_drops_the_power(source):
    report = load_weights(build_backbone('resnet18', None, 'avg'), ours(source))
    assert report.unexpected == ('pooling.p',) and report.whole


def test_order_does_not_take_a_longer_network(source):
    foreign = {
        f'x{i}.{n.rsplit(".", 1)[-1]}': t
        for i, (n, t) in enumerate(source.trunk.items())
        if 'num_batches' not in n
    }
    assert (
        load_weights(build_backbone('resnet18', None), foreign | {'y.weight': torch.ones(5, 512)}).by
        == 'order'
    )
    with pytest.raises(ValueError, match='none of its'):
        load_weights(build_backbone('resnet18', None), foreign | {'y.weight': torch.ones(5, 512, 1, 1)})


def test_the_command_takes_a_part_only_when_asked(source, tmp_path, capsys):
    from ccc.cli import main

    part = {n: t for n, t in source.trunk.items() if not n.startswith('layer4')}
    torch.save(dict(state_dict=part), tmp_path / 'part.pth')
    command = (
        'train --recipe city --subset-ids 10 --height 32 --width 16 --iters 1 --num-epochs 1 --num-clusters'
        ' 10 --jaccard-k1 8 --batch-size 16 --eval-start-epoch 9 --device cpu'.split()
    )
    command += ['--log-dir', str(tmp_path / 'logs'), '--resnet-pretrained', str(tmp_path / 'part.pth')]
    assert main(command) != 0
    output = capsys.readouterr().err
    assert (
        '--allow-partial' in output
        and 'layer4.0.conv1.weight' in output
        and len(output.strip().splitlines()) == 1
    )
    assert main([*command, '--allow-partial']) == 0
    assert 'trunk' in capsys.readouterr().out and list((tmp_path / 'logs').rglob('epoch_000.pt'))
