"""Errors that a person can do something about."""

import errno
import re

GOES_ON = "what was saved is intact, and the same command goes on from there"
FULL = {errno.ENOSPC, errno.EDQUOT}  # of an OSError: the disk
SECRET = re.compile(r"(:/{1,2})[^/\s@]+@")  # of a URL, or of one taken for a path: user:password


class UserError(ValueError):
    """What was given, what is accepted, what to do. Shown without a traceback; exit code 2.

    Names and passwords inside URLs are not repeated.
    """

    def __str__(self) -> str:
        return SECRET.sub(r"\1***@", super().__str__())


class Stopped(BaseException):
    """Ctrl-C or SIGTERM where it cannot wait. Exit code 130.

    No KeyboardInterrupt, which the command line's library would end without a word.
    """


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Stopped on request: where the state is, from which the same call goes on. Exit code 130."""
