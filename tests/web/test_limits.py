"""What clients send is bounded and checked before it reaches the model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from pydantic import ValidationError

from dalle_zoo.web.events import whole
from dalle_zoo.web.generation import GenerationRequest, Limits
from dalle_zoo.web.middleware import MAX_BODY, MAX_JSON, BodyLimitMiddleware
from tests.web.conftest import Slow


def read_all(path: str, chunks: Iterator[bytes]) -> int:
    """Returns the bytes that an application reads of a body behind the limit."""
    total = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal total
        while body := (await receive())["body"]:
            total += len(body)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": next(chunks, b"")}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    asyncio.run(BodyLimitMiddleware(app)({"type": "http", "path": path}, receive, send))
    return total


@pytest.mark.parametrize(("path", "limit"), [("/v1/images/generations", MAX_JSON), ("/gradio_api/upload", MAX_BODY)])
def test_bodies_are_bounded(path: str, limit: int) -> None:
    chunk = bytes(limit // 4)
    assert read_all(path, iter([chunk] * 4)) == limit
    endless = iter(lambda: chunk, None)
    with pytest.raises(HTTPException, match=f"413: a request may have {limit} bytes"):
        read_all(path, endless)


@pytest.mark.parametrize(
    "fields", [{"n": 3.0}, {"n": "3"}, {"n": True}, {"seed": 1.0}, {"temperature": "hot"}, {"prompt": None}]
)
def test_fields_have_their_types(fields: dict[str, Any]) -> None:
    assert GenerationRequest(prompt="a", temperature=1).n == 1
    with pytest.raises(ValidationError):
        GenerationRequest(**{"prompt": "a", **fields})


def test_null_is_an_omitted_field() -> None:
    nothing = dict.fromkeys(GenerationRequest.model_fields.keys() - {"prompt"})
    assert GenerationRequest.model_validate({"prompt": "a", **nothing}) == GenerationRequest(prompt="a")


@pytest.mark.parametrize("given", [torch.zeros(2, 2, dtype=torch.long), torch.full((4, 4), 99), torch.zeros(4, 4)])
def test_kept_codes_fit_the_model(pipe: Slow, given: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="given must"):
        GenerationRequest(prompt="a").to_request(pipe, Limits(), given=given)


def test_numbers_of_the_form_are_whole() -> None:
    assert whole("candidates", 8.0) == whole("candidates", 8) == 8
    for value in (None, 2.5, float("inf"), "8"):
        with pytest.raises(TypeError, match="candidates must be an integer"):
            whole("candidates", value)
