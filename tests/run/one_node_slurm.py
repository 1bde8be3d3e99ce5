"""A real Slurm on this machine, for tests: one node, loopback addresses only, everything in one directory.

    python tests/run/one_node_slurm.py DIRECTORY    run it until Ctrl-C or SIGTERM, to try things by hand

What is unusual about its configuration, and why:

- no cgroups, and what is not named here (accounting, MPI) is off, so that it runs in a container and as any user;
- `cred_expire=5` and `KillWait`: a requeued job starts again after some ten seconds instead of two minutes, and has
  `KILL_WAIT` seconds between SIGTERM and SIGKILL;
- `config_overrides`: the node may declare more CPUs and memory than the machine has;
- `JobRequeue=0`, as on some clusters: only jobs that ask for it are queued again;
- the first job id is random, because ports are derived from it and several such clusters run side by side.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODE = "localhost"
PARTITION = "tests"
CPUS = 16
MEMORY_MB = 64000
KILL_WAIT = 30

CONFIGURATION = """\
ClusterName=onenode
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
KillWait={kill_wait}
FirstJobId={first_job_id}
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName={partition} Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


class SlurmUnavailableError(Exception):
    """Slurm is not installed here and cannot be."""


class OneNodeSlurm:
    """The daemons of a cluster, as a context manager; clients find it through `environment`.

    Args:
        directory: holds configuration, key, socket, state and logs. Its path must be short (a socket lies in it).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": _path_with_daemons()}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> OneNodeSlurm:
        try:
            self._configure()
            self._start_munge()
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", NODE)
            _wait_until(lambda: self.run("sinfo", "-h", "-o", "%T").strip() == "idle", 60, self._complain)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self.run("scancel", "--full", "--signal=KILL", f"--partition={PARTITION}")
            self.run("scancel", f"--partition={PARTITION}")
        with contextlib.suppress(TimeoutError):
            _wait_until(lambda: self.run("squeue", "-h") == "", 20)
        self._stop()

    def run(self, *command: str) -> str:
        """The output of a Slurm command; empty if it failed."""
        done = subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout if done.returncode == 0 else ""

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, by name."""
        fields = self.run("scontrol", "show", "job", "-o", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def _configure(self) -> None:
        for name in ("state", "spool"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        controller_port, node_port = _free_ports(2)
        settings = {
            "host": socket.gethostname().split(".")[0],
            "user": subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip(),
            "directory": self.directory,
            "controller_port": controller_port,
            "node_port": node_port,
            "first_job_id": random.SystemRandom().randint(1000, 10_000_000),
            "node": NODE,
            "cpus": CPUS,
            "memory": MEMORY_MB,
            "partition": PARTITION,
            "kill_wait": KILL_WAIT,
        }
        (self.directory / "slurm.conf").write_text(CONFIGURATION.format(**settings))
        key = self.directory / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _start_munge(self) -> None:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.directory}/munge.{suffix}" for option, suffix in files.items()]
        self._start("munged", "--foreground", "--force", "--num-threads=2", *options)
        _wait_until((self.directory / "munge.socket").exists, 20, self._complain)

    def _start(self, *command: str) -> None:
        with (self.directory / f"{command[0]}.out").open("wb") as log:
            environment = os.environ | self.environment
            # Away from the terminal's Ctrl-C, which would end the daemons before the jobs.
            daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(daemon)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _complain(self) -> str:
        logs = [path for suffix in ("log", "out") for path in sorted(self.directory.glob(f"*.{suffix}"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)


def install() -> None:
    """Install Slurm from Debian's or Ubuntu's packages, unless it is there.

    Raises:
        SlurmUnavailableError: says why not.
    """
    missing = _missing_programs()
    if not missing:
        return
    what = f"Slurm is not installed ({', '.join(missing)} missing)"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SlurmUnavailableError(f"{what}: apt-get install {' '.join(PACKAGES)} as root to run this test")
    with open(Path(tempfile.gettempdir()) / "install-slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # against the other workers of the tests
        try:
            problem = _apt_get_install()
        except subprocess.TimeoutExpired:
            problem = "it did not come to an end"
    if problem:
        raise SlurmUnavailableError(f"{what} and apt-get install failed: {problem}")


def _apt_get_install() -> str:
    # RUNLEVEL=1 keeps the packages from starting their own daemons.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    apt = ["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    subprocess.run([*apt, "update"], env=environment, capture_output=True, timeout=120)
    command = [*apt, "install", "-y", "--no-install-recommends", *PACKAGES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return "" if done.returncode == 0 else done.stderr.strip()[-500:]


def _missing_programs() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program, path=_path_with_daemons()) is None]


def _path_with_daemons() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in sockets]


def _wait_until(condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds} s\n{explain()}")
        time.sleep(0.2)


@contextlib.contextmanager
def running_slurm() -> Iterator[OneNodeSlurm]:
    """A cluster in a directory of its own, installed before if need be.

    Raises:
        SlurmUnavailableError: it is not installed and cannot be.
    """
    install()
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:
        # munged refuses keys and sockets below directories that others may write.
        os.chmod(directory, 0o755)
        with OneNodeSlurm(Path(directory)) as cluster:
            yield cluster


def _main() -> None:
    ends = {signal.SIGINT, signal.SIGTERM}
    install()
    with OneNodeSlurm(Path(sys.argv[1]).resolve()) as cluster:
        for name, value in cluster.environment.items():
            print(f"export {name}={value}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        signal.sigwait(ends)


if __name__ == "__main__":
    _main()
