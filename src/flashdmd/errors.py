"""Errors that a person can do something about."""

import errno
import re

GOES_ON = "what was saved is intact, and the same command goes on from there"
FULL = {errno.ENOSPC, errno.EDQUOT}  # of an OSError: the disk
WORD = re.compile(r"\S+")
TOKEN = re.compile(r"(?i)(\bhf_)[a-z0-9]{8,}|((?:token|password)=)[^\s&'\"]+")


def masked(text: str) -> str:
    """Without what signs somebody in: user:password of a URL (also of one that a path made of it,
    or that lacks its scheme), tokens of the hub, and what token= and password= are given.
    """
    return TOKEN.sub(r"\1\2***", WORD.sub(_unsigned, text))


def _unsigned(word: re.Match[str]) -> str:
    """Up to the last @, for a password may hold one, or a slash."""
    before, at, place = word[0].rpartition("@")
    start, colon, signed = before.partition(":")
    if not at or not colon:
        return word[0]
    if signed.startswith("/"):
        return f"{start}:{'//' if signed.startswith('//') else '/'}***@{place}"
    named = re.match(r".*['\"=(]", start)  # what stands before the user: a key, a quote
    return f"{named[0] if named else ''}***@{place}"


class UserError(ValueError):
    """What was given, what is accepted, what to do. Shown without a traceback; exit code 2.

    Names and passwords are not repeated, see `masked`.
    """

    def __str__(self) -> str:
        return masked(super().__str__())


class Stopped(BaseException):
    """Ctrl-C or SIGTERM where it cannot wait. Exit code 130.

    No KeyboardInterrupt, which the command line's library would end without a word.
    """


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Stopped on request: where the state is, from which the same call goes on. Exit code 130."""
