"""A small pipeline with random weights, and a server for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dalle_zoo import DallePipeline
from dalle_zoo.models.dvae import DVAE, DVAEConfig
from dalle_zoo.models.prior import Prior, PriorConfig
from dalle_zoo.tokenizers import ByteTokenizer
from dalle_zoo.web.engine import Engine


class Slow(DallePipeline):
    """A pipeline whose first batch waits until it is released, so that requests gather behind it."""

    released = threading.Event()

    def sample(self, *arguments, **options):  # type: ignore[no-untyped-def]
        self.batches.append(len(arguments[0]))
        assert self.released.wait(30)
        return super().sample(*arguments, **options)


@pytest.fixture
def pipe() -> Slow:
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=16, width=8, num_groups=3, codebook_size=16, decoder_stem=8))
    tokenizer = ByteTokenizer()
    config = PriorConfig(
        text_length=8, text_vocab=tokenizer.vocab_size, image_height=4, image_width=4, codebook_size=16, width=64,
        num_layers=2, num_heads=1,
    )  # fmt: skip
    prior = Prior(config)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    pipe = Slow(dvae, prior, tokenizer)
    pipe.batches = []
    pipe.released = threading.Event()
    pipe.released.set()
    return pipe


@pytest.fixture
def engine(pipe: Slow) -> Iterator[Engine]:
    engine = Engine(pipe, max_waiting=8, max_images=8)
    yield engine
    pipe.released.set()
    engine.close()


def until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Waits for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
