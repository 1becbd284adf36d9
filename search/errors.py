"""The one kind of error that a command line answers with a line and exit code 2."""

# A limit beyond which nobody waits for a measurement.
_MOST_SECONDS = 86_400.0


def one_line(error: BaseException) -> str:
    """What went wrong, by its type: errors of libraries often have several lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class UserError(ValueError):
    """What was asked for cannot be done; the text is one line: what came, what was expected, what to do."""


def check_seconds(seconds: float) -> None:
    """Refuse an option --seconds that is no time to wait.

    Raises:
        UserError: it is none.
    """
    if not 0 < seconds <= _MOST_SECONDS:  # neither is true of nan
        raise UserError(f"--seconds {seconds:g}; expected a number above 0, at most {_MOST_SECONDS:.0f}")
