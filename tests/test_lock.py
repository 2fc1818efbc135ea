"constraints.txt holds one version of all that is installed, within the ranges of settings.ini, and names no machine."
import importlib.metadata, os, re
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = dict(linux='Linux', darwin='Darwin')
PLACES = [(system, version) for system in SYSTEMS for version in ('3.10','3.11','3.12')]

def lines(): return [o for o in (ROOT/'constraints.txt').read_text(encoding='utf-8').splitlines() if not o.startswith('#')]

def environment(system, version):
    "What markers ask for, on another system."
    return default_environment() | dict(python_version=version, python_full_version=f'{version}.9', sys_platform=system,
                                        platform_system=SYSTEMS[system], os_name='posix', extra='')

def locked(where=None):
    "name -> every version that is pinned for an environment; None: this one."
    where, found = where or default_environment() | dict(extra=''), {}
    for r in map(Requirement, lines()):
        if r.marker is None or r.marker.evaluate(where): found.setdefault(canonicalize_name(r.name), []).append(str(r.specifier).removeprefix('=='))
    return found

def asked(where, *kinds):
    "What settings.ini asks for in an environment."
    cfg = ConfigParser(delimiters=['=']); cfg.read(ROOT/'settings.ini', encoding='utf-8')
    every = [Requirement(o) for k in kinds for o in cfg['DEFAULT'][k].split()]
    return [r for r in every if r.marker is None or r.marker.evaluate(where)]

def test_a_line_is_a_name_and_a_version():
    "No address of an index, no path, no link: whoever reads it has other ones."
    assert len(lines()) > 200
    for o in lines(): assert re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*( ; [A-Za-z0-9_.'=<>!*() -]+)?", o), o

@pytest.mark.parametrize('place', PLACES, ids='-'.join)
def test_every_requirement_is_locked_within_its_range(place):
    where, kinds = environment(*place), ('requirements','dev_requirements')
    have, want = locked(where), asked(where, *kinds)
    assert len(want) > 30
    for r in want:
        name = canonicalize_name(r.name)
        assert name in have, f'{name} is not in constraints.txt: run .ci/lock'
        assert all(r.specifier.contains(v) for v in have[name]), f'{name}=={have[name][0]}, but settings.ini wants {r}: run .ci/lock'

@pytest.mark.parametrize('place', PLACES, ids='-'.join)
def test_one_version_each(place):
    twice = {k: v for k,v in locked(environment(*place)).items() if len(v) > 1}
    assert not twice

def test_what_only_linux_has_is_marked():
    mac, linux = (locked(environment(o, '3.11')) for o in ('darwin','linux'))
    cuda = {k for k in linux if k.startswith(('nvidia-','triton'))}
    assert len(cuda) > 5 and not cuda & set(mac)

def test_what_requirements_require_is_locked_too():
    "All that is installed for the locked packages, here and now. One in another version may require others."
    have, todo, seen = locked(), asked(default_environment() | dict(extra=''), 'requirements', 'dev_requirements'), set()
    while todo:
        r = todo.pop()
        for extra in ('', *r.extras):
            name = canonicalize_name(r.name)
            if (name, extra) in seen: continue
            seen.add((name, extra))
            try: d = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError: continue
            assert name in have, f'{name} is installed for one of our requirements, and not in constraints.txt: run .ci/lock'
            assert any(r.specifier.contains(v, prereleases=True) for v in have[name]), f'{name}=={have[name][0]}, but {r} is required: run .ci/lock'
            if d.version.split('+')[0] not in have[name]: continue
            where = default_environment() | dict(extra=extra)
            todo += [q for q in map(Requirement, d.requires or []) if q.marker is None or q.marker.evaluate(where)]
    assert len(seen) > 50

@pytest.mark.skipif(os.environ.get('BIAS_DISTILL_LOCKED') != '1', reason='the locked versions were not asked for (BIAS_DISTILL_LOCKED=1)')
def test_the_locked_versions_are_installed():
    have = {canonicalize_name(d.metadata['Name']): d.version.split('+')[0] for d in importlib.metadata.distributions()}
    other = {k: (have[k], v) for k,v in locked().items() if k in have and have[k] not in v and k not in ('pip','setuptools','wheel')}
    assert not other

def test_ci_takes_the_lock_where_it_is_asked_to():
    "On push the locked versions, once a week the newest; .ci/run itself works without the lock."
    text = (ROOT/'.ci'/'run').read_text()
    line, = [o for o in text.splitlines() if 'constraints.txt' in o]
    assert re.search(r'\[ "\$\{BIAS_DISTILL_LOCKED:-\}" = 1 \] && locked=\'-c constraints.txt\'$', line)
    ci = (ROOT/'.github'/'workflows'/'ci.yml').read_text()
    assert "BIAS_DISTILL_LOCKED: ${{ github.event_name == 'schedule' && '0' || '1' }}" in ci and 'cron:' in ci
