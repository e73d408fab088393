"""The one exception that means "the user can mend this": the door prints its message and exits with 2."""


class DataError(Exception):
    """A message that names the file, row or sample that is wrong and what to do about it."""
