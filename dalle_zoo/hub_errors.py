"""Errors of the Hugging Face Hub: each response, and each way in which none arrives, has its own message."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from dalle_zoo.model_folder import CHECKSUMS

SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )[^\s'\"]+")
"""Access tokens of the Hub, in any text."""
MOST_CHARACTERS = 200
"""Length at which the Hub's own words are truncated."""


class HubError(ValueError):
    """The Hub does not have a model, refuses access, or cannot be reached. The message says which."""


class ExternalRepositoryError(HubError):
    """The repository has no ``sha256.json``: it contains an external model, or none."""


# ---------------------------------------------------------------- tokens


def hide_secrets(text: str) -> str:
    """Replaces access tokens in a text by asterisks.

    Example:
        >>> hide_secrets("Illegal header value b'Bearer hf_abcdefgh'")
        "Illegal header value b'Bearer ***'"
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if secret := os.environ.get(name, "").strip():
            text = text.replace(secret, "***")
    return SECRET.sub("***", text)


def checked_token(token: object) -> str | None:
    """Returns an access token without the white space around it.

    Raises:
        HubError: The token cannot be one. The message does not contain it.
    """
    if token is None:
        return None
    if not isinstance(token, str):
        raise HubError(f"token must be text, got {type(token).__name__}")
    if not token.strip():
        raise HubError("token is empty: omit it to use the stored token, or pass one of your account on the Hub")
    if not re.fullmatch(r"[!-~]+", token.strip()):  # an HTTP library would repeat it in its error
        raise HubError("token contains spaces, line breaks or letters that no token has: copy it again")
    return token.strip()


# ---------------------------------------------------------------- responses


@contextmanager
def explained(
    name: str, *, revision: str | None = None, offline: str | None = None, writes: bool = False
) -> Iterator[None]:
    """Replaces errors of huggingface_hub, and of the HTTP library below it, with errors that say what to do.

    Args:
        name: ``organization/name``.
        revision: Requested revision. Defaults to none.
        offline: Why only cached files are used. Defaults to none, the Hub is accessed.
        writes: Whether the block uploads. Defaults to False.

    Raises:
        HubError: The Hub refused, or did not respond.
        ExternalRepositoryError: The repository exists, and has no ``sha256.json``.
    """
    from huggingface_hub import constants, errors

    # The base classes are those of the HTTP library, which differs between versions of huggingface_hub. An upload
    # raises RuntimeError.
    library = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)
    library = tuple(base for base in library if base is not OSError)
    others = (errors.FileMetadataError, ConnectionError, TimeoutError, socket.gaierror)
    no_response: tuple[type[Exception], ...] = (*library, *others)
    where = f"{name} on {constants.ENDPOINT}"
    try:
        yield
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{where} cannot be {'written to' if writes else 'read'}: HF_HUB_OFFLINE is set") from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{where} has no revision {revision!r}: see its branches and tags") from None
    except errors.LocalEntryNotFoundError as error:
        if offline is None:
            raise HubError(_no_file(where, error)) from None
        at = f" at revision {revision!r}" if revision else ""
        raise HubError(f"{name}{at} is neither a local folder nor in the Hub's cache, and {offline}") from None
    except errors.EntryNotFoundError as error:
        raise ExternalRepositoryError(f"{where} is not a model of dalle-zoo: it has no {CHECKSUMS}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(refusal(where, error, name, writes=writes)) from None
    except no_response as error:
        raise HubError(silence(where, error, writes=writes)) from None
    except RuntimeError as error:
        if not writes:
            raise
        raise HubError(silence(where, error, writes=True)) from None


def _no_file(where: str, error: BaseException) -> str:
    """Message for a file that is not in the cache: huggingface_hub stores the reason in the chain of causes."""
    from huggingface_hub.errors import HfHubHTTPError

    name = where.partition(" ")[0]
    for reason in list(exception_chain(error))[1:]:
        if isinstance(reason, HfHubHTTPError):
            return refusal(where, reason, name)
    unknown = f"it is not in the cache either. If a local folder was meant: no folder {name!r} exists"
    return f"{silence(where, error)}; {unknown}"


def refusal(where: str, error: Any, name: str, *, writes: bool = False) -> str:
    """Returns the message for an HTTP status.

    Args:
        where: Repository and endpoint.
        error: An error of huggingface_hub with a response.
        name: ``organization/name``.
        writes: Whether the request was part of an upload.
    """
    kind = type(error).__name__
    status = error.response.status_code if error.response is not None else 0
    words = _words(error)
    if kind == "GatedRepoError":
        return f"{where} is gated: request access on its page, and pass the token of the user who has it"
    if kind == "DisabledRepoError":
        return f"{where} was disabled by its owner or by the Hub{words}: choose another model"
    if writes and (status == 401 or kind == "RepositoryNotFoundError"):
        return (
            f"{where} cannot be written to with this token{words}: run `hf auth login` as a member of the "
            "organization, with a token that has write access"
        )
    if kind == "RepositoryNotFoundError":
        return (
            f"there is no {where}, or it is private and the token does not give access: check the name, run "
            f"`hf auth login`, or pass token=. If a local folder was meant: no folder {name!r} exists"
        )
    again = "; the same command resumes the upload" if writes else ""
    if status == 412:
        return f"{where} received another commit in the meantime; nothing was changed: run the same command again"
    if status >= 500:
        return f"{where} is out of order (status {status}{words}): try again later{again}"
    advice = {
        401: "the token is wrong or expired, run `hf auth login`",
        403: "follow this message" if words else "the token lacks a permission, or a proxy blocks the request",
        404: "this address does not exist, check the name and the variable HF_ENDPOINT",
        407: "the proxy requires a login, set it in HTTPS_PROXY",
        410: "it was removed, choose another model",
        429: "there were too many requests, wait a few minutes, or log in for a higher limit",
    }
    return f"{where} refused the request (status {status}{words}): {advice.get(status, 'see its page')}{again}"


def _words(error: Any) -> str:
    """The Hub's own words on one line, in a form that continues a sentence; empty if there are none."""
    headers = error.response.headers if error.response is not None else {}
    text = " ".join(str(headers.get("X-Error-Message") or error.server_message or "").split())
    if not text or "<" in text:  # an HTML page is not for people
        return ""
    return f", {hide_secrets(text[:MOST_CHARACTERS])!r}"


