"Folders and tables as users have them: broken files, mixed sizes and formats, odd names, loops of links, missing cameras and identities."
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccc.cli import main
from ccc.config import Config
from ccc.data import load_dataset
from ccc.folder import check_images, inspect_image, keep_readable, number_names, read_table, walk_files
from ccc.training import Trainer, fallbacks, open_dataset, rank_gallery, why_no_match

TINY = dict(dataset='folder', arch='resnet18', resnet_pretrained='none', height=16, width=8, pad=1, num_clusters=6, jaccard_k1=6, batch_size=16, num_instances=4, bn_chunks=1,
            iters=2, num_epochs=2, warmup_iters=0, num_workers=1, maps=False, device='cpu', cluster_min_instances=2)


def picture(seed, width=16, height=32, mode='RGB'):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def mess(tmp_path):
    "100 files, one in twenty broken, in five formats, with names from everywhere and links that go round."
    root = tmp_path / 'mess'
    for i in range(100):
        kind, mode = [('.jpg', 'RGB'), ('.PNG', 'RGBA'), ('.png', 'L'), ('.webp', 'RGB'), ('.bmp', 'P')][i % 5]
        odd = ['plain', 'two words', 'ü人', '-rf', "quote'd", 'new\nline', os.fsdecode(b'latin\xe9'), '#%&', 'x' * 120, '<b>'][i % 10]
        path = root / f'part {i % 3}' / f'{odd}_{i}{kind}'
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 4 + i % 30, 8 + i % 50, mode).save(path)
        if i % 20 == 3: path.write_bytes(path.read_bytes()[:[0, 20, 60][i % 3]])
    (root / 'part 0/up').symlink_to(tmp_path)
    (root / 'part 1/round').symlink_to(root)
    (root / 'lost.jpg').symlink_to('nowhere.jpg')
    (root / 'self.png').symlink_to('self.png')
    (tmp_path / 'outside.jpg').write_bytes(b'must not be found through the link up')
    return root


def test_a_mess_is_read_once_and_told(mess):
    data = load_dataset('folder', mess)
    assert len(data.train) == 102 and not data.train.has_pids and not data.train.has_camids        # the two dead links are files that cannot be read
    check = check_images(data, num_workers=2)
    assert len(check.faults()) == 7 and '7 files that cannot be read' in str(check)
    str(check).encode('utf-8')                                                                      # no half characters of odd names
    kept = keep_readable(data, check)
    assert len(kept.train) == 95 and '7 files' in kept.notes[0]
    for i in range(95): assert kept.train.image(i).mode == 'RGB'
    assert kept.fingerprint() != data.fingerprint()


def test_walk_enters_a_folder_once(tmp_path):
    (tmp_path / 'real').mkdir()
    picture(0).save(tmp_path / 'real/a.png')
    (tmp_path / 'a link').symlink_to(tmp_path / 'real')
    assert walk_files(tmp_path) == ['real/a.png']
    assert walk_files(tmp_path / 'a link') == ['a.png']


def test_training_on_a_mess(mess, tmp_path, capsys):
    config = Config(**TINY, root_dir=str(mess), log_dir=str(tmp_path / 'logs'))
    rows = Trainer(config).fit()
    said = capsys.readouterr().out
    assert 'skipped: 7 files' in said and 'no cameras' in said and 'no NMI' in said and 'no mAP' in said
    assert len(rows) == 2 and {'churn', 'silhouette', 'confidence'} <= set(rows[1]) and not {'mAP', 'nmi', 'camera_nmi'} & set(rows[1])
    assert Trainer.resume(tmp_path / 'logs/folder-hdc-seed999').epoch == 2


def test_without_cameras_is_as_with_one(tmp_path):
    for i in range(40): picture(i).save(tmp_path / f'{i:03d}.png')
    data = load_dataset('folder', tmp_path)
    assert (data.train.camids == -1).all()
    rows = []
    for camid in (-1, 0):
        data.train.camids[:] = camid
        rows.append(Trainer(Config(**TINY, root_dir=str(tmp_path), log_dir=str(tmp_path / f'logs{camid}'), loss_with_camera=True), data).fit())
    assert [r['loss'] for r in rows[0]] == [r['loss'] for r in rows[1]]


