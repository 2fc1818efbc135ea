"A notebook in the process of a test, its parameters set as papermill sets them: in seconds, as nothing is loaded anew."
import os
from contextlib import contextmanager
from pathlib import Path
import pandas as pd
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

ROOT = Path(__file__).resolve().parents[1]

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
