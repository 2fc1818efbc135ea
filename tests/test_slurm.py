"The workflow on a real Slurm of its own (see slurm_cluster.py): its jobs wait in a queue, its controller dies, and its rows are those of a local run."
import shutil, subprocess, sys, time
import pytest
from slurm_cluster import Cluster, packages
from notebooks import environment
from test_sweep import copy, result, snakemake

SLURM = ('--workflow-profile','profiles/slurm','--slurm-no-account','--slurm-status-command','squeue','--slurm-init-seconds-before-status-checks','5')

@pytest.fixture
def cluster(tmp_path):
    if not (tree := packages(tmp_path/'slurm')): pytest.skip("BIAS_DISTILL_SLURM names no folder with Slurm's packages; tests/slurm_cluster.py says how to get them")
    with Cluster(tree, tmp_path/'cluster') as c: yield c

@pytest.mark.slurm
def test_a_cluster_whose_controller_is_killed(copy, cluster):
    "A job makes a group of rows. The first one ends while nobody controls it, the second one waits: each runs once, and is heard of."
    begin, local, log = time.monotonic(), copy.with_name('local'), copy.with_name('log')
    shutil.copytree(copy, local)
    what = ('--config','profile=smoke','datasets=cmnist','seeds=0,1','row_threads=1','--','table_judges')
    def told(text): print(f'{time.monotonic()-begin:4.0f} s  {text}; queue: {cluster.jobs()}', flush=True)
    def running(seed): return (copy/f'smoke/runs/rows_cmnist_5pct_smoke_seed{seed}.log').exists()
    def done(folder, seed): return len(list((folder/'smoke/rows').glob(f'*-seed{seed}-*.json')))
    snakemake(*what, cwd=local)
    each = done(local, 0)
    with open(log, 'w') as f:
        p = subprocess.Popen([sys.executable,'-m','snakemake', *SLURM, *what], cwd=copy, stdout=f, stderr=f,
                             env=environment() | cluster.env | dict(XDG_CACHE_HOME=str(copy.with_name('cache'))))
    def until(what, seconds=600): cluster.wait(lambda: what() or p.poll() is not None, seconds)
    try:
        until(lambda: running(0) or running(1))
        told('a job runs')
        first = 0 if running(0) else 1
        assert sorted(cluster.jobs().values()) == ['PENDING','RUNNING']
        cluster.kill_controller()
        told('the controller is killed')
        until(lambda: done(copy, first) == each)
        time.sleep(45)                        # some questions that nobody answers
        assert p.poll() is None and not running(1-first)
        told(f'{each} rows are made without it')
        cluster.start_controller()
        until(cluster.jobs)
        told('the controller is back')
        until(lambda: False, 1200)
        told('Snakemake has ended')
    finally:
        p.kill()
        print(log.read_text())
    assert p.wait() == 0 and log.read_text().count('has been submitted with SLURM jobid') == 3 and set(cluster.jobs().values()) == {'COMPLETED'}
    assert result(copy/'smoke') == result(local/'smoke') and len(result(local/'smoke')) == 2*each
    for kind in ('md','csv'): assert (copy/f'smoke/table_judges.{kind}').read_text() == (local/f'smoke/table_judges.{kind}').read_text()
    print(f'{2*each} rows, 2 jobs, and the page: as a local run makes them')
