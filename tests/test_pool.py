"Matching on a pool: characteristic functions by the definition, DM where nothing was trained, a killed run that ends like another, and what is refused."
import cmath, json, shutil
from dataclasses import replace
import pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file
from bias_distill.data.kept import load_tensors
from bias_distill.data.names import seeded
from bias_distill.data.split import Split
from bias_distill.distill import pool as room
from bias_distill.distill.dm import dm
from bias_distill.distill.images import start
from bias_distill.distill.mtt import snapshot, train_experts
from bias_distill.distill.pool import METRICS, blend, calibration_loss, ecf, ecf_distance, match_loss, pool
from bias_distill.experiment import experiment
from bias_distill.experiment.experiment import Experiment, stages
from bias_distill.experiment.forecast import outline
from bias_distill.experiment.passes import expert_passes, pool_passes
from bias_distill.experiment.params import runs_of
from bias_distill.experiment.settings import complete
from bias_distill.experiment.store import arguments
from bias_distill.experiment.tables import DISTILLERS
from bias_distill.networks.convnet import ConvNet, network_for
from bias_distill.weights.weighting import Weighting, fixed, uniform
from test_matching import Killed, killer
from notebooks import execute, texts
from test_run import finish, job, results

pytestmark = pytest.mark.usefixtures('small_data')

def few_images():
    x = torch.randint(0, 256, (120,3,8,8), generator=seeded(0), dtype=torch.uint8)
    return Split(x, torch.arange(120)%3, torch.zeros(120, dtype=torch.long))
def weightings():
    w = .5+torch.rand(120, generator=seeded(1))
    return [uniform(), fixed('mean', w), Weighting('draw', w, p=w/w.mean())]
SMALL = dict(batch=12, width=4, classes=3, compile=False, seed=0)
def last(f, s, ws, n, state=None, **kw):
    for state in f(s, ws, state or start(s, ws, 2, classes=3, seed=0), n, **(SMALL | kw)): pass
    return state

# -- against definitions written down once more

def test_ecf_by_a_loop_over_t():
    "With Python's complex numbers, one frequency and one image at a time, as the formula stands."
    g = seeded(0); f, s, t = (torch.randn(*n, 6, generator=g, dtype=torch.double) for n in ((2,9), (2,4), (11,)))
    w = torch.rand(2, 9, generator=g); w = w/w.mean(1, keepdim=True)
    def phi(f, w, t):
        unit = [[float(o)/float(v.norm()) for o in v] for v in f]
        return sum(float(a)*cmath.exp(1j*sum(p*float(q) for p,q in zip(v, t))) for a,v in zip(w, unit))/float(sum(w))
    for weights in (w, None):
        by_hand = 0.
        for c in range(2):
            for o in t:
                r, z = phi(f[c], torch.ones(9) if weights is None else weights[c], o), phi(s[c], torch.ones(4), o)
                phase = 2*(abs(r)*abs(z)-r.real*z.real-r.imag*z.imag)
                by_hand += ((abs(r)-abs(z))**2/2+max(phase, 1e-12)/2)**.5/len(t)
        found = ecf_distance(ecf(f.float(), weights, t.float()), ecf(s.float(), None, t.float()))
        assert abs(found.item()-by_hand) < 1e-5*by_hand

def test_ecf_of_what_is_the_same_has_a_finite_gradient():
    s, t = torch.randn(2, 4, 6, generator=seeded(0)).requires_grad_(), torch.randn(11, 6, generator=seeded(1))
    ecf_distance(ecf(s.detach(), None, t), ecf(s, None, t)).backward()
    assert s.grad.isfinite().all()

