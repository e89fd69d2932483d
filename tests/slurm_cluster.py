"""A real Slurm of one node in a folder: munged, slurmctld and slurmd of this machine, started and stopped by a test."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
KillWait=5
MinJobAge=600
JobRequeue=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Slurm in a folder, as a context. Jobs are submitted, watched and signalled by its own commands."""

    def __init__(self, folder):
        self.folder, self.daemons = Path(folder), []
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = dict(control=free_port(), node=free_port())
        text = CONFIG.format(folder=self.folder, host=host, cpus=os.cpu_count(), **ports)
        (self.folder / "slurm.conf").write_text(text)
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    @staticmethod
    def is_installed():
        return all(shutil.which(program) for program in PROGRAMS)

    def __enter__(self):
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket"]
        munge += [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        self._start(munge, lambda: (self.folder / "munge.socket").exists())
        self._start(["slurmctld", "-D"], lambda: "UP" in self.call("scontrol", "ping"))
        self._start(["slurmd", "-D"], lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T"))
        return self

    def _start(self, command, is_ready, seconds=30):
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            daemon = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True)
        self.daemons.append(daemon)
        self.wait(is_ready, seconds, lambda: (self.folder / f"{command[0]}.out").read_text())

    def __exit__(self, *_):
        self.call("scancel", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *command, cwd=None):
        """stdout and stderr of one of Slurm's commands."""
        done = subprocess.run([*map(str, command)], env=self.env, capture_output=True, text=True, cwd=cwd)
        return done.stdout + done.stderr

    def wait(self, condition, seconds, explain=lambda: ""):
        until = time.time() + seconds
        while not condition():
            assert time.time() < until, f"too slow: {explain()}"
            time.sleep(0.2)

    def submit(self, *command, cwd, **env):
        """Job id of an sbatch command."""
        before, self.env = self.env, {**self.env, **env}
        said = self.call("sbatch", *command, cwd=cwd)
        self.env = before
        match = re.search(r"Submitted batch job (\d+)", said)
        assert match, said
        return match[1]

    def finish(self, job, seconds, explain):
        """Until a job is complete. A requeued one is started early, since Slurm would let it wait for two minutes, and given
        time enough; but not in the seconds after it was requeued, whose credential is revoked."""
        hasten_at = None

        def is_complete():
            nonlocal hasten_at
            state = self.state(job)
            assert state != "FAILED", explain()
            if state == "PENDING":
                hasten_at = hasten_at or time.time() + 5
                if time.time() > hasten_at:
                    self.call("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=20")
                    hasten_at = time.time() + 30
            return state == "COMPLETED"

        self.wait(is_complete, seconds, explain)

    def state(self, job):
        """PENDING, RUNNING, COMPLETED, CANCELLED, TIMEOUT, NODE_FAIL, ..."""
        match = re.search(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))
        return match[1] if match else "UNKNOWN"
