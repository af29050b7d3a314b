"""Errors that a person can act on, shown without a traceback."""


class UserError(Exception):
    """A mistake in what was asked; the message says what was expected, what came and what to do."""