@pytest.mark.parametrize('metric', METRICS)
def test_gradients_are_the_derivative_of_the_losses(metric):
    "By differences, in double precision, of the match and of the calibration."
    net = ConvNet(3, 8, 4).reset(seeded(1)).requires_grad_(False).double()
    t = torch.randn(9, net.features, generator=seeded(2), dtype=torch.double)
    x, s = (torch.rand(3, n, 3, 8, 8, generator=seeded(n), dtype=torch.double) for n in (5,2))
    m = METRICS[metric]
    def summary(z): return m.summary(z, None, t) if metric=='mean' else torch.stack([(F.normalize(z, dim=-1)@t.T).cos().mean(1), (F.normalize(z, dim=-1)@t.T).sin().mean(1)], 1)
    def features(x): return net.embed(x.flatten(0,1)).unflatten(0, x.shape[:2])
    def loss(s): return m.scale*m.distance(summary(features(x)), summary(features(s)))+F.cross_entropy(net(s.flatten(0,1)), torch.arange(3).repeat_interleave(2))*3
    leaf = s.float().requires_grad_(); net.float()
    fast = match_loss(net.embed, m, leaf, m.summary(features(x.float()), None, t.float()), t.float())+calibration_loss(net, leaf, torch.arange(3))
    grad, = torch.autograd.grad(fast, leaf); net.double()
    assert abs(fast.item()-loss(s).item()) < 1e-4*fast.item()
    for k in range(3):
        d = torch.randn(s.shape, generator=seeded(7,k), dtype=torch.double)
        slope = (loss(s+1e-6*d)-loss(s-1e-6*d)).item()/2e-6
        assert abs(slope-(grad*d).sum().item()) < 1e-3*grad.abs().sum().item()

def test_a_member_at_an_age():
    shots = {n: torch.stack([v, v+1, v+3], 1) for n,v in snapshot(ConvNet(3, 8, 4, members=2)).items()}
    net = ConvNet(3, 8, 4)
    for k in (0,1):
        for l in (0.,.25,1.):
            for n,p in blend(net, shots, k, l).named_parameters(): assert torch.allclose(p, shots[n][k,0]+3*(1-l), atol=1e-6)   # the snapshot between is passed over

# -- beside DM, and beside others

@pytest.mark.parametrize('strategy', ['none','crop_flip'])
def test_an_untrained_pool_is_dm_bit_for_bit(strategy):
    s, ws = few_images(), weightings()
    state = start(s, ws, 2, classes=3, seed=0)
    for t in range(3):
        shot = snapshot(network_for(s.x, 4, 3).reset(seeded(0,'dm',t,'net')))
        pools = {w.name: {n: torch.stack([v, v], 1) for n,v in shot.items()} for w in ws}
        state = last(pool, s, ws, t+1, state, trajectories=pools, calibration=0., strategy=strategy)
    by_dm = last(dm, s, ws, 3, strategy=strategy)
    for w in ws: assert torch.equal(state['x'][w.name], by_dm['x'][w.name])
    assert state['loss'] == by_dm['loss']

@pytest.mark.parametrize('metric', METRICS)
def test_alone_as_in_company_and_one_pass_for_all_that_weigh_alike(metric, monkeypatch):
    s, ws = few_images(), weightings()
    pools = {w.name: train_experts(s, w, 2, 1, 3, .05, 12, 4, classes=3, compile=False, seed=0) for w in ws}
    twins = [replace(w, name=w.name+' again') for w in ws]
    pools |= {w.name: pools[w.name.removesuffix(' again')] for w in twins}
    alone = {w.name: last(pool, s, [w], 2, trajectories=pools, metric=metric)['x'][w.name] for w in ws}
    passes, f = [], room.features_of_draws
    monkeypatch.setattr(room, 'features_of_draws', lambda *a: passes.append(1) or f(*a))
    together = last(pool, s, ws+twins, 2, trajectories=pools, metric=metric)['x']
    assert len(passes) == 2*len(ws)
    for w in ws: assert torch.equal(together[w.name], alone[w.name]) and torch.equal(together[w.name+' again'], alone[w.name])
    assert len({o.sum().item() for o in alone.values()}) == 3

# -- the main job

RUN = dict(profile='smoke', ipc=2, distiller='pool', iterations=3, weighting='gap_draw')
THREE = 'uniform,kde'

