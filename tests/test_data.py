"Readers against every layout on disk, augmentation on odd sizes, the sampler's promises."

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from ccc.city import City, city_folder, city_plan
from ccc.cli import main
from ccc.data import (
    BENCHMARKS,
    CameraAwareSampler,
    apply_augmentation,
    augment,
    draw_augmentation,
    image_key,
    load_dataset,
    load_images,
    normalize,
    subset,
)

TINY = City(n_train=4, n_test=3, n_distractors=3, n_junk=2)


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 8), (len(name), 0, 0)).save(root / name)
    return root


def lists(folder, **lines):
    for part in ('train', 'val', 'query', 'gallery'):
        (folder / f'list_{part}.txt').write_text(''.join(line + '\n' for line in lines[part]))


@pytest.fixture(scope='module')
def city(tmp_path_factory):
    return load_dataset('city', tmp_path_factory.mktemp('city'), city=TINY)


CONVERTED = ('bounding_box_train', 'query', 'bounding_box_test')


@pytest.mark.parametrize(
    'name, folder, splits, form',
    [
        ('market1501', 'Market-1501-v15.09.15', CONVERTED, '{pid:04d}_c{cam}s1_{n:06d}_00.jpg'),
        ('msmt17', 'MSMT17_V1', CONVERTED, '{pid:04d}_c{cam}_{n:06d}.jpg'),
        ('veri', 'VeRi', ('image_train', 'image_query', 'image_test'), '{pid:04d}_c{cam:03d}_{n:08d}_0.jpg'),
        ('veri', 'VeRi', CONVERTED, '{pid:04d}_c{cam}_{n:08d}.jpg'),
    ],
)
def test_folders(tmp_path, name, folder, splits, form):
    made = [(1, 2, 0), (1, 12, 1), (7, 1, 2)]
    tree(tmp_path, *(f'{folder}/{s}/{form.format(pid=p, cam=c, n=n)}' for s in splits for p, c, n in made))
    (tmp_path / folder / splits[0] / 'Thumbs.db').write_bytes(b'')
    for root in (tmp_path, tmp_path / folder):
        d = load_dataset(name, root, check_counts=False)
        for split in (d.train, d.query, d.gallery):
            assert list(split.paths) == sorted(split.paths) and len(split) == 3
            assert sorted(zip(split.pids, split.camids)) == [(1, 1), (1, 11), (7, 0)]
            assert split.pids.dtype == split.camids.dtype == np.int64


@pytest.mark.parametrize(
    'version, train, test', [('MSMT17_V1', 'train', 'test'), ('MSMT17_V2', 'mask_train_v2', 'mask_test_v2')]
)
def test_msmt17_lists(tmp_path, version, train, test):
    names = (
        '0000/0000_045_12_0303morning_0006_2.jpg',
        '0001/0001_000_01_0303noon_0100_1.jpg',
        '0002/0002_001_15_0114afternoon_0101_0.jpg',
    )
    folder = tree(tmp_path, *(f'{version}/{part}/{n}' for part in (train, test) for n in names)) / version
    lists(
        folder,
        train=[f'{names[1]} 1'],
        val=[f'{names[0]} 0'],
        query=[f'{names[2]} 2'],
        gallery=[f'{n} {i}' for i, n in enumerate(names)],
    )
    for root in (tmp_path, folder):
        d = load_dataset('msmt17', root, check_counts=False)
        assert [Path(p).name for p in d.train.paths] == [names[0][5:], names[1][5:]]
        assert d.train.pids.tolist() == [0, 1] and d.train.camids.tolist() == [11, 0]
        assert d.query.pids.tolist() == [2] and d.query.camids.tolist() == [14]
        assert d.gallery.image(0).size == (4, 8)


def test_junk_is_left_out_and_distractors_stay(tmp_path):
    tree(
        tmp_path,
        'bounding_box_train/0002_c1s1_000001_00.jpg',
        'query/0001_c1s1_000001_00.jpg',
        'bounding_box_test/-1_c1s1_000001_00.jpg',
        'bounding_box_test/0000_c2s1_000001_00.jpg',
        'bounding_box_test/0001_c2s1_000001_00.jpg',
    )
    d = load_dataset('market1501', tmp_path, check_counts=False)
    assert d.gallery.pids.tolist() == [0, 1]
    assert subset(d, 5).gallery.pids.tolist() == [1]


def test_root_from_environment(tmp_path, monkeypatch):
    tree(tmp_path, *(f'market1501/{s}/0001_c1s1_000001_00.jpg' for s in CONVERTED))
    monkeypatch.setenv('CCC_DATA', str(tmp_path))
    assert len(load_dataset('market1501', check_counts=False).train) == 1
    monkeypatch.delenv('CCC_DATA')
    monkeypatch.setenv('HOME', str(tmp_path / 'nobody'))
    with pytest.raises(FileNotFoundError, match='Dataset.*CCC_DATA'):
        load_dataset('market1501')


