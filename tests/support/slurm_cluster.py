"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, on loopback.

    def test_job(slurm):  # the fixture of tests/slurm/conftest.py
        job = slurm.submit("--nodes=2", "--wrap", "srun hostname")
        assert slurm.wait(job) == "COMPLETED"

Everything lies in one temporary folder with ports of its own, so that clusters do not meet. Slurm's
daemons want root. They die with the process that started them, however that ends; what jobs left
behind is found by the cluster's SLURM_CONF in its environment.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.support.processes import HANG_SECONDS

NODES = ("n1", "n2")
CPUS_PER_NODE = 4  # on paper: Slurm does not count the real ones
GPUS_PER_NODE = 2  # on paper: device files that Slurm takes for GPUs
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "setpriv")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
STOP_SECONDS = 60.0  # then the processes are killed
POLL_SECONDS = 0.1
LASTING = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

# cred_expire: a requeued job waits for it to pass, 120 s by default. KillWait, GraceTime: ranks can
# save before they are killed, on a busy machine too.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=300
KillWait=600
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=600
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""
CGROUPS = """
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
"""


def missing_programs() -> str | None:
    """Why there can be no cluster here, in a line; None where there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons need root"


def find_tracking() -> str:
    """Return how Slurm finds the processes of a job: `cgroup`, as most clusters do, if it works.

    With it, a signal other than KILL reaches only the processes that slurmstepd itself has started.
    """
    return "cgroup" if os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK) else "linuxproc"


class SlurmCluster:
    """Two nodes of Slurm, started on entry and removed on exit.

    Args:
        settings: Lines of slurm.conf that replace those above.
    """

    def __init__(self, settings: str = "") -> None:
        self._settings = settings
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = os.environ | {
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def command(self, *words: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a command of Slurm's clients, and return its output.

        Raises:
            AssertionError: It failed; the message holds its output.
        """
        done = subprocess.run(
            words,
            cwd=cwd,
            env=self._environment | environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path | None = None, **environment: str) -> int:
        """Submit options of `sbatch`, a script and its arguments, and return the job's id."""
        return int(self.command("sbatch", "--parsable", *words, cwd=cwd, **environment))

    def describe(self, job: int) -> dict[str, str]:
        """Return what `scontrol show job` prints, by name."""
        line = self.command("scontrol", "show", "job", str(job), "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", line))

    def has_ended(self, job: int) -> bool:
        """Whether the job has ended for good; one that was requeued has not."""
        return self.describe(job)["JobState"] in LASTING

    def wait(self, job: int, seconds: float = HANG_SECONDS) -> str:
        """Wait until the job has ended for good, and return its state.

        Raises:
            AssertionError: It had not, in that time.
        """
        deadline = time.monotonic() + seconds
        while not self.has_ended(job):
            assert time.monotonic() < deadline, f"job {job} has not ended after {seconds:g} s"
            time.sleep(POLL_SECONDS)
        return self.describe(job)["JobState"]

    def processes(self, job: int, node: str | None = None) -> list[psutil.Process]:
        """Find the processes of the job's steps (not of its script), on a node or on all."""
        return [
            process
            for process, environment in self._all_processes()
            if environment.get("SLURM_JOB_ID") == str(job)
            and environment.get("SLURM_STEP_ID", "").isdigit()
            and node in (None, environment.get("SLURMD_NODENAME"))
        ]

    def _all_processes(self) -> Iterator[tuple[psutil.Process, dict[str, str]]]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") == self._environment["SLURM_CONF"]:
                    yield process, environment

    def _find_step_daemons(self) -> set[int]:
        """slurmstepd, which wipes its environment, by its socket in the spool directory."""
        return {
            connection.pid
            for connection in psutil.net_connections(kind="unix")
            if connection.pid and str(connection.laddr).startswith(f"{self.folder}/")
        }

    def _start(self) -> None:
        # Free ports, one for the controller and one for each node.
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
        ports = [each.getsockname()[1] for each in sockets]
        for each in sockets:
            each.close()
        # Slurm's configuration: nodes, control groups, devices that stand for GPUs.
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            f"CPUs={CPUS_PER_NODE} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, host=host, ports=ports, nodes=nodes, tracking=find_tracking()
            )
            + self._settings
        )
        (self.folder / "cgroup.conf").write_text(CGROUPS)
        (self.folder / "gres.conf").write_text(
            f"Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n"
        )
        for gpu in range(GPUS_PER_NODE):
            os.mknod(self.folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3 + 2 * gpu))
        for name in ("state", *(f"spool_{node}" for node in NODES)):
            (self.folder / name).mkdir()
        # The daemons: munge first, because Slurm needs its socket.
        key = self.folder / "munge.key"
        key.touch(mode=0o400)
        key.write_bytes(os.urandom(128))
        paths = [
            f"--{option}={self.folder}/{file}"
            for option, file in (
                ("socket", "munge.socket"),
                ("key-file", "munge.key"),
                ("pid-file", "munged.pid"),
                ("log-file", "munged.messages"),
                ("seed-file", "munge.seed"),
            )
        ]
        self._launch("munged", "--foreground", *paths)
        self._until("munged", (self.folder / "munge.socket").exists)
        self._launch("slurmctld", "-D")
        for node in NODES:
            self._launch("slurmd", "-D", "-N", node)
        self._until("idle nodes", self._is_idle)

    def _launch(self, *words: str) -> None:
        # The kernel ends it with this process, be that by `kill -9`.
        with (self.folder / f"daemon_{len(self._daemons)}.log").open("w") as log:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *words],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _is_idle(self) -> bool:
        with contextlib.suppress(AssertionError):
            return self.command("sinfo", "--noheader", "--format=%D %t").split() == ["2", "idle"]
        return False

    def _until(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not is_there():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "".join(path.read_text()[-1000:] for path in self.folder.glob("*.log"))
                raise AssertionError(f"Slurm: no {what} ({dead=}):\n{logs}")
            time.sleep(POLL_SECONDS)

    def _stop(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.command("scancel", "--user=root")
            deadline = time.monotonic() + STOP_SECONDS
            while self.command("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        for daemon in reversed(self._daemons):  # munged last: the others talk through it
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        left = {process.pid for process, _ in self._all_processes()} | self._find_step_daemons()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
