"""What runs in each task of a submitted job.

Notable: this module imports nothing heavy. submitit installs its signal handlers when it has read the pickled job, and
a signal that comes before them, while Python is busy importing torch, would kill the task.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinov3.env import set_triton_cache_dir
from dinov3.run.output_dir import JOB_ID, split_output_dir, with_output_dir

logger = logging.getLogger("dinov3")

GRACE_FOR_OTHER_TASKS_S = 5


class CheckpointableSubmitter:
    """A function of a Python file, to be called in a job, again after each requeue, with the same arguments.

    Args:
        module_path: the Python file.
        callable_name: its function, which takes a list of arguments without a program name.
        args: the arguments. One `--output-dir=DIR` is added before them, unless they have one.
        output_dir: where the job logs and what the script gets as `--output-dir`; `%j` stands for the job id.
    """

    def __init__(self, module_path: str, callable_name: str, args: Sequence[str], output_dir: str) -> None:
        self.module_path = str(Path(module_path).expanduser().resolve())
        self.callable_name = callable_name
        self.args = list(args)
        self.output_dir = os.path.abspath(os.path.expanduser(output_dir))
        self.working_dir = os.getcwd()
        self.visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self) -> Any:
        """Run the function; returns what it returns."""
        from dinov3.logging import cleanup_logging, setup_logging
        from dinov3.utils.custom_callable import load_custom_callable, script_directory_on_path

        job = _job_environment()
        arguments = with_output_dir(self.args, self.output_dir, "" if job is None else job.job_id)
        os.chdir(self.working_dir)
        with contextlib.nullcontext() if job is None else self._set_up_task(job):
            setup_logging(output=split_output_dir(arguments)[0], level=logging.INFO)
            try:
                command = shlex.join([self.module_path, *arguments])
                logger.info("calling %s of %s in %s", self.callable_name, command, self.working_dir)
                with script_directory_on_path(self.module_path):
                    return load_custom_callable(self.module_path, self.callable_name)(arguments)
            except SystemExit as end:
                # submitit would take the good end of a script that calls sys.exit for a failure.
                if end.code not in (None, 0):
                    raise
                return None
            finally:
                cleanup_logging()

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """submitit's hook when the job is preempted: the same call, to be queued again under the same job id."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)

    @contextlib.contextmanager
    def _set_up_task(self, job: Any) -> Iterator[None]:
        from dinov3.distributed import TorchDistributedEnvironment

        if job.cluster == "debug":
            yield  # in the process of the launcher, which is left as it is
            return
        if job.cluster == "local":
            self._undo_what_submitit_does_locally()
        set_triton_cache_dir()
        TorchDistributedEnvironment().export(overwrite=True)
        try:
            yield
        except Exception:
            if job.cluster == "local":
                atexit.register(_end_other_tasks, int(job.job_id))
            raise

    def _undo_what_submitit_does_locally(self) -> None:
        # It makes tasks deaf to SIGTERM, although nothing ends them later, as Slurm would.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # It counts GPUs from 0, whichever the user has chosen.
        if self.visible_gpus:
            count = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.visible_gpus.split(",")[:count])
        # It makes a directory that is really called %j.
        if JOB_ID in self.output_dir:
            with contextlib.suppress(OSError):
                os.rmdir(self.output_dir)


def _job_environment() -> Any:
    import submitit

    try:
        return submitit.JobEnvironment()
    except RuntimeError:  # called directly, not by submitit
        return None


def _end_other_tasks(controller: int) -> None:
    # As srun and torchrun do when a process fails; submitit's local controller would wait for the others.
    if os.getppid() != controller:
        return
    time.sleep(GRACE_FOR_OTHER_TASKS_S)  # for their own error messages
    try:
        found = subprocess.run(["pgrep", "-P", str(controller)], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return  # they notice at their next collective
    for process in found.stdout.split():
        if int(process) != os.getpid() and os.getppid() == controller:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
