"`paper_figures/gpu_slot`, with a made-up `nvidia-smi` on the path: who gets which GPU, and what is left alone."
import os, subprocess, time
from pathlib import Path
import pytest
from conftest import LIMIT

SLOT = Path(__file__).resolve().parents[1]/'paper_figures/gpu_slot'
SAYS = 'echo "<${CUDA_VISIBLE_DEVICES-unset}>"'
TWO = ['GPU 0: NVIDIA A100 (UUID: GPU-aaa)', 'GPU 1: NVIDIA A100 (UUID: GPU-bbb)']
CUT = [TWO[0], '  MIG 3g.20gb     Device  0: (UUID: MIG-a0)', '  MIG 3g.20gb     Device  1: (UUID: MIG-a1)', TWO[1]]

@pytest.fixture
def machine(tmp_path):
    "A function that says with what environment a machine with these lines of `nvidia-smi -L` runs a job."
    def made(lines, **more):
        (tmp_path/'bin').mkdir(exist_ok=True)
        smi = tmp_path/'bin/nvidia-smi'
        smi.write_text('#!/bin/sh\n' + ("cat <<'END'\n" + '\n'.join(lines) + '\nEND\n' if lines else 'exit 9\n'))
        smi.chmod(0o755)
        (tmp_path/'tmp').mkdir(exist_ok=True)
        clean = {k: v for k,v in os.environ.items() if k not in ('CUDA_VISIBLE_DEVICES','N_GPUS','SLURM_JOB_ID','GPU_JOBS')}
        return clean | dict(PATH=f"{smi.parent}:{clean['PATH']}", TMPDIR=str(tmp_path/'tmp')) | more
    return made

def answer(env, command=SAYS):
    p = subprocess.run([SLOT, 'bash', '-c', command], env=env, capture_output=True, text=True, timeout=LIMIT)
    return p.returncode, p.stdout.strip(), p.stderr.strip()

def held(env, tmp_path, n):
    "Start `n` jobs that hold their GPU until a file is there; what each was given, in the order of starting."
    go, jobs, seen = tmp_path/'go', [], []
    for k in range(n):
        said = tmp_path/f'said{k}'
        wait = f'{SAYS} > {said}.part; mv {said}.part {said}; until [ -e {go} ]; do sleep .05; done'
        jobs.append(subprocess.Popen([SLOT, 'bash', '-c', wait], env=env))
        end = time.monotonic()+60
        while not said.exists() and time.monotonic() < end: time.sleep(.02)
        seen.append(said.read_text().strip())
    return seen, go, jobs

def let_go(go, jobs):
    go.touch()
    assert [p.wait(LIMIT) for p in jobs] == [0]*len(jobs)
    go.unlink()

@pytest.mark.parametrize('lines,want', [(TWO, ['<GPU-aaa>','<GPU-bbb>']), (CUT, ['<MIG-a0>','<MIG-a1>','<GPU-bbb>'])])
def test_each_job_gets_one_of_its_own(machine, tmp_path, lines, want):
    env = machine(lines)
    seen, go, jobs = held(env, tmp_path, len(want))
    late = subprocess.Popen([SLOT, 'bash', '-c', SAYS], env=env, stdout=subprocess.PIPE, text=True)
    time.sleep(.5)
    waiting = late.poll() is None
    let_go(go, jobs)
    assert seen == want and waiting and late.communicate(timeout=LIMIT)[0].strip() in want

@pytest.mark.parametrize('preset,want', [('3', ['<3>']), ('GPU-ccc', ['<GPU-ccc>']), ('5,MIG-a1', ['<5>','<MIG-a1>']),
    ('GPU-1b-1c,MIG-1a', ['<GPU-1b-1c>','<MIG-1a>']), ('3,-1,4', ['<3>'])])
def test_what_is_preset_is_kept(machine, tmp_path, preset, want):
    seen, go, jobs = held(machine(TWO, CUDA_VISIBLE_DEVICES=preset), tmp_path, len(want))
    let_go(go, jobs)
    assert seen == want

@pytest.mark.parametrize('lines,more,want', [
    ([], {}, '<unset>'),                                   # no GPU
    (TWO, dict(CUDA_VISIBLE_DEVICES=''), '<>'),            # somebody wants none
    (TWO, dict(CUDA_VISIBLE_DEVICES='-1'), '<-1>'),
    (TWO, dict(SLURM_JOB_ID='7', CUDA_VISIBLE_DEVICES='2'), '<2>'),
    ([], dict(N_GPUS='2'), '<0>')])
def test_others_choose(machine, lines, more, want): assert answer(machine(lines, **more)) == (0, want, '')

def test_several_jobs_a_gpu(machine, tmp_path):
    seen, go, jobs = held(machine(TWO, GPU_JOBS='2'), tmp_path, 4)
    let_go(go, jobs)
    assert seen == ['<GPU-aaa>','<GPU-bbb>']*2

def test_exit_code_and_arguments(machine):
    env = machine(TWO)
    assert answer(env, 'exit 7')[0] == 7
    p = subprocess.run([SLOT, 'printf', '%s|', 'a b', '$HOME', '*'], env=env, capture_output=True, text=True)
    assert p.stdout == 'a b|$HOME|*|'

def test_a_link_in_place_of_the_locks_is_refused(machine, tmp_path):
    env, theirs = machine(TWO), tmp_path/'theirs'
    theirs.mkdir()
    (theirs/'GPU-aaa.1').write_text('mine')
    place = tmp_path/f'tmp/gpu_slot.{os.getuid()}'
    place.symlink_to(theirs)
    code, out, err = answer(env)
    assert (code, out) == (1, '') and err == f'gpu_slot: {place} is no folder of yours: delete it, or set TMPDIR'
    assert [p.name for p in theirs.iterdir()] == ['GPU-aaa.1'] and (theirs/'GPU-aaa.1').read_text() == 'mine'
