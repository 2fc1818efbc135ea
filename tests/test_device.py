"""The main job on a GPU, as far as a machine without one can check: on the simulated device of `device_sim`, under CUDA's rules
and under MPS's. Where tensors are, what a GPU can compute, which device is asked, what a finished row means elsewhere."""
import copy, json, warnings
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
from bias_distill.experiment.experiment import Experiment
from bias_distill.experiment.settings import complete
from bias_distill.experiment.tables import DATASETS, DISTILLERS, WEIGHTINGS, Dataset
from bias_distill.networks.augment import augment
from bias_distill.networks.device import repeatable
from bias_distill.networks.fast import compiled
from device_sim import simulated

KINDS = ('cuda', 'mps')

def few_digits(conflict=.3, seed=0, data_dir=None, split='test'):
    "400 digits to train with, 100 to judge: of each class and bias some."
    d = cmnist(conflict=conflict, seed=seed, split=split)
    return replace(d, name='few', train=d.train[torch.arange(400)], test=d.test[torch.arange(0, len(d.test), len(d.test)//100)[:100]])

@pytest.fixture(autouse=True)
def small(monkeypatch):
    "A small set by name; the cases of a test are otherwise the smoke profile's."
    monkeypatch.delenv('BIAS_DISTILL_DATA', raising=False)
    monkeypatch.setitem(DATASETS, 'few', Dataset(few_digits, .3))
    warnings.filterwarnings('ignore', message='no Triton')

def run(**given): return complete(**dict(dataset='few', profile='smoke', ipc=2, eval_epochs=2) | given)

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
    with simulated() as g, repeatable(torch.device('cuda')):
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
    'dm': [dict(weighting=o) for o in ('uniform','kde','gap_draw','oracle_draw','fairdd')],
    'dc': [dict(distiller='dc', weighting='uniform', **TRAINED_DC)],
    'dsa': [dict(distiller='dsa', augment='scale_rotate', **TRAINED_DC)],
    'mtt': [dict(distiller='mtt', augment='scale_rotate', experts=1, expert_epochs=2, latest_start=1, iterations=2)],
    'random': [dict(distiller='random', weighting='oracle_draw', eval_augment='color_crop_cutout_flip_scale_rotate')],
    'kmeans': [dict(distiller='kmeans', weighting=o) for o in ('uniform','kde_draw')]}
JUDGES = {
    'erm': dict(debiaser='erm'), 'selecmix': dict(debiaser='selecmix'), 'dfa': dict(debiaser='dfa'),
    'mlp': dict(network='mlp'), 'lenet': dict(network='lenet'),
    'none': dict(distiller='none', network='mlp', ipc=0)}
VIEWED = {o: dict(weighting=o) for o in ('jtt','knn','clusters','kde_pixels','kde_selecmix','lff','dfa')}

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
    finish(Experiment(runs, out_dir=tmp_path/'cpu', device='cpu'))
    for (n,x),(_,y) in zip(images(tmp_path/'a').items(), images(tmp_path/'cpu').items()):
        assert (x-y).abs().max() < 1e-3, (n, (x-y).abs().max())
    if DISTILLERS[runs[0].distiller].steps: killed_and_resumed(runs, kind, tmp_path)

class Killed(Exception): pass

def killed_and_resumed(runs, kind, tmp_path):
    method = DISTILLERS[runs[0].distiller]
    def dies(*args, **kwargs):
        for s in method.steps(*args, **kwargs):
            yield s
            raise Killed
    with simulated(kind), pytest.MonkeyPatch.context() as m:
        m.setitem(DISTILLERS, runs[0].distiller, replace(method, steps=dies))
        with pytest.raises(Killed): finish(Experiment(runs, out_dir=tmp_path/'b', device=kind), save_every=0.)
    half = [p for p in (tmp_path/'b/stages').glob('distill-*')]
    with simulated(kind): finish(Experiment(runs, out_dir=tmp_path/'b', device=kind), save_every=0.)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path/o).glob('*.safetensors')} for o in 'ab')
    assert a == b and len(a) == len(runs) and not half

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', JUDGES)
def test_each_judge(name, kind, tmp_path):
    given = dict(distiller='random', weighting='uniform', debias_steps=2 if JUDGES[name].get('debiaser') else None) | JUDGES[name]
    with simulated(kind): assert finite(finish(Experiment(run(**given), out_dir=tmp_path, device=kind)))
