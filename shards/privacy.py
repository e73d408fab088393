"""Identifiers become salted hashes: the same patient stays the same patient, and nobody without the salt knows which.

The salt is the user's, is read from a file of theirs, and is never written anywhere.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from shards.errors import DataError

SHORTEST = 16  # characters; a short salt can be guessed, and with it the patients
_MAKE = 'python -c "import secrets; print(secrets.token_hex(32))" > salt.txt'


class Salt:
    """`hash(kind, value)`: 24 hex digits of a keyed blake2b. One `kind` says nothing about another."""

    def __init__(self, secret: str):
        if len(secret) < SHORTEST:
            raise DataError(f"the salt has {len(secret)} characters and needs {SHORTEST}: make one with\n  {_MAKE}")
        self._key = blake2b(secret.encode()).digest()

    def hash(self, kind: str, value: str) -> str:
        person = kind.encode()[:16]
        return blake2b(value.encode(), key=self._key, person=person, digest_size=12).hexdigest()


def read_salt(path: Path) -> str:
    """The first line of a file. DataError when there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise DataError(f"--salt-file {path} cannot be read; make one with\n  {_MAKE}") from None
    return lines[0].strip() if lines else ""


def missing_salt(files: int) -> DataError:
    return DataError(
        f"{files:,} DICOM files name their patients. Their identifiers are stored hashed with a salt that only you "
        f"know: make one, keep it secret, and name it with --salt-file\n  {_MAKE}"
    )
