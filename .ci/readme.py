"""README.md from nbs/index.ipynb, without Quarto:  python .ci/readme.py [--check]

The notebook is run first, in memory: a number or a table in README.md is then what the rows say today, not what they said
when somebody last saved the notebook. `--check` writes nothing, and fails where README.md is not what would be written."""
import difflib, os, posixpath, re, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NBS, README = ROOT/'nbs', ROOT/'README.md'
HEAD = '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, not this file. -->\n\n'

def has(cell, directive): return re.search(rf'^#\|\s*{directive}\s*$', cell.source, re.M)

def run(nb):
    "Run `nb` where it lies, so that its relative paths hold; a cell that nbdev_test would not run keeps its saved output."
    for c in nb.cells:
        if c.cell_type == 'code' and has(c, r'eval:\s*false'): c.metadata.tags = [*c.metadata.get('tags', []), 'skip-execution']
    NotebookClient(nb, timeout=None, kernel_name='python3', coalesce_streams=True, resources={'metadata': {'path': str(NBS)}}).execute()

def from_root(md):
    "Links of the notebook, which lies in nbs/, as links of README.md, which lies above it."
    def fix(m):
        path, sharp, anchor = m[2].partition('#')
        if not path or not os.path.exists(NBS/path): return m[0]  # a web page, an anchor, or code such as nets[0](x)
        return m[1] + posixpath.normpath(posixpath.join('nbs', path)) + sharp + anchor
    return re.sub(r'(\]\(|\b(?:src|href)=["\']|^\[[^\]]+\]:\s*)([^)\s"\']+)', fix, md, flags=re.M)

def plain(o, i):
    "An output as text: README.md holds no picture of its own, and nothing that differs from one run to the next."
    if o.output_type == 'stream': return o
    kinds, text = set(o.data), o.data.get('text/plain', '')
    if any(k.startswith('image/') for k in kinds): sys.exit(f"index.ipynb, cell {i}: shows an image; link a committed picture instead: ![](../paper_figures/x.png)")
    if 'text/markdown' not in kinds and re.search(r'^<IPython\.|\bat 0x[0-9a-f]+', text):
        sys.exit(f"index.ipynb, cell {i}: shows {text}, which says nothing in a README; print, or show IPython.display.Markdown")
    o.data = {k: from_root(v) if k == 'text/markdown' else v for k, v in o.data.items() if k in ('text/markdown', 'text/plain')}
    return o

def shown(nb):
    "The cells that a reader of README.md sees: prose, code without its `#|` lines, outputs without warnings."
    for i, c in enumerate(nb.cells):
        if c.cell_type == 'markdown': c.source = from_root(c.source)
        elif c.cell_type != 'code' or has(c, 'hide'): continue
        else:
            c.metadata.tags = ['no-input'] if has(c, r'echo:\s*false') else []
            c.outputs = [plain(o, i) for o in c.outputs if o.get('name') != 'stderr']
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
            if not c.source: continue
        yield c

def readme():
    nb = nbformat.read(NBS/'index.ipynb', as_version=4)
    run(nb)
    nb.cells = list(shown(nb))
    conf = Config()
    conf.MarkdownExporter.preprocessors = ['nbconvert.preprocessors.TagRemovePreprocessor']
    conf.TagRemovePreprocessor.update(enabled=True, remove_input_tags={'no-input'})
    body, _ = MarkdownExporter(config=conf).from_notebook_node(nb)
    body = re.sub(r'[ \t]+$', '', body, flags=re.M)
    return HEAD + re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'

if __name__ == '__main__':
    new, old = readme(), README.read_text(encoding='utf-8') if README.exists() else ''
    if '--check' not in sys.argv: README.write_text(new, encoding='utf-8')
    elif new != old:
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), 'README.md', 'nbs/index.ipynb', lineterm='')
        sys.exit('\n'.join([*diff][:40] + ['README.md is not what nbs/index.ipynb makes. To mend: python .ci/readme.py']))
