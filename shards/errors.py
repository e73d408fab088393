"""The exceptions that mean "the user can mend this": the door prints the message and exits with 2."""


class DataError(Exception):
    """A message that names the file, row or sample that is wrong and what to do about it."""


class FetchError(DataError):
    """Data at an address cannot be had. No fault of a sample: a run stops, and goes on later where it was."""
