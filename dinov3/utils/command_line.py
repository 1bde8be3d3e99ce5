"""Command lines: unknown flags are refused by name, and errors that the user can fix are one clear message."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from dinov3.utils.memory import keep_freed_memory
from dinov3.utils.messages import did_you_mean
from dinov3.utils.text import escape_what_cannot_be_printed

#: Errors whose message is written for the person at the keyboard.
USER_ERRORS = (ValueError, OSError, RuntimeError, NotImplementedError, ModuleNotFoundError)


class ArgumentParser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and names an unknown flag, and the right one, before anything else."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; unknown flags end the program."""
        given = list(sys.argv[1:] if args is None else args)
        self.refuse_unknown_flags(given)
        return super().parse_known_args(given, namespace)

    def refuse_unknown_flags(self, tokens: Iterable[str]) -> None:
        """End the program with a message about the flags among `tokens` that do not exist, if there are any."""
        shown = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        hidden = [flag for action in self._actions for flag in action.option_strings]
        flags = (token for token in tokens if re.match("--?[A-Za-z]", token))
        unknown = [flag + suggest_flag(flag, shown) for flag in flags if flag.partition("=")[0] not in hidden]
        if unknown:
            self.error(f"unknown flag{'s' if len(unknown) > 1 else ''}: {', '.join(unknown)}")


def suggest_flag(given: str, known: Iterable[str]) -> str:
    """Say which flag is meant by an unknown one, or nothing.

    Args:
        given: the flag, possibly with `=value`.
        known: the flags that exist.
    """
    flag = given.partition("=")[0]
    if flag.replace("_", "-") == "--local-rank":
        return " (torch.distributed.launch passes it: start with torchrun, which needs no such flag)"
    return did_you_mean(flag.replace("_", "-"), known)


def run_command_line(main: Callable[[], Any]) -> NoReturn:
    """Call `main()` and exit with 0, with 130 on Ctrl-C, or with 1 and `error: ...` on an error that a user can fix.

    `DINOV3_TRACEBACK=1` shows the traceback instead. Other exceptions are bugs and always show it.
    """
    escape_what_cannot_be_printed()
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        if os.environ.get("DINOV3_TRACEBACK") == "1" or not str(error):
            raise
        advice = "out of memory: use smaller batches or images; " if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {advice}{error}\n(DINOV3_TRACEBACK=1 shows where it was raised)", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
