"A stored image holds several smaller ones: decoded as a plain loop does, in every distiller, alone and in company, and by whoever has only the file."
import functools, json, shutil
from dataclasses import replace
import pytest, torch
from safetensors.torch import load_file
from bias_distill.data.kept import load_tensors
from bias_distill.data.names import seeded
from bias_distill.data.split import Split
from bias_distill.distill.dm import dm
from bias_distill.distill.dsa import dsa
from bias_distill.distill.factor import factors, opened, pack, tile_side, unpack
from bias_distill.distill.images import start
from bias_distill.distill.mtt import mtt, train_experts
from bias_distill.distill.pool import pool
from bias_distill.distill.rded import crop, crop_places, easiest
from bias_distill.experiment.experiment import Experiment
from bias_distill.experiment.judge import evaluate
from bias_distill.experiment.settings import complete
from bias_distill.experiment.store import run_key
from bias_distill.experiment.tables import DISTILLERS
from bias_distill.results.sweep import cell_name, run_of
from bias_distill.weights.weighting import Weighting, uniform
from notebooks import execute, texts
from test_run import ROOT, finish, job, results, rows

pytestmark = pytest.mark.usefixtures('small_data')

SMALL = dict(profile='smoke', ipc=2, factor=2)
PACKED = [d for d,m in DISTILLERS.items() if m.packs]

# -- against definitions written down once more

def by_loops(x, f):
    "Each new pixel is the bilinear mean of the two by two old ones around it, in a tile that repeats the last pixel of the image."
    h = x.shape[-1]; s = tile_side(h, f); out = torch.zeros(len(x)*f*f, x.shape[1], h, h, dtype=x.dtype)
    def near(k, at):                                   # places in the image, and their shares
        p = min(max((at+.5)*s/h-.5, 0), s-1); a = int(p); b = min(a+1, s-1)
        return [(min(k*s+a, h-1), 1-(p-a)), (min(k*s+b, h-1), p-a)]
    for n,image in enumerate(x):
        for i in range(f):
            for j in range(f):
                for r in range(h):
                    for c in range(h):
                        out[n*f*f+i*f+j,:,r,c] = sum(u*v*image[:,q,o] for q,u in near(i, r) for o,v in near(j, c))
    return out

@pytest.mark.parametrize('side,f', [(8,2), (9,2), (13,3)])
def test_unpack_by_loops(side, f):
    x = torch.rand(1, 2, 3, side, side, generator=seeded(side), dtype=torch.double)
    assert torch.allclose(unpack(x, f)[0], by_loops(x[0], f), atol=1e-6)

def test_every_factor_packs_and_unpacks():
    for side in (28,32,64):
        for f in factors(side):
            flat = torch.rand(2, f*f, 3, 1, 1, generator=seeded(f)).expand(2, f*f, 3, side, side)
            assert pack(flat, f).shape == (2,1,3,side,side) and torch.allclose(unpack(pack(flat, f), f), flat, atol=1e-5)
        assert factors(side)[0] == 1 and all(f*4 <= side for f in factors(side))

def test_gradient_flows_to_every_pixel():
    x = torch.rand(1, 2, 3, 8, 8, generator=seeded(0), dtype=torch.double).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: unpack(o, 2), x, fast_mode=True)
    images, back = opened(x, 2)
    g = torch.randn(images.shape, generator=seeded(1), dtype=torch.double)
    want, = torch.autograd.grad((unpack(x, 2)*g).sum(), x)
    assert torch.equal(back(g), want) and torch.equal(back(g), want) and (want.abs() > 0).all()      # twice the same

# -- in the distillers

