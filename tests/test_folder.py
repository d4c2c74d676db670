"""Folders and tables as users have them: broken files, mixed sizes and formats, odd names, loops of links,
missing cameras and identities."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccc.city import City
from ccc.cli import main
from ccc.config import Config
from ccc.data import load_dataset
from ccc.folder import (
    IMAGES,
    check_images,
    inspect_image,
    keep_readable,
    number_names,
    read_image,
    read_table,
    table_rows,
    to_rgb,
    walk_files,
    walk_folder,
)
from ccc.training import Trainer, fallbacks, open_dataset, rank_gallery, why_no_match

TINY = dict(
    dataset='folder',
    arch='resnet18',
    resnet_pretrained='none',
    height=16,
    width=8,
    pad=1,
    num_clusters=6,
    jaccard_k1=6,
    batch_size=16,
    num_instances=4,
    bn_chunks=1,
    iters=2,
    num_epochs=2,
    warmup_iters=0,
    num_workers=1,
    maps=False,
    device='cpu',
    cluster_min_instances=2,
)


def picture(seed, width=16, height=32, mode='RGB'):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    ).convert(mode)


@pytest.fixture
def mess(tmp_path):
    "100 files, one in twenty broken, in five formats, with names from everywhere and links that go round."
    root = tmp_path / 'mess'
    for i in range(100):
        kind, mode = [('.jpg', 'RGB'), ('.PNG', 'RGBA'), ('.png', 'L'), ('.webp', 'RGB'), ('.bmp', 'P')][
            i % 5
        ]
        odd = [
            'plain',
            'two words',
            'ü人',
            '-rf',
            "quote'd",
            'new\nline',
            os.fsdecode(b'latin\xe9'),
            '#%&',
            'x' * 120,
            '<b>',
        ][i % 10]
        path = root / f'part {i % 3}' / f'{odd}_{i}{kind}'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 4 + i % 30, 8 + i % 50, mode).save(path)
        if i % 20 == 3:
            path.write_bytes(path.read_bytes()[: [0, 20, 60][i % 3]])
    (root / 'part 0/up').symlink_to(tmp_path)
    (root / 'part 1/round').symlink_to(root)
    (root / 'lost.jpg').symlink_to('nowhere.jpg')
    (root / 'self.png').symlink_to('self.png')
    (tmp_path / 'outside.jpg').write_bytes(b'must not be found through the link up')
    return root


def test_a_mess_is_read_once_and_told(mess):
    data = load_dataset('folder', mess)
    # the two dead links are files that cannot be read
    assert len(data.train) == 102 and not data.train.has_pids and not data.train.has_camids
    check = check_images(data, num_workers=2)
    assert len(check.faults()) == 7 and '7 files that cannot be read' in str(check)
    str(check).encode('utf-8')  # no half characters of odd names
    readable = keep_readable(data, check)
    assert len(readable.train) == 95 and '7 files' in readable.notes[0]
    for i in range(95):
        assert readable.train.image(i).mode == 'RGB'
    assert readable.fingerprint() != data.fingerprint()


def test_walk_enters_a_folder_once(tmp_path):
    (tmp_path / 'real').mkdir()
    picture(0).save(tmp_path / 'real/a.png')
    (tmp_path / 'a link').symlink_to(tmp_path / 'real')
    assert walk_files(tmp_path) == ['real/a.png']
    assert walk_files(tmp_path / 'a link') == ['a.png']


def test_training_on_a_mess(mess, tmp_path, capsys):
    config = Config(**TINY, root_dir=str(mess), log_dir=str(tmp_path / 'logs'))
    rows = Trainer(config).fit()
    output = capsys.readouterr().out
    assert (
        'skipped: 7 files' in output and 'no cameras' in output and 'no NMI' in output and 'no mAP' in output
    )
    assert (
        len(rows) == 2
        and {'churn', 'silhouette', 'confidence'} <= set(rows[1])
        and not {'mAP', 'nmi', 'camera_nmi'} & set(rows[1])
    )
    assert Trainer.resume(tmp_path / 'logs/folder-hdc-seed999').epoch == 2


def test_without_cameras_is_as_with_one(tmp_path):
    for i in range(40):
        picture(i).save(tmp_path / f'{i:03d}.png')
    data = load_dataset('folder', tmp_path)
    assert (data.train.camids == -1).all()
    rows = []
    for camid in (-1, 0):
        data.train.camids[:] = camid
        rows.append(
            Trainer(
                Config(
                    **TINY,
                    root_dir=str(tmp_path),
                    log_dir=str(tmp_path / f'logs{camid}'),
                    loss_with_camera=True,
                ),
                data,
            ).fit()
        )
    assert [r['loss'] for r in rows[0]] == [r['loss'] for r in rows[1]]


def test_table_trains_and_evaluates(tmp_path, capsys):
    pandas = pytest.importorskip('pandas')
    rows = []
    for i in range(60):
        picture(i % 10).save(tmp_path / f'{i}.png')
        rows.append(
            dict(
                path=f'{i}.png',
                pid=f'person {i % 10}',
                camid=['door', 'yard', None][i % 3],
                split=['train', 'train', 'query', 'gallery'][i // 15],
            )
        )
    pandas.DataFrame(rows).to_parquet(tmp_path / 'crops.parquet')
    config = Config(**TINY, root_dir=str(tmp_path / 'crops.parquet'), log_dir=str(tmp_path / 'logs'))
    last = Trainer(config).fit()[-1]
    output = capsys.readouterr().out
    # ten pictures, each again and again: found at once
    assert '10 images without a camera' in output and last['mAP'] == 1 and last['nmi'] is not None
    assert main(['evaluate', str(tmp_path / 'logs/folder-hdc-seed999')]) == 0
    assert 'without the cross-camera rule' in capsys.readouterr().out
    assert main(['data', '--dataset', 'folder', '--root-dir', str(tmp_path / 'crops.parquet')]) == 0
    assert 'train: 30 images' in capsys.readouterr().out


@pytest.mark.parametrize(
    'text, says',
    [
        ('name,pid\na,1\n', "column 'path'"),
        ('path\n', "column 'path'"),
        ('path,split\na.jpg,val\n', "got 'val'"),
        ('path,pid\na.jpg,1\n,2\n', 'row 1'),
    ],
)
def test_bad_tables(tmp_path, text, says):
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(ValueError, match=says):
        read_table(tmp_path / 't.csv')


@pytest.mark.parametrize(
    'options, says',
    [
        (dict(pattern='('), 'regular expression'),
        (dict(pattern='(?P<who>x)'), 'a group'),
        (dict(pattern='(?P<pid>x)'), 'does not parse'),
        (dict(train='B'), 'empty split'),
    ],
)
def test_bad_patterns_are_one_line(tmp_path, options, says):
    picture(0).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match=says):
        load_dataset('folder', tmp_path, **options)


def test_nothing_but_junk(tmp_path):
    picture(0).save(tmp_path / '-1_c1_a.png')
    with pytest.raises(ValueError, match='junk'):
        load_dataset('folder', tmp_path)


def test_numbers_and_names():
    assert number_names([3, '03', None])[0].tolist() == [3, 3, -1]
    assert number_names(['10', '9', 'x'])[0].tolist() == [0, 1, 2]  # one name among numbers: all are names
    assert number_names([])[0].shape == (0,)


def test_a_fault_is_a_finding(tmp_path):
    assert inspect_image(tmp_path).fault and inspect_image(tmp_path / 'nowhere').fault.startswith(
        'FileNotFound'
    )
    (tmp_path / 'empty.jpg').touch()
    assert inspect_image(tmp_path / 'empty.jpg').fault
    data = load_dataset('folder', tmp_path)
    with pytest.raises(ValueError, match='none that can be read among 1'):
        keep_readable(data, check_images(data))


def test_why_a_query_has_no_match_agrees_with_the_ranking():
    rng = np.random.default_rng(0)
    from ccc.data import Split

    draw = lambda n, name: Split(
        np.array([f'{name}{i}' for i in range(n)]), rng.integers(-1, 12, n), rng.integers(-1, 3, n)
    )
    query, gallery = draw(60, 'q'), draw(50, 'g')
    gallery.paths[:5] = query.paths[:5]
    q, g = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 50))
    )
    for cross in (True, False):
        ranking = rank_gallery(q, g, query, gallery, cross_camera=cross)
        assert (
            (why_no_match(query, gallery, cross) == 0) == ~np.isnan(ranking.ap)
        ).all() and 0 < ranking.n_valid < 60
        for i in range(60):  # the slow twin
            right = [
                (query.pids[i] == p >= 0)
                and query.paths[i] != path
                and not (cross and query.camids[i] == c >= 0)
                for path, p, c in zip(gallery.paths, gallery.pids, gallery.camids)
            ]
            assert any(right) == (why_no_match(query, gallery, cross)[i] == 0)


def test_benchmarks_say_nothing_of_fallbacks():
    assert fallbacks(load_dataset('city')) == []
    assert open_dataset(Config(dataset='city')).notes == ()


def test_blurred_split_is_the_same_split(tmp_path):
    picture(0).save(tmp_path / 'a.png')
    split = load_dataset('folder', tmp_path).train
    hidden = split.blurred().where([0])
    assert (np.asarray(hidden.image(0))[8:] == np.asarray(split.image(0))[8:]).all() and (
        np.asarray(hidden.image(0))[:8] != np.asarray(split.image(0))[:8]
    ).any()


# ---- what a viewer shows

RAMP = np.linspace(0, 255, 64 * 32).reshape(64, 32).astype(np.uint8)


@pytest.mark.parametrize(
    'name, image, options',
    [
        ('16 bits.png', Image.fromarray(RAMP.astype(np.uint16) * 257), {}),
        ('16 bits.tif', Image.fromarray(RAMP.astype(np.uint16) * 257), {}),
        ('white is zero.tif', Image.fromarray(65535 - RAMP.astype(np.uint16) * 257), dict(tiffinfo={262: 0})),
        ('wide.tif', Image.fromarray(RAMP.astype(np.int32) * 257), {}),
        ('float.tif', Image.fromarray((RAMP / 255).astype(np.float32)), {}),
        ('float.pfm', Image.fromarray((RAMP / 255).astype(np.float32)), {}),
        ('grey.pgm', Image.fromarray(RAMP), {}),
        ('16 bits.pgm', Image.fromarray(RAMP.astype(np.uint16) * 257), {}),
        ('palette.png', Image.fromarray(RAMP).convert('P'), {}),
        ('grey and alpha.png', Image.fromarray(np.stack([RAMP, RAMP * 0 + 255], 2)), {}),
        ('cmyk.tif', Image.fromarray(RAMP).convert('RGB').convert('CMYK'), {}),
    ],
)
def test_one_picture_in_many_files(tmp_path, name, image, options):
    image.save(tmp_path / name, **options)
    assert np.abs(np.asarray(read_image(tmp_path / name)).astype(int) - RAMP[..., None]).max() <= 1
    assert not inspect_image(tmp_path / name).fault


@pytest.mark.parametrize(
    'dtype, white',
    [
        ('uint8', 255),
        ('>u2', 65535),
        ('int16', 255),
        ('int32', 65535),
        ('uint64', 255),
        ('float16', 1),
        ('float64', 1),
    ],
)
@pytest.mark.parametrize('channels', [None, 1, 3])
def test_one_picture_in_many_arrays(dtype, white, channels):
    a = (RAMP.astype(np.float64) / 255 * white).round(0 if white > 1 else 6).astype(dtype)
    if channels:
        a = np.repeat(a[..., None], channels, 2)
    shown = np.asarray(to_rgb(a)).astype(int)
    assert shown.shape == (64, 32, 3) and np.abs(shown - RAMP[..., None]).max() <= 1
    assert (np.asarray(to_rgb(torch.from_numpy(a.astype(a.dtype.newbyteorder('=')).copy()))) == shown).all()


@pytest.mark.parametrize(
    'a, says',
    [
        (np.zeros((3, 64, 32), np.uint8), 'channels come last'),
        (np.zeros((2, 4, 4, 3), np.uint8), 'shape'),
        (np.zeros((4, 0)), 'shape'),
        (np.zeros(7), 'shape'),
        (np.zeros((4, 4, 5)), 'shape'),
        (np.full((4, 4), np.inf), 'finite'),
        (np.eye(4) * 2, 'between 0'),
        (-np.eye(4), 'between 0'),
        (RAMP.astype(np.uint16), '16 of 256'),
        (7000 + RAMP.astype(np.uint16), '16 of 256'),
        (RAMP / 255 / 255, '16 of 256'),
        (RAMP.astype(np.int64) * 10**6, 'between 0'),
        (np.zeros((4, 4), complex), 'real'),
        (np.array([['a']]), 'real'),
        (np.array([[None]]), 'real'),
        (np.zeros((4, 4, 4), np.uint8), 'transparent everywhere'),
        (np.zeros((4, 4, 2), np.float32), 'transparent everywhere'),
    ],
)
def test_what_cannot_be_shown_is_refused(a, says):
    with pytest.raises(ValueError, match=says):
        to_rgb(a)


@pytest.mark.parametrize(
    'suffix, mode', [('.png', 'RGBA'), ('.webp', 'RGBA'), ('.tif', 'RGBA'), ('.png', 'LA'), ('.gif', 'P')]
)
def test_what_lies_under_alpha_is_not_seen(tmp_path, suffix, mode):
    alpha = np.zeros((64, 32, 1), np.uint8)
    alpha[16:48, 8:24] = 255
    shown = []
    for k in (1, 2):
        rgb = np.where(alpha > 0, np.asarray(picture(0, 32, 64)), np.asarray(picture(k, 32, 64)))
        image = Image.fromarray(np.concatenate([rgb, alpha], 2))
        image = image if mode in ('RGBA', 'P') else image.convert('LA')
        image.save(tmp_path / f'{k}{suffix}', **(dict(lossless=True) if suffix == '.webp' else {}))
        shown.append(np.asarray(read_image(tmp_path / f'{k}{suffix}')).astype(int))
    assert (
        (shown[0][:16] == 255).all()
        and np.abs(shown[0] - shown[1])[alpha[..., 0] == 0].max() == 0
        and np.ptp(shown[0]) > 100
    )


@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif'])
def test_upright_by_exif(tmp_path, turn, suffix):
    exif, upright = Image.Exif(), picture(0, 24, 48).resize((96, 192))
    exif[0x112] = turn
    stored = (
        upright.transpose({1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]) if turn > 1 else upright
    )
    stored.save(tmp_path / f'a{suffix}', exif=exif, quality=95)
    shown, facts = read_image(tmp_path / f'a{suffix}'), inspect_image(tmp_path / f'a{suffix}')
    assert shown.size == upright.size == (facts.width, facts.height)
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(upright)).mean() < 12


def test_damaged_exif_is_no_reason_to_refuse(tmp_path):
    picture(0).save(tmp_path / 'a.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12broken')
    assert read_image(tmp_path / 'a.jpg').size == (16, 32) and not inspect_image(tmp_path / 'a.jpg').fault


def test_files_and_arrays_go_one_way(tmp_path):
    from ccc.model import Crops

    for i, a in enumerate((RAMP, RAMP.astype(np.uint16) * 257, (RAMP / 255).astype(np.float32))):
        Image.fromarray(a).save(tmp_path / f'{i}.tif')
        for given in (a, [a], a[..., None], Image.open(tmp_path / f'{i}.tif'), tmp_path / f'{i}.tif'):
            crops = Crops(given)
            assert (
                len(crops) == 1
                and (np.asarray(crops.image(0)) == np.asarray(read_image(tmp_path / f'{i}.tif'))).all()
            )
    with pytest.raises(ValueError, match='image 1: .*channels come last'):
        Crops([RAMP, np.zeros((3, 8, 5), np.uint8)]).image(1)


def test_plain_pictures_are_as_pillow_decodes_them(tmp_path):
    for name, mode in (('a.jpg', 'RGB'), ('b.jpg', 'L'), ('c.png', 'RGB'), ('d.bmp', 'P'), ('e.jpg', 'CMYK')):
        picture(3, 40, 80, mode).save(tmp_path / name)
        assert (
            np.asarray(read_image(tmp_path / name)) == np.asarray(Image.open(tmp_path / name).convert('RGB'))
        ).all()


def test_series_are_counted(tmp_path):
    frames = [picture(i, 32, 64) for i in range(3)]
    for suffix in ('.gif', '.tif', '.webp', '.png'):
        frames[0].save(tmp_path / f'a{suffix}', save_all=True, append_images=frames[1:])
    check = check_images(load_dataset('folder', tmp_path))
    assert 'several pictures: 4 files' in str(check) and not check.faults()


def test_every_raster_suffix_is_listed(tmp_path):
    assert set(
        '.jpg .jpeg .jpe .jfif .png .apng .bmp .dib .webp .avif .tif .tiff .ppm .pgm .pbm .pnm .gif .jp2 .j2k'
        ' .tga .ico .pcx .psd .qoi .sgi .dds .mpo'.split()
    ) <= set(IMAGES)
    assert not set('.mpg .mpeg .eps .ps .pdf .emf .wmf .h5 .hdf .grib .bufr .palm .iim'.split()) & set(IMAGES)
    for i, s in enumerate(('.JFIF', '.tga', '.qoi', '.pcx', '.dib', '.sgi', '.jp2')):
        picture(i).save(tmp_path / f'a{s}')
    check = check_images(load_dataset('folder', tmp_path))
    assert check.readable('train').sum() == 7


def test_pipes_and_other_programs_files_are_faults(tmp_path):
    os.mkfifo(tmp_path / 'pipe.jpg')  # would be waited for
    # would start Ghostscript
    (tmp_path / 'drawing.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n')
    picture(0).save(tmp_path / 'a.png')
    Image.new('RGBA', (8, 16)).save(tmp_path / 'nothing.png')
    check = check_images(load_dataset('folder', tmp_path))
    assert sorted(Path(p).name for p in check.faults()) == [
        'drawing.png',
        'nothing.png',
        'pipe.jpg',
    ] and 'transparent everywhere' in str(check)
    with pytest.raises(OSError, match='pipe.jpg'):
        read_image(tmp_path / 'pipe.jpg')


# ---- our own output is no data


def make_run(
    folder,
    config='{"config": {"dataset": "folder", "root_dir": ".", "log_dir": "logs"}}',
    parts=('labels', 'checkpoints', 'figures'),
):
    for part in parts:
        (folder / part).mkdir(parents=True)
    picture(9).save(folder / parts[-1] / 'evolution.png')
    if config is not None:
        (folder / 'config.json').write_text(config)


@pytest.mark.parametrize(
    'kind', [dict(), dict(config='null'), dict(config='{'), dict(config='[]'), dict(parts=('figures',))]
)
def test_runs_are_no_images(tmp_path, kind):
    for i in range(4):
        picture(i).save(tmp_path / f'{i:04d}_c1_a.png')
    make_run(tmp_path / 'logs/one', **kind)
    data = load_dataset('folder', tmp_path)
    assert len(data.train) == 4 and data.train.has_pids and 'logs/one' in data.notes[-1] and not data.ignored
    assert (
        'logs/one' in str(check_images(data))
        and 'logs/one' in keep_readable(data, check_images(data)).notes[0]
    )
    for inside in ('logs/one', 'logs/one/figures'):
        with pytest.raises(ValueError, match='own output'):
            load_dataset('folder', tmp_path / inside)
    (tmp_path / 't.csv').write_text(
        'path\n0000_c1_a.png\n' + f'logs/one/{kind.get("parts", ("figures",))[-1]}/evolution.png\n'
    )
    table = load_dataset('folder', tmp_path / 't.csv')
    assert len(table.train) == 1 and '1 row with files of runs' in table.notes[0]


@pytest.mark.parametrize('config', [None, '{"lr": 1}'])
def test_a_project_with_folders_of_such_names_is_data(tmp_path, config):
    make_run(tmp_path / 'project', config)
    picture(0).save(tmp_path / 'project/0001_c1_a.png')
    assert (
        len(load_dataset('folder', tmp_path / 'project').train) == 2
        and len(load_dataset('folder', tmp_path).train) == 2
    )


def write_rgb16(path, rgb):
    "A PNG of 16 bits a colour, which Pillow does not write."
    import struct, zlib

    chunk = lambda kind, data: (
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    )
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in rgb)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


def test_colours_of_16_bits(tmp_path):
    rgb = np.repeat(RAMP[..., None], 3, 2).astype(np.uint16)
    write_rgb16(tmp_path / 'whole.png', rgb * 257)
    assert np.abs(np.asarray(read_image(tmp_path / 'whole.png')).astype(int) - rgb).max() <= 1
    for name, factor in (('8 bits.png', 1), ('10 bits.png', 4)):
        write_rgb16(tmp_path / name, rgb * factor)
        assert '16 of 256' in inspect_image(tmp_path / name).fault


def test_a_folder_with_settings_of_others_is_data(tmp_path):
    (tmp_path / 'shop').mkdir()
    (tmp_path / 'shop/config.json').write_text('{"config": {"fps": 25}}')
    picture(0).save(tmp_path / 'shop/a.png')
    assert walk_folder(tmp_path) == (['shop/a.png', 'shop/config.json'], [])


@pytest.mark.parametrize('put', ['0001_c1_a.jpg', 'below/a.png', 'notes.txt', 'train/a.jpg'])
def test_the_city_is_not_drawn_among_files(tmp_path, put, capsys):
    (tmp_path / put).parent.mkdir(exist_ok=True)
    picture(0).save(tmp_path / put, 'PNG')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='--dataset folder'):
        load_dataset('city', tmp_path)
    with pytest.raises(ValueError, match='--dataset folder'):
        load_dataset('city', tmp_path / put)  # a file
    assert main(['data', '--root-dir', str(tmp_path)]) == 2 and '--dataset folder' in capsys.readouterr().err
    assert sorted(tmp_path.rglob('*')) == before


def test_the_city_may_lie_beside_our_own_output(tmp_path):
    tiny = City(n_train=2, n_test=1, n_distractors=0, n_junk=0)
    make_run(tmp_path / 'logs/one')
    city = load_dataset('city', tmp_path, city=tiny)
    assert (
        load_dataset('city', tmp_path, city=tiny).root
        == load_dataset('city', city.root, city=tiny).root
        == city.root
    )
    picture(0).save(tmp_path / '0001_c1_a.png')
    mine = load_dataset('folder', tmp_path)
    assert len(mine.train) == 1 and 'city-' in mine.notes[0]  # a drawing of before is not read as mine
    with pytest.raises(ValueError, match='--dataset folder'):
        load_dataset('city', tmp_path, city=City(n_train=3, n_test=1))


# ---- identities and cameras


@pytest.mark.parametrize('first, cams', [(0, (0, 1, 2)), (1, (0, 1, 2)), (3, (2, 3, 4))])
def test_cameras_count_from_zero_or_one(tmp_path, first, cams):
    for i in range(6):
        picture(i).save(tmp_path / f'{i:04d}_c{first + i % 3}_a.png')
    assert sorted(set(load_dataset('folder', tmp_path).train.camids.tolist())) == list(cams)
    if not first:
        with pytest.raises(ValueError, match='first_camera=1, got 0'):
            load_dataset('folder', tmp_path, first_camera=1)


def test_one_stray_name_costs_one_label(tmp_path):
    for i in range(20):
        picture(i).save(tmp_path / f'{i:04d}_c{1 + i % 3}_a.png')
    picture(99).save(tmp_path / 'holiday.png')
    for pattern in (None, r'^(?P<pid>\d+)_c(?P<camid>\d)'):
        data = load_dataset('folder', tmp_path, pattern=pattern)
        assert (data.train.pids == -1).sum() == (data.train.camids == -1).sum() == 1 and len(data.train) == 21
        assert 'identity and camera of 1 of 21 images' in data.notes[0] and 'holiday.png' in str(
            check_images(data)
        )


@pytest.mark.parametrize(
    'folders, counts, note',
    [
        (('train', 'val', 'test'), (1, 0, 0), 'test 1, val 1'),
        (('Train', 'Probe', 'Gallery'), (1, 1, 1), ''),
        (('train', 'query', 'test'), (1, 1, 1), ''),
        (('train', 'query', 'gallery', 'test'), (1, 1, 1), 'test 1'),
        (('image_train', 'probe', 'image_test', 'val'), (1, 1, 1), 'val 1'),
    ],
)
def test_split_names(tmp_path, folders, counts, note):
    for i, f in enumerate(folders):
        (tmp_path / f).mkdir()
        picture(i).save(tmp_path / f / '0001_c1_a.png')
    data = load_dataset('folder', tmp_path)
    assert (
        (len(data.train), len(data.query), len(data.gallery)) == counts
        and note in ' '.join(data.notes)
        and bool(data.notes) == bool(note)
    )
    (tmp_path / 't.csv').write_text('path,split\n' + ''.join(f'{f}/0001_c1_a.png,{f}\n' for f in folders))
    table = load_dataset('folder', tmp_path / 't.csv')
    assert (len(table.train), len(table.query), len(table.gallery)) == counts and bool(table.notes) == bool(
        note
    )


@pytest.mark.parametrize(
    'encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'cp1252', 'latin-1']
)
@pytest.mark.parametrize('separator', [',', ';', '\t', '|'])
def test_encodings_and_separators(tmp_path, encoding, separator):
    picture(0).save(tmp_path / 'é.png')
    rows = [['path', 'pid', 'camid'], ['é.png', 'Jörg', '1'], ['b.png', 'Anna', '2']]
    (tmp_path / 't.csv').write_bytes('\r\n'.join(separator.join(r) for r in rows).encode(encoding))
    (paths, pids, camids), notes = (lambda s, n: (s['train'], n))(*table_rows(tmp_path / 't.csv'))
    assert Path(paths[0]).exists() and pids.tolist() == [1, 0] and camids.tolist() == [1, 2]
    assert bool(notes) == (encoding in ('cp1252', 'latin-1'))


@pytest.mark.parametrize(
    'header',
    [
        'path,pid,camid',
        ' path , pid,camid ',
        'PATH,PID,CAMID',
        'file_name,person_id,camera_id',
        'Image Path,Person ID,Camera',
        '"path","pid","camid"',
        'path,pid,camid,',
        'img,identity,cam',
    ],
)
def test_headers(tmp_path, header):
    (tmp_path / 't.csv').write_text(header + '\na.png,7,1\n\nb.png,8\n')
    splits, notes = table_rows(tmp_path / 't.csv')
    assert splits['train'][1].tolist() == [7, 8] and splits['train'][2].tolist() == [1, -1] and notes == []


@pytest.mark.parametrize(
    'word',
    [
        'NA',
        'na',
        'N/A',
        'NaN',
        'nan',
        'null',
        'NULL',
        'None',
        '<NA>',
        '#N/A',
        'unknown',
        '-',
        '?',
        '-1',
        '-1.0',
        '-7',
        '',
        ' ',
    ],
)
def test_words_for_a_missing_value(tmp_path, word):
    (tmp_path / 't.csv').write_text(f'path,pid,camid\na.png,{word},1\nb.png,anna,{word}\n')
    splits, notes = table_rows(tmp_path / 't.csv')
    assert splits['train'][1].tolist() == [-1, 0] and splits['train'][2].tolist() == [1, -1]
    assert len(notes) == (2 if word.strip() else 0)


@pytest.mark.parametrize(
    'values, numbers',
    [
        (['1' * 20, '1' * 19 + '2', '1' * 20], [0, 1, 0]),
        (['9223372036854775807', '5'], [9223372036854775807, 5]),
        (['9223372036854775808', '5'], [1, 0]),
        (['3.0', '3', '03', '+3', 3, 3.0, np.float32(3)], [3] * 7),
        (['3.0', '3', 'x', '03'], [0, 0, 1, 0]),
        (['00', '0'], [0, 0]),
        (['3.5', '3'], [1, 0]),
        (['e\u0301', '\u00e9'], [0, 0]),
        ([True, False], [1, 0]),
    ],
)
def test_numbers_of_many_forms(values, numbers):
    assert number_names(values)[0].tolist() == numbers


@pytest.mark.parametrize(
    'values, says',
    [([1e20, 2.0], 'must be text'), (['1.23457E+19'], 'rounded'), ([float('inf')], 'must be text')],
)
def test_rounded_numbers_are_refused(values, says):
    with pytest.raises(ValueError, match=says):
        number_names(values)


@pytest.mark.parametrize(
    'content, says',
    [
        (b'path,pid\na.png,1,2\n', 'cells in each row'),
        (b'path,pid,PID\na.png,1,2\n', None),
        (b'PID,Person_ID,path\n1,2,a\n', 'one column for pid'),
        (b'path,pid\n"a.png,1\nb.png,2\n', 'table of text'),
        (b'path\0,pid\na,1', None),
        (b'', "column 'path'"),
        (b'\xff\xfe', "column 'path'"),
        (b'\xff\xfea', 'must be text'),
        (b'\x89PNG\r\n\x1a\n', "column 'path'"),
    ],
)
def test_odd_tables_are_one_line(tmp_path, content, says):
    (tmp_path / 't.csv').write_bytes(content)
    if says is None:
        assert table_rows(tmp_path / 't.csv')[0]['train'][1].tolist() == [1]
        return
    with pytest.raises(ValueError, match=says) as e:
        table_rows(tmp_path / 't.csv')
    assert 't.csv' in str(e.value)


def test_damaged_parquet_names_the_file(tmp_path):
    (tmp_path / 't.parquet').write_bytes(b'PAR1 no more')
    with pytest.raises(ValueError, match='t.parquet'):
        table_rows(tmp_path / 't.parquet')


def test_contradictions_and_unused_columns_are_named(tmp_path, capsys):
    for name in 'ab':
        picture(ord(name)).save(tmp_path / f'{name}.png')
    (tmp_path / 't.csv').write_text('path,pid,bbox\na.png,1,x\na.png,2,y\nb.png,1,z\n')
    assert main(['data', '--dataset', 'folder', '--root-dir', str(tmp_path / 't.csv')]) == 0
    output = capsys.readouterr().out
    assert 'not used: 1 column of the table: bbox' in output and 'contradiction: 1 image' in output


def test_paths_of_other_systems(tmp_path):
    (tmp_path / 'sub').mkdir()
    picture(0).save(tmp_path / 'sub/a.png')
    Path(os.fsdecode(os.fsencode(tmp_path) + b'/caf\xe9.png')).write_bytes(
        (tmp_path / 'sub/a.png').read_bytes()
    )
    (tmp_path / 't.csv').write_bytes(b'path\nsub\\a.png\ncaf\xe9.png\n')
    assert all(os.path.exists(p) for p in read_table(tmp_path / 't.csv')['train'][0])
