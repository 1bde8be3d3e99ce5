"""What runs in each task of a submitted job, and the output directory on its command line.

Notable: this module imports nothing heavy. submitit installs its signal handlers after it has read the pickled job, and
a signal that arrives before that, while Python is still importing torch, would kill the task.
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

logger = logging.getLogger("dinov3")

FLAG = "--output-dir"
KEY = "output_dir"
JOB_ID = "%j"
GRACE_FOR_OTHER_TASKS_S = 5


def split_output_dir(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take the output directory out of a command line.

    Args:
        arguments: tokens among which may be `--output-dir DIR`, `--output-dir=DIR` or `output_dir=DIR`.

    Returns:
        The last directory given, None without one; and the other tokens in their order.

    Raises:
        ValueError: `--output-dir` without a directory.
    """
    found: str | None = None
    others: list[str] = []
    tokens = iter(arguments)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name == FLAG or (name == KEY and equals):
            found = value if equals else next(tokens, "")
            if not found:
                raise ValueError(f"{name}: expected a directory after it")
        else:
            others.append(token)
    return found, others


def with_output_dir(arguments: Sequence[str], output_dir: str, job_id: str) -> list[str]:
    """Return a script's arguments with exactly one `--output-dir=DIR` (absolute, `%j` replaced) before the others.

    Args:
        arguments: of the script; an output directory among them beats `output_dir`.
        output_dir: the job's.
        job_id: replaces `%j`.
    """
    own, others = split_output_dir(arguments)
    directory = os.path.realpath(os.path.expanduser((own or output_dir).replace(JOB_ID, job_id)))
    return [f"{FLAG}={directory}", *others]


class CheckpointableSubmitter:
    """Calls a function of a Python file in a job, and again with the same arguments after each requeue.

    Args:
        module_path: the Python file.
        callable_name: its function, which takes a list of arguments without a program name.
        args: the arguments. One `--output-dir=DIR` is put before them, unless they contain one.
        output_dir: where the job logs, and what the script gets as `--output-dir`; `%j` stands for the job id.
    """

    def __init__(self, module_path: str, callable_name: str, args: Sequence[str], output_dir: str) -> None:
        self.module_path = str(Path(module_path).expanduser().resolve())
        self.callable_name = callable_name
        self.args = list(args)
        self.output_dir = os.path.abspath(os.path.expanduser(output_dir))
        self.working_dir = os.getcwd()
        self.visible_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self) -> Any:
        """Call the function and return what it returns."""
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
                # submitit would report a script that ends with sys.exit(0) as failed.
                if end.code not in (None, 0):
                    raise
                return None
            finally:
                cleanup_logging()

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Tell submitit, when the job is preempted, to queue the same call again under the same job id."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *args, **kwargs)

    @contextlib.contextmanager
    def _set_up_task(self, job: Any) -> Iterator[None]:
        from dinov3.distributed import TorchDistributedEnvironment

        if job.cluster == "debug":
            yield  # runs in the launcher's own process, whose environment must not change
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
        # It makes tasks ignore SIGTERM, although nothing kills them later, as Slurm would.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # It numbers GPUs from 0, whichever ones the user has chosen.
        if self.visible_gpus:
            count = len(os.environ["CUDA_VISIBLE_DEVICES"].split(","))
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.visible_gpus.split(",")[:count])
        # It creates a directory that is literally called %j.
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
        return  # they will notice at their next collective
    for process in found.stdout.split():
        if int(process) != os.getpid() and os.getppid() == controller:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
