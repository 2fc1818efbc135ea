"A distilled set as a dataset for the Hugging Face hub: who gets the folder gets the images, our number and the terms."
import io, json, os, re, signal, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import numpy as np, pyarrow.parquet, pytest, torch, yaml
from PIL import Image
from conftest import LIMIT
from bias_distill.data.kept import load_tensors
from bias_distill.data.names import seeded
from bias_distill.experiment.experiment import Experiment
from bias_distill.experiment.judge import evaluate
from bias_distill.experiment.settings import complete
from bias_distill.experiment.tables import DATASETS
from bias_distill.experiment.watch import read_row
from bias_distill.results.card import HOME, LICENCES, ORIGINS, PAPER, export_card, origins

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(profile='smoke', ipc=2)

pytestmark = pytest.mark.usefixtures('small_data')

def job(out, data_dir=None, **settings):
    "A finished experiment, and its row."
    e = Experiment(complete(**(SMALL | settings)), data_dir, out_dir=str(out))
    e.look(); e.weigh(); e.distill()
    return e, e.judge()[0]

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Two seeds, and one whose images hold four each, in one folder of runs."
    out = tmp_path_factory.mktemp('card')/'runs'
    before = os.environ.pop('BIAS_DISTILL_DATA', None)
    found = {k: job(out, **o) for k,o in dict(first={}, second=dict(seed=1), tiled=dict(factor=2, weighting='uniform')).items()}
    if before is not None: os.environ['BIAS_DISTILL_DATA'] = before
    return out, found

def head_and_body(folder):
    _, head, body = (folder/'README.md').read_text(encoding='utf-8').split('---\n', 2)
    return yaml.safe_load(head), body

def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file())

# -- who opens it

READ = '''
import json, sys
from datasets import get_dataset_config_names, load_dataset
folder, cache = sys.argv[1:]
found = {}
for name in get_dataset_config_names(folder):
    d = load_dataset(folder, name, cache_dir=cache)
    found[name] = dict(splits=list(d), labels=list(d['train']['label']), names=d['train'].features['label'].names,
                       pixels=[sum(o.convert('RGB').tobytes()) for o in d['train']['image']], mode=d['train'][0]['image'].mode)
found['first'] = list(load_dataset(folder, cache_dir=cache)['train']['label'])[:3]
print(json.dumps(found))
'''

def in_python(tmp, code, *args):
    "What code prints as JSON, with the library `datasets` and without a network."
    pytest.importorskip('datasets', reason="the library datasets is not installed: pip install -e '.[dev]'")
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', HF_HOME=str(tmp/'home'), HF_HUB_DISABLE_TELEMETRY='1')
    p = subprocess.run([sys.executable,'-c',code,*args], env=env, capture_output=True, text=True, timeout=LIMIT)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(p.stdout.splitlines()[-1])

def opened(folder, tmp):
    "What the library `datasets` finds in a folder."
    return in_python(tmp, READ, str(folder), str(tmp/'cache'))

LOOK_AT = '''
import json, sys
code, folder = sys.argv[1:]
assert code.count('path/to/this/folder') == 1
exec(code.replace('path/to/this/folder', folder), seen := {})
images = seen['images']
print(json.dumps(dict(labels=list(images['label']), pixels=[sum(o.convert('RGB').tobytes()) for o in images['image']])))
'''

def looked_at(folder, tmp):
    "What the card's own first lines read, with the folder's path in the place of their placeholder."
    return in_python(tmp, LOOK_AT, head_and_body(folder)[1].split('```python\n')[1].split('```')[0], folder.as_posix())

def sums(x): return [int(o.sum()) for o in (x*255).round().long()]

def test_the_library_datasets_opens_it(finished, tmp_path):
    out, found = finished
    rows = [found[k][1] for k in ('second','first')]
    seen = opened(export_card(rows, tmp_path/'set', out), tmp_path)
    assert list(seen) == ['seed0','seed1','first'] and seen['first'] == [0,0,1]
    for r in rows:
        x, part = load_tensors(out/f"{r['key']}.safetensors")[0]['x'], seen[f"seed{r['seed']}"]
        assert part['splits'] == ['train'] and part['mode'] == 'RGB' and part['names'] == [str(o) for o in range(10)]
        assert part['labels'] == [c for c in range(10) for _ in range(2)] and part['pixels'] == sums(x)