def test_list_without_its_folder_is_no_layout(tmp_path):
    folder = tree(tmp_path, 'MSMT17_V1/train/a.jpg') / 'MSMT17_V1'
    lists(folder, train=[], val=[], query=[], gallery=[])
    with pytest.raises(FileNotFoundError, match='list_gallery.txt'):
        load_dataset('msmt17', tmp_path)


def test_own_folder(tmp_path):
    tree(tmp_path, 'train/a/1.png', 'train/b/2.JPG', 'train/.hidden.jpg')
    d = load_dataset('folder', tmp_path, pattern='', query=(), gallery=())
    assert d.train.pids.tolist() == [-1, -1] and d.train.camids.tolist() == [-1, -1] and len(d.query) == 0
    assert load_dataset('folder', tmp_path, pattern=r'(?P<pid>\w)/').train.pids.tolist() == [0, 1]
    with pytest.raises(ValueError, match='does not parse'):
        load_dataset('folder', tmp_path, pattern=r'(?P<pid>\d{4})')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        load_dataset('folder', tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='first_camera=3'):
        load_dataset('folder', tmp_path, pattern=r'(?P<camid>\d)', query=(), gallery=(), first_camera=3)
    (tmp_path / 'train/a/1.png').unlink()
    with pytest.raises(ValueError, match='empty split'):
        load_dataset('folder', tmp_path, train='train/a', query=(), gallery=())


def test_city_is_market_1501(city):
    plan = city_plan(TINY)
    assert len(city.train) == sum(p[0] == 'bounding_box_train' for p in plan)
    assert len(city.gallery) == sum(p[0] == 'bounding_box_test' and p[2] >= 0 for p in plan)
    again = load_dataset('market1501', city.root, check_counts=False)
    assert again.fingerprint() == city.fingerprint()
    assert city_folder(TINY).name != city_folder(City()).name


def test_cached_city_is_not_drawn_again(city):
    before = Path(city.root).stat().st_mtime_ns
    load_dataset('city', Path(city.root).parent, city=TINY)
    assert Path(city.root).stat().st_mtime_ns == before


