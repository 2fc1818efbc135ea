"""The main job on a GPU, as far as a machine without one can check: on the simulated device of `device_sim`, under CUDA's rules
and under MPS's. Where tensors are, what a GPU can compute, which device is asked, what a finished row means elsewhere."""
import copy, functools, shutil, warnings
from dataclasses import replace
import numpy as np, pytest, torch
from safetensors.torch import load_file
from torch import nn
from torch.func import grad, vmap
from bias_distill.audit.doubtful import fingerprint
from bias_distill.audit.look import looked
from bias_distill.audit.plants import write_images
from bias_distill.audit.properties import colours, file_facts
from bias_distill.audit.report import audit
from bias_distill.data.cmnist import cmnist
from bias_distill.data.folder import folder, raw_files
from bias_distill.data.kept import load_tensors
from bias_distill.data.names import seeded
from bias_distill.distill import dm
from bias_distill.distill.images import joined
from bias_distill.experiment import judge
from bias_distill.experiment.experiment import Experiment
from bias_distill.experiment.settings import complete
from bias_distill.experiment.tables import DATASETS, DISTILLERS, Dataset
from bias_distill.networks.advance import prefetched
from bias_distill.networks.augment import augment
from bias_distill.networks.convnet import network_for
from bias_distill.networks.device import repeatable
from bias_distill.networks.fast import channels_last, compiled
from bias_distill.networks.training import batch_loss, kept_bytes
from device_sim import simulated

KINDS = ('cuda', 'mps')

def few_digits(conflict=.3, seed=0, data_dir=None, split='test'):
    "400 digits to train with, 100 to judge: of each class and bias some."
    d = cmnist(conflict=conflict, seed=seed, split=split)
    def some(s, n): return s[torch.randperm(len(s), generator=seeded(seed, 'some'))[:n]]
    return replace(d, name='few', train=some(d.train, 400), test=some(d.test, 100))

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "A small set by name; the cases of a test are otherwise the smoke profile's."
    monkeypatch.delenv('BIAS_DISTILL_DATA', raising=False)
    monkeypatch.setitem(DATASETS, 'few', Dataset(few_digits, .3))
    monkeypatch.setattr('bias_distill.weights.choice.STEPS', (2, 4))
    warnings.filterwarnings('ignore', message='no Triton')

def run(**given): return complete(**dict(dataset='few', profile='smoke', ipc=2, encoder_steps=3, eval_epochs=2) | given)

def finish(e, save_every=20.):
    e.look()
    e.weigh()
    e.distill(save_every)
    return e.judge()

def images(folder): return {p.name: load_file(p)['x'] for p in sorted(folder.glob('*.safetensors'))}

# -- the simulated device keeps a GPU's rules

def refused(f, words):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=words): f()

def test_two_devices_do_not_mix():
    with simulated() as g:
        a = torch.rand(3, 4)
        b = a.to('cuda')
        assert (a.device.type, b.device, b.is_cuda) == ('cpu', torch.device('cuda:0'), True) and g.moves.total() == 1
        for f in (lambda: a+b, lambda: a@b.T, lambda: a*b.sum(), lambda: torch.equal(a, b)): refused(f, 'two devices')
        assert (b*2).is_cuda and (b*torch.tensor(2.)).is_cuda and b[torch.tensor([0,1])].is_cuda
        refused(lambda: a[torch.tensor([0,1], device='cuda')], 'indices should be')
        refused(lambda: b.index_put_((torch.tensor([0]),), a[:1]), 'two devices')
        for f in (b.numpy, lambda: np.asarray(b)): refused(f, 'numpy')
        refused(lambda: torch.rand(3, generator=torch.Generator(), device='cuda'), 'generator')
        refused(lambda: torch.multinomial(b, 1, generator=torch.Generator()), 'generator')
        assert torch.zeros_like(b).is_cuda and b.new_zeros(3).is_cuda and not torch.zeros_like(b, device='cpu').is_cuda
        assert not b.cpu().is_cuda and b.cpu().numpy().shape == (3, 4)

