"""Errors that a person can do something about."""

import errno
import re

FULL = {errno.ENOSPC, errno.EDQUOT}  # of an OSError: the disk
SECRET = re.compile(r"//[^/\s@]+@")  # user:password in a URL


class UserError(ValueError):
    """What was given, what is accepted, what to do. Shown without a traceback; exit code 2.

    Names and passwords inside URLs are not repeated.
    """

    def __str__(self) -> str:
        return SECRET.sub("//***@", super().__str__())


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Stopped on request: where the state is, from which the same call goes on. Exit code 130."""
