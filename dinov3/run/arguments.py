"""The launcher's command line: which options are its own, which go to the script, and where defaults come from."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinov3.distributed import runtime
from dinov3.run.output_dir import JOB_ID, split_output_dir
from dinov3.utils.cluster import CLUSTERS, cluster_settings, settings_file, slurm_answers

DEFAULT_NGPUS = 8
LEAST = {
    "ngpus": 0,
    "nodes": 1,
    "timeout": 1,
    "gpus_per_node": 0,
    "tasks_per_node": 1,
    "cpus_per_task": 1,
    "mem_gb": 0,
    "slurm_array_parallelism": 1,
}
PROGRAM = "python -m dinov3.run.submit"
NGPUS_HELP = "GPUs per node, and a task for each; 0: a task without GPU (default: 8; on this machine those it has)"
OUTPUT_DIR_HELP = "directory of the job and of the script; %%j is the job id (default: ./outputs/<script>/%%j)"
EPILOG = f"""\
Options that are not listed here go to SCRIPT, in their order; so does everything after --.

Where it runs, its size and what is for Slurm can be set for good in {{file}}
(e.g. slurm_partition: gpu) or in the environment (e.g. DINOV3_SLURM_PARTITION=gpu).

examples:
  {PROGRAM} dinov3/train/train.py --ngpus 8 --nodes 4 --config-file CONFIG.yaml train.dataset_path=ImageNet:root=DIR
  {PROGRAM} dinov3/eval/knn.py --cluster local --wait --ngpus 1 model.dino_hub=dinov3_vits16 output_dir=outputs/knn
  {PROGRAM} script.py --cluster slurm --dry-run -- --ngpus 3   # --ngpus is the script's
"""


def get_submitit_parser() -> argparse.ArgumentParser:
    """The options that say where and how a job runs, without those that say what it runs (`get_run_parser`)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where = _Group(parser, "where it runs")
    where.add(
        "--cluster", str, "auto", "{" + ",".join(CLUSTERS) + "}",
        "slurm; local: background processes on this machine; debug: one task in this process; "
        "auto: slurm if a controller answers, else local (default: %(default)s)",
    )  # fmt: skip
    size = _Group(parser, "its size")
    size.add("--ngpus", int, DEFAULT_NGPUS, "N", NGPUS_HELP)
    size.add("--nodes", int, 1, "N", "number of nodes (default: %(default)s)")
    size.add("--timeout", int, 2800, "N", "minutes until it is stopped, saved and queued again (default: %(default)s)")
    size.add("--gpus-per-node", int, None, "N", "if other than --ngpus")
    size.add("--tasks-per-node", int, None, "N", "if other than --ngpus")
    size.add("--cpus-per-task", int, None, "N", "CPU cores of each task")
    size.add("--mem-gb", float, None, "N", "memory per node; 0: all of it")
    slurm = _Group(parser, "for Slurm (not passed unless set)")
    slurm.add("--slurm-partition", str, None, "NAME", "partition, or several separated by commas")
    slurm.add("--slurm-account", str, None, "NAME", "account that is charged")
    slurm.add("--slurm-qos", str, None, "NAME", "quality of service")
    slurm.add("--slurm-constraint", str, None, "FEATURES", "node features, such as h100")
    slurm.add("--slurm-nice", int, 0, "N", "lower the priority by N")
    slurm.add("--slurm-array-parallelism", int, 256, "N", "jobs of an array that run at a time (default: %(default)s)")
    slurm.add("--slurm-setup", str, None, "LINE", "shell line before the tasks start; may be repeated", action="append")
    slurm.add("--comment", str, "", "TEXT", "comment of the job")
    slurm.add("--exclude", str, "", "NODES", "nodes to stay away from")
    return parser