def test_networks_optimisers_and_functional_gradients():
    with simulated():
        net, x = nn.Sequential(nn.Conv2d(3,4,3), nn.GroupNorm(4,4), nn.Flatten(), nn.Linear(144,2)).to('cuda'), torch.rand(2,3,8,8)
        refused(lambda: net(x), 'two devices')
        net(x.cuda()).sum().backward()
        assert all(p.is_cuda and p.grad.is_cuda for p in net.parameters()) and copy.deepcopy(net)[0].weight.is_cuda
        for opt in (torch.optim.Adam(net.parameters()), torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, foreach=True)): opt.step()
        def loss(w, x): return (x@w).pow(2).sum()
        here = torch.rand(3, 4, device='cuda')
        assert vmap(grad(loss), (None,0))(torch.rand(4, device='cuda'), here).is_cuda
        refused(lambda: vmap(grad(loss), (None,0))(torch.rand(4), here), 'two devices')

def test_what_a_kind_cannot_do():
    with simulated('mps') as g:
        refused(lambda: torch.rand(3).to('mps').double(), 'float64')
        refused(lambda: torch.zeros(3, dtype=torch.double).to('mps'), 'float64')
        refused(lambda: torch.rand(3, device='mps').mode(), 'not currently implemented for the MPS device')
    with simulated(), repeatable(torch.device('cuda')):
        refused(lambda: torch.ones(3, device='cuda').cumsum(0), 'deterministic')
        refused(lambda: torch.zeros(3, device='cuda').long().bincount(torch.ones(3, device='cuda')), 'deterministic')
        assert torch.ones(3, device='cuda').long().cumsum(0).is_cuda
    with pytest.raises(RuntimeError, match='no mps'), simulated('cuda'): torch.zeros(3, device='mps')

def test_what_is_counted():
    with simulated() as g:
        x = torch.rand(100, device='cuda')
        g.reset()
        x.sum().item()
        x[x > .5]
        assert g.syncs.total() == 2 and g.moves.total() == 0 and g.ops['sum'] == 1
        assert g.peak >= 400

# -- the main job

TRAINED_DC = dict(iterations=1, outer_steps=2, inner_epochs=1)
CASES = { # what is run side by side
    'dm': [dict(weighting=o) for o in ('uniform','kde','oracle_draw','fairdd')],
    'dc': [dict(distiller='dc', weighting='uniform', **TRAINED_DC)],
    'dsa': [dict(distiller='dsa', augment='color_scale_rotate', weighting=o, **TRAINED_DC) for o in ('uniform','kde_draw')],
    'mtt': [dict(distiller='mtt', augment='scale_rotate', experts=1, expert_epochs=2, latest_start=1, iterations=2)],
    'random': [dict(distiller='random', weighting=o) for o in ('gap_draw','group_draw')],
    'kmeans': [dict(distiller='kmeans', weighting='kde_draw')],
    'pool': [dict(distiller='pool', experts=1, epoch_steps=2, iterations=2, factor=2)],
    'rded': [dict(distiller='rded', weighting='gap_draw', teacher_epochs=1)]}
JUDGES = {
    'erm': dict(debiaser='erm'), 'selecmix': dict(debiaser='selecmix'), 'dfa': dict(debiaser='dfa'),
    'mlp': dict(network='mlp'), 'lenet': dict(network='lenet'),
    'none': dict(distiller='none', network='mlp', ipc=0)}
def cases(given): return [run(**o) for o in given]

