"""The one exception that means "the user can mend this": doors print its message and exit with 2."""


class UserError(Exception):
    """A message that names the thing that is wrong and what to do about it."""