def digits(): return Split((torch.rand(60, 3, 8, 8, generator=seeded(0))*255).byte(), torch.arange(3).repeat(20))
FEW = dict(lr=1., batch=8, width=4, classes=3, compile=False, seed=0)
def first_step(name, split, ws, state, **more):
    how = FEW|more
    if name in ('mtt','pool'):
        shots = train_experts(split, ws[0], 1, 3, 2, .05, 8, 4, classes=3, compile=False, seed=0)
        how |= dict(trajectories={w.name: shots for w in ws})
    if name=='mtt': how |= dict(student_steps=2, ahead=1, latest_start=1, lr_net=.05)
    if name=='dsa': how |= dict(outer_steps=2, inner_epochs=1, strategy='none')
    return next(dict(dm=dm, dsa=dsa, mtt=mtt, pool=pool)[name](split, ws, state, 2, **how))

@pytest.mark.parametrize('name', ['dm','dsa','mtt','pool'])
def test_a_step_is_the_step_of_what_is_seen_taken_back(name):
    "One step on the seen images by the distiller without `factor`; its gradient, taken back by a matrix of derivatives, moves the stored ones."
    split, w = digits(), [uniform()]
    stored = start(split, w, 2, classes=3, factor=2)
    stored['x']['uniform'] = .4+.2*stored['x']['uniform']                          # far from 0 and 1, so that no pixel is clipped
    seen = start(split, w, 2*4, classes=3)
    seen['x']['uniform'] = unpack(stored['x']['uniform'], 2)
    x, s = stored['x']['uniform'].clone(), seen['x']['uniform'].clone()
    small = dict(lr=1e-4)
    after, at = first_step(name, split, w, stored, factor=2, **small), first_step(name, split, w, seen, **small)
    assert after['loss'] == at['loss']
    one = torch.zeros(1,1,1,8,8); jacobian = torch.autograd.functional.jacobian(lambda o: unpack(o, 2), one).view(4*64, 64)
    moved = (at['v']['uniform']).view(3,2,4,3,64).permute(0,1,3,2,4).flatten(3)@jacobian
    scale = 1e-6+moved.abs().max()
    assert torch.allclose(after['v']['uniform'].view(3,2,3,64), moved, atol=1e-4*scale) and moved.abs().max() > 0
    assert not torch.equal(after['x']['uniform'], x) and after['x']['uniform'].shape == x.shape != s.shape

@pytest.mark.parametrize('name', ['dm','dsa','mtt','pool'])
def test_factor_one_is_today(name):
    split, w = digits(), [uniform()]
    a, b = (first_step(name, split, w, start(split, w, 2, classes=3, **f), **f) for f in ({}, dict(factor=1)))
    assert torch.equal(a['x']['uniform'], b['x']['uniform']) and a['loss'] == b['loss']