def finite(rows): return all(0 <= a <= 100 for r in rows for a in r['accuracy'])

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', CASES)
def test_each_distiller(name, kind, tmp_path):
    "It runs, says where, gives what the CPU gives to rounding, and a killed run ends as an undisturbed one, to the bit."
    runs = cases(CASES[name])
    with simulated(kind) as g: rows = finish(Experiment(runs, out_dir=tmp_path/'a', device='auto'))
    assert finite(rows) and all(r['how'].startswith(kind) for r in rows) and g.ops.total() > 1000
    assert [r['weighting'] for r in rows] == [r.weighting for r in runs] and all(r['host_memory_mb'] > 100 for r in rows)
    plain = finish(Experiment(runs, out_dir=tmp_path/'cpu', device='cpu'))
    for r,o in zip(rows, plain): assert r['loss'] == pytest.approx(o['loss'], rel=1e-3)
    for (n,x),(_,y) in zip(images(tmp_path/'a').items(), images(tmp_path/'cpu').items()):
        assert (x-y).abs().mean() < 1e-4, n # rounding may carry a ReLU across zero: single pixels differ by more
    if not DISTILLERS[runs[0].distiller].steps: return
    shutil.copytree(tmp_path/'a/stages', tmp_path/'b/stages', ignore=shutil.ignore_patterns('distill-*')) # the same encoder
    killed_and_resumed(runs, kind, tmp_path)

class Killed(Exception): pass

def killed_and_resumed(runs, kind, tmp_path):
    method = DISTILLERS[runs[0].distiller]
    @functools.wraps(method.steps) # its name, and so its files
    def dies(*args, **kwargs):
        for s in method.steps(*args, **kwargs):
            yield s
            raise Killed
    with simulated(kind), pytest.MonkeyPatch.context() as m:
        m.setitem(DISTILLERS, runs[0].distiller, replace(method, steps=dies))
        with pytest.raises(Killed): finish(Experiment(runs, out_dir=tmp_path/'b', device=kind), save_every=0.)
    half = [*(tmp_path/'b/stages').glob('distill-*')]
    with simulated(kind): finish(Experiment(runs, out_dir=tmp_path/'b', device=kind), save_every=0.)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path/o).glob('*.safetensors')} for o in 'ab')
    assert a == b and len(a) == len(half) == len(runs)

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', JUDGES)
def test_each_judge(name, kind, tmp_path):
    given = dict(distiller='random', weighting='uniform', debias_steps=2 if JUDGES[name].get('debiaser') else None) | JUDGES[name]
    with simulated(kind): assert finite(finish(Experiment(run(**given), out_dir=tmp_path, device=kind)))

# -- networks that are judged in several crowds

FOUR = dict(distiller='random', weighting='uniform', eval_networks=4, eval_batch=8)

def parameters_of_each(monkeypatch, out_dir, device='cpu', **given):
    "The row, and parameters (4, ...) of the networks that were judged, in their order."
    seen, predict = [], judge.predict
    def looks(net, *args):
        seen.append([p.detach().cpu().clone().unflatten(0, (net.members,-1)) for p in net.parameters()])
        return predict(net, *args)
    with monkeypatch.context() as m:
        m.setattr(judge, 'predict', looks)
        row, = finish(Experiment(run(**FOUR | given), out_dir=out_dir, device=device))
    return row, [torch.cat(o) for o in zip(*seen)]

@pytest.mark.parametrize('debiaser', ['none','erm','selecmix','dfa'])
def test_a_network_is_the_same_in_every_crowd(debiaser, tmp_path, monkeypatch):
    "On the CPU, to the last bit, in crowds of two and more, where a batch is one bite."
    given = dict(debiaser=debiaser, debias_steps=None if debiaser == 'none' else 3)
    row, whole = parameters_of_each(monkeypatch, tmp_path/'a', **given)
    with monkeypatch.context() as m:
        m.setattr(judge, 'crowds', lambda *args: [range(2), range(2, 4)])
        split, parts = parameters_of_each(monkeypatch, tmp_path/'b', **given)
    assert all(torch.equal(a, b) for a,b in zip(whole, parts)) and len(whole) == len(parts) > 5
    assert split['accuracy'] == row['accuracy'] and split['crowds'] == [2, 2] and 'crowds' not in row
    assert split.get('best_on_validation') == row.get('best_on_validation') and len({o.sum().item() for o in whole[0]}) == 4

