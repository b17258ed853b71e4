"""Errors that a user can mend: the command line prints their message as one line, without a traceback."""


class UserError(Exception):
    """Base of every error whose message names what is wrong, where, and the remedy."""


class OptionError(UserError, ValueError):
    """An option that cannot be used; the message names the option, its value and what would be accepted."""
