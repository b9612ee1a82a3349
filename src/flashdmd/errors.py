"""Errors that a person can do something about."""

import errno

FULL = {errno.ENOSPC, errno.EDQUOT}  # of an OSError: the disk


class UserError(ValueError):
    """What was given, what is accepted, what to do. Shown without a traceback; exit code 2."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Stopped on request: where the state is, from which the same call goes on. Exit code 130."""