def test_a_small_card_holds_fewer_networks(tmp_path, monkeypatch):
    "What two networks keep, times three, is the memory of the card."
    row, whole = parameters_of_each(monkeypatch, tmp_path/'a')
    pair = judge.evaluation_networks(run(**FOUR), torch.empty(1, 3, 28, 28), 10, numbers=range(2))
    for share,crowds in ((1, [2, 2]), (.3, [2, 2]), (2.1, None)):
        with simulated(memory=int(share*judge.SHARE*kept_bytes(pair, 8, 28))+99):
            on_card, parts = parameters_of_each(monkeypatch, tmp_path/str(share), 'cuda')
        assert on_card.get('crowds') == crowds and on_card['accuracy'] == row['accuracy']
        assert all(torch.equal(a, b) for a,b in zip(whole, parts))

def test_what_a_step_keeps_is_what_is_counted():
    "The simulated GPU's live bytes between forwards and backwards, and at most."
    with simulated() as g:
        net, n = network_for(torch.zeros(1, 3, 28, 28, device='cuda').byte(), 16, 10, 3), 64
        x, y, w = torch.rand(n, 3, 28, 28).cuda(), torch.zeros(n).long().cuda(), torch.ones(n).cuda()
        counted = kept_bytes(net, n, 28)
        before = g.now
        g.reset()
        loss = batch_loss(net, channels_last(x), y, w)
        kept = g.now-before
        loss.backward()
    assert abs(kept-counted) < .05*counted and kept < g.peak-before < judge.SHARE*counted

# -- which device

def test_the_second_of_two_gpus_and_no_other(tmp_path):
    with simulated('cuda:1') as g: finish(Experiment(run(), out_dir=tmp_path, device='cuda:1'))
    assert g.named == {'cuda:1'} and set(g.asked) == {'cuda:1'} and len(g.asked) > 9

def test_a_run_on_the_cpu_asks_no_gpu(tmp_path, monkeypatch):
    "Where there is one, too: it may be another job's."
    def opened(*args): raise AssertionError('a CUDA context was opened')
    with simulated() as g:
        monkeypatch.setattr(torch.cuda, '_lazy_init', opened)
        row, = finish(Experiment(run(), out_dir=tmp_path, device='cpu'))
    assert g.ops.total() == len(g.asked) == 0 and row['how'].startswith('cpu') and 'host_memory_mb' not in row

def test_a_run_that_a_gpu_finished_is_finished(tmp_path, monkeypatch):
    "Its row, its images, its embedding; nothing is computed again, and nothing is written."
    runs = [run(weighting=o) for o in ('uniform','kde')]
    def shown(e):
        e.look()
        e.weigh()
        return [x.cpu() for x in e.distill().values()], e.judge(), e.views[e.run].cpu()
    with simulated(): made = shown(Experiment(runs, out_dir=tmp_path, device='cuda'))
    def files(): return {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.is_file() and p.suffix != '.lock'}
    there = files()
    for name in ('start', 'evaluate'): monkeypatch.setattr(f'bias_distill.experiment.experiment.{name}', None)
    again = shown(Experiment(runs, out_dir=tmp_path, device='cpu'))
    assert again[1] == made[1] and again[1][0]['how'].startswith('cuda') and torch.equal(again[2], made[2])
    assert all(torch.equal(a, b) for a,b in zip(again[0], made[0]))
    assert files() == there

def test_exact_means_float32_on_a_gpu():
    def tf32(x): return torch.backends.cudnn.allow_tf32
    with simulated(), torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        x = torch.ones(2, device='cuda')
        assert [compiled(tf32, False, exact)(x) for exact in (False, True)] == [True, False]

