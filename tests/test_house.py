"The promises that the repository makes about its own files: cheap to check, easy to break without noticing."
import ast, functools, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml
from notebooks import papermill

ROOT = Path(__file__).resolve().parents[1]
IN_NBS = sorted(p for p in ROOT.glob('nbs/**/*.ipynb') if '.ipynb_checkpoints' not in p.parts)
NOTEBOOKS = [*IN_NBS, *sorted(ROOT.glob('paper_figures/*.ipynb'))]
WITH_PARAMETERS = [ROOT/'nbs/run.ipynb', *sorted(ROOT.glob('paper_figures/*.ipynb'))]

def name(p): return str(p.relative_to(ROOT))
def code_cells(p): return [c for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']

def tracked_text():
    "(path, text) of each text file that git has or would take; pictures stored in a notebook left out."
    ls = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if ls.returncode: pytest.skip('not a git checkout')
    for f in ls.stdout.splitlines():
        try: text = (ROOT/f).read_text(encoding='utf-8')
        except (UnicodeDecodeError, OSError): continue
        yield f, re.sub(r'"image/[^"]+": (?:"[^"]*"|\[[^\]]*\])', '', text)

def test_tags_survive_cleaning():
    # Without this key nbdev_clean strips the tag `parameters`, and papermill then runs the defaults without a word.
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    assert 'tags' in cfg['DEFAULT']['allowed_cell_metadata_keys'].split()

@pytest.mark.parametrize('p', WITH_PARAMETERS, ids=name)
def test_parameters_come_first_and_once(p):
    tagged = ['parameters' in c['metadata'].get('tags', []) for c in code_cells(p)]
    assert sum(tagged) == 1, f"{sum(tagged)} cells are tagged 'parameters'"
    assert tagged[0], "the cell tagged 'parameters' must be the first code cell"

@pytest.mark.parametrize('p', [*NOTEBOOKS, *sorted(ROOT.glob('paper_figures/executed/*.ipynb'))], ids=name)
def test_notebook_is_light(p): assert p.stat().st_size < 300_000

@pytest.mark.parametrize('p', NOTEBOOKS, ids=name)
def test_cells_are_short(p):
    for c in code_cells(p):
        if 'parameters' in c['metadata'].get('tags', []): continue    # a table: papermill wants a line each
        lines = [l for l in ''.join(c['source']).splitlines() if l.strip()]
        assert len(lines) <= 30, f"{len(lines)} lines in the cell that begins {lines[0]!r}"

@pytest.mark.parametrize('p', IN_NBS, ids=name)
def test_lines_are_narrow(p):
    for c in code_cells(p):
        for l in ''.join(c['source']).splitlines(): assert len(l) <= 120, f"{len(l)} characters: {l[:60]}..."

def exported():
    "(module, its syntax tree) of each module."
    for p in sorted(ROOT.glob('bias_distill/**/*.py')):
        if p.name not in ('_modidx.py','__init__.py'): yield p, ast.parse(p.read_text(encoding='utf-8'))

FLOORS = ['data','networks','weights','distill','debias','experiment','audit','results']

def test_imports_go_down():
    "A folder is a floor: a module imports its own folder and those below, and nothing registers itself upstairs."
    for p,tree in exported():
        here = FLOORS.index(p.parent.name)
        for n in ast.walk(tree):
            if not isinstance(n, ast.ImportFrom) or not n.level: continue
            floor = p.parent.name if n.level == 1 else n.module.split('.')[0]
            assert FLOORS.index(floor) <= here, f"{p.relative_to(ROOT)} imports {n.module}"

@pytest.mark.parametrize('path', [p for folder in ('nbs','paper_figures') for p in sorted((ROOT/folder).rglob('*.ipynb')) if 'parameters' in p.read_text(encoding='utf-8') and (folder != 'nbs' or p.name == 'run.ipynb') and not {'runs','smoke'} & set(p.parts)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_one_cell_takes_the_parameters(path):
    "Without the tag papermill runs the defaults in silence; an executed copy can be run again too."
    tags = [c['metadata'].get('tags', []) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]
    assert sum('parameters' in o for o in tags) == 1

def test_at_most_ten_floors():
    "The longest chain of imports within the package, in modules."
    below = {}
    for p,tree in exported():
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        folders = {n: p.parent if n.level == 1 else p.parent.parent for n in froms}
        paths = [folders[n].joinpath(*(n.module or '').split('.')) for n in froms] + [folders[n]/o.name for n in froms for o in n.names]
        below[p] = {q for o in paths if (q := o.with_suffix('.py')).is_file()}
    @functools.cache
    def height(p): return 1+max(map(height, below[p]), default=0)
    assert max(below.values(), key=len) and max(map(height, below)) <= 10

def test_no_method_is_attached_by_assignment():
    for p,tree in exported():
        classes = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
        for n in tree.body:
            for t in n.targets if isinstance(n, ast.Assign) else ():
                inside = [o for o in ast.walk(t) if isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name) and o.value.id in classes]
                assert not inside, f"{p.relative_to(ROOT)}:{n.lineno}"

def test_modules_are_short():
    for p,_ in exported():
        lines = [l for l in p.read_text(encoding='utf-8').splitlines() if l.strip() and not l.startswith('# %%')]
        assert len(lines) <= 400, f"{p.relative_to(ROOT)}: {len(lines)} lines"

def test_parameters_of_the_main_job_are_the_fields_of_a_run():
    "The cell that papermill reads against the model: names, order, groups, defaults, words of help."
    from bias_distill.experiment.params import OTHER
    from bias_distill.experiment.settings import FIELDS, GROUPS
    cell = next(c for c in code_cells(ROOT/'nbs/run.ipynb') if 'parameters' in c['metadata'].get('tags', []))
    found, heading = {}, None
    for l in ''.join(cell['source']).splitlines():
        if l.startswith('# '): heading = l[2:]
        elif l.strip():
            k, value, help = re.fullmatch(r'(\w+) = (.*?) +# (.*)', l).groups()
            found[k] = heading, ast.literal_eval(value), help
    want = {k: (heading, FIELDS[k].default, FIELDS[k].description) for heading,names in GROUPS.items() for k in names}
    assert {k: v for k,v in found.items() if k not in OTHER} == want and set(found) - set(want) == set(OTHER)
    assert [k for k in found if k not in OTHER] == list(want)

def test_no_path_of_one_machine():
    here = [str(ROOT), str(Path.home()), os.environ.get('BIAS_DISTILL_DATA', '')]
    if sys.prefix != sys.base_prefix: here.append(sys.prefix)  # a virtual environment, whose paths stand in tracebacks and warnings
    here = '|'.join(re.escape(o) for o in here if Path(o).is_absolute() and len(o) > 1)
    found = [f"{f}: {m[0]}" for f, text in tracked_text()
             for m in re.finditer(rf'(?<![\w.+-])(?:/(?:home|root|tmp|Users)/|(?:{here})(?![\w-]))\S{{0,40}}', text)]
    assert not found, '\n'.join(found)

def test_citation():
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    assert cff['title'].startswith('bias_distill')
    paper, = [r for r in cff['references'] if r['type'] == 'conference-paper']
    assert paper['title'] == 'Mitigating Bias in Dataset Distillation'
    assert 'arXiv:2406.06609' in [i['value'] for i in paper['identifiers']]

def test_one_version():
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    assert str(cff['version']) == cfg['DEFAULT']['version']

def test_readme_links_exist():
    text = re.sub(r'^```.*?^```|`[^`\n]*`', '', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.M | re.S)
    links = re.findall(r'\]\(([^)\s]+)|\b(?:src|href)=["\']([^"\']+)', text)
    paths = [(a or b).split('#')[0] for a, b in links if not re.match(r'[a-z]+:|#', a or b)]
    assert paths, 'README.md links to no file of the repository'
    missing = [p for p in paths if not (ROOT/p).exists()]
    assert not missing, missing

def test_figures_are_made_from_rows(tmp_path):
    "The figure notebooks that only read rows run, and leave the repository as it was."
    for p in [o for o in WITH_PARAMETERS if o.stem == 'faces']:
        code, err = papermill(p, tmp_path/p.name)
        assert code == 0, err[-2000:]

# -- the documentation

def test_readme_is_short(): assert 500 < len(re.sub(r'<!--.*?-->', '', (ROOT/'README.md').read_text(encoding='utf-8')).split()) <= 900

@pytest.fixture(scope='module')
def site():
    "The built documentation; a broken link or a missing picture fails here."
    for needed in ('mkdocs','mkdocs_jupyter'): pytest.importorskip(needed)
    if shutil.which('mkdocs') is None: pytest.skip('mkdocs is not on the path')
    p = subprocess.run([sys.executable, str(ROOT/'.ci/site')], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, (p.stdout+p.stderr)[-3000:]
    yield ROOT/'_docs'
    for folder in ('_docs','_docs_src','_proc'): shutil.rmtree(ROOT/folder, ignore_errors=True)

def test_site_has_pages_and_api(site):
    assert (site/'index.html').exists() and (site/'nbs/docs/weightings.html').exists() and (site/'paper_figures/table_cmnist.html').exists()
    text = (site/'nbs/weights/02_kde.html').read_text(encoding='utf-8')
    assert 'log_density' in text and 'Log of the kernel density estimate at the samples themselves' in text

def test_site_in_a_browser(site, tmp_path):
    browser = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if browser is None: pytest.skip("no Chromium here: Debian's package chromium has one")
    flags = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
    for page,word in (('index.html', 'What we measured'), ('nbs/docs/weightings.html', 'gap_draw')):
        args = [browser, *flags, f'--user-data-dir={tmp_path}', '--dump-dom', (site/page).as_uri()]
        p = subprocess.run(args, capture_output=True, text=True)
        assert p.returncode == 0 and word in p.stdout, p.stderr[-2000:]