def test_one_run_is_one_config(finished, tmp_path):
    out, found = finished
    folder = export_card(out/f"{found['first'][1]['key']}.json", tmp_path/'set')
    assert list(opened(folder, tmp_path)) == ['default','first']
    head, body = head_and_body(folder)
    assert [o['config_name'] for o in head['configs']] == ['default'] and "load_dataset('path/to/this/folder', split='train')" in body

@pytest.mark.parametrize('which', [['first'], ['second','first']])
def test_the_lines_of_the_card_run_as_they_stand(finished, tmp_path, which):
    "Of two seeds they name the first."
    out, found = finished
    folder = export_card([found[k][1] for k in which], tmp_path/'set', out)
    x, seen = load_tensors(out/f"{found['first'][1]['key']}.safetensors")[0]['x'], looked_at(folder, tmp_path)
    assert seen['labels'] == [c for c in range(10) for _ in range(2)] and seen['pixels'] == sums(x)
    assert ("'seed0'" in head_and_body(folder)[1]) == (len(which) == 2)

def test_the_hub_takes_the_head(finished, tmp_path):
    hub = pytest.importorskip('huggingface_hub', reason="huggingface_hub is not installed: pip install -e '.[dev]'")
    out, found = finished
    card = hub.DatasetCard.load(export_card(found['first'][1], tmp_path/'set', out)/'README.md')
    assert card.data.license == 'cc-by-sa-3.0' and card.data.size_categories == ['n<1K'] and card.data.task_categories == ['image-classification']
    assert 'SMOKE' not in card.data.pretty_name and 'A smoke run' in card.text and not set(card.data.to_dict()) - {
        'pretty_name','license','task_categories','size_categories','tags','configs'}

def test_pandas_and_pyarrow_open_it(finished, tmp_path):
    out, found = finished
    folder = export_card(found['first'][1], tmp_path/'set', out)
    t = pyarrow.parquet.read_table(folder/'data'/'train.parquet')
    x = load_tensors(folder/f"{found['first'][1]['key']}.safetensors")[0]['x']
    for o,want in zip(t['image'].to_pylist(), x):
        pixels = np.array(Image.open(io.BytesIO(o['bytes'])))
        assert pixels.shape == (28,28,3) and np.abs(pixels/255-want.permute(1,2,0).numpy()).max() <= .5/255+1e-6

def test_the_same_run_makes_the_same_bytes(finished, tmp_path):
    out, found = finished
    a, b = (export_card(found['first'][1], tmp_path/o, out) for o in 'ab')
    assert names(a) == names(b) and all((a/o).read_bytes() == (b/o).read_bytes() for o in names(a))

# -- our number

@pytest.mark.parametrize('which,apart', [('first', 0), ('second', 0), ('tiled', 1)])
def test_who_has_only_the_folder_gets_our_number(finished, tmp_path, which, apart):
    "The code as the card prints it, then networks that are trained on the floats. With tiles the code rounds otherwise, by 1e-5."
    out, found = finished
    e, row = found[which]
    folder = export_card(row, tmp_path/'set', out)
    file = f"{row['key']}.safetensors"
    code = head_and_body(folder)[1].split('```python\n')[2].split('```')[0]
    assert code.count(file) == 1
    seen = {}; exec(code.replace(file, str(folder/file)), seen)
    mean, std = (torch.tensor(row['inputs'][k]).view(3,1,1) for k in ('mean','std'))
    assert torch.allclose(seen['x'], (e.synthetic[e.run].flatten(0,1)-mean)/std, atol=1e-4 if apart else 0, rtol=0)
    again = evaluate(seen['x']*std+mean if apart else load_tensors(folder/file)[0]['x'], seen['y'], e.run, e.train, e.test, 10, False)
    assert all(abs(a-b) <= apart for a,b in zip(again['accuracy'], row['accuracy'])), (again['accuracy'], row['accuracy'])
    for i,v in enumerate(row['accuracy']): assert f"| seed {row['seed']}, network {i+1} | {v:.1f} |" in head_and_body(folder)[1]

