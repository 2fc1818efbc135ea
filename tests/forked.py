"Snakemake's dry runs, in processes that have its modules already: loading them takes far longer than the run. Imports little, as each process imports it."
import functools, multiprocessing, os, subprocess, sys

@functools.cache
def server():
    "What starts such processes, where that is safe; None elsewhere."
    if sys.platform != 'linux': return None
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['snakemake.cli','bias_distill.results.jobs','bias_distill.results.sweep'])
    return context

def as_a_process(args, cwd, env, said):
    "What `python -m snakemake` does."
    os.environ.clear(); os.environ.update(env); os.chdir(cwd); sys.argv = ['snakemake',*args]
    for stream in (1, 2): os.dup2(os.open(said, os.O_WRONLY|os.O_APPEND), stream)
    from snakemake.cli import main
    main([*args])

def dry_run(args, cwd, env, limit):
    "Exit code of a call that makes nothing, and what it said; a TimeoutError after `limit` seconds."
    if server() is None:
        p = subprocess.run([sys.executable,'-m','snakemake',*args], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
        return p.returncode, p.stdout
    said = cwd.parent/'said.txt'; said.write_text('')
    p = server().Process(target=as_a_process, args=(args, cwd, env, said)); p.start(); p.join(limit)
    if p.exitcode is None: p.kill(); p.join(); raise TimeoutError(said.read_text())
    return p.exitcode, said.read_text()
