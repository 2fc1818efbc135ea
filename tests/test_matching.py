"Gradient and trajectory matching: their gradients are derivatives, a killed run ends like an undisturbed one, a diverging one keeps what it had."
import copy, ctypes, functools, gc, json, math
from dataclasses import replace
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file
from bias_distill.experiment import experiment
from bias_distill.data.names import seeded
from bias_distill.distill.dsa import distance, gradients, image_gradients, parameters, real_gradients
from bias_distill.networks.convnet import logits
from bias_distill.experiment.tables import DISTILLERS, coreset
from bias_distill.experiment.settings import complete
from bias_distill.data.kept import load_tensors, save_tensors
from bias_distill.distill.mtt import Trajectories, steps, trajectory_gradients
from bias_distill.experiment.watch import peak_memory
from bias_distill.networks.convnet import ConvNet
from notebooks import execute, texts
from test_run import finish, job, results

pytestmark = pytest.mark.usefixtures('small_data')

def small_net(width=4): return ConvNet(3, 8, width, mean=[.4,.5,.6]).reset(seeded(1)).double()
def images(*n): return torch.rand(*n, 3, 8, 8, generator=seeded(len(n), *n), dtype=torch.double)
def along(f, x, d, e=1e-6): return ((f(x+e*d)-f(x-e*d))/(2*e)).item()

# -- against definitions written down once more, and numerical derivatives

def test_distance_by_loops():
    g = seeded(0); a, b = ({'conv': torch.randn(3,2,3,3, generator=g), 'weight': torch.randn(1,5,4, generator=g)} for _ in range(2))
    pairs = [(a['conv'][o].flatten(), b['conv'][o].flatten()) for o in range(3)] + [(a['weight'][0,:,o], b['weight'][0,:,o]) for o in range(4)]
    by_hand = 0.
    for u,v in pairs:
        dot = sum(float(p)*float(q) for p,q in zip(u, v))
        by_hand += 1-dot/(math.sqrt(sum(float(p)**2 for p in u))*math.sqrt(sum(float(q)**2 for q in v))+1e-6)
    assert abs(distance(a, b).item()-by_hand) < 1e-5

def test_logits_are_the_networks():
    net = small_net(); [p.data.add_(.1*torch.randn(p.shape, generator=seeded(k))) for k,p in enumerate(net.parameters())]
    assert torch.allclose(logits(net, dict(net.named_parameters()), images(5)), net(images(5)), atol=1e-10)

def test_image_gradients_are_the_derivative_of_the_matching_loss():
    "The loss is written with modules and `backward()`; its derivative taken by differences."
    net, real, w = small_net(), images(3,6), torch.rand(3,6, generator=seeded(2), dtype=torch.double)
    def network_gradient(x, w, c):
        n = copy.deepcopy(net); (w*F.cross_entropy(n(x), torch.full((len(x),), c), reduction='none')).mean().backward()
        return {k: p.grad for k,p in n.named_parameters() if k in parameters(net)[0]}
    def loss(s): return sum(distance(network_gradient(s[c], torch.ones(len(s[c])), c), network_gradient(real[c], w[c], c)) for c in range(3))
    q, p = parameters(net); f_real, f_syn = gradients(net, compile=False)
    g = real_gradients(f_real, q, p, real, w, most=4)
    for c in range(3):
        for k,v in network_gradient(real[c], w[c], c).items(): assert torch.allclose(g[k][c], v, atol=1e-10)
    s = images(3,2); got, grad = image_gradients(f_syn, q, p, s, g)
    assert abs((got-loss(s)).item()) < 1e-8
    for k in range(3):
        d = torch.randn(s.shape, generator=seeded(k), dtype=torch.double)
        assert abs(along(loss, s, d)-(grad*d).sum().item()) < 1e-5*abs(grad).sum().item()

def test_trajectory_gradients_are_the_derivative_of_the_distance():
    "The student is trained by `torch.optim.SGD`; the derivative taken by differences, of the images and of the learning rate."
    net, y = small_net(), torch.arange(3).repeat(2)
    theta = {k: v.detach().clone() for k,v in net.named_parameters()}
    target = {k: v+.1*torch.randn(v.shape, generator=seeded(5,k), dtype=torch.double) for k,v in theta.items()}
    plan = [(torch.randperm(6, generator=seeded(k))[:4], {}) for k in range(3)]
    def loss(s, lr):
        n = copy.deepcopy(net); opt = torch.optim.SGD(n.parameters(), lr=float(lr))
        for i,_ in plan: opt.zero_grad(); F.cross_entropy(n(s[i]), y[i]).backward(); opt.step()
        far = lambda a: sum((a[k]-target[k]).pow(2).sum() for k in theta)
        return (far(dict(n.named_parameters()))/far(theta)).detach()
    s, lr = images(6), torch.tensor(.2, dtype=torch.double)
    got, grad_s, grad_lr = trajectory_gradients(steps(net, False), theta, target, lr, s, y, plan)
    assert abs((got-loss(s, lr)).item()) < 1e-10
    for k in range(3):
        d = torch.randn(s.shape, generator=seeded(k), dtype=torch.double)
        assert abs(along(lambda o: loss(o, lr), s, d)-(grad_s*d).sum().item()) < 1e-5*grad_s.abs().sum().item()
    assert abs(along(lambda o: loss(s, o), lr, torch.tensor(1., dtype=torch.double))-grad_lr.item()) < 1e-6