def runs(metrics=METRICS): return [r for m in metrics for r in runs_of(complete(**RUN, metric=m), THREE)]

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "Both metrics in one folder: they share views and pools."
    out = tmp_path_factory.mktemp('pool')
    with pytest.MonkeyPatch.context() as p:
        p.delenv('BIAS_DISTILL_DATA', raising=False)
        finish(Experiment(runs(), out_dir=str(out)))
    return out

def test_rows_say_what_was_done(undisturbed):
    images, rows = [], results(undisturbed)[0]
    assert {(r['weighting'], r['metric']) for r in rows.values()} == {(w, m) for w in ('uniform','kde','gap_draw') for m in METRICS}
    for k,r in rows.items():
        assert (r['distiller'], r['calibration'], r['experts'], r['student_steps']) == ('pool', 1., 2, None)
        seconds = json.loads((undisturbed/f'{k}.json').read_text())['seconds']
        assert list(seconds)[-3:] == ['experts','distill','evaluate'] and seconds['experts'] > 0
        assert ('-p metric ecf' in r['command']) == (r['metric']=='ecf')
        images.append(load_file(undisturbed/f'{k}.safetensors')['x'])
    assert all(x.isfinite().all() and x.min() >= 0 and x.max() <= 1 and x.std() > .05 for x in images)
    assert len({x.double().sum().item() for x in images}) == 6

def test_killed_and_resumed_is_the_same(undisturbed, tmp_path, monkeypatch):
    "From views and pools that are there; both metrics."
    (tmp_path/'stages').mkdir()
    for p in undisturbed.glob('stages/*.safetensors'):
        if not p.name.startswith('distill'): shutil.copy(p, tmp_path/'stages')
    def no(*args, **kw): raise AssertionError('a pool is trained anew')
    monkeypatch.setattr(experiment, 'train_experts', no)
    for m in METRICS:
        with monkeypatch.context() as p:
            p.setitem(DISTILLERS, 'pool', replace(DISTILLERS['pool'], steps=killer(pool, 2)))
            e = Experiment(runs([m]), out_dir=str(tmp_path)); e.look(); e.weigh()
            with pytest.raises(Killed): e.distill(save_every=0.)
    assert [load_tensors(p)[1]['t'] for p in tmp_path.glob('stages/distill-*')] == [2]*6
    finish(Experiment(runs(), out_dir=str(tmp_path)))
    assert results(tmp_path) == results(undisturbed)

def test_a_pool_is_trained_once(undisturbed, tmp_path, monkeypatch):
    "For both metrics, any calibration and number of images; and for MTT, where the settings agree. Two numbers of images go side by side."
    run = complete(**RUN)
    assert stages(run) == ['chosen','experts0','distill']
    e = Experiment(run, out_dir=str(undisturbed))
    def file(**changes): return e.store.stage(complete(**RUN | changes), 'experts0')
    assert file() == file(metric='ecf') == file(calibration=0., ipc=3) == file(distiller='mtt', expert_epochs=1, epoch_steps=4, latest_start=0, ahead=1)
    assert file().exists() and file() != file(epoch_steps=5) and file() != file(weighting='kde')
    def no(*args, **kw): raise Killed
    monkeypatch.setattr(experiment, 'train_experts', no)
    pair = Experiment([complete(**RUN | dict(ipc=1)), complete(**RUN | dict(ipc=3))], out_dir=str(undisturbed))
    pair.look(); pair.weigh(); syn = pair.distill()
    assert [tuple(x.shape[:2]) for x in syn.values()] == [(10,1), (10,3)] and pair._beside(pair.runs[0]) == ['gap_draw, ipc 3']