def test_images_do_not_depend_on_threads(city):
    one, many = (load_images(city.train, 24, 12, num_workers=n, progress=False) for n in (1, 4))
    assert one.dtype == torch.uint8 and torch.equal(one, many)
    u = np.asarray(city.train.image(3).resize((12, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(one[3].permute(1, 2, 0).numpy(), u)


@pytest.mark.parametrize('height, width, pad', [(96, 48, 10), (31, 77, 10), (8, 8, 0), (5, 3, 4)])
def test_augmentation_is_torchvisions(height, width, pad):
    images = torch.randint(
        0, 256, (33, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    a = draw_augmentation(33, height, width, torch.Generator().manual_seed(0), pad=pad)
    for out, u, flip, top, left, (y, x, h, w) in zip(
        apply_augmentation(images, a), images, a.flip, a.top.tolist(), a.left.tolist(), a.box.tolist()
    ):
        u = TF.hflip(u) if flip else u
        u = TF.normalize(TF.crop(TF.pad(u, pad), top, left, height, width) / 255, mean, std)
        torch.testing.assert_close(
            out, TF.erase(u, y, x, h, w, torch.tensor(mean).view(3, 1, 1)), atol=1e-5, rtol=0
        )


def test_augmentation_switches(city):
    images = load_images(city.train, 96, 48, progress=False)[:8]
    assert torch.equal(augment(images, flip=0, pad=0, erase=0), normalize(images))
    assert torch.equal(augment(images, flip=1, pad=0, erase=0), normalize(images).flip(3))
    a, b = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    assert (draw_augmentation(1000, 96, 48, torch.Generator().manual_seed(0), erase=1).box[:, 2] > 0).all()


def test_sampler_pass_length_and_order():
    labels, camids = np.repeat(np.arange(37), 6), np.tile(np.arange(6), 37)
    s = CameraAwareSampler(labels, camids, 4, 32, seed=1)
    assert len(s) == 128 and len(list(s)) == 128  # 37 clusters, 8 a batch: 4 full batches
    drawn = s.draw(0).reshape(-1, 4)
    assert len(np.unique(labels[drawn[:, 0]])) == 32  # each cluster once in a pass
    it = s.set_pass(0).batches()
    run = np.concatenate([next(it) for _ in range(8)])
    assert run.dtype == np.int64 and np.array_equal(run, np.concatenate([s.draw(0), s.draw(1)]))
    assert not np.array_equal(s.draw(0), s.draw(1))
    assert not np.array_equal(s.draw(0), CameraAwareSampler(labels, camids, 4, 32, seed=2).draw(0))


def test_sampler_corners():
    assert CameraAwareSampler([5, 5], [0, 1], 1, 1).draw(0).shape == (1,)
    s = CameraAwareSampler([3, 3], [0, 1], 4, 32)  # one cluster fills a batch by itself
    assert len(s) == 32 and set(s.draw(0)) == {0, 1}
    for bad in ([], [-1, -1], [0, 1, 2]):
        with pytest.raises(ValueError, match='no cluster'):
            CameraAwareSampler(np.array(bad, int), None)
    with pytest.raises(ValueError, match='one length'):
        CameraAwareSampler([0, 0], [0])
    with pytest.raises(ValueError, match='multiple'):
        CameraAwareSampler([0, 0], None, 16, 24)


def draws(members, camids, n, times=400):
    "How often each image came in each of many groups of n, (times, images)."
    sampler = CameraAwareSampler(np.zeros(members, int), camids, n, n, seed=0)
    return np.stack([np.bincount(sampler.draw(t)[1:], minlength=members) for t in range(times)])


# other cameras, the anchor's own camera, no cameras
@pytest.mark.parametrize('camids, others', [([0] * 8 + [1] * 8, 8), ([0] * 9, 8), (None, 8)])
def test_a_remainder_is_drawn_without_repeats_while_it_can_be(camids, others):
    members = 9 if camids is None else len(camids)
    counts = draws(members, camids, 16)  # 8 others for 15 places: 7 come twice, 1 once
    assert (np.sort(counts, axis=1)[:, -others:] == [1] + [2] * 7).all() and (counts.sum(1) == 15).all()


@pytest.mark.parametrize('n, largest', [(9, {1}), (10, {2}), (17, {2}), (16, {2})])
def test_no_image_comes_more_than_twice_up_to_twice_as_many_places(n, largest):
    assert set(draws(9, None, n).max(1)) == largest  # 8 others: 8 places, 9, 16, 15
    assert (draws(9, None, 26).max(1) > 2).all()  # 25 places for 8: some image comes four times or more


def test_every_member_is_as_likely_to_come_twice():
    from scipy.stats import chisquare

    counts = draws(9, None, 13, times=4000)  # 12 places for 8 others: 4 of them twice
    twice, anchors = (counts == 2).sum(0), (counts == 0).sum(0)
    assert chisquare(twice).pvalue > 0.001 and chisquare(anchors).pvalue > 0.001


@pytest.mark.skipif(
    not (
        Path(os.environ.get('CCC_DATA', '~/Dataset')).expanduser() / BENCHMARKS['market1501'].folders[0]
    ).is_dir(),
    reason='needs Market-1501 in $CCC_DATA',
)
def test_market1501_itself():
    d = load_dataset('market1501')
    assert len(np.unique(d.train.camids)) == 6 and (d.gallery.pids == 0).sum() == 2798
    assert [len(s) for s in (subset(d, 100).train, subset(d, 100).query, subset(d, 100).gallery)] == [
        1747,
        449,
        1926,
    ]


def test_listed_files_that_are_not_there(tmp_path, capsys):
    names = [f'{i:04d}/{i:04d}_000_0{1 + i % 3}_0303morning_0006_{i}.jpg' for i in range(6)]
    folder = (
        tree(tmp_path, *(f'MSMT17_V1/{part}/{n}' for part in ('train', 'test') for n in names)) / 'MSMT17_V1'
    )
    lines = [f'{n} {i}' for i, n in enumerate(names)]
    for part in ('train', 'val', 'query', 'gallery'):
        (folder / f'list_{part}.txt').write_text('\r\n'.join(lines), encoding='utf-8-sig')
    whole = load_dataset('msmt17', tmp_path, check_counts=False)
    assert sorted(set(whole.train.pids.tolist())) == list(range(6)) and whole.notes == ()
    (folder / 'test' / names[2]).unlink()
    with pytest.raises(FileNotFoundError, match='1 of 6 images listed in list_query.txt.*--no-check-counts'):
        load_dataset('msmt17', tmp_path)
    partly = load_dataset('msmt17', tmp_path, check_counts=False)
    assert (
        len(partly.query) == len(partly.gallery) == 5
        and 'missing: 1 of 6' in partly.notes[0]
        and subset(partly, 2).notes == partly.notes
    )
    assert (
        main(['data', '--dataset', 'msmt17', '--root-dir', str(tmp_path), '--subset-ids', '3']) == 0
        and 'missing: 1 of 6' in capsys.readouterr().out
    )


def test_a_stray_name_in_a_benchmark(tmp_path):
    tree(tmp_path, *(f'{s}/0001_c1s1_000001_00.jpg' for s in CONVERTED), 'query/holiday.jpg')
    with pytest.raises(ValueError, match='does not parse.*holiday'):
        load_dataset('market1501', tmp_path)
    partly = load_dataset('market1501', tmp_path, check_counts=False)
    assert len(partly.query) == 1 and 'holiday.jpg' in partly.notes[0]


def test_the_cache_follows_the_reader(city, monkeypatch):
    import ccc.data

    before = image_key(city.train, 24, 12)
    monkeypatch.setattr(ccc.data, 'READER', ccc.data.READER + 1)
    assert image_key(city.train, 24, 12) != before
