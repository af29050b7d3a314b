"""``dalle-zoo serve``: errors before a model is loaded, and Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dalle_zoo.cli import serve
from dalle_zoo.cli.main import main


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN, raising=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reachable from other machines: set the variable DALLE_ZOO_TOKEN"),
        (["--host", "::"], "--host :: is reachable from other machines"),
        (["--host", "example.org"], "--host example.org is reachable from other machines"),
        (["--port", "70000"], "--port must be an integer in 0..65535, got 70000"),
        (["--max-images", "65"], "--max-images must be an integer in 1..64 (of --batch-size), got 65"),
        (["--max-waiting", "0"], "--max-waiting must be an integer"),
    ],
)
def test_wrong_options_raise(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "composition", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("token", ["two words", "m\u00fcll", "caf\udce9", "a\n"])
def test_a_token_can_be_sent_in_a_header(
    token: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(serve.TOKEN, token)
    assert main(["serve", "composition"]) == 2
    said = capsys.readouterr().err
    assert f"{serve.TOKEN} must consist of printable ASCII characters without spaces" in said
    assert token not in said


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_hosts_need_no_token(host: str) -> None:
    assert serve.is_loopback(host)


def test_port_in_use_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "composition", "--port", str(port)]) == 2
    assert f"cannot serve at 127.0.0.1, port {port} (Address already in use)" in capsys.readouterr().err


def test_missing_extra_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("gradio_that_is_not_installed",))
    assert main(["serve"]) == 2
    assert "serve needs gradio_that_is_not_installed: pip install 'dalle-zoo[web]'" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_stops_the_server(tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "dalle_zoo", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(serve.__file__).parents[2])},
        # A shell starts background commands with SIGINT ignored, and a new process inherits that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert server.stdout is not None
        assert re.match(r"composition at http://127\.0\.0\.1:\d+ ", server.stdout.readline())
        server.send_signal(signal.SIGINT)
        rest, errors = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert (server.returncode, rest, errors) == (0, "stopped\n", "")
