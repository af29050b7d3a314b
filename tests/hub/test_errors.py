"""Messages for every response of the Hub, and for every way in which it may be unreachable."""

from __future__ import annotations

import socket
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants, errors

from dalle_zoo import DallePipeline
from dalle_zoo.hub import upload
from dalle_zoo.hub_errors import ExternalRepositoryError, HubError, checked_token, explained, hide_secrets


def refused(status: int, words: str = "", kind: type[errors.HfHubHTTPError] = errors.HfHubHTTPError) -> Any:
    headers = {"X-Error-Message": words} if words else {}
    response: Any = SimpleNamespace(status_code=status, headers=headers, request=None)
    return kind(f"{status} of a library", response=response)


def message(error: BaseException, **options: Any) -> str:
    with pytest.raises(HubError) as caught, explained("org/toy", **options):
        raise error
    text = str(caught.value)
    assert text.count("\n") == 0
    assert "org/toy" in text
    return text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refused(401), "refused the request (status 401): the token is wrong or expired, run `hf auth login`"),
        (refused(403, "You must accept the terms"), "403, 'You must accept the terms'): follow this message"),
        (refused(403), "the token lacks a permission, or a proxy blocks the request"),
        (refused(403, kind=errors.GatedRepoError), "is gated: request access on its page"),
        (refused(403, kind=errors.DisabledRepoError), "was disabled by its owner"),
        (refused(404, kind=errors.RepositoryNotFoundError), "there is no org/toy on"),
        (refused(404), "status 404): this address does not exist"),
        (refused(407), "the proxy requires a login"),
        (refused(410), "it was removed"),
        (refused(429), "status 429): there were too many requests, wait a few minutes"),
        (refused(500), "is out of order (status 500): try again later"),
        (refused(504, "<html>gateway</html>"), "is out of order (status 504): try again later"),
        (refused(418), "status 418): see its page"),
        (refused(404, kind=errors.RevisionNotFoundError), "has no revision 'v1'"),
    ],
)
def test_each_response_has_its_message(error: Any, expected: str) -> None:
    text = message(error, revision="v1")
    assert expected in text
    assert "check the network" not in text, "the network is fine"
    missing = errors.LocalEntryNotFoundError("not in the cache")
    missing.__cause__ = error
    if not isinstance(error, errors.RevisionNotFoundError):
        assert message(missing) == text, "the reason is in the chain of causes"


def named(name: str, text: str = "of a library", base: type[Exception] | None = None) -> Exception:
    """An exception of an HTTP library, by the name of its class."""
    library = errors.HfHubHTTPError.__bases__[0] if base is None else base
    return type(name, (library,), {})(text)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (named("ConnectError", "[Errno -2] Name or service not known"), "cannot be resolved: check the network (DNS)"),
        (socket.gaierror(-3, "Temporary failure in name resolution"), "cannot be resolved: check the network (DNS)"),
        (named("ProxyError"), "the proxy does not respond: check the variable HTTPS_PROXY"),
        (named("UnsupportedProtocol"), "HF_ENDPOINT must begin with https://"),
        (named("TooManyRedirects"), "it redirects without end: check the variable HF_ENDPOINT"),
        (named("RemoteProtocolError"), "it closed the connection before the response was complete"),
        (named("ReadTimeout"), "it did not respond in time"),
        (named("ConnectError", "[SSL: CERTIFICATE_VERIFY_FAILED]"), "its certificate cannot be verified"),
        (named("ConnectError", "[Errno 111] Connection refused"), "([Errno 111] Connection refused): check the"),
        (ConnectionResetError(104, "Connection reset by peer"), "did not respond ([Errno 104] Connection reset"),
        (errors.FileMetadataError("no commit hash"), "it responded, but not as a Hub does"),
    ],
)
def test_each_way_without_a_response_has_its_message(error: Exception, expected: str) -> None:
    assert expected in message(error)
    assert message(error, writes=True).endswith("the same command resumes the upload")
    missing = errors.LocalEntryNotFoundError("not in the cache")
    missing.__cause__ = error
    assert expected in message(missing)
    assert "not in the cache either. If a local folder was meant: no folder 'org/toy' exists" in message(missing)


def test_upload_errors_quote_the_hub() -> None:
    full = message(refused(403, "Private repository storage limit reached"), writes=True)
    assert "403, 'Private repository storage limit reached'): follow this message" in full
    assert "auth login" not in full
    assert "with a token that has write access" in message(refused(401), writes=True)
    assert "received another commit" in message(refused(412), writes=True)
    assert "the same command resumes the upload" in message(refused(500), writes=True)
    assert "did not respond (cut)" in message(RuntimeError("cut"), writes=True)


def test_unrelated_errors_are_not_changed() -> None:
    for error in (RuntimeError("a bug"), PermissionError(13, "no"), OSError(28, "full"), HubError("ours")):
        with pytest.raises(type(error)) as caught, explained("org/toy"):
            raise error
        assert caught.value is error
    with pytest.raises(ExternalRepositoryError), explained("org/toy"):
        raise refused(404, kind=errors.RemoteEntryNotFoundError)


def test_offline_mode_is_not_reported_as_network_error() -> None:
    missing = errors.LocalEntryNotFoundError("no")
    assert "at revision 'v1' is neither a local folder nor" in message(missing, revision="v1", offline="it is set")
    assert "HF_HUB_OFFLINE is set" in message(errors.OfflineModeIsEnabled("no"))


# ---------------------------------------------------------------- tokens


def test_messages_contain_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "from-the-environment")
    leak = "Illegal header value b'Bearer hf_SECRET123', Bearer s3cret, from-the-environment"
    for error in (named("LocalProtocolError", leak), refused(403, leak), RuntimeError(leak)):
        with pytest.raises(HubError) as caught, explained("org/toy", writes=True):
            raise error
        text = "".join(traceback.format_exception(caught.value))
        assert "***" in text
        shown = text.rpartition("HubError")[2]  # the cause is not printed
        assert not any(secret in shown for secret in ("SECRET123", "s3cret", "from-the-environment"))
        assert "Illegal header value b'Bearer hf_SECRET123'" not in text
    assert hide_secrets("hf_hub_download of hf_abcdefgh1") == "hf_hub_download of ***"


@pytest.mark.parametrize("token", ["", "  \n", "hf_SECRET 123", "hf_SECRET\n123", "hf_SECRÉT", 5, True])
def test_malformed_token_is_not_sent(token: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HfApi, "create_repo")
    for call in (
        lambda: DallePipeline.from_pretrained("org/toy", token=token),
        lambda: upload("org/toy", {}, token=token),
    ):
        with pytest.raises(HubError, match=r"^token (is empty|contains|must be text)") as caught:
            call()
        assert "SECR" not in str(caught.value)


def test_white_space_around_token_is_removed() -> None:
    assert checked_token(" hf_abc\r\n") == "hf_abc"
    assert checked_token(None) is None
    assert constants.ENDPOINT, "the messages name the address"
