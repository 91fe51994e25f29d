"""What the Hub, the way to it or the disk refused: tried again where that may help, else said in one sentence with its remedy."""

import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
from huggingface_hub import errors as hub
from safetensors import SafetensorError

T = TypeVar("T")
ATTEMPTS = 4
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that may be others a moment later
REFUSALS = (httpx.HTTPError, OSError, RuntimeError, json.JSONDecodeError, hub.HFValidationError, SafetensorError)
CLOSED = "the folder cannot be written to; change its permissions or name another"
DISK = {
    errno.ENOSPC: "the disk is full; make room, or name a folder on another disk (TMPDIR is where a push prepares its files)",
    errno.EROFS: "the disk is read-only; name a folder that can be written to",
    errno.EACCES: CLOSED,
    errno.EPERM: CLOSED,
}


class HubError(OSError):
    """A push or a pull that did not happen: why, and what to do."""


def unwrapped(error: Exception) -> Exception:
    """The error itself, where an upload from a thread wraps it."""
    return error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error


def passing(error: Exception) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, hub.HfHubHTTPError):
        status, method = error.response.status_code, error.response.request.method
        return status in PASSING or (status, method) == (400, "PUT")  # the latter: other bytes were stored than announced
    if isinstance(error, hub.LocalEntryNotFoundError):  # not on the disk, and the Hub did not answer
        return not isinstance(error.__cause__, hub.OfflineModeIsEnabled)
    return isinstance(error, httpx.TransportError | json.JSONDecodeError)  # a proxy's page of HTML where JSON was due


def insist(action: Callable[[], T]) -> T:
    """What `action` returns, which is called again after 1, 2 and 4 seconds if it failed for a reason that may pass."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except REFUSALS as error:
            if not passing(unwrapped(error)):
                raise
            time.sleep(2**attempt)
    return action()


@contextmanager
def explained(doing: str, repo_id: str, endpoint: str) -> Iterator[None]:
    """Raise HubError with the remedy for what goes wrong inside. `doing`: "push to" or "pull from"."""
    try:
        yield
    except REFUSALS as error:
        if (remedy := reason(unwrapped(error), endpoint)) is None:
            raise
        raise HubError(f"cannot {doing} {repo_id}: {remedy}") from error


def reason(error: Exception, endpoint: str) -> str | None:
    """The cause and its remedy; None for an error that speaks for itself."""
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
    said = getattr(error, "server_message", None) or error
    if isinstance(error, hub.HFValidationError):
        return f"the Hub allows no such name; write owner/name, in letters, digits, '-', '_' and '.' ({error})"
    if isinstance(error, hub.OfflineModeIsEnabled) or isinstance(error.__cause__, hub.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, hub.RevisionNotFoundError):
        return "it has no such revision; look at its branches and tags on the Hub"
    if isinstance(error, hub.GatedRepoError):
        return "its owner grants access one by one; ask for it on the repository's page, and pass the token of that account"
    if status == 401 or isinstance(error, hub.LocalTokenNotFoundError):
        return (
            f"the token is missing or not valid, or the repository is not there ({said}); make a token at {endpoint}/settings/tokens "
            "and pass token=, set HF_TOKEN, or run `hf auth login`"
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token may not read it; check the name, or pass token="
    if status == 403:
        return f"the token may not do that ({said}); use one whose rights cover this owner's repositories"
    if passing(error):
        return f"{endpoint} cannot be reached or is busy ({said}; {ATTEMPTS} attempts); what arrived is kept, so run the same again"
    if status is not None:
        return f"the Hub answered {status} ({said}); nothing was changed"
    full = isinstance(error, SafetensorError) and "os error 28" in str(error)  # from Rust, without an errno
    number = errno.ENOSPC if full else getattr(error, "errno", None)
    return f"{DISK[number]} ({error})" if number in DISK else None
