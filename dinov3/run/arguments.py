"""The launcher's command line: which options are its own, which go to the script, and where their defaults come from.

Users set options once for all jobs in `~/.config/dinov3/cluster.yaml`, by name, such as

    slurm_partition: gpu
    cpus_per_task: 12
    slurm_setup: [module load cuda]

or in the environment (`DINOV3_SLURM_PARTITION` for `slurm_partition`), which beats the file. Nothing about any site is
built in: an option that is not set is not passed to Slurm.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from dinov3.distributed import runtime
from dinov3.run.job import JOB_ID, split_output_dir
from dinov3.utils.cluster import slurm_answers
from dinov3.utils.messages import did_you_mean
from dinov3.utils.text import read_text

CLUSTERS = ("auto", "slurm", "local", "debug")
DEFAULT_NGPUS = 8
LEAST = {"ngpus": 0, "nodes": 1, "timeout": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1}
LEAST |= {"mem_gb": 0, "slurm_array_parallelism": 1}
PROGRAM = "python -m dinov3.run.submit"
CLUSTER_HELP = (
    "slurm; local: background processes on this machine; debug: one task in this process; "
    "auto: slurm if a controller answers, otherwise local (default: %(default)s)"
)
NGPUS_HELP = "GPUs per node, with one task each; 0: one task without a GPU (default: 8; on this machine: all it has)"
TIMEOUT_HELP = "minutes until the job is stopped, saved and queued again (default: %(default)s)"
SETUP_HELP = "shell line to run before the tasks start; may be repeated"
OUTPUT_DIR_HELP = "directory of the job and of the script; %%j is the job id (default: ./outputs/<script>/%%j)"
EPILOG = f"""\
Options that are not listed here go to SCRIPT, in their order; so does everything after --.

Where it runs, its size and what is for Slurm can be set once for all jobs in {{file}}
(e.g. slurm_partition: gpu) or in the environment (e.g. DINOV3_SLURM_PARTITION=gpu).

examples:
  {PROGRAM} dinov3/train/train.py --ngpus 8 --nodes 4 --config-file CONFIG.yaml train.dataset_path=ImageNet:root=DIR
  {PROGRAM} dinov3/eval/knn.py --cluster local --wait --ngpus 1 model.dino_hub=dinov3_vits16 output_dir=outputs/knn
  {PROGRAM} script.py --cluster slurm --dry-run -- --ngpus 3   # --ngpus is the script's
"""


def get_submitit_parser() -> argparse.ArgumentParser:
    """Return the options that say where and how a job runs, without those that say what it runs (`get_run_parser`)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where = parser.add_argument_group("where it runs")
    where.add_argument("--cluster", type=str, default="auto", metavar="{" + ",".join(CLUSTERS) + "}", help=CLUSTER_HELP)
    size = parser.add_argument_group("its size")
    size.add_argument("--ngpus", type=int, default=DEFAULT_NGPUS, metavar="N", help=NGPUS_HELP)
    size.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: %(default)s)")
    size.add_argument("--timeout", type=int, default=2800, metavar="N", help=TIMEOUT_HELP)
    size.add_argument("--gpus-per-node", type=int, metavar="N", help="if different from --ngpus")
    size.add_argument("--tasks-per-node", type=int, metavar="N", help="if different from --ngpus")
    size.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of each task")
    size.add_argument("--mem-gb", type=float, metavar="N", help="memory per node; 0: all of it")
    slurm = parser.add_argument_group("for Slurm (not passed unless set)")
    slurm.add_argument("--slurm-partition", type=str, metavar="NAME", help="partition, or several separated by commas")
    slurm.add_argument("--slurm-account", type=str, metavar="NAME", help="account to charge")
    slurm.add_argument("--slurm-qos", type=str, metavar="NAME", help="quality of service")
    slurm.add_argument("--slurm-constraint", type=str, metavar="FEATURES", help="node features, such as h100")
    slurm.add_argument("--slurm-nice", type=int, default=0, metavar="N", help="lower the priority by N")
    most_help = "how many jobs of an array run at the same time (default: %(default)s)"
    slurm.add_argument("--slurm-array-parallelism", type=int, default=256, metavar="N", help=most_help)
    slurm.add_argument("--slurm-setup", type=str, metavar="LINE", action="append", help=SETUP_HELP)
    slurm.add_argument("--comment", type=str, default="", metavar="TEXT", help="comment of the job")
    slurm.add_argument("--exclude", type=str, default="", metavar="NODES", help="nodes to avoid")
    return parser


