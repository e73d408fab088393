"""One quick question to the model hub before its clients start their minute of retries."""

from __future__ import annotations

from pathlib import Path

from hybridssl.errors import UserError


def is_here(name: str) -> bool:
    """Whether a model is on this machine: a folder, or a hub id in the hub's cache. UserError for what is neither."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
    except (HFValidationError, ValueError) as error:
        raise UserError(f"{name!r} is neither a folder nor a hub id (org/name): {error}") from error


def require(what: str, seconds: float = 10.0) -> None:
    """UserError naming `what` when the hub cannot be reached (HF_ENDPOINT and HF_HUB_OFFLINE are heeded)."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)  # any answer will do, even a refusal
    except Exception as e:  # the HTTP library behind the client, and so its errors, differ between versions
        reason = type(e).__name__
        raise UserError(
            f"{what} is not on this machine and {constants.ENDPOINT} cannot be reached ({reason}): "
            "give a folder that holds it, or connect"
        ) from e
