"A full disk, wherever it strikes: one error that names the file and says what to do, and the same command goes on."
import errno, os
import pytest
from bias_distill.experiment.experiment import experiment
from bias_distill.experiment.settings import complete

RUNS = {
    'dm': dict(weighting='kde'),
    'mtt': dict(distiller='mtt', weighting='uniform', augment='none', experts=1, expert_epochs=2, latest_start=1, iterations=2)}

pytestmark = pytest.mark.usefixtures('small_data')

def images(folder): return {p.name: p.read_bytes() for p in folder.glob('*.safetensors')}

class Disk:
    "Room for some files, then none."
    def __init__(self, files): self.left, self.fsync = files, os.fsync
    def __call__(self, fd):
        if self.left == 0: raise OSError(errno.ENOSPC, 'No space left on device')
        self.left -= 1
        self.fsync(fd)

@pytest.mark.parametrize('kind', RUNS)
def test_full_disk_at_every_file(kind, tmp_path, monkeypatch):
    run = complete(profile='smoke', ipc=1, conflict=.05, **RUNS[kind])
    whole, = experiment(run, tmp_path/'whole')
    fails = 0
    for room in range(20): # two files only try whether the folder can be written
        with monkeypatch.context() as m:
            m.setattr(os, 'fsync', Disk(room))
            try: row, = experiment(run, tmp_path/'full')
            except (OSError, ValueError) as e: said = str(e)
            else: break
        fails += 1
        for o in ('No space left', str(tmp_path/'full'), 'type the command again'): assert o in said, said
        assert not [p for p in tmp_path.glob('full/**/.*') if not p.name.endswith('.lock')]
    assert fails > 4, said # at a trial, a stage, the distillation, the images or their picture, the row
    assert row['accuracy']==whole['accuracy'] and images(tmp_path/'full')==images(tmp_path/'whole')
