"""Rank, world size and meeting point of this process, from its launcher: torchrun, submitit, Slurm, or none."""

from __future__ import annotations

import os
import random
import socket

from dinov3.distributed import slurm

PORT_RANGE = (20000, 60000)
N_PORT_CANDIDATES = 4


class TorchDistributedEnvironment:
    """Rank, world size and meeting point of this process.

    The first source that applies counts: torchrun (`TORCHELASTIC_RUN_ID`), submitit's local and debug executors, a
    Slurm task (`SLURM_JOB_ID` and `SLURM_STEP_ID`, also under submitit); otherwise it is a single process. Under
    submitit and Slurm, `MASTER_PORT` fixes the port; otherwise all ranks derive the same one from the job id.

    Attributes:
        job_type: `"TorchElastic"`, `"submitit"`, `"Slurm"` or `"manual"`.
        job_id: the launcher's; empty without one.
        master_addr: host of rank 0.
        candidate_ports: ports to try, `master_port` first, the same on all ranks; several if they come from the job id.
        local_rank: rank of this process on its node.
        local_world_size: number of processes on this node.

    Raises:
        RuntimeError: a variable of the launcher is missing or wrong; the message names it.
    """

    job_type: str
    job_id: str
    master_addr: str
    candidate_ports: list[int]
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __init__(self) -> None:
        # A shell in a Slurm allocation has most of Slurm's variables, but is not one of the job's tasks.
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._read_torchrun()
        elif "SUBMITIT_DEBUG_JOB_ID" in os.environ:
            self._be_single_process()
        elif os.environ.get("SUBMITIT_EXECUTOR") == "local":
            self._read_submitit()
        elif slurm.is_slurm_task():
            self._read_slurm()
        else:
            self._be_single_process()
        if not (0 <= self.local_rank < self.local_world_size and 0 <= self.rank < self.world_size):
            raise RuntimeError(
                f"the variables of {self.job_type} contradict each other: rank {self.rank} of {self.world_size}, "
                f"local rank {self.local_rank} of {self.local_world_size}"
            )

    @property
    def master_port(self) -> int:
        """The port that rank 0 listens on, unless another program uses it."""
        return self.candidate_ports[0]

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def export(self, *, overwrite: bool, nccl_async_error_handling: bool = False) -> TorchDistributedEnvironment:
        """Set `MASTER_ADDR`, `MASTER_PORT`, `RANK`, `WORLD_SIZE`, `LOCAL_RANK` and `LOCAL_WORLD_SIZE`.

        Args:
            overwrite: replace variables that have another value.
            nccl_async_error_handling: also set `TORCH_NCCL_ASYNC_ERROR_HANDLING=1`.

        Returns:
            This object.

        Raises:
            RuntimeError: a variable has another value and `overwrite` is off.
        """
        values = {
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
        }
        if nccl_async_error_handling:
            values["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
        conflicts = [
            f"{name}={os.environ[name]} (not {value})"
            for name, value in values.items()
            if os.environ.get(name, value) != value
        ]
        if conflicts and not overwrite:
            raise RuntimeError(f"the environment already has {', '.join(conflicts)}: unset it or pass overwrite=True")
        os.environ.update(values)
        return self

    def __str__(self) -> str:
        job = f"{self.job_type} job" + (f" ({self.job_id})" if self.job_id else "")
        return f"{job} using {self.master_addr}:{self.master_port} (rank={self.rank}, world size={self.world_size})"

    def _read_torchrun(self) -> None:
        self.job_type = "TorchElastic"
        self.job_id = os.environ["TORCHELASTIC_RUN_ID"]
        self.master_addr = _variable("MASTER_ADDR")
        self.candidate_ports = [_integer("MASTER_PORT")]
        self.rank = _integer("RANK")
        self.world_size = _integer("WORLD_SIZE")
        self.local_rank = _integer("LOCAL_RANK")
        self.local_world_size = _integer("LOCAL_WORLD_SIZE")

    def _read_submitit(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        self.job_type = "submitit"
        self.job_id = job.job_id
        self.master_addr = "127.0.0.1"  # the local executor has one node
        self.candidate_ports = _ports_of_job(self.job_id)
        self.rank = job.global_rank
        self.world_size = job.num_tasks
        self.local_rank = job.local_rank
        self.local_world_size = job.num_tasks // job.num_nodes

    def _read_slurm(self) -> None:
        self.job_type = "Slurm"
        self.job_id = os.environ["SLURM_JOB_ID"]
        node_list = os.environ.get("SLURM_STEP_NODELIST") or _variable("SLURM_JOB_NODELIST")
        n_nodes = _integer("SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in os.environ else "SLURM_JOB_NUM_NODES")
        self.master_addr = slurm.hostnames(node_list)[0]
        self.candidate_ports = _ports_of_job(self.job_id)
        self.rank = _integer("SLURM_PROCID")
        self.world_size = slurm.task_count()
        self.local_rank = _integer("SLURM_LOCALID")
        # Tasks spread unevenly over nodes still need a local world size that holds the local rank.
        self.local_world_size = max(self.world_size // n_nodes, self.local_rank + 1)

    def _be_single_process(self) -> None:
        self.job_type = "manual"
        self.job_id = ""
        self.master_addr = "127.0.0.1"
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))  # port 0 stands for any free one
            self.candidate_ports = [int(listener.getsockname()[1])]
        self.rank = self.local_rank = 0
        self.world_size = self.local_world_size = 1


def _ports_of_job(job_id: str) -> list[int]:
    generator = random.Random(int(job_id))
    candidates = [generator.randint(*PORT_RANGE) for _ in range(N_PORT_CANDIDATES)]
    # A port that `export` has set for this job leaves the other candidates; any other value is what the user wants.
    if "MASTER_PORT" in os.environ and _integer("MASTER_PORT") != candidates[0]:
        return [_integer("MASTER_PORT")]
    return candidates


def _variable(name: str) -> str:
    if name not in os.environ:
        raise RuntimeError(f"the launcher did not set {name}, which this process needs to find the others")
    return os.environ[name]


def _integer(name: str) -> int:
    value = _variable(name)
    if not value.isdecimal():
        raise RuntimeError(f"{name}={value!r} is not a number")
    return int(value)
