"""Slurm on this machine, under a folder, from Debian's packages; nothing is installed, and no right of root is needed.

BIAS_DISTILL_SLURM names a folder with the packages, or what they were extracted to. On Debian 12 they are had by

    mkdir debs && cd debs && apt-get download slurmctld slurmd slurm-client slurm-wlm-basic-plugins libhwloc15

and `pytest -m slurm` then does the rest. One node, one partition (gpu), no accounts. The node says that it has more cores
and memory than the machine may have, and one GPU that is none: so what asks for them is scheduled here too.
"""
import os, pwd, signal, socket, subprocess, time
from pathlib import Path

USER = pwd.getpwuid(os.getuid()).pw_name

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=64000 Gres=gpu:1
PartitionName=gpu Nodes={host} Default=YES
"""

def free_ports(n):
    "Ports that nobody listens to."
    found = [socket.socket() for _ in range(n)]
    for s in found: s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in found]
    for s in found: s.close()
    return ports

def packages(folder):
    "Where Slurm lies: the folder that BIAS_DISTILL_SLURM names, or, where that holds packages, `folder` with what is in them. None without it."
    given = os.environ.get('BIAS_DISTILL_SLURM')
    if not given: return
    debs = sorted(Path(given).glob('*.deb'))
    for deb in debs: subprocess.run(['dpkg','-x',deb,folder], check=True)
    tree = Path(folder if debs else given)
    if not list(tree.glob('usr/sbin/slurmctld*')): raise FileNotFoundError(f'BIAS_DISTILL_SLURM={given}: no package slurmctld there')
    return tree

class Cluster:
    "Slurm from the packages extracted in `tree`, with all its files in `folder`, as long as the block lasts."
    def __init__(self, tree, folder):
        self.tree, self.folder, self.daemons = Path(tree).resolve(), Path(folder).resolve(), {}
        plugins = next(self.tree.glob('usr/lib/*/slurm*/auth_none.so')).parent
        for o in ('state','spool','bin'): (self.folder/o).mkdir(parents=True)
        for o in ('slurmctld','slurmd','slurmstepd'):    # Debian's names end in -wlm, and a daemon of another name reads no Gres
            (self.folder/o).symlink_to(next(self.tree.glob(f'usr/sbin/{o}*')))
        host = socket.gethostname().split('.')[0]
        conf = CONF.format(host=host, ports=free_ports(2), user=USER, plugins=plugins, folder=self.folder)
        (self.folder/'slurm.conf').write_text(conf)
        (self.folder/'gres.conf').write_text(f'NodeName={host} Name=gpu File=/dev/null\n')
        srun = self.folder/'bin/srun'                # Snakemake starts it without SLURM_CONF
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {self.tree}/usr/bin/srun "$@"\n')
        srun.chmod(0o755)
        path = [srun.parent, self.tree/'usr/bin', *filter(None, [os.environ.get('PATH')])]
        libraries = [plugins, plugins.parent, *filter(None, [os.environ.get('LD_LIBRARY_PATH')])]
        self.env = dict(SLURM_CONF=self.folder/'slurm.conf', PATH=':'.join(map(str, path)), LD_LIBRARY_PATH=':'.join(map(str, libraries)))
        self.env = {k: str(v) for k,v in self.env.items()}

    def start(self, name, *args):
        log = open(self.folder/f'{name}.log', 'a')
        self.daemons[name] = subprocess.Popen([self.folder/name,'-D',*args], env=os.environ | self.env, cwd=self.folder, stdout=log, stderr=log)
        log.close()

    def start_controller(self): self.start('slurmctld')

    def kill_controller(self):
        "As a crash does."
        p = self.daemons.pop('slurmctld')
        p.kill()
        p.wait()

    def ask(self, *command):
        "What a command of Slurm prints; None where it fails, as without a controller."
        p = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True)
        return None if p.returncode else p.stdout

    def jobs(self):
        "State of each job in the queue, or lately in it, by its number."
        text = self.ask('squeue','--noheader','--states=all','--format=%i %T')
        return None if text is None else {int(i): state for i,state in map(str.split, text.splitlines())}

    def wait(self, what, seconds=120):
        "Until it is so."
        until = time.monotonic()+seconds
        while not what():
            dead = [o for o,p in self.daemons.items() if p.poll() is not None]
            if dead or time.monotonic() > until: raise RuntimeError('\n'.join(p.read_text()[-3000:] for p in sorted(self.folder.glob('*.log'))))
            time.sleep(.5)

    def __enter__(self):
        self.start_controller()
        self.start('slurmd','-d',self.folder/'slurmstepd')
        self.wait(lambda: (self.ask('sinfo','--noheader','--format=%t') or '').strip()=='idle')
        return self

    def __exit__(self, *_):
        "No job and no daemon is left."
        self.ask('scancel','--user',USER)
        if 'slurmctld' in self.daemons: self.wait(lambda: not self.ask('squeue','--noheader'))
        for p in self.daemons.values(): p.send_signal(signal.SIGTERM)
        for p in self.daemons.values():
            try: p.wait(30)
            except subprocess.TimeoutExpired: p.kill()
