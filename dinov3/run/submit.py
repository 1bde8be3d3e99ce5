"""Run a script as a job: on a Slurm cluster, in processes on this machine, or in this process.

    python -m dinov3.run.submit SCRIPT [options] [script arguments]

Notable: a Slurm job that is preempted or reaches its time limit is queued again under the same id, so it continues in
the same output directory. The command and the state of the code are recorded with each job.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Run by path: this file's directory, first on sys.path, would hide modules of the standard library.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import ast
import contextlib
import json
import os
import pdb
import pickle
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dinov3
from dinov3.configs.setup import make_output_dir
from dinov3.env import clean_env
from dinov3.run.arguments import choose_cluster, get_run_parser, get_submitit_parser, parse_arguments
from dinov3.run.job import FLAG, JOB_ID, CheckpointableSubmitter
from dinov3.run.watch_job import watch_job
from dinov3.utils.cluster import get_slurm_executor_parameters
from dinov3.utils.command_line import run_command_line
from dinov3.utils.environment import get_sha, run_git
from dinov3.utils.messages import did_you_mean

__all__ = ["CheckpointableSubmitter", "get_run_parser", "get_submitit_parser", "main", "submit_jobs"]

MAX_REQUEUES_AFTER_TIMEOUT = 30
SIGNAL_BEFORE_TIMEOUT_S = 120
UNNAMED_PICKLE = re.compile(r"[0-9a-f]{32}\.pkl")


def main(argv: Sequence[str] | None = None) -> int:
    """Submit a job.

    Args:
        argv: the arguments after the program's name. Default: those of the command line.

    Returns:
        The exit status: 0 once the job is submitted, or with `--wait` that of the job.

    Raises:
        FileNotFoundError: the script does not exist.
        ValueError: the script cannot be parsed or does not define the function, or a setting is wrong.
        RuntimeError: Slurm refuses the job, or the output directory cannot be written.
        ModuleNotFoundError: submitit is not installed.
    """
    command = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(command)
    script = _checked_script(args.module_path, args.callable_name)
    args.output_dir = os.path.abspath(os.path.expanduser(args.output_dir))
    task = CheckpointableSubmitter(str(script), args.callable_name, args.script_args, args.output_dir)
    name = f"{script.stem}:{args.callable_name}"
    if args.dry_run:
        _print_dry_run(task, args, name)
        return 0
    make_output_dir(_part_without_job_id(args.output_dir))
    # Taken before the job can start, written when its id is known.
    record = {"script": vars(task), "parameters": _parameters(args, name)} | _describe_launch(script, command)
    patch = run_git(script.parent, "diff", "HEAD")
    (job,) = submit_jobs([task], args, name=name)
    job.paths.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"job_id": job.job_id, **record}, indent=2) + "\n"
    (job.paths.folder / f"{job.job_id}_launch.json").write_text(text, encoding="utf-8")
    if patch:
        (job.paths.folder / f"{job.job_id}_uncommitted.patch").write_text(patch, encoding="utf-8")
    if args.cluster == "debug":
        return _run_here(job)
    _announce(job, args, name)
    try:
        return watch_job(job, args.cluster) if args.wait else 0
    except KeyboardInterrupt:
        if args.cluster == "slurm":
            print(f"\njob {job.job_id} continues without the launcher", file=sys.stderr)
        raise


def submit_jobs(tasks: Sequence[Callable[[], Any]], args: argparse.Namespace, *, name: str) -> list[Any]:
    """Submit one job per task; on Slurm several become an array.

    Args:
        tasks: what to call in each task of a job, usually `CheckpointableSubmitter`s.
        args: the options of `get_submitit_parser` and `output_dir`, the directory of the jobs' files (`%j` in it is
            the job id); `slurm_array_parallelism` jobs of an array run at the same time.
        name: of the jobs.

    Returns:
        submitit's jobs.

    Raises:
        ValueError: the cluster is unknown or does not answer.
        RuntimeError: Slurm refuses the job.
        ModuleNotFoundError: submitit is not installed.
    """
    submitit = _import_submitit()
    cluster = choose_cluster(args.cluster)
    retries = {"slurm_max_num_timeout": MAX_REQUEUES_AFTER_TIMEOUT}
    with clean_env():
        # submitit starts jobs in another directory, where they must find this package.
        root = Path(dinov3.__file__).resolve().parents[1]
        if root.name not in ("site-packages", "dist-packages"):
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
        executor = submitit.AutoExecutor(folder=args.output_dir, cluster=cluster, **retries)
        executor.update_parameters(**_parameters(args, name))
        try:
            with _output_not_inherited() if cluster == "local" else contextlib.nullcontext():
                return [executor.submit(tasks[0])] if len(tasks) == 1 else list(executor.submit_array(tasks))
        except submitit.core.utils.FailedJobError as error:
            _remove_leftovers(tasks, args, name)
            raise RuntimeError(f"Slurm refuses the job (--dry-run shows what it is given): {error}") from error


def _remove_leftovers(tasks: Sequence[Callable[[], Any]], args: argparse.Namespace, name: str) -> None:
    # submitit leaves files of refused jobs under random names, and somebody may be submitting another job there now.
    folder = _part_without_job_id(args.output_dir)
    script = _sbatch_script(args, name)
    for path in folder.glob(".submission_file_*.sh"):
        if not path.is_symlink() and path.read_text() == script:
            path.unlink(missing_ok=True)
    for path in folder.glob("*.pkl"):
        if UNNAMED_PICKLE.fullmatch(path.name):
            with contextlib.suppress(OSError, pickle.UnpicklingError, AttributeError):
                left = vars(pickle.loads(path.read_bytes()).function)
                if any(left == vars(task) for task in tasks):
                    path.unlink()


def _parameters(args: argparse.Namespace, name: str) -> dict[str, Any]:
    # For submitit's AutoExecutor, which ignores slurm_* on other clusters.
    srun_arguments = ["--kill-on-bad-exit=1"]
    given = {"gpus_per_node": args.gpus_per_node, "tasks_per_node": args.tasks_per_node}
    if args.cpus_per_task is not None:
        # Since Slurm 22.05, srun no longer takes it from sbatch.
        srun_arguments.append(f"--cpus-per-task={args.cpus_per_task}")
    return get_slurm_executor_parameters(
        args.nodes,
        args.ngpus,
        **{parameter: value for parameter, value in given.items() if value is not None},
        name=name,
        timeout_min=args.timeout,
        mem_gb=args.mem_gb,
        cpus_per_task=args.cpus_per_task,
        slurm_partition=args.slurm_partition,
        slurm_account=args.slurm_account,
        slurm_qos=args.slurm_qos,
        slurm_constraint=args.slurm_constraint,
        slurm_comment=args.comment or None,
        slurm_exclude=args.exclude or None,
        slurm_array_parallelism=args.slurm_array_parallelism,
        slurm_setup=args.slurm_setup,
        slurm_signal_delay_s=SIGNAL_BEFORE_TIMEOUT_S,
        slurm_srun_args=srun_arguments,
        # Some clusters requeue only jobs that ask for it.
        slurm_additional_parameters={"requeue": True} | ({"nice": args.slurm_nice} if args.slurm_nice else {}),
    )


def _checked_script(module_path: str, callable_name: str) -> Path:
    # Checked now, because a job may wait in the queue for days before Python would notice.
    script = Path(module_path).expanduser().resolve()
    if not script.is_file():
        raise FileNotFoundError(f"script {module_path} does not exist; the script comes before its arguments")
    if script.suffix != ".py":
        raise ValueError(f"{module_path} is not a Python file: its name must end in .py")
    try:
        body = ast.parse(script.read_text(encoding="utf-8"), filename=str(script)).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{module_path} is not valid Python: {error}") from error
    names = _top_level_names(body)
    if callable_name not in names and "*" not in names:
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        hint = did_you_mean(callable_name, functions) or f"; its functions: {', '.join(functions) or 'none'}"
        raise ValueError(f"{module_path} does not define {callable_name!r}{hint}; choose one with --callable-name")
    return script


def _top_level_names(body: Sequence[ast.AST]) -> set[str]:
    # Including those defined under `if` or `try`, but not inside functions and classes.
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Name):
            names |= {node.id} if isinstance(node.ctx, ast.Store) else set()
        else:
            names |= _top_level_names(list(ast.iter_child_nodes(node)))
    return names


def _part_without_job_id(output_dir: str) -> Path:
    parts = Path(output_dir).parts
    return Path(*parts[: next((i for i, part in enumerate(parts) if JOB_ID in part), len(parts))])


@contextlib.contextmanager
def _output_not_inherited() -> Iterator[None]:
    # Tasks write to their own files. A background process that held this one's output open would keep a reader of
    # that pipe waiting.
    sys.stdout.flush()
    sys.stderr.flush()
    copies = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in copies:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in copies.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _print_dry_run(task: CheckpointableSubmitter, args: argparse.Namespace, name: str) -> None:
    call = shlex.join([task.module_path, f"{FLAG}={args.output_dir}", *task.args])
    print(f"each task calls {task.callable_name} of: {call}", file=sys.stderr)
    if args.cluster == "slurm":
        print(_sbatch_script(args, name))
    else:
        n_tasks = 1 if args.cluster == "debug" else _parameters(args, name)["tasks_per_node"]
        print(f"{n_tasks} tasks on this machine (--cluster {args.cluster}), without Slurm", file=sys.stderr)


def _sbatch_script(args: argparse.Namespace, name: str) -> str:
    submitit = _import_submitit()

    class Writer(submitit.SlurmExecutor):  # type: ignore[name-defined]
        @classmethod
        def affinity(cls) -> int:
            return 1  # so that the script can be written where there is no Slurm

    writer = Writer(folder=args.output_dir)
    parameters = _parameters(args, name)
    generic = {key: value for key, value in parameters.items() if not key.startswith("slurm_")}
    specific = {key.removeprefix("slurm_"): value for key, value in parameters.items() if key.startswith("slurm_")}
    writer.update_parameters(**writer._convert_parameters(generic), **specific)
    return str(writer._make_submission_file_text(writer._submitit_command_str, ""))


def _run_here(job: Any) -> int:
    # submitit starts a debugger on an error; without a terminal nobody could use it.
    post_mortem = pdb.post_mortem
    if not sys.stdin.isatty():
        pdb.post_mortem = lambda *args, **kwargs: None
    try:
        job.results()
    finally:
        pdb.post_mortem = post_mortem
    return 0


def _announce(job: Any, args: argparse.Namespace, name: str) -> None:
    size = f"{args.nodes} x {job.num_tasks // args.nodes} tasks"
    cancel = f"scancel {job.job_id}" if args.cluster == "slurm" else f"kill {job.job_id}"
    print(f"submitted {args.cluster} job {job.job_id} ({name}, {size})")
    print(f"  directory  {job.paths.folder}")
    print(f"  log        {job.paths.stdout} (and .err)")
    print(f"  to stop it {cancel}", flush=True)


def _describe_launch(script: Path, command: Sequence[str]) -> dict[str, Any]:
    directory, git = script.parent, None
    head = run_git(directory, "rev-parse", "HEAD", "--show-toplevel")
    if head:
        commit, checkout = head.splitlines()
        git = {
            "checkout": checkout,
            "commit": commit,
            "branch": run_git(directory, "rev-parse", "--abbrev-ref", "HEAD").strip(),
            "status": run_git(directory, "status", "--porcelain").splitlines(),
        }
    return {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "python": sys.executable,
        "working_directory": os.getcwd(),
        "command": shlex.join(["python", "-m", "dinov3.run.submit", *command]),
        "git": git,
        "dinov3": get_sha(),
    }


def _import_submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("submitting jobs needs submitit: pip install submitit") from error
    return submitit


if __name__ == "__main__":
    run_command_line(lambda: sys.exit(main()))
