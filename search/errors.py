"""The one kind of error that a command line answers with a line and exit code 2."""


class UserError(ValueError):
    """What was asked for cannot be done; the text is one line: what came, what was expected, what to do."""
