"""Errors that a user can mend: scripts turn them into one line and an exit code; all others keep their traceback."""

from contextlib import contextmanager


class UserError(ValueError):
    """Something outside the program is wrong: a file, a folder, a network. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The command line, or the library's call, is wrong, or contradicts the files that it names. Exit code 2."""

    exit_code = 2


@contextmanager
def as_usage_error():
    """A ValueError of transport/ or models.py, which know nothing of users, becomes a UsageError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def told_as(flag, usual="--ckpt"):
    """A UserError that speaks of the usual flag speaks of another, under which the file was given."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace(usual, flag, 1)) from error