def test_defaults_and_commands():
    for profile in ('smoke','laptop','paper'):
        run = complete(distiller='pool', profile=profile)
        assert run.metric == 'mean' and run.calibration == 1 and run.experts and run.epoch_steps and run.expert_epochs == 1 and run.latest_start is None
        assert not [k for k in ('metric','calibration','lr_img','experts') if f'-p {k}' in arguments(run)]
        other = complete(distiller='pool', profile=profile, metric='ecf')
        assert '-p metric ecf' in arguments(other) and '-p lr_img' not in arguments(other)
    assert complete().metric is None and complete().calibration is None
    assert 'networks trained on the real images; ' in outline(complete(distiller='pool'), 10)

def test_forecast_counts_a_pool_for_each_weighting(tmp_path):
    e = Experiment(complete(**RUN), out_dir=str(tmp_path)); r = e.run
    one, two = pool_passes(e, [r])[0], pool_passes(e, [r, r.but(weighting='kde')])[0]
    assert two == 2*one and pool_passes(e, [r, r.but(ipc=4)])[0] < 2*one and pool_passes(e, [r.but(calibration=0.)])[0] < one
    assert 0 < one and expert_passes(e, r) == r.experts*r.epoch_steps*256*4

@pytest.mark.parametrize('given,words', [
    (dict(metric='men'), ["unknown metric 'men'", "did you mean 'mean'?", 'mean, ecf']),
    (dict(metric=3), ['metric=3', 'expected str']),
    (dict(calibration=-1.), ['calibration=-1.0', 'at least 0']),
    (dict(calibration='on'), ["calibration='on'", 'expected float']),
    (dict(calibration=float('nan')), ['calibration=nan', 'finite']),
    (dict(experts=0), ['experts=0', 'at least 1']),
    (dict(ahead=2), ['ahead=2', 'only mtt takes it', "distiller='pool'"]),
    (dict(distiller='dm', metric='ecf'), ["metric='ecf'", 'only pool takes it', "distiller='dm'"]),
    (dict(distiller='mtt', calibration=1.), ['calibration=1.0', 'only pool takes it', "distiller='mtt'"]),
    (dict(distiller='pol'), ["unknown distiller 'pol'", "did you mean 'pool'?"]),
], ids=str)
def test_refused(given, words):
    with pytest.raises(ValueError) as e: complete(**dict(profile='smoke', distiller='pool') | given)
    assert all(o in str(e.value) for o in words), str(e.value)

def test_refused_by_the_function():
    s = few_images(); state = start(s, [uniform()], 2, classes=3, seed=0)
    for bad,word in ((dict(metric='men'), "unknown metric 'men'"), (dict(calibration=-1.), 'calibration=-1.0: expected'), (dict(calibration=float('nan')), 'calibration=nan')):
        with pytest.raises(ValueError, match=word): next(pool(s, [uniform()], state, trajectories={}, **SMALL | bad))
    assert state['t'] == 0

@pytest.mark.parametrize('bad,word', [(dict(lr_img=1e38, iterations=9), 'lower lr_img'), (dict(lr_net=1e30), 'experts of .kde. is not finite: lower lr_net')])
def test_divergence_is_said(bad, word, tmp_path):
    e = job(complete(**RUN | dict(weighting='kde') | bad), False, out_dir=str(tmp_path)); e.look(); e.weigh()
    if 'lr_net' in bad:
        with pytest.raises(FloatingPointError, match=word): e.distill()
        assert not list(tmp_path.glob('stages/experts*'))
    else:
        x = e.distill()[e.run]                                       # images are kept in their range, however far they are thrown
        assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1

@pytest.mark.compiled
def test_the_main_job(tmp_path):
    given = dict(profile='smoke', ipc=2, distiller='pool', metric='ecf', weighting='gap_draw', compare='uniform,kde', out_dir=tmp_path/'runs')
    nb = execute('nbs/run.ipynb', **given)
    rows = results(tmp_path/'runs')[0]
    assert {r['weighting'] for r in rows.values()} == {'uniform','kde','gap_draw'} and {r['metric'] for r in rows.values()} == {'ecf'}
    assert 'pool + gap in the draw (ours)' in '\n'.join(texts(nb))
