"""Every form of a model gives the same embeddings, an index and a threshold keep
their promises, the commands work on any of them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ccc
from ccc.cli import main
from ccc.config import Config
from ccc.labels import PseudoLabels
from ccc.model import (
    READERS,
    Bytes,
    Crops,
    Index,
    Model,
    from_network,
    card,
    describe,
    pair_similarities,
    parity,
    set_threshold,
    surest,
    write_labels,
    write_page,
)
from ccc.training import make_network

CONFIG = Config(dataset='city', arch='resnet18', resnet_pretrained='none', height=24, width=12)


@pytest.fixture(scope='module')
def model():
    net = make_network(CONFIG)
    made = from_network(net, describe(net, CONFIG, 'nobody'), 'cpu')
    made.progress = False
    return made


@pytest.fixture
def crops(tmp_path):
    for i in range(20):
        pixels = np.random.default_rng(i // 2).integers(
            0, 255, (40, 20, 3), dtype=np.uint8
        ) // 2 + np.random.default_rng(100 + i).integers(0, 40, (40, 20, 3), dtype=np.uint8)
        (tmp_path / 'crops').mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((15 + i, 30 + i)).save(tmp_path / f'crops/{i // 2:02d} of {i % 2}.png')
    return tmp_path / 'crops'


def test_import_is_lazy():
    assert ccc.load is ccc.model.load and 'load' in dir(ccc)


def test_batches_change_nothing(model, crops):
    x = model.embed(crops)
    assert x.shape == (20, 512) and x.dtype == np.float32
    np.testing.assert_allclose(model.embed(crops, batch_size=3), x, atol=1e-5)
    images = [Image.open(p) for p in sorted(crops.iterdir())]
    np.testing.assert_allclose(model.embed(images), x, atol=1e-6)
    assert model.embed([]).shape == (0, 512)
    with pytest.raises(OSError, match='nowhere.jpg'):
        model.embed('nowhere.jpg')


@pytest.mark.parametrize('suffix', ['.safetensors', '.pt2', '.onnx'])
def test_every_form_is_the_model(model, crops, tmp_path, suffix):
    if suffix == '.onnx':
        pytest.importorskip('onnxruntime'), pytest.importorskip('onnxscript')
    path = tmp_path / f'new/m{suffix}'
    assert model.export(path, crops) > 0.9999
    again = ccc.load(path)
    x = model.embed(crops)
    for size in (1, 7, 20):
        assert (again.embed(crops, size) * x).sum(1).min() > 0.9999  # any number of images at a time
    assert again.info == json.loads(json.dumps(model.info)) and {p.name for p in path.parent.iterdir()} == {
        path.name,
        'm.md',
    }
    assert model.info['weights'] in (tmp_path / 'new/m.md').read_text()
    if suffix != '.safetensors':
        with pytest.raises(ValueError, match='needs the network itself'):
            again.export(tmp_path / 'b.onnx', crops)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_as_on_a_cpu(model, crops, tmp_path):
    model.export(tmp_path / 'm.safetensors', crops)
    on_gpu = ccc.load(tmp_path / 'm.safetensors', device='cuda')
    assert (on_gpu.embed(crops) * model.embed(crops)).sum(1).min() > 0.9999
    on_gpu.export(tmp_path / 'm.pt2', crops)
    assert (
        next(on_gpu.module.parameters()).is_cuda
        and (on_gpu.embed(crops) * model.embed(crops)).sum(1).min() > 0.9999
    )


def test_a_file_that_differs_is_not_kept(model, crops, tmp_path, monkeypatch):
    other = Model(None, model.info, Bytes(make_network(Config(**CONFIG.__dict__ | dict(seed=1)))))
    monkeypatch.setitem(
        ccc.model.WRITERS,
        '.safetensors',
        lambda m, path, write=ccc.model.WRITERS['.safetensors']: write(other, path),
    )
    with pytest.raises(ValueError, match='cosine above 0.9999'):
        model.export(tmp_path / 'm.safetensors', crops)
    assert not list(tmp_path.glob('*m*'))
    with pytest.raises(ValueError, match='real images, got none'):
        parity(model, model, [])


def test_what_is_no_model(tmp_path):
    (tmp_path / 'm.h5').touch()
    with pytest.raises(ValueError, match='.safetensors'):
        ccc.load(tmp_path / 'm.h5')
    with pytest.raises(FileNotFoundError):
        ccc.load(tmp_path / 'nowhere')
    from safetensors.torch import save_file

    save_file(dict(a=torch.zeros(1)), tmp_path / 'm.safetensors')
    with pytest.raises(ValueError, match='description'):
        ccc.load(tmp_path / 'm.safetensors')
    with pytest.raises(ValueError, match='last or best'):
        ccc.load(tmp_path, checkpoint='first')
    assert set(READERS) == {'.pt', '.safetensors', '.onnx', '.pt2'}


def test_index(model, crops, tmp_path):
    index = model.index(crops)
    index.save(tmp_path / 'i.faiss')
    hits = model.search(crops, Index.load(tmp_path / 'i.faiss'), k=100)
    assert (
        hits.positions.shape == (20, 20)
        and (hits.positions[:, 0] == np.arange(20)).all()
        and (np.diff(hits.similarity) <= 1e-6).all()
    )
    assert next(hits.rows())[1:3] == (1, str(crops / '00 of 0.png'))
    index.weights = 'other'
    with pytest.raises(ValueError, match='weights other'):
        model.search(crops, index)


def test_threshold_keeps_its_bound():
    rng = np.random.default_rng(0)
    for n in (100, 1000, 12345):
        # many ties
        same, different = (
            rng.normal(0.6, 0.2, 50).astype(np.float32).round(2),
            rng.normal(0.2, 0.2, n).astype(np.float32).round(2),
        )
        for bound in (0.01, 0.05, 0.5):
            c = set_threshold(same, different, bound)
            assert (
                c.fmr == (different >= np.float32(c.threshold)).mean() <= bound
                and c.fnmr == (same < np.float32(c.threshold)).mean()
            )
            lower = np.unique(np.r_[same, different])
            lower = lower[lower < np.float32(c.threshold)]
            # the next lower one would break it
            assert not len(lower) or (different >= lower[-1]).mean() > bound
            assert c.fnmr_at(bound) == c.fnmr and 0 <= c.eer <= 1
    with pytest.raises(ValueError, match='at least 1000 of two'):
        set_threshold(same, different[:999], 0.001)


def test_pairs_against_loops():
    rng = np.random.default_rng(0)
    x, ids, cams = (
        rng.normal(size=(30, 4)).astype(np.float32),
        rng.integers(-1, 5, 30),
        rng.integers(-1, 3, 30),
    )
    same, different = pair_similarities(x, ids, cams)
    pairs = [(i, j) for i in range(30) for j in range(i) if ids[i] >= 0 and ids[j] >= 0]
    slow = (
        [x[i] @ x[j] for i, j in pairs if ids[i] == ids[j] and not cams[i] == cams[j] >= 0],
        [x[i] @ x[j] for i, j in pairs if ids[i] != ids[j]],
    )
    for fast, by_loop in zip((same, different), slow):
        np.testing.assert_allclose(np.sort(fast), np.sort(np.float32(by_loop)), atol=1e-5)


def test_calibration_travels(model, crops, tmp_path):
    model.info.pop('calibration', None)
    with pytest.raises(ValueError, match='model.calibrate'):
        model.same(crops / '00 of 0.png', crops / '00 of 1.png')
    calibration = model.calibrate(crops, ids=np.arange(20) // 2)
    assert (
        calibration.source == 'people as labelled'
        and calibration.n_same == 10
        and calibration.n_different == 180
    )
    model.export(tmp_path / 'm.safetensors', crops)
    again = ccc.load(tmp_path / 'm.safetensors')
    a, b = [crops / '00 of 0.png', crops / '03 of 0.png'], [crops / '00 of 1.png', crops / '04 of 0.png']
    assert again.calibration == calibration and (again.same(a, b).same == model.same(a, b).same).all()
    with pytest.raises(ValueError, match='got 2 and 1'):
        model.same(a, b[:1])
    guess = model.calibrate(crops, ids=PseudoLabels(np.arange(20) // 2, np.linspace(0, 1, 20), None), fmr=0.1)
    assert 'not of people' in guess.source and guess.n_same == 5
    model.info.pop('calibration')


def test_surest_half():
    labels = PseudoLabels(np.array([0, 0, 1, 1, -1]), np.array([0.9, 0.1, 0.8, 0.2, 1.0]), None)
    assert surest(labels).tolist() == [0, -1, 1, -1, -1]
    assert surest(PseudoLabels(np.array([-1, -1]), np.zeros(2), None)).tolist() == [-1, -1]


def test_odd_names_on_page_and_in_table(tmp_path, model):
    crops = Crops([Image.new('RGB', (8, 16), 'red')] * 3)
    crops.names = ['<script>', 'a,"b"\n', os.fsdecode(b'\xff')]
    labels = PseudoLabels(np.array([0, 0, -1]), np.array([0.5, 0.25, 0]), np.zeros((1, 2)))
    write_labels(tmp_path / 'l.csv', crops.names, labels)
    write_page(tmp_path / 'l.html', crops, labels)
    import csv

    rows = list(csv.reader(open(tmp_path / 'l.csv', newline='', errors='surrogateescape')))
    assert rows == [
        ['path', 'cluster', 'confidence'],
        ['<script>', '0', '0.5000'],
        ['a,"b"\n', '0', '0.2500'],
        [crops.names[2], '-1', '0.0000'],
    ]
    page = (tmp_path / 'l.html').read_text()
    assert '<script>' not in page and page.count('<img') == 3 and 'in no cluster: 1 image' in page


def test_card_says_what_is_not_known(model):
    text = card(model)
    assert 'not evaluated' in text and 'not stated' in text and 'cannot say who somebody is' in text
    assert 'mAP: 50.0%' in card(Model(None, model.info | dict(scores=dict(epoch=3, mAP=0.5))))
    assert not set('root_dir log_dir ckpt_dir pattern'.split()) & set(model.info['settings'])


def test_commands(model, crops, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('CCC_DEBUG', '1')
    model.export('m.safetensors', crops)
    (crops / 'broken.jpg').write_bytes(b'x')
    assert (
        main(
            [
                'label',
                'crops',
                'm.safetensors',
                '--num-clusters',
                '10',
                '--k1',
                '4',
                '--min-instances',
                '1',
                '--blur',
            ]
        )
        == 0
    )
    output = capsys.readouterr().out
    assert 'skipped: 1 file' in output and '20 images' in output
    assert len(Path('labels.csv').read_text().splitlines()) == 21
    assert (
        main(['search', 'crops/03 of 0.png', 'crops', 'm.safetensors', '--k', '2', '--save', 'c.faiss']) == 0
    )
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 2 and first[0].split('\t')[1:] == ['1', '1.000', 'crops/03 of 0.png']
    assert (
        main(['search', 'crops', 'c.faiss', 'm.safetensors', '--k', '1']) == 0
        and len(capsys.readouterr().out.splitlines()) == 20
    )
    assert (
        main(['export', 'm.safetensors', 'again.pt2', 'crops']) == 0 and 'at least' in capsys.readouterr().out
    )
    monkeypatch.delenv('CCC_DEBUG')
    for line in (
        'search crops crops m.safetensors --save x.txt',
        'label nowhere m.safetensors',
        'label crops nowhere',
        'export m.safetensors m.xyz crops',
    ):
        assert main(line.split()) == 2 and capsys.readouterr().err.count('\n') == 1


def frame_and_boxes():
    "A frame of noise with 12 boxes in it."
    rng = np.random.default_rng(4)
    frame = rng.integers(0, 255, (120, 200, 3), dtype=np.uint8)
    corners = rng.integers(0, 80, (12, 2))
    return frame, np.hstack([corners, corners + rng.integers(12, 40, (12, 2))])


def test_what_a_tracker_has_in_hand(model):
    frame, boxes = frame_and_boxes()
    arrays = [frame[t:b, l:r] for l, t, r, b in boxes]
    x = model.embed(arrays)
    forms = dict(
        tensors=[torch.from_numpy(a).permute(2, 0, 1) for a in arrays],
        pictures=[Image.fromarray(a) for a in arrays],
        tuple=tuple(arrays),
    )
    for name, crops in forms.items():
        np.testing.assert_array_equal(model.embed(crops), x, name)
    for f in (frame, Image.fromarray(frame), torch.from_numpy(frame).permute(2, 0, 1)):
        for b in (
            boxes,
            boxes.tolist(),
            torch.from_numpy(boxes),
            boxes.astype(np.float32) + np.array([0.6, 0.6, -0.4, -0.4], np.float32),
        ):
            np.testing.assert_array_equal(model.embed(f, boxes=b), x)
    assert model.embed(frame, boxes=[]).shape == (0, model.info['dim'])
    # cut off at the frame
    np.testing.assert_array_equal(
        model.embed(frame, boxes=[[-50, -9, 30.5, 400]]), model.embed(frame[:, :31])
    )
    same_size = torch.from_numpy(np.stack([frame[:40, :20], frame[40:80, :20]])).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(model.embed(same_size), model.embed([frame[:40, :20], frame[40:80, :20]]))
    np.testing.assert_array_equal(model.embed(same_size.permute(0, 2, 3, 1).numpy()), model.embed(same_size))


@pytest.mark.parametrize(
    'boxes',
    [
        [[10, 10, 10, 40]],
        [[1, 1, 5, 5], [300, 10, 400, 40]],
        [[10, 10, np.nan, 40]],
        [[30, 30, 10, 10]],
        [1, 2, 3, 4],
        [[1, 2, 3, 4, 0.9]],
    ],
)
def test_boxes_that_are_none(model, boxes):
    with pytest.raises(ValueError, match='boxes must be'):
        model.embed(frame_and_boxes()[0], boxes=boxes)


def test_tensors_that_are_no_pictures(model):
    for tensor in (
        torch.rand(3, 9, 9),
        torch.zeros(9, 9, 3, dtype=torch.uint8),
        torch.zeros(9, 9, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match='uint8'):
            model.embed([tensor])
    with pytest.raises(ValueError, match='one frame, got 2'):
        model.embed([np.zeros((9, 9, 3), np.uint8)] * 2, boxes=[[0, 0, 5, 5]])


def test_onnx_for_trackers_takes_normalised_floats(model, crops, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    assert model.export_normalised(tmp_path / 'reid.onnx', crops) > 0.9999
    session = onnxruntime.InferenceSession(str(tmp_path / 'reid.onnx'), providers=['CPUExecutionProvider'])
    entry, info = session.get_inputs()[0], ccc.load(tmp_path / 'reid.onnx').info
    assert (
        entry.type == 'tensor(float)'
        and entry.shape[1:] == [3, 24, 12]
        and isinstance(entry.shape[0], str)
        and not info['normalisation']['inside']
    )
    mean, std = (np.array(info['normalisation'][k], np.float32) for k in ('mean', 'std'))
    for n in (1, 5):  # as a tracker does it, without this package
        pixels = np.stack(
            [
                np.asarray(Image.open(p).convert('RGB').resize((12, 24), Image.Resampling.BILINEAR))
                for p in sorted(crops.iterdir())[:n]
            ]
        )
        z = session.run(
            None,
            {entry.name: ((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)},
        )[0]
        assert (z * model.embed(sorted(crops.iterdir())[:n])).sum(1).min() > 0.9999
    with pytest.raises(ValueError, match='.onnx file, got m.pt2'):
        model.export_normalised(tmp_path / 'm.pt2', crops)
    assert 'normalisation: before the model' in (tmp_path / 'reid.md').read_text()


def test_the_command_writes_onnx_for_trackers(model, crops, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    from ccc.cli import main

    weights, out = tmp_path / 'm.safetensors', tmp_path / 'reid.onnx'
    model.export(weights, crops)
    assert 'normalisation: inside the model' in weights.with_suffix('.md').read_text()
    assert main(['export', str(weights), str(out), str(crops), '--normalised']) == 0
    assert (
        onnxruntime.InferenceSession(str(out), providers=['CPUExecutionProvider']).get_inputs()[0].type
        == 'tensor(float)'
    )
    assert (
        main(['export', str(weights), str(tmp_path / 'reid.pt2'), str(crops), '--normalised']) != 0
        and not (tmp_path / 'reid.pt2').exists()
    )


# files of others are data


class Evil:
    "Opens a file when it is unpickled."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), 'w')


@pytest.mark.parametrize('suffix', ['.pt', '.pt2'])
def test_a_model_file_runs_nothing(tmp_path, suffix):
    path, mark = tmp_path / f'm{suffix}', tmp_path / 'it_ran'
    torch.save({'settings': Evil(mark), 'network': Evil(mark)}, path)
    with pytest.raises(ValueError):
        ccc.load(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file would have, so the test can fail


@pytest.mark.parametrize('damage', ['another kind', 'a claim of many vectors', 'cut short', 'junk'])
def test_an_index_file_is_looked_at_first(tmp_path, damage):
    import faiss

    path = tmp_path / 'g.faiss'
    x = np.eye(4, 8, dtype=np.float32)
    Index(x, list('abcd'), 'w').save(path)
    assert len(Index.load(path)) == 4
    content = bytearray(path.read_bytes())
    assert int.from_bytes(content[8:16], 'little') == 4  # how many vectors it says it has
    if damage == 'another kind':
        faiss.write_index(faiss.index_factory(8, 'HNSW4'), str(path))
    elif damage == 'junk':
        path.write_bytes(b'junk')
    elif damage == 'cut short':
        path.write_bytes(content[:-5])
    else:
        path.write_bytes(content[:8] + (2**40).to_bytes(8, 'little') + content[16:])
    with pytest.raises(ValueError, match='g.faiss'):
        Index.load(path)


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    import csv

    names = ['=1+1.jpg', '+1.jpg', '-1.jpg', '@home.jpg', '\tx.jpg', 'plain.jpg']
    labels = PseudoLabels(np.zeros(6, int), np.ones(6), np.zeros((1, 2)))
    write_labels(tmp_path / 'l.csv', names, labels)
    with open(tmp_path / 'l.csv', newline='') as f:
        cells = [row[0] for row in csv.reader(f)][1:]
    assert not any(cell[0] in '=+-@\t' for cell in cells)
    assert [os.path.normpath(cell) for cell in cells] == names  # and each still names its file


def test_a_card_shows_names_as_text(model):
    text = card(Model(None, model.info | dict(origin='<script>alert(1)</script>')), '<img src=x>')
    assert '<script>' not in text and '<img' not in text
