"Debiasers and views through the main job: what they train on, what they report, and that neither sees a bias label."
import functools
from dataclasses import replace
import pytest, torch
from safetensors.torch import load_file
from bias_distill.experiment import experiment
from bias_distill.data.split import Split
from bias_distill.data.names import seeded
from bias_distill.experiment.tables import DEBIASERS, WEIGHTINGS
from bias_distill.experiment.settings import complete
from bias_distill.experiment.judge import held_out
from bias_distill.experiment.tables import VIEWS
from notebooks import execute, texts
from test_run import finish, job, results

pytestmark = pytest.mark.usefixtures('small_data')

SMOKE = dict(profile='smoke', ipc=2)
TIMES = ('seconds','memory_mb','peak_memory_mb','made')
def told(rows): return [{k: v for k,v in r.items() if k not in TIMES} for r in rows]

@pytest.mark.parametrize('name', ['selecmix','dfa'])
def test_debiaser_after_distillation(name, tmp_path):
    "The images are those of the plain run; only what is trained on them differs. Killed before the evaluation and resumed, the rows are the same."
    plain = finish(job(complete(**SMOKE), out_dir=str(tmp_path/'a')))
    rows = finish(job(complete(**SMOKE, debiaser=name), out_dir=str(tmp_path/'a')))
    for a,b in zip(plain, rows):
        assert a['key'] != b['key'] and b['debiaser'] == name and f'-p debiaser {name}' in b['command'] and 'debiaser' not in a['command']
        assert torch.equal(*(load_file(tmp_path/'a'/f"{r['key']}.safetensors")['x'] for r in (a, b)))
        best = b['best_on_validation']; assert {len(best[k]) for k in ('accuracy','aligned','conflicting','step','validation')} == {2} and all(1 <= t <= b['debias_steps'] for t in best['step'])
        assert 'best_on_validation' not in a and a['debias_steps'] is None
    e = job(complete(**SMOKE, debiaser=name), out_dir=str(tmp_path/'b')); e.look(); e.weigh(); e.distill()     # killed here
    assert told(finish(job(complete(**SMOKE, debiaser=name), out_dir=str(tmp_path/'b')))) == told(rows)
    more = finish(job(complete(**SMOKE, debiaser=name, debias_steps=9), out_dir=str(tmp_path/'a')))
    assert more[0]['key'] != rows[0]['key'] and more[0]['accuracy'] != rows[0]['accuracy']

@pytest.mark.parametrize('network,debiaser', [(None,'none'),(None,'erm'),(None,'selecmix'),(None,'dfa'),('mlp','none'),('mlp255','erm'),('mlp','selecmix'),('mlp255','selecmix'),('mlp255','dfa')])
def test_the_training_set_itself(network, debiaser, tmp_path, monkeypatch):
    "Without distillation: nothing held out is trained on, no images are stored, and asking again computes nothing."
    seen = []
    if debiaser != 'none':
        judge = DEBIASERS[debiaser]
        def watched(new, x, *a, **kw):
            seen.append(len(x))
            return judge.train(new, x, *a, **kw)
        monkeypatch.setitem(DEBIASERS, debiaser, replace(judge, train=watched))
    run = complete(profile='smoke', distiller='none', weighting='uniform', debiaser=debiaser, network=network)
    e = job(run, out_dir=str(tmp_path)); row, = finish(e)
    assert row['ipc'] == 0 and row['n_train'] == len(e.train) and row['loss'] == [] and e.done(run)
    assert [p.suffix for p in tmp_path.iterdir() if p.is_file()] == ['.json']
    if seen: assert seen == [len(e.train)-row['best_on_validation']['images']] and row['best_on_validation']['images'] >= 100
    monkeypatch.setattr(experiment, 'evaluate', None)
    assert finish(job(run, out_dir=str(tmp_path))) == [row]

def test_held_out_is_a_part_of_every_class():
    data = Split(torch.zeros(1030,3,8,8,dtype=torch.uint8), torch.cat([torch.zeros(1000), torch.ones(30)]).long())
    i = held_out(data, 2, 0); assert len(i.unique()) == len(i) and data.y[i].bincount().tolist() == [100,3]
    assert not torch.equal(i, held_out(data, 2, 1)) and torch.equal(i, held_out(data, 2, 0))

@pytest.fixture
def few_marks(monkeypatch): monkeypatch.setattr('bias_distill.weights.choice.STEPS', (2,4)) # where the encoder is looked at