# -- the main job with each of them

RUN = {d: dict(profile='smoke', ipc=2, distiller=d, iterations=3) for d in ('dc','dsa','mtt')}

@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = {d: tmp_path_factory.mktemp(d) for d in RUN}
    with pytest.MonkeyPatch.context() as m:
        m.delenv('BIAS_DISTILL_DATA', raising=False)
        for d,o in out.items(): finish(job(complete(**RUN[d]), out_dir=str(o)))
    return out

class Killed(Exception): pass
def killer(f, at):
    @functools.wraps(f) # its name, and so its files
    def go(*args, **kw):
        for state in f(*args, **kw):
            yield state
            if state['t'] == at: raise Killed
    return go

@pytest.mark.compiled
@pytest.mark.parametrize('distiller,at', [('dc',3), ('dsa',1), ('dsa',2), ('dsa',5), ('mtt',2)])
def test_killed_and_resumed_is_the_same(distiller, at, undisturbed, tmp_path, monkeypatch):
    "Within a network's steps, between two networks, and along a trajectory."
    run = complete(**RUN[distiller])
    with monkeypatch.context() as m:
        method = DISTILLERS[distiller]
        m.setitem(DISTILLERS, distiller, replace(method, steps=killer(method.steps, at)))
        e = job(run, out_dir=str(tmp_path)); e.look(); e.weigh()
        with pytest.raises(Killed): e.distill(save_every=0.)
    left = [load_tensors(p)[1]['t'] for p in tmp_path.glob('stages/distill-*')]
    assert left == [at]*2                                  # killed in the step after it
    finish(job(run, out_dir=str(tmp_path)))
    assert results(tmp_path) == results(undisturbed[distiller])

@pytest.mark.compiled
def test_rows_say_what_was_done(undisturbed):
    for d,out in undisturbed.items():
        rows, pictures = results(out)
        assert {r['weighting'] for r in rows.values()} == {'uniform','kde'}
        for r in rows.values():
            assert r['distiller'] == d and (r['outer_steps'] is None) == (d=='mtt') and (r['experts'] is None) == (d!='mtt')
            stages = list(json.loads((out/f"{r['key']}.json").read_text())['seconds'])
            assert stages == ['data']+['supcon','kde']*(r['weighting']=='kde')+['experts']*(d=='mtt')+['distill','evaluate']
            assert ('learned_lr' in r) == (d=='mtt') and (d!='mtt' or .01 < r['learned_lr'] < .2)
            x = load_file(out/f"{r['key']}.safetensors")['x']
            assert x.isfinite().all() and x.min() >= 0 and x.max() <= 1 and x.std() > .05
        a, b = (load_file(out/f"{k}.safetensors")['x'] for k in rows)
        assert not torch.equal(a, b)

@pytest.mark.compiled
def test_weightings_alone_or_side_by_side(undisturbed, tmp_path):
    for d,out in undisturbed.items():
        row, = finish(job(complete(**RUN[d]), out_dir=str(tmp_path/d), compare=False))
        assert torch.equal(load_file(out/f"{row['key']}.safetensors")['x'], load_file(tmp_path/d/f"{row['key']}.safetensors")['x'])

@pytest.mark.parametrize('distiller', ['dsa','mtt'])
def test_every_way_to_use_weights(distiller, tmp_path):
    "Each way to use weights: none, by the batch, fixed, in the draw, by group, groups in the draw. The smoke workflow tries every weighting, with DM."
    ways = ('uniform','kde','kde_rare','kde_draw','fairdd','oracle_draw')
    rows = finish(job(complete(**RUN[distiller]), out_dir=str(tmp_path), compare=','.join(ways)))
    assert {r['weighting'] for r in rows} == set(ways)
    x = {r['weighting']: load_file(tmp_path/f"{r['key']}.safetensors")['x'] for r in rows}
    assert all(v.isfinite().all() for v in x.values())
    for i,a in enumerate(x):
        for b in list(x)[:i]: assert not torch.equal(x[a], x[b]), (a, b)

def test_a_start_from_centres(tmp_path):
    "The images that `kmeans` would choose, kept before the first step; alone as in company."
    runs = [complete(profile='smoke', ipc=2, factor=2, init='kmeans', weighting=w) for w in ('uniform','oracle_draw')]
    beside = finish(experiment.Experiment(runs, out_dir=str(tmp_path/'beside')))
    e = experiment.Experiment(runs[1:], out_dir=str(tmp_path/'alone')); e.look(); e.weigh()
    state, name = e._state(e.run), e.weightings[e.run].name                            # killed here
    chosen = coreset(e.train, e.weightings[e.run], 2, 10, e.run.width, factor=2, seed=0)
    assert torch.equal(state['x'][name], chosen) and load_tensors(e.store.stage(e.run, 'distill'))[1]['t'] == 0
    row, = finish(experiment.Experiment(runs[1:], out_dir=str(tmp_path/'alone')))
    x, y = (load_file(tmp_path/o/f"{row['key']}.safetensors")['x'] for o in ('alone','beside'))
    assert torch.equal(x, y) and row['accuracy'] == beside[1]['accuracy'] and row['init'] == 'kmeans' and not torch.equal(x, chosen.flatten(0,1))

