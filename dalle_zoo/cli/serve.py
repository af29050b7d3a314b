"""``dalle-zoo serve``: a web page and OpenAI's image endpoint for one model."""

from __future__ import annotations

import ipaddress
import os
import socket
from argparse import Namespace
from importlib.util import find_spec

from dalle_zoo.cli.errors import UserError
from dalle_zoo.cli.parser import parser
from dalle_zoo.cli.sampling import DTYPES, MODEL_HELP, choose_device, without_collection
from dalle_zoo.values import as_integer
from dalle_zoo.zoo import DEFAULT_MODEL, check_location

TOKEN = "DALLE_ZOO_TOKEN"
"""Environment variable with the token that clients must send."""
NEEDED = ("gradio", "fastapi", "uvicorn")
SHUTDOWN_SECONDS = 3
"""Time for open connections when the server ends."""


def serve(arguments: list[str]) -> None:
    """Serves a model until Ctrl-C."""
    p = parser(
        "serve",
        "Serve a model: a web page, and POST /v1/images/generations as OpenAI's API has it.\n"
        f"The variable {TOKEN} holds a token that clients must send; other hosts than this one need it.\n\n"
        "  dalle-zoo serve                                       the bundled model at http://127.0.0.1:7860\n"
        f"  {TOKEN}=... dalle-zoo serve my-model --host 0.0.0.0    for other machines",
    )
    p.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=MODEL_HELP)
    p.add_argument("--host", default="127.0.0.1", help="address to bind to [127.0.0.1: this machine only]")
    p.add_argument("--port", type=int, default=7860, help="port; 0: any free one [7860]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, … [auto: a GPU if there is one]")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the prior [float32]")
    p.add_argument("--quantize", choices=("int8", "int4"), help="round the prior's matrices to 8 or 4 bits")
    p.add_argument("--batch-size", type=int, default=64, help="images generated at once, of several requests [64]")
    p.add_argument("--max-images", type=int, default=16, help="largest number of images per request [16]")
    p.add_argument("--max-prompt", type=int, default=1000, help="longest prompt, characters [1000]")
    p.add_argument("--max-waiting", type=int, default=64, help="waiting requests, after which more are refused [64]")
    options = p.parse_args(arguments)
    token = os.environ.get(TOKEN) or None
    _check(options, token)
    check_location(options.model)
    with _bind(options.host, options.port) as listener:
        _serve(options, token, listener)


def _check(options: Namespace, token: str | None) -> None:
    """Raises an error for what cannot be served, before a model is loaded."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'dalle-zoo[web]'")
    for name in ("batch_size", "max_prompt", "max_waiting"):
        as_integer(f"--{name.replace('_', '-')}", getattr(options, name), least=1)
    as_integer("--max-images", options.max_images, least=1, most=options.batch_size, meaning=" (of --batch-size)")
    as_integer("--port", options.port, least=0, most=65535)
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(f"{TOKEN} must consist of printable ASCII characters without spaces, to be sent in a header")
    if token is None and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host} is reachable from other machines: set the variable {TOKEN} to a token that "
            "clients must send, or use --host 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens, or raises `UserError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(f"cannot serve at {host}, port {port} ({reason}): choose another host or port") from None


def _serve(options: Namespace, token: str | None, listener: socket.socket) -> None:
    with without_collection():
        import torch
        import uvicorn

        from dalle_zoo.pipeline import DallePipeline
        from dalle_zoo.web.engine import Engine
        from dalle_zoo.web.generation import Limits
        from dalle_zoo.web.server import create_server

    pipe = DallePipeline.from_pretrained(
        options.model,
        device=choose_device(options.device),
        dtype=getattr(torch, options.dtype),
        quantize=options.quantize,
    )
    engine = Engine(pipe, max_waiting=options.max_waiting, max_images=options.batch_size)
    limits = Limits(max_images=options.max_images, max_prompt=options.max_prompt)
    try:
        config = uvicorn.Config(
            create_server(engine, limits=limits, token=token),
            log_level="warning",
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        print(f"{options.model} at {url(listener)} (API: {url(listener)}/v1); Ctrl-C ends it", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # raised again by uvicorn after it has closed its connections
        print("stopped")
    finally:
        engine.close()


def url(listener: socket.socket) -> str:
    """Address of a socket for browsers."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
