"""The output directory on a command line: found in every spelling, passed on in exactly one."""

from __future__ import annotations

import os
from collections.abc import Sequence

FLAG = "--output-dir"
KEY = "output_dir"
JOB_ID = "%j"


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
    """The arguments of a script in a job: exactly one `--output-dir=DIR`, absolute, `%j` replaced, before the others.

    Args:
        arguments: of the script; an output directory among them beats `output_dir`.
        output_dir: the job's.
        job_id: takes the place of `%j`.
    """
    own, others = split_output_dir(arguments)
    return [f"{FLAG}={real_output_dir(own or output_dir, job_id)}", *others]


def real_output_dir(output_dir: str, job_id: str) -> str:
    """`output_dir` as an absolute path without links, in which `%j` is the job id."""
    return os.path.realpath(os.path.expanduser(output_dir.replace(JOB_ID, job_id)))
