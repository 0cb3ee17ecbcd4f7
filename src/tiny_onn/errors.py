"""The one exception for mistakes a user can mend."""


class UserError(ValueError):
    """Bad input in one line: what, got, expected, remedy. The CLI prints it and exits with 2."""
