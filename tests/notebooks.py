"A notebook through papermill; and in the process of a test, its parameters set as papermill sets them: in seconds, as nothing is loaded anew."
import os, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
import pandas as pd
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from conftest import LIMIT

ROOT = Path(__file__).resolve().parents[1]

# Jupyter chooses a kernel's ports before the kernel takes them. Another that starts just then may be first, and the
# kernel dies or is never heard. That is not what these tests are about.
NO_KERNEL = 'Kernel died before replying to kernel_info', "Kernel didn't respond in"

def environment():
    "That of a user: no data, and no sign of a test."
    return {k: v for k,v in os.environ.items() if k not in ('IN_TEST','BIAS_DISTILL_DATA')}

def papermill(notebook, out, *args, cwd=ROOT, env=None):
    "(exit code, standard error) of the command; it is typed once more where its kernel did not start."
    command = [sys.executable,'-m','papermill',ROOT/notebook,out,'--no-progress-bar',*args]
    for _ in range(2):
        p = subprocess.run([*map(str, command)], cwd=cwd, env=env or environment(), capture_output=True, text=True, timeout=LIMIT)
        if not any(o in p.stderr for o in NO_KERNEL): break
    return p.returncode, p.stderr

@contextmanager
def working_in(folder):
    before = os.getcwd(); os.chdir(folder)
    try: yield
    finally: os.chdir(before)

def execute(path, cwd=ROOT, **parameters):
    "The notebook (a path from the repository's root) with its outputs. What a cell raises is raised here."
    nb = read_nb(ROOT/path)
    cell, = (c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    cell.source += ''.join(f'\n{k} = {(str(v) if isinstance(v, Path) else v)!r}' for k,v in parameters.items())
    pd.reset_option('^display')   # another notebook may have changed it
    kernel = pd.option_context('display.max_columns', 20)   # as pandas shows tables in a kernel, not in a terminal
    with working_in(cwd), kernel: CaptureShell().run_all(nb, exc_stop=True)
    return nb

def texts(nb):
    "What its outputs say, each as Markdown if it has that, else as plain text."
    shown = [o['data'] for c in nb['cells'] for o in c.get('outputs', []) if 'data' in o]
    return [''.join(o.get('text/markdown') or o.get('text/plain', '')) for o in shown]