def test_a_start_is_of_real_images_by_weight():
    split = digits()
    heavy = Weighting('heavy', p=(torch.arange(60)//3%2).double()+1e-9)
    state = start(split, [heavy], 2, classes=3, factor=2)
    for k in range(3):
        mine = pack(split.x[(split.y==k) & (heavy.p>.5)][:,None].expand(-1,4,-1,-1,-1).float()/255, 2)[:,0,:,:4,:4]    # each as a tile
        tiles = state['x']['heavy'][k].unflatten(-1,(2,4)).unflatten(-3,(2,4)).permute(0,2,4,1,3,5).flatten(0,2)
        away = torch.cdist(tiles.flatten(1), mine.flatten(1))
        assert (away.min(1).values < 1e-3).all() and len(away.argmin(1).unique()) == 8

# -- runs

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "distiller -> its folder, runs side by side with factor 2."
    out = {d: tmp_path_factory.mktemp(d) for d in PACKED}
    with pytest.MonkeyPatch.context() as m:
        m.delenv('BIAS_DISTILL_DATA', raising=False)
        for d,o in out.items():
            with_the_view_of(out, o)
            finish(job(complete(**SMALL, distiller=d, weighting='kde_draw'), out_dir=str(o)))
    return out

def with_the_view_of(made, folder):
    "What the encoder sees is the same for every distiller: trained once, for the first."
    (folder/'stages').mkdir(exist_ok=True)
    for p in made[PACKED[0]].glob('stages/supcon-*'): shutil.copy(p, folder/'stages')   # the first has none yet

@pytest.mark.parametrize('distiller', PACKED)
def test_rows_and_files(distiller, made):
    found, files = results(made[distiller])
    assert {r['weighting'] for r in found.values()} == {'uniform','kde_draw'}
    for key,r in found.items():
        assert r['factor'] == 2 and f'-{distiller}-factor2-' in key and '-p factor 2' in r['command'] and r['inputs']['factor'] == 2
        assert run_key(run_of(r), r['data']) == key and '-factor2-' in cell_name(run_of(r))
        t, meta = load_tensors(made[distiller]/f'{key}.safetensors')
        assert t['x'].shape == (20,3,28,28) and t['y'].tolist() == [c for c in range(10) for _ in range(2)] and meta['inputs'] == r['inputs']
        assert t['x'].min() >= 0 and t['x'].max() <= 1 and t['x'].std() > .05

@pytest.mark.parametrize('distiller', PACKED)
def test_alone_as_in_company(distiller, made, tmp_path):
    with_the_view_of(made, tmp_path)
    e = job(complete(**SMALL, distiller=distiller, weighting='kde_draw'), compare=False, out_dir=str(tmp_path))
    row, = finish(e)
    other = json.loads((made[distiller]/f"{row['key']}.json").read_text())
    assert {k: row[k] for k in ('accuracy','loss','auroc')} == {k: other[k] for k in ('accuracy','loss','auroc')}
    for kind in ('safetensors','png'): assert e.store.file(e.run, kind).read_bytes() == (made[distiller]/f"{row['key']}.{kind}").read_bytes()

def test_with_other_factors_and_more_images_beside(made, tmp_path):
    "Runs that differ in the factor are no company; those that differ in images per class are."
    r = complete(**SMALL, weighting='kde_draw')
    e = Experiment([r.but(factor=None), r.but(ipc=1), r.but(factor=3), r], out_dir=str(tmp_path)); found = finish(e)
    assert [o['beside'] for o in found] == [[], ['kde_draw, ipc 2'], [], ['kde_draw, ipc 1']]
    assert [tuple(e.synthetic[o].shape[:2]) for o in e.runs] == [(10,2),(10,4),(10,18),(10,8)]
    assert torch.equal(load_file(e.store.file(r, 'safetensors'))['x'], load_file(made['dm']/f'{e.store.key(r)}.safetensors')['x'])

def test_killed_and_resumed_is_the_same(made, tmp_path):
    run = complete(**SMALL, weighting='kde_draw')
    e = job(run, out_dir=str(tmp_path)); e.look(); e.weigh()
    e.states = {r: e._state(r) for r in e.runs}
    joint = {r: e._steps([r], s, {r: s}) for r,s in e.states.items()}
    for r,steps in joint.items():
        for _ in range(2): next(steps)
        e._keep(r, e.states[r])                                       # two of four steps, then nothing
    finish(job(run, out_dir=str(tmp_path)))
    assert results(tmp_path)[1] == results(made['dm'])[1]

def test_who_has_only_the_file_gets_our_number(made):
    "The code in the file's own words, then the judge on what it gives."
    e = job(complete(**SMALL, weighting='kde_draw'), out_dir=str(made['dm'])); finish(e)
    row = e.store.row(e.run)
    t, meta = load_tensors(e.store.file(e.run, 'safetensors'))
    names = dict(t); exec(meta['inputs']['opening'], names)
    assert names['x'].shape == (80,3,28,28) and names['y'].tolist() == [c for c in range(10) for _ in range(8)]
    assert torch.allclose(names['x'], e.synthetic[e.run].flatten(0,1), atol=1e-5)
    again = evaluate(names['x'], names['y'], e.run, e.train, e.test, 10, False)
    assert all(abs(a-b) < 1 for a,b in zip(again['accuracy'], row['accuracy'])), (again['accuracy'], row['accuracy'])
    unopened = evaluate(t['x'], t['y'], e.run, e.train, e.test, 10, False)
    assert unopened['accuracy'] != row['accuracy']

def test_the_job_says_how_to_open(tmp_path):
    nb = execute('nbs/run.ipynb', **SMALL, distiller='random', compare=False, weighting='uniform', out_dir=tmp_path/'runs')
    row, = rows(tmp_path/'runs').values()
    said = ''.join(texts(nb))
    code = said.split('```python\n')[1].split('```')[0]
    names = {}; exec(code, names)
    assert row['inputs']['opening'] in code and names['x'].shape == (80,3,28,28) and abs(names['x'].mean()) < 3 and '4 in the place of one' in said

# -- what does not go

@pytest.mark.parametrize('bad,words', [
    (dict(factor=0), ['factor=0', 'at least 1']), (dict(factor=2.5), ['factor=2.5', 'expected int']),
    (dict(factor=2, distiller='none', weighting='uniform'), ['factor=2', 'only dm', "distiller='none'"])])
def test_refused_before_anything(bad, words):
    with pytest.raises(ValueError) as e: complete(profile='smoke', **bad)
    assert all(w in str(e.value) for w in words) and len(str(e.value)) < 250

@pytest.mark.parametrize('bad,words', [
    (dict(factor=8), ['factor=8', '28 pixels', '1, 2, 3, 4, 5, 6, 7']), (dict(factor=7, ipc=50), ['ipc=50, factor=7', 'expected at most'])])
def test_refused_once_the_images_are_known(bad, words, tmp_path):
    with pytest.raises(ValueError) as e: Experiment(complete(profile='smoke', **bad), out_dir=str(tmp_path))
    assert all(w in str(e.value) for w in words) and not list(tmp_path.glob('stages/*safetensors'))

def test_names_of_old_results_stay():
    "Without `factor`, or with 1, the names are those of rows and stages made before it could be set."
    rows = {p.stem: json.loads(p.read_text()) for p in sorted((ROOT/'paper_figures/rows').glob('*.json'))}
    plain = {k: r for k,r in rows.items() if r.get('factor') in (None, 1)}
    assert len(plain) > 300
    for key, row in plain.items():
        same = row | dict(factor=1 if row['distiller']!='none' else None)
        assert cell_name(run_of(row)) == key.removesuffix('-mlxtend') == cell_name(run_of(same))

# -- RDED, which chooses crops

def test_crops_lie_inside_and_show_what_is_there():
    left, top, side = crop_places(500, generator=seeded(0))
    assert ((left >= 0) & (top >= 0) & (left+side <= 1+1e-6) & (top+side <= 1+1e-6)).all() and .07 < side.pow(2).min() < .15 and side.max() > .95
    ramp = torch.arange(16.).expand(1,3,16,16)/16                       # brightness says where a pixel comes from
    x = crop(ramp.expand(500,-1,-1,-1), left, top, side)[:,0]
    inner = (left+.5*side)*16-.5                                        # the crop's middle, in pixels
    assert torch.allclose(x.mean((1,2))*16, inner, atol=.3)

def test_easiest_by_sorting():
    losses = torch.rand(40, 5, generator=seeded(0))
    want = sorted(range(40), key=lambda i: min(losses[i].tolist()))[:7]
    i, k = easiest(losses, 7)
    assert i.tolist() == want and [losses[o].argmin().item() for o in want] == k.tolist()

def test_rded_is_chosen_once_and_kept(made, monkeypatch):
    "Another judge of the same images asks no teacher; the row counts its seconds."
    e = job(complete(**SMALL, distiller='rded', weighting='kde_draw', eval_epochs=2), out_dir=str(made['rded']))
    def no(*args, **kw): raise AssertionError('chosen again')
    monkeypatch.setitem(DISTILLERS, 'rded', replace(DISTILLERS['rded'], select=functools.wraps(DISTILLERS['rded'].select)(no)))
    assert all(r['seconds']['distill'] > 0 and r['teacher_epochs'] == 3 for r in finish(e))

def test_rded_takes_draws_alone(tmp_path):
    with pytest.raises(ValueError, match="distiller='rded' has no mean to weight"): complete(distiller='rded', weighting='kde')
    with pytest.raises(ValueError, match='only rded takes it'): complete(teacher_epochs=3)
