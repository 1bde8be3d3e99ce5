"""Ending a command: quietly, or with one clear message instead of a traceback for an error that the user can fix."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from dinov3.utils.text import escape_what_cannot_be_printed

#: Errors whose message is written for the person at the keyboard.
USER_ERRORS = (ValueError, OSError, RuntimeError, NotImplementedError, ModuleNotFoundError)


def run_command_line(main: Callable[[], Any]) -> NoReturn:
    """Call `main()` and exit with 0, with 130 on Ctrl-C, or with 1 and `error: ...` on an error that a user can fix.

    `DINOV3_TRACEBACK=1` shows the traceback instead. Other exceptions are bugs and always show it.
    """
    escape_what_cannot_be_printed()
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