def test_no_view_and_no_weighting_sees_a_bias_label(tmp_path, few_marks):
    "All that is not named an oracle gives the same on a set whose bias labels are gone to pieces."
    run, found = complete(**SMOKE, weighting='gap_draw'), []
    for shuffled in (False, True):
        e = job(run, out_dir=str(tmp_path/str(shuffled)), compare=','.join(k for k,w in WEIGHTINGS.items() if not w.sees_labels))
        e.train = e.train[torch.randperm(len(e.train), generator=seeded(0))[:1500]]                    # of 4,000: it is said sooner
        if shuffled: e.train = Split(e.train.x, e.train.y, e.train.b[torch.randperm(len(e.train), generator=seeded(1))])
        e.look()
        found.append({r.weighting: w for r,w in e.weigh().items()})
    i = torch.arange(40).view(10,4)
    for k,a in found[0].items():
        b = found[1][k]; assert (a.p is None) == (b.p is None) and (a.p is None or torch.equal(a.p, b.p))
        if a.in_batch: assert torch.equal(a.in_batch(i), b.in_batch(i)), k

def test_every_weighting_says_what_it_looks_at():
    for k,w in WEIGHTINGS.items():
        assert (w.view is None) == (k == 'uniform' or w.sees_labels)
        assert all(o in VIEWS for o in w.views)
    uses = {k: w.uses for k,w in WEIGHTINGS.items()}
    assert uses['uniform'] == () and uses['fairdd'] == ('labels_known','labels_wrong') and uses['gap_draw'] == ('encoder_tau','encoder_width') and uses['lff'] == ('encoder_steps','encoder_width')

def test_views_are_kept_and_shared(tmp_path, monkeypatch, few_marks):
    "A view is computed once for all weightings that look at it, also in a later run; what was chosen stands in the row."
    first = finish(job(complete(**SMOKE, weighting='gap'), out_dir=str(tmp_path)))
    def no(*args, **kw): raise AssertionError('computed again')
    for k,v in list(VIEWS.items()): monkeypatch.setitem(VIEWS, k, replace(v, see=functools.wraps(v.see)(lambda *args, **kw: no())))
    row = finish(job(complete(**SMOKE, weighting='gap_draw'), out_dir=str(tmp_path)))[-1]
    assert row['chosen'] == first[-1]['chosen'] and row['chosen']['steps'] in (2,4) and row['init'] == 'weighted'
    assert list(row['seconds']) == ['data','chosen','kde','distill','evaluate'] and len(list(tmp_path.glob('stages/chosen-*'))) == 1

@pytest.mark.parametrize('bad,words', [
    (dict(debiaser='selectmix'), ["unknown debiaser 'selectmix'", "did you mean 'selecmix'?", 'none, erm, selecmix, dfa']),
    (dict(debias_steps=0, debiaser='dfa'), ['debias_steps=0', 'at least 1']), (dict(debias_lr=-1., debiaser='dfa'), ['debias_lr=-1.0', 'above 0']),
    (dict(debias_lr=.1), ['debias_lr=0.1', 'selecmix or dfa', "debiaser='none'"]), (dict(network='resnet'), ["unknown network 'resnet'", 'convnet, mlp']),
    (dict(distiller='none'), ["weighting='kde'", "distiller='none'", 'uniform']), (dict(distiller='none', weighting='uniform', iterations=3), ['iterations=3', 'takes no steps']),
    (dict(weighting='knnn'), ["did you mean 'knn'?"]), (dict(weighting='fairdd', dataset='folder'), ['folder has no bias labels'])])
def test_refused(bad, words):
    with pytest.raises(ValueError) as e: complete(**bad)
    assert all(w in str(e.value) for w in words), str(e.value)

@pytest.mark.parametrize('given,n,word', [
    (dict(ipc=2, weighting='gap_draw', debiaser='selecmix', compare='uniform,jtt'), 3, 'gap in the draw (ours), then SelecMix'),
    (dict(ipc=2, weighting='group_draw', compare='gap_draw'), 2, 'gap and guess in the draw (ours)'),
    (dict(distiller='none', weighting='uniform', network='mlp', debiaser='dfa'), 1, 'the training set, then DFA')])
def test_the_main_job(given, n, word, tmp_path):
    given = dict(profile='smoke', out_dir=tmp_path/'runs') | given
    nb = execute('nbs/run.ipynb', **given)
    assert len(results(tmp_path/'runs')[0]) == n and word in '\n'.join(texts(nb))
