"The promises that the repository makes about its own files: cheap to check, easy to break without noticing."
import json, os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted([*ROOT.glob('nbs/*.ipynb'), *ROOT.glob('paper_figures/*.ipynb')])
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
        r = subprocess.run([sys.executable,'-m','papermill',str(p),str(tmp_path/p.name),'--no-progress-bar'], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert r.returncode == 0, r.stderr[-2000:]
