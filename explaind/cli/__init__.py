"""The command line: thin verbs that parse, call one function, and print.

Exit status: 0 fine, 1 a check failed, 2 bad input, with one line that says why.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import CycloptsError

from explaind.cli import diagnosing, exchanging, ledgers, pruning, studies, transplanting
from explaind.cli.terminal import BAD_INPUT, FINE, app
from explaind.errors import ExplaindError

VERBS = (ledgers, diagnosing, studies, transplanting, pruning, exchanging)
"""Importing them is what fills the app."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit status; what is wrong with the input is said in one line on stderr."""
    sys.path.insert(0, str(Path.cwd()))  # a user's own task, package.module:Name, is looked for where they stand
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return status if isinstance(status, int) else FINE
    except (ExplaindError, CycloptsError) as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else ""))
    except MemoryError:
        return _refused("out of memory; nothing that was recorded is lost: free some, or give decompose less (--memory)")
    except KeyboardInterrupt:
        return _refused("stopped; what was recorded so far stays readable, and decompose goes on where it was")


def _refused(reason: str) -> int:
    print(f"explaind: {' '.join(reason.split())}", file=sys.stderr)
    return BAD_INPUT


def script() -> None:
    """The ``explaind`` command."""
    sys.exit(main())
