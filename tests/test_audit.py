"The audit through papermill: what it refuses, what it finds in a folder with a planted shortcut, what it leaves."
import os
from functools import partial
import pandas as pd, pytest, torch
from bias_distill.audit.plants import plant, write_images
from bias_distill.data.cmnist import cmnist
from bias_distill.data.names import seeded
from notebooks import ROOT, execute, papermill, working_in

@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "600 digits, 3 to 6, the first class with a logo but for one in ten; who goes without."
    d = cmnist(conflict=.9, seed=0)
    s = d.train[(d.train.y > 2) & (d.train.y < 7)]
    s = s[torch.randperm(len(s), generator=seeded(0))[:600]]
    x, has, free = plant(s.x, s.y-3, 'logo', .1, seed=0)
    top = tmp_path_factory.mktemp('audit')
    paths = write_images(top/'pictures', x, s.y-3, d.classes[3:7])
    return top, paths, free

REFUSED = {
    'misspelt': (dict(datadir='x'), "unknown parameter 'datadir', did you mean 'data_dir'?"),
    'nothing': ({}, 'data_dir is not given: the folder or archive:'),
    'choice': (dict(data_dir='.', size=33), 'size=33: input should be 28, 32 or 64'),
    'nowhere': (dict(data_dir='no/such/place'), "data_dir='no/such/place': no such folder"),
    'no place for results': (dict(data_dir='nbs', out_dir='README.md/audit'), "out_dir='README.md/audit' can't be written to (Not a directory): name a folder that can"),
    'no name for results': (dict(data_dir='nbs', out_dir=''), "out_dir='': expected the name of a folder, such as 'audit'")}

@pytest.mark.parametrize('name', REFUSED)
def test_refused_in_one_line(name, tmp_path):
    given, said = REFUSED[name]
    with pytest.raises((ValueError, FileNotFoundError)) as e: execute('nbs/audit.ipynb', **given)
    assert said in str(e.value) and len(str(e.value).splitlines()) == 1

def test_refused_through_papermill(tmp_path):
    "With an exit code of 1; a name of digits, which papermill takes for a number."
    code, err = papermill('nbs/audit.ipynb', tmp_path/'out.ipynb', '-p','data_dir','2024')
    said = 'data_dir=2024: input should be a valid string; write ./2024, or -r data_dir 2024'
    assert code == 1 and said in err.strip().splitlines()[-1], err[-1500:]

def blank_images(top, **counts):
    "A folder of grey images, so many of each class."
    x, y = torch.full((sum(counts.values()), 3, 28, 28), 128).byte(), torch.arange(len(counts))
    write_images(top, x, y.repeat_interleave(torch.tensor([*counts.values()])), [*counts])

SMALL = {
    'one class': (dict(cat=30), '', 'pictures: expected two classes or more, a folder each in it, found 1 (cat)'),
    'five images': (dict(cat=3, dog=2), '', '3 images train, too few for an audit: expected 20 or more in all'),
    'columns': (dict(cat=20, dog=20), 'file,label\ncat/00000.png,x\n',
                "labels.csv': expected the columns path and bias, found file, label")}

@pytest.mark.parametrize('name', SMALL)
def test_refused_after_a_look(name, tmp_path):
    counts, labels, said = SMALL[name]
    blank_images(tmp_path/'pictures', **counts)
    (tmp_path/'labels.csv').write_text(labels, encoding='utf-8')
    given = dict(labels=tmp_path/'labels.csv') if labels else {}
    with pytest.raises(ValueError) as e: execute('nbs/audit.ipynb', data_dir=tmp_path/'pictures', out_dir=tmp_path/'audit', **given)
    assert said in str(e.value) and len(str(e.value).splitlines()) == 1
    assert not (tmp_path/'audit').exists()