def test_no_number_that_was_not_measured(finished, tmp_path):
    "Every accuracy in the card's table is one of the rows', or what follows from them."
    out, found = finished
    rows = [found[k][1] for k in ('first','second')]
    body = head_and_body(export_card(rows, tmp_path/'set', out))[1]
    lines = [o for o in body.splitlines() if o.startswith('| seed ') and ', network ' in o]
    assert len(lines) == sum(len(r['accuracy']) for r in rows)
    means = [np.mean(r['accuracy']) for r in rows]
    assert f'| mean ± standard deviation | {np.mean(means):.1f} ± {np.std(means, ddof=1):.1f} (2 seeds) |' in body

# -- whose images

def test_the_sources_of_all_our_rows_are_known():
    rows = [read_row(p) for p in sorted((ROOT/'paper_figures'/'rows').glob('*.json'))]
    assert len(rows) > 100
    for dataset,source in {(r['dataset'], r['source']) for r in rows if not DATASETS[r['dataset']].own}:
        found = origins(dict(dataset=dataset, source=source))
        assert len(found) == 1+(dataset=='bg_fmnist') and set(found) <= set(ORIGINS), (dataset, source)

def test_every_dataset_has_a_line():
    "What each loader calls its source, in its own code."
    text = ''.join((ROOT/'bias_distill'/'data'/f'{o}.py').read_text() for o in ('cmnist','bg_fmnist','corrupted_cifar10','faces','utkface_race','celeba'))
    said = set(re.findall(r'f?"(MNIST|Fashion-MNIST|CIFAR-10|UTKFace|BFFHQ|CelebA|10 photos)\b[^"]*"', text)) | {'MiniPlaces','Places365'}
    assert said == {o.name for o in ORIGINS}

def test_terms_that_are_no_licence_of_the_hub_get_a_file(finished, tmp_path):
    out, found = finished
    folder = export_card(found['first'][1], tmp_path/'set', out, licence='other')
    head, body = head_and_body(folder)
    assert head['license'] == 'other' and head['license_name'] and head['license_link'] == 'LICENSE.md'
    assert (folder/'LICENSE.md').read_text().strip() in body

def test_the_card_names_this_project():
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    assert HOME == cfg['DEFAULT']['git_url']
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    paper = next(r for r in cff['references'] if r['type'] == 'conference-paper')
    assert all(f"{a['family-names']}, {a['given-names']}" in PAPER for a in paper['authors']) and paper['title'] in PAPER and str(paper['year']) in PAPER

ODD = ('a|b','$x_1$','*star*',"it's {fine}: #1")

@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    "A run on somebody's own pictures, whose classes have names that mean something to YAML, Markdown and format strings."
    top = tmp_path_factory.mktemp('own')
    for k,name in enumerate(ODD):
        (top/'pictures'/name).mkdir(parents=True)
        for i in range(12):
            x = torch.randint(0, 256, (28,28,3), generator=seeded('card',k,i)).byte().numpy()
            Image.fromarray(x).save(top/'pictures'/name/f'{i}.png')
    before = os.environ.pop('BIAS_DISTILL_DATA', None)
    made = job(top/'runs', str(top/'pictures'), dataset='folder', size=28)
    if before is not None: os.environ['BIAS_DISTILL_DATA'] = before
    return top, made[1]

def test_ones_own_pictures(mine, tmp_path):
    top, row = mine
    with pytest.raises(ValueError, match="licence=None: the images of dataset='folder' are your own"): export_card(row, tmp_path/'set', top/'runs')
    assert not list(tmp_path.iterdir())
    folder = export_card(row, tmp_path/'set', top/'runs', licence='cc-by-4.0', origin='[my garden](https://example.com), 2024')
    head, body = head_and_body(folder)
    assert head['license'] == 'cc-by-4.0' and '[my garden](https://example.com), 2024' in body and str(top) not in body
    assert opened(folder, tmp_path)['default']['names'] == sorted(ODD)
    piped = export_card(row, tmp_path/'piped', top/'runs', licence='mit', origin='garden | park')
    assert r'| own images | `mit` | garden \| park |' in head_and_body(piped)[1]
    assert 'against the bias' not in body and 'conflicting' not in body

