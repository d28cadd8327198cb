"""Every way in which a run can be wrong.

A message is one line: what is wrong, where, what was expected, what was found, and what to do.
"""


class ExplaindError(Exception):
    """Root of the package's own errors; the command line turns it into one line and exit status 2."""

    def __init__(self, what: str, *, where: object = None, expected: object = None, got: object = None, do: str | None = None) -> None:
        parts = [what if where is None else f"{what} ({where})"]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if do is not None:
            parts.append(do)
        super().__init__("; ".join(parts).replace("\n", " "))


class ConfigError(ExplaindError):
    """A configuration file, an override or an option names something that does not exist or has the wrong type."""


class RuleError(ExplaindError):
    """The optimizer, or one of its options, has no rule."""


class RecordError(ExplaindError):
    """The training loop did something that cannot be recorded faithfully; what was recorded before stays readable."""


class StoreError(ExplaindError):
    """A run or a ledger on disk is missing, damaged, of another schema version, or cannot be written."""


class ReplayError(ExplaindError):
    """The model, the data or the losses given do not fit what the run recorded."""


class RequestError(ExplaindError):
    """A decomposition was asked for that is impossible or too large."""