@pytest.mark.parametrize('op', ['scale', 'rotate'])
def test_a_warp_on_a_gpu_is_a_product_where_its_gradient_counts(op):
    "`grid_sample` backwards has no form on CUDA that gives the same bits twice; the simulated device refuses it."
    x, params = torch.rand(3, 3, 28, 28), dict(op=op, sx=torch.tensor([.9,1.,1.1]), sy=torch.tensor([1.1,.9,1.]), angle=torch.tensor([-9.,4,12]))
    plain = x.clone().requires_grad_()
    augment(plain, params).pow(2).sum().backward()
    with simulated() as g, repeatable(torch.device('cuda')):
        refused(lambda: torch.nn.functional.grid_sample(x.cuda().requires_grad_(), torch.zeros(3,4,4,2).cuda(), align_corners=False).sum().backward(), 'deterministic')
        here = x.cuda().requires_grad_()
        out = augment(here, params)
        out.pow(2).sum().backward()
        assert (here.grad.cpu()-plain.grad).abs().max() < 1e-4 and (out.cpu()-augment(x, params)).abs().max() < 1e-5
        g.reset()
        augment(x.cuda(), params)
    assert g.ops['grid_sampler_2d'] == 1      # without a gradient it is the quicker one

@pytest.mark.parametrize('kind', KINDS)
def test_audit(kind, tmp_path):
    s = few_digits(.1).train
    s = s[s.y < 2]
    write_images(tmp_path/'in', s.x, s.y, ('zero','one'))
    d = folder(tmp_path/'in', size=28)
    seen = looked(raw_files(tmp_path/'in'), colours, file_facts, fingerprint)
    with simulated(kind) as g: a = audit(d, seen, device=kind)
    b = audit(d, seen, device='cpu')
    assert g.ops.total() > 100 and (a.z-b.z).abs().max() < 1e-2 and list(a.verdict.table.verdict) == list(b.verdict.table.verdict)

# -- what a step costs the host

TRAJECTORY = dict(experts=1, expert_epochs=2, latest_start=1, epoch_steps=2)
STEPS = { # weightings side by side; how; operations of a step, at most: a GPU starts them one by one
    'dm, uniform': ('uniform', dict(), 110),
    'dm, uniform and kde': ('uniform and kde', dict(), 200),
    'dm, every way to weigh': ('kde and kde_draw and oracle_draw and fairdd and kde_rare', dict(), 410),
    'dm, augmented mosaics': ('uniform and kde', dict(augment='color_crop_cutout_scale_rotate', factor=2), 300),
    'dsa': ('uniform and kde', dict(distiller='dsa', augment='color_crop_cutout_scale_rotate', outer_steps=4, inner_epochs=2), 1300),
    'mtt': ('uniform and kde', dict(distiller='mtt', augment='color_crop_cutout_scale_rotate', **TRAJECTORY), 3300),
    'pool': ('uniform and kde_draw', dict(distiller='pool', augment='color_crop_cutout_scale_rotate', factor=2, experts=1, epoch_steps=2), 520)}

@pytest.fixture
def at_once(monkeypatch):
    "Draws made in this thread, where the simulated GPU sees what they touch."
    monkeypatch.setattr('bias_distill.networks.advance.prefetched', lambda items, ahead: iter(items))

def begun(runs, out_dir):
    "A distillation after its first step: its steps, and the state that they share."
    e = Experiment(runs, out_dir=out_dir, device='cuda')
    e.look()
    e.weigh()
    states = {r: e._state(r) for r in e.runs}
    joint = joined([*states.values()])
    steps = e._steps(e.runs, joint, states)
    next(steps)
    return steps, joint

@pytest.mark.parametrize('name', STEPS)
def test_a_step_makes_two_copies_and_waits_for_nothing(name, tmp_path, at_once):
    "One copy to the GPU for the whole numbers that were drawn, one for the others; none back."
    weightings, given, most = STEPS[name]
    with simulated() as g:
        steps, _ = begun([run(weighting=o, iterations=4, **given) for o in weightings.split(' and ')], tmp_path)
        g.reset()
        for _ in range(2): next(steps)
    assert sum(n for (way,_),n in g.moves.items() if way == 'to') <= 2*2, g.moves
    assert not g.syncs and not any(way == 'from' for way,_ in g.moves), (g.syncs, g.moves)
    assert 100 < g.ops.total()/2 <= most