# -- what is refused, before anything is written

def bad(finished, tmp_path):
    out, found = finished
    row = found['first'][1]
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'theirs.txt').write_text('keep')
    (tmp_path/'file').write_text('keep'); (tmp_path/'alone').mkdir()
    (tmp_path/'alone'/f"{row['key']}.json").write_text((out/f"{row['key']}.json").read_text())
    key = row['key']
    return {
        'no row': lambda: export_card(out/'cmnist-nothing', tmp_path/'new'),
        'did you mean': lambda: export_card(str(out/key)[:-1], tmp_path/'new'),
        'expected a row, or the path of its file': lambda: export_card(7, tmp_path/'new'),
        'are not beside it. This command makes both: papermill': lambda: export_card(tmp_path/'alone'/key, tmp_path/'new'),
        'a folder that is not empty': lambda: export_card(row, tmp_path/'full', out),
        'is a file': lambda: export_card(row, tmp_path/'file', out),
        "can't be made": lambda: export_card(row, tmp_path/'file'/'below', out),
        "folder=''": lambda: export_card(row, '', out),
        'expected a row, or several': lambda: export_card([], tmp_path/'new', out),
        'one row a seed': lambda: export_card([row, row], tmp_path/'new', out),
        "weighting is 'kde' and 'uniform'": lambda: export_card([row, found['tiled'][1]], tmp_path/'new', out),
        "did you mean 'mit'": lambda: export_card(row, tmp_path/'new', out, licence='MIT '.lower()),
        'has its own source': lambda: export_card(row, tmp_path/'new', out, origin='mine')}

def test_bad_input_writes_nothing(finished, tmp_path):
    wrong = bad(finished, tmp_path)
    before = names(tmp_path)
    for words,call in wrong.items():
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=re.escape(words)): call()
    assert names(tmp_path) == before and not (tmp_path/'new').exists()

def test_damaged_images_are_refused(finished, tmp_path):
    out, found = finished
    key = found['first'][1]['key']
    for kind in ('json','safetensors'): (tmp_path/f'{key}.{kind}').write_bytes((out/f'{key}.{kind}').read_bytes())
    raw = bytearray((tmp_path/f'{key}.safetensors').read_bytes()); raw[-5] ^= 1
    (tmp_path/f'{key}.safetensors').write_bytes(raw)
    with pytest.raises(ValueError, match='is damaged'): export_card(tmp_path/key, tmp_path/'new')
    assert not (tmp_path/'new').exists()

KILLED = '''
import os, signal, sys
from pyarrow import parquet
from bias_distill.results.card import export_card
def die(*args): os.kill(os.getpid(), signal.SIGKILL)
row, folder, last = sys.argv[1:]
if last=='card':
    import bias_distill.results.card as card
    card.card_text = die
else: parquet.write_table = die
export_card(row, folder)
'''

@pytest.mark.parametrize('last', ['images','card'])
def test_a_kill_leaves_no_half_of_it(finished, tmp_path, last):
    "The folder is not there after a kill -9; and the same call then makes it."
    out, found = finished
    row = str(out/found['first'][1]['key'])
    p = subprocess.run([sys.executable,'-c',KILLED,row,str(tmp_path/'set'),last], cwd=ROOT, capture_output=True, timeout=LIMIT)
    assert p.returncode == -signal.SIGKILL and not (tmp_path/'set').exists()
    assert 'README.md' in names(export_card(row, tmp_path/'set'))

def test_licences_are_names_that_the_hub_has(): assert len(set(LICENCES)) == len(LICENCES) > 60 and all(re.fullmatch(r'[a-z0-9+.-]+', o) for o in LICENCES)