def get_run_parser() -> argparse.ArgumentParser:
    """The launcher's whole command line, with the built-in defaults."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} SCRIPT [options] [script arguments] [-- more script arguments]",
        description="Run a Python file on a Slurm cluster, or on this machine. Its function main(argv) is called in\n"
        "each task; a job that is preempted or runs out of time is queued again and continues.",
        epilog=EPILOG.format(file=settings_file()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[get_submitit_parser()],
        allow_abbrev=False,
    )
    parser.add_argument("module_path", type=str, metavar="SCRIPT", help="the Python file")
    job = _Group(parser, "the job")
    job.add("--callable-name", str, "main", "NAME", "the function (default: %(default)s)")
    job.add("--output-dir", str, None, "DIR", OUTPUT_DIR_HELP)
    job.group.add_argument("--wait", action="store_true", help="show the log, and end when the job ends, as it ends")
    job.group.add_argument("--dry-run", action="store_true", help="only print what Slurm would be given")
    return parser


class _Group:
    """A titled group of options, each described on one line."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self.group = parser.add_argument_group(title)

    def add(self, flag: str, kind: type, default: Any, metavar: str, text: str, action: str = "store") -> None:
        self.group.add_argument(flag, type=kind, default=default, metavar=metavar, help=text, action=action)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The launcher's options, completed from the user's settings, and the script's arguments as `script_args`.

    Args:
        argv: the arguments after the program's name.

    Returns:
        The options; `cluster` is never `auto`, `ngpus` and `output_dir` are never None.

    Raises:
        SystemExit: wrong options; argparse prints which.
        ValueError: wrong settings in the user's file or environment.
    """
    settings = cluster_settings()
    parser = get_run_parser()
    # None tells a default from the same number given: on this machine there are as many tasks as it has GPUs.
    parser.set_defaults(ngpus=None)
    parser.set_defaults(**{name: value for name, value in settings.items() if name != "slurm_setup"})
    end = argv.index("--") if "--" in argv else len(argv)
    try:
        output_dir, own = split_output_dir(argv[:end])
        last_output_dir, rest = split_output_dir(argv[end + 1 :])
    except ValueError as error:
        parser.error(str(error))
    args, unknown = parser.parse_known_args(own)
    _warn_of_near_misses(parser, unknown)
    args.script_args = [*unknown, *rest]
    args.output_dir = last_output_dir or output_dir or f"outputs/{Path(args.module_path).stem}/{JOB_ID}"
    if args.slurm_setup is None:
        args.slurm_setup = settings.get("slurm_setup")
    try:
        # What Slurm would be given can be shown where there is none.
        shows_slurm = args.dry_run and args.cluster in ("auto", "slurm")
        args.cluster = "slurm" if shows_slurm else choose_cluster(args.cluster)
    except ValueError as error:
        parser.error(str(error))
    _check_size(parser, args)
    return args


def choose_cluster(wanted: str) -> str:
    """`wanted`, or for `auto` what there is: `slurm` or `local`.

    Raises:
        ValueError: no such kind of cluster, or no Slurm to submit to.
    """
    if wanted not in CLUSTERS:
        raise ValueError(f"--cluster: expected one of {', '.join(CLUSTERS)}, not {wanted!r}")
    if wanted not in ("auto", "slurm"):
        return wanted
    if slurm_answers():
        return "slurm"
    if wanted == "slurm":
        raise ValueError(
            "--cluster slurm: `scontrol ping` finds no controller. Submit from a node of the cluster, "
            "or use --cluster local; --dry-run works anywhere"
        )
    print("no Slurm controller answers: running on this machine (--cluster local)", file=sys.stderr)
    return "local"


def _check_size(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, not {value}")
    if args.cluster == "slurm":
        args.ngpus = DEFAULT_NGPUS if args.ngpus is None else args.ngpus
        return
    if args.nodes > 1:
        parser.error(f"--nodes {args.nodes}: --cluster {args.cluster} runs on this machine only")
    if args.cluster == "local" and JOB_ID in str(Path(args.output_dir).parent):
        parser.error(f"--output-dir {args.output_dir}: {JOB_ID} can only be in the last part with --cluster local")
    available = 0 if runtime.device().type == "cpu" else torch.accelerator.device_count()
    wanted = args.ngpus if args.gpus_per_node is None else args.gpus_per_node
    if wanted is not None and wanted > available > 0:
        parser.error(f"{wanted} GPUs are asked for, but this machine has {available}")
    args.ngpus = available if args.ngpus is None else args.ngpus


def _warn_of_near_misses(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    for token in unknown:
        flag = token.partition("=")[0]
        near = [option for option in known if option == f"--slurm-{flag[2:]}"]
        near = near or difflib.get_close_matches(flag, known, n=1, cutoff=0.85)
        if flag.startswith("--") and near:
            print(f"{flag} is no option of the launcher and goes to the script; meant {near[0]}?", file=sys.stderr)