def test_what_is_in_doubt_is_read_in_one_wait_every_fifty_steps(tmp_path, at_once):
    with simulated() as g:
        steps, joint = begun([run(weighting=o, iterations=103, batch_real=2, width=2) for o in ('uniform','kde')], tmp_path)
        g.reset()
        known = [len(joint['loss']['kde']) for _ in steps]
    assert g.syncs.total() == 3 and joint['t'] == 103 and 'unsure' not in joint # after 50, 100, and at the end
    assert known == [0]*48 + [50]*50 + [100]*4 and len(joint['loss']['uniform']) == 103

@pytest.mark.parametrize('distiller,bad,says', [
    ('dsa', dict(lr_net=1e38, augment='crop', **TRAINED_DC), r"the loss of 'uniform' is nan at step 1: lower lr_img .* or lr_net"),
    ('dsa', dict(lr_net=1e38, augment='crop', **TRAINED_DC | dict(inner_epochs=3)), r"after step 0, the network trained on 'uniform' is not finite: lower lr_net"),
    ('mtt', dict(lr_lr=1e38, augment='crop', student_steps=1, **TRAJECTORY), r"'uniform' is (nan|not finite).*lr_lr")])
def test_divergence_on_a_gpu_is_said_as_on_a_cpu(distiller, bad, says, tmp_path):
    "The same words, the same step; what is kept is what was last looked at, and it is good."
    said, kept = {}, {}
    for device in ('cpu', 'cuda'):
        with simulated(), pytest.raises(FloatingPointError, match=says) as stopped:
            finish(Experiment(run(distiller=distiller, weighting='uniform', **dict(iterations=9) | bad), out_dir=tmp_path/device, device=device))
        said[device] = str(stopped.value).split('. The images')[0]
        kept[device], = (load_tensors(p) for p in (tmp_path/device/'stages').glob('distill-*'))
        tensors, meta = kept[device]
        assert tensors['x'].isfinite().all() and f"after {meta['t']} good steps" in str(stopped.value) and len(meta['loss']) == meta['t']
    assert said['cuda'] == said['cpu'] and kept['cuda'][1]['t'] == 0 <= kept['cpu'][1]['t']

@pytest.mark.parametrize('save_every,kept', [(0., 3), (3600., 0)])
def test_nothing_is_kept_that_was_not_looked_at(save_every, kept, tmp_path, monkeypatch):
    "Each checkpoint is read first, however far the next look is: what went wrong before it is not kept."
    monkeypatch.setattr('bias_distill.distill.images.LOOK', 10**6)
    calls, good = [], dm.dm_gradients
    def breaks(*args):
        calls.append(args)
        loss, grad = good(*args)
        return (loss*float('nan'), grad*float('nan')) if len(calls) == 4 else (loss, grad)
    monkeypatch.setattr(dm, 'dm_gradients', breaks)
    with simulated(), pytest.raises(FloatingPointError, match=f"'uniform' is nan at step 3.*after {kept} good steps"):
        finish(Experiment(run(weighting='uniform', iterations=9), out_dir=tmp_path, device='cuda'), save_every)
    (tensors, meta), = (load_tensors(p) for p in (tmp_path/'stages').glob('distill-*'))
    assert tensors['x'].isfinite().all() and meta['t'] == len(meta['loss']) == kept

def test_draws_ahead_are_the_draws(tmp_path, at_once):
    "With a thread that draws ahead (as in the tests above) and without: the same images, to the bit."
    given = [run(**o) for o in CASES['dm'][1:3]]
    with simulated(): finish(Experiment(given, out_dir=tmp_path/'plain', device='cuda'))
    with simulated(), pytest.MonkeyPatch.context() as m:
        m.setattr('bias_distill.networks.advance.prefetched', prefetched)
        finish(Experiment(given, out_dir=tmp_path/'ahead', device='cuda'))
    a, b = (images(tmp_path/o) for o in ('plain','ahead'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