def test_table_trains_and_evaluates(tmp_path, capsys):
    pandas = pytest.importorskip('pandas')
    rows = []
    for i in range(60):
        picture(i % 10).save(tmp_path / f'{i}.png')
        rows.append(dict(path=f'{i}.png', pid=f'person {i % 10}', camid=['door', 'yard', None][i % 3], split=['train', 'train', 'query', 'gallery'][i // 15]))
    pandas.DataFrame(rows).to_parquet(tmp_path / 'crops.parquet')
    config = Config(**TINY, root_dir=str(tmp_path / 'crops.parquet'), log_dir=str(tmp_path / 'logs'))
    last = Trainer(config).fit()[-1]
    said = capsys.readouterr().out
    assert '10 images without a camera' in said and last['mAP'] == 1 and last['nmi'] is not None       # ten pictures, each again and again: found at once
    assert main(['evaluate', str(tmp_path / 'logs/folder-hdc-seed999')]) == 0
    assert 'without the cross-camera rule' in capsys.readouterr().out
    assert main(['data', '--dataset', 'folder', '--root-dir', str(tmp_path / 'crops.parquet')]) == 0
    assert 'train: 30 images' in capsys.readouterr().out


@pytest.mark.parametrize('text, says', [('name,pid\na,1\n', "column 'path'"), ('path\n', "column 'path'"), ('path,split\na.jpg,val\n', "got 'val'"), ('path,pid\na.jpg,1\n,2\n', 'row 1')])
def test_bad_tables(tmp_path, text, says):
    (tmp_path / 't.csv').write_text(text)
    with pytest.raises(ValueError, match=says): read_table(tmp_path / 't.csv')


@pytest.mark.parametrize('options, says', [(dict(pattern='('), 'regular expression'), (dict(pattern='(?P<who>x)'), 'a group'), (dict(pattern='(?P<pid>x)'), 'does not parse'), (dict(train='B'), 'empty split')])
def test_bad_patterns_are_one_line(tmp_path, options, says):
    picture(0).save(tmp_path / 'a.png')
    with pytest.raises(ValueError, match=says): load_dataset('folder', tmp_path, **options)


def test_nothing_but_junk(tmp_path):
    picture(0).save(tmp_path / '-1_c1_a.png')
    with pytest.raises(ValueError, match='junk'): load_dataset('folder', tmp_path)


def test_numbers_and_names():
    assert number_names([3, '03', None])[0].tolist() == [3, 3, -1]
    assert number_names(['10', '9', 'x'])[0].tolist() == [0, 1, 2]        # one name among numbers: all are names
    assert number_names([])[0].shape == (0,)


def test_a_fault_is_a_finding(tmp_path):
    assert inspect_image(tmp_path).fault and inspect_image(tmp_path / 'nowhere').fault.startswith('FileNotFound')
    (tmp_path / 'empty.jpg').touch()
    assert inspect_image(tmp_path / 'empty.jpg').fault
    data = load_dataset('folder', tmp_path)
    with pytest.raises(ValueError, match='none that can be read among 1'): keep_readable(data, check_images(data))


def test_why_a_query_has_no_match_agrees_with_the_ranking():
    rng = np.random.default_rng(0)
    from ccc.data import Split
    draw = lambda n, name: Split(np.array([f'{name}{i}' for i in range(n)]), rng.integers(-1, 12, n), rng.integers(-1, 3, n))
    query, gallery = draw(60, 'q'), draw(50, 'g')
    gallery.paths[:5] = query.paths[:5]
    q, g = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 50)))
    for cross in (True, False):
        ranking = rank_gallery(q, g, query, gallery, cross_camera=cross)
        assert ((why_no_match(query, gallery, cross) == 0) == ~np.isnan(ranking.ap)).all() and 0 < ranking.n_valid < 60
        for i in range(60):                                               # the slow twin
            right = [(query.pids[i] == p >= 0) and query.paths[i] != path and not (cross and query.camids[i] == c >= 0)
                     for path, p, c in zip(gallery.paths, gallery.pids, gallery.camids)]
            assert any(right) == (why_no_match(query, gallery, cross)[i] == 0)


def test_benchmarks_say_nothing_of_fallbacks():
    assert fallbacks(load_dataset('city')) == []
    assert open_dataset(Config(dataset='city')).notes == ()


def test_blurred_split_is_the_same_split(tmp_path):
    picture(0).save(tmp_path / 'a.png')
    split = load_dataset('folder', tmp_path).train
    hidden = split.blurred().where([0])
    assert (np.asarray(hidden.image(0))[8:] == np.asarray(split.image(0))[8:]).all() and (np.asarray(hidden.image(0))[:8] != np.asarray(split.image(0))[:8]).any()