# ---------------------------------------------------------------- no response


def silence(where: str, error: BaseException, *, writes: bool = False) -> str:
    """Returns the message for a request without a response.

    Args:
        where: Repository and endpoint.
        error: What the HTTP library raised.
        writes: Whether the request was part of an upload.
    """
    endpoint = where.rpartition(" on ")[2]
    again = "; the same command resumes the upload" if writes else ""
    chain = list(exception_chain(error))
    kinds = {type(each).__name__ for each in chain}
    text = " ".join(str(each) for each in chain)
    known = (
        ("ProxyError" in kinds, "the proxy does not respond: check the variable HTTPS_PROXY"),
        ("UnsupportedProtocol" in kinds or "InvalidURL" in kinds,
         "the address is not valid: HF_ENDPOINT must begin with https://"),
        ("TooManyRedirects" in kinds, "it redirects without end: check the variable HF_ENDPOINT"),
        ("FileMetadataError" in kinds, "it responded, but not as a Hub does: check HF_ENDPOINT, and whether a proxy "
         "or a login page answers in its place"),
        ("gaierror" in kinds or "Name or service not known" in text or "name resolution" in text,
         f"the name of {endpoint} cannot be resolved: check the network (DNS) and the variable HF_ENDPOINT"),
        ("CERTIFICATE_VERIFY_FAILED" in text, "its certificate cannot be verified: check the clock, and the "
         "certificates of your organization (SSL_CERT_FILE)"),
        (any("Timeout" in kind for kind in kinds), "it did not respond in time: check the network"),
        ("RemoteProtocolError" in kinds, "it closed the connection before the response was complete: run the same "
         "command again"),
    )  # fmt: skip
    for applies, reason in known:
        if applies:
            return f"{where} cannot be reached: {reason}{again}"
    detail = hide_secrets(" ".join(str(chain[-1]).split())[:MOST_CHARACTERS])
    return f"{where} did not respond ({detail}): check the network{again}"


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and those that it was raised from or while handling."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