@pytest.mark.compiled
def test_experts_are_trained_once(undisturbed, monkeypatch):
    "Another number of images a class, another walk of the student: the same experts."
    def no(*args, **kw): raise Killed
    monkeypatch.setattr(experiment, 'train_experts', no)
    for more in (dict(ipc=1), dict(student_steps=3, lr_img=50.)):
        e = job(complete(**RUN['mtt'] | more), out_dir=str(undisturbed['mtt'])); e.look(); e.weigh(); e.distill()
    e = job(complete(**RUN['mtt'], lr_net=.01), out_dir=str(undisturbed['mtt'])); e.look(); e.weigh()
    with pytest.raises(Killed): e.distill()                               # those would have to be trained

def test_experts_in_crowds(monkeypatch, tmp_path):
    "Trained and stored a crowd at a time; each expert has a name of its own."
    monkeypatch.setattr(experiment, 'CROWD', 2)
    e = job(complete(**RUN['mtt'], experts=3), out_dir=str(tmp_path), compare=False); e.look(); e.weigh()
    shots, _ = e._experts(e.run)
    assert len(list(tmp_path.glob('stages/experts*'))) == 2 and (len(shots), shots.snapshots) == (3, e.run.expert_epochs+1)
    starts = [shots.at(k, 0)['convs.0.weight'] for k in range(3)]; assert not torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='only Linux tells the peak since a moment')
def test_experts_stay_in_their_files(tmp_path):
    "Of 160 MB a walk holds one snapshot at a time; read as a whole, the same files take all of it."
    files = [tmp_path/f'{k}.safetensors' for k in range(2)]
    for f in files: save_tensors(f, {n: torch.rand(2, 10, 500_000) for n in ('weight','bias')})
    def grown(f):
        gc.collect(); ctypes.CDLL(None).malloc_trim(0)        # what earlier tests left free would be used first, and not be seen
        Path('/proc/self/clear_refs').write_text('5'); before = peak_memory(); f()
        return peak_memory()-before
    def walk():
        shots = Trajectories(files)
        for e in range(4):
            for t in (0, 3, 9): assert {k: v.shape for k,v in shots.at(e, t).items()} == dict(weight=(500_000,), bias=(500_000,))
    assert grown(walk) < 40 and grown(lambda: [{k: v.clone() for k,v in load_tensors(f)[0].items()} for f in files]) > 100

@pytest.mark.parametrize('distiller,bad,word', [('dsa', dict(lr_net=1e38), 'lr_net (1e+38)'), ('dc', dict(lr_net=1e38), 'lr_net (1e+38)'), ('mtt', dict(lr_lr=1e38, student_steps=1), 'or lr_lr (1e+38)')])
def test_divergence_stops_and_keeps_the_last_good_state(distiller, bad, word, tmp_path):
    e = job(complete(**RUN[distiller] | bad), out_dir=str(tmp_path), compare=False); e.look(); e.weigh()
    with pytest.raises(FloatingPointError) as stopped: e.distill()
    kept, = tmp_path.glob('stages/distill-*')
    tensors, meta = load_tensors(kept)
    assert word in str(stopped.value) and 'lower' in str(stopped.value) and str(kept) in str(stopped.value) and f"after {meta['t']} good steps" in str(stopped.value)
    assert tensors['x'].isfinite().all() and meta['t'] < e.run.iterations*(e.run.outer_steps or 1)
    assert not list(tmp_path.glob('*.json'))

def test_experts_that_diverge_are_said_so(tmp_path):
    e = job(complete(**RUN['mtt'], lr_net=1e30), out_dir=str(tmp_path), compare=False); e.look(); e.weigh()
    with pytest.raises(FloatingPointError, match='experts of .kde. is not finite: lower lr_net'): e.distill()
    assert not list(tmp_path.glob('stages/experts*'))

@pytest.mark.compiled
@pytest.mark.parametrize('distiller', ['dsa','mtt'])
def test_the_main_job(distiller, tmp_path):
    nb = execute('nbs/run.ipynb', profile='smoke', ipc=2, distiller=distiller, out_dir=tmp_path/'runs')
    assert len(results(tmp_path/'runs')[0]) == 2 and distiller.upper()+' + KDE' in '\n'.join(texts(nb))

def test_benchmark_runs(tmp_path):
    execute('paper_figures/benchmark_dsa.ipynb', width=8, batch_real=16, ipc=2, inner_epochs=1, repeats=1, out_dir=tmp_path)
    row = json.loads((tmp_path/'benchmark_dsa.json').read_text())
    assert set(row['ratio']) == {'matching','training','outer step'} and row['relative_difference']['parameters_max'] < .01