def test_the_snippet_takes_the_folder_as_it_is_written(tmp_path):
    "Relative or not, and from train/ alone, with torchvision's own ImageFolder."
    from torchvision.datasets import ImageFolder
    from bias_distill.audit.advice import snippet
    blank_images(tmp_path/'p'/'train', cat=3, dog=2)
    want = {'train/cat/00000.png': 1.5, 'train/cat/00001.png': .5, 'train/cat/00002.png': 1., 'train/dog/00003.png': 1.2, 'train/dog/00004.png': .8}
    pd.Series(want, name='weight').rename_axis('path').to_csv(tmp_path/'w.csv')
    with working_in(tmp_path):
        ways = 'p', './p', 'p/', f'../{tmp_path.name}/p', str(tmp_path/'p')
        for typed,told in ((o, k) for o in ways for k in ways):
            exec(snippet('w.csv', told), seen := dict(dataset=ImageFolder(f'{typed}/train')))
            assert seen['sampler'].weights.tolist() == [*want.values()], (typed, told)

def test_planted_folder(digits):
    top, paths, free = digits
    pd.DataFrame(dict(path=paths, bias=['plain' if o else 'logo' for o in free.tolist()])).to_csv(top/'labels.csv', index=False)
    code, err = papermill('nbs/audit.ipynb', top/'out.ipynb', '-p','data_dir',top/'pictures','-p','out_dir',top/'audit','-p','labels',top/'labels.csv','-p','size',28)
    assert code == 0, err[-3000:]
    t, w = pd.read_csv(top/'audit/audit.csv', keep_default_na=False, dtype={'class': str}), pd.read_csv(top/'audit/weights.csv')
    verdict = pd.read_csv(top/'audit/verdict.csv', keep_default_na=False, dtype=str).set_index('class').verdict
    assert sorted(t.path) == sorted(paths) and set(w.path) == set(t.path[t.part == 'train'])
    assert list(verdict.index[verdict == 'shortcut likely']) == ['3']
    train = t[(t.part == 'train') & (t['class'] == '3')]
    wanted = train.path.isin([o for o,f in zip(paths, free.tolist()) if f])
    against = train['flags'].str.contains('against the shortcut')
    assert (against & wanted).sum() >= .9*wanted.sum() and (against & wanted).sum() >= .8*against.sum()
    weight = train.weight.astype(float)
    assert weight[wanted].mean() > 3 and abs(weight.mean()-1) < .01
    assert (w.weight[~w.path.str.startswith('3/')] == 1).all()

def test_a_folder_too_small_to_say(tmp_path):
    "... one of whose classes has a name that is no Unicode, which tables keep byte for byte."
    d = cmnist(conflict=.9, seed=0)
    s = d.train[d.train.y < 2]
    s = s[torch.randperm(len(s), generator=seeded(0))[:40]]
    paths = write_images(tmp_path/'in', s.x, s.y, d.classes[:2])
    odd, name = os.fsencode(tmp_path/'in')+b'/caf\xe9', f'{d.classes[0]}/'
    os.rename(tmp_path/'in'/d.classes[0], odd)
    labels = ''.join(f'{o},red\n' for o in paths).replace(name, os.fsdecode(b'caf\xe9/'))
    (tmp_path/'labels.csv').write_bytes(os.fsencode('path,bias\n'+labels))
    execute('nbs/audit.ipynb', data_dir=tmp_path/'in', out_dir=tmp_path/'out', size=28, labels=tmp_path/'labels.csv')
    read = partial(pd.read_csv, encoding_errors='surrogateescape', dtype=object)
    assert set(read(tmp_path/'out/verdict.csv').verdict) == {'too few images to say'}
    assert set(read(tmp_path/'out/weights.csv').weight) == {'1'}
    assert (tmp_path/'out/audit.csv').read_bytes().count(b'\ncaf\xe9/') == (s.y == 0).sum()

def test_parameters_are_the_fields():
    "The cell that papermill reads against the model: names, order, defaults, words of help."
    import ast, json, re
    from bias_distill.audit.asked import Asked
    cells = json.loads((ROOT/'nbs/audit.ipynb').read_text(encoding='utf-8'))['cells']
    cell = next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))
    found = [re.fullmatch(r'(\w+) = (.*?) +# (.*)', l.rstrip('\n')).groups() for l in cell['source']]
    fields = Asked.model_fields
    assert [o[0] for o in found] == list(fields)
    for name,value,_ in found: assert ast.literal_eval(value) == (None if fields[name].is_required() else fields[name].default)
