"Tests touch no network and leave nothing behind, whoever starts them. Set here, before any test imports bias_distill."
import atexit, os, shutil, tempfile

os.environ.setdefault('BIAS_DISTILL_OFFLINE', '1')
os.environ['MPLBACKEND'] = 'Agg'
if 'BIAS_DISTILL_CACHE' not in os.environ:
    cache = os.environ['BIAS_DISTILL_CACHE'] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

LIMIT = 3600   # seconds after which something hangs for ever: no test fails for being slow
