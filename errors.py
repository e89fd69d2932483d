"""Errors that a user can mend: scripts turn them into one line and an exit code; all others keep their traceback."""


class UserError(Exception):
    """Something outside the program is wrong: a file, a folder, a network. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The command line is wrong, or contradicts the files that it names. Exit code 2."""

    exit_code = 2