def get_run_parser() -> argparse.ArgumentParser:
    """Return the whole command line of the launcher, with the built-in defaults."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} SCRIPT [options] [script arguments] [-- more script arguments]",
        description="Run a Python file on a Slurm cluster or on this machine. Its function main(argv) is called in\n"
        "each task; a job that is preempted or runs out of time is queued again and continues.",
        epilog=EPILOG.format(file=settings_file()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[get_submitit_parser()],
        allow_abbrev=False,
    )
    parser.add_argument("module_path", type=str, metavar="SCRIPT", help="the Python file")
    job = parser.add_argument_group("the job")
    job.add_argument(
        "--callable-name", type=str, default="main", metavar="NAME", help="function (default: %(default)s)"
    )
    job.add_argument("--output-dir", type=str, metavar="DIR", help=OUTPUT_DIR_HELP)
    job.add_argument("--wait", action="store_true", help="show the log until the job ends, and exit with its status")
    job.add_argument("--dry-run", action="store_true", help="only print what would be given to Slurm")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the launcher's options, complete them from the user's settings, and collect the script's arguments.

    Args:
        argv: the arguments after the program's name.

    Returns:
        The options, of which `cluster` is never `auto` and `ngpus` and `output_dir` are never None; and `script_args`.

    Raises:
        SystemExit: wrong options; argparse prints which.
        ValueError: wrong settings in the user's file or environment.
    """
    settings = user_settings()
    parser = get_run_parser()
    # None, because the default depends on the cluster: on this machine there are as many tasks as GPUs.
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
    """Return `wanted`, or for `auto` what is available: `slurm` or `local`.

    Raises:
        ValueError: no such kind of cluster, or no Slurm to submit to.
    """
    if wanted not in CLUSTERS:
        raise ValueError(f"--cluster: {_expected_cluster(wanted)}")
    if wanted not in ("auto", "slurm"):
        return wanted
    if slurm_answers():
        return "slurm"
    if wanted == "slurm":
        raise ValueError(
            "--cluster slurm: `scontrol ping` finds no controller. Submit from a node of the cluster "
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
        parser.error(f"{wanted} GPUs were requested, but this machine has {available}")
    args.ngpus = available if args.ngpus is None else args.ngpus


def _warn_of_near_misses(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    for token in unknown:
        flag = token.partition("=")[0]
        with_prefix = f"--slurm-{flag.removeprefix('--')}"
        # A high cutoff, because most of these are the script's own options.
        hint = did_you_mean(with_prefix if with_prefix in known else flag, known, cutoff=0.85)
        if flag.startswith("--") and hint:
            print(f"{flag} is not a launcher option, passing it to the script{hint}", file=sys.stderr)


def settings_file() -> Path:
    """Return where the user's settings are: `dinov3/cluster.yaml` in `$XDG_CONFIG_HOME`, by default `~/.config`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "dinov3" / "cluster.yaml"


def user_settings() -> dict[str, Any]:
    """Read the options of `get_submitit_parser` that the user's file and environment set; the environment wins.

    Raises:
        ValueError: a key of the file is unknown, or a value has the wrong type; the message says where.
    """
    options = {action.dest: action for action in get_submitit_parser()._actions}
    file = settings_file()
    found = {name: (value, f"{file}: {name}") for name, value in _read_settings(file, options).items()}
    for name in options:
        variable = f"DINOV3_{name.upper()}"
        if os.environ.get(variable):
            found[name] = (os.environ[variable], variable)
    return {name: _convert(options[name], value, origin) for name, (value, origin) in found.items()}


def _read_settings(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines such as 'slurm_partition: NAME', not a {type(content).__name__}")
    unknown = ", ".join(f"{name!r}{did_you_mean(str(name), options)}" for name in content if name not in options)
    if unknown:
        raise ValueError(f"{path}: unknown settings {unknown}; it takes {', '.join(options)}")
    return {name: value for name, value in content.items() if value is not None}


def _convert(option: Any, value: Any, origin: str) -> Any:
    if option.dest == "slurm_setup":
        lines = value if isinstance(value, list) else [value]
        if not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{origin}: expected shell lines, not {value!r}")
        return lines
    described = {int: "a whole number", float: "a number", str: "text"}[option.type]
    problem = f"{origin}: expected {described}, not {value!r}"
    # YAML has types of its own; int(1.5) and str(True) would hide a mistake.
    if isinstance(value, bool | list | dict) or (option.type is int and isinstance(value, float)):
        raise ValueError(problem)
    try:
        converted = option.type(value)
    except ValueError:
        raise ValueError(problem) from None
    if option.dest == "cluster" and converted not in CLUSTERS:
        raise ValueError(f"{origin}: {_expected_cluster(converted)}")
    return converted


def _expected_cluster(given: str) -> str:
    return f"expected one of {', '.join(CLUSTERS)}, not {given!r}{did_you_mean(given, CLUSTERS)}"
