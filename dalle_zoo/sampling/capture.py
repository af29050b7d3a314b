"""Replays a sampling step on a GPU as a CUDA graph.

Launching the hundreds of kernels of a step from the host takes longer than running them. A graph launches all of them
at once, with the memory addresses that were recorded. So the inputs of a step, the previous token and the number of
the step, are copied into fixed buffers on the device, and no part of the step waits for the host.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from dalle_zoo.models.image_prior import Decoding

# P prompts, n candidates of each

logger = logging.getLogger(__name__)


class SampleFunction(Protocol):
    """A function that samples one token of every candidate."""

    def __call__(self, index: int | Tensor, previous: Tensor | None) -> Tensor:
        """Number of the token, and the previous tokens (P, n), None at 0, to tokens (P, n)."""


class RepeatedStep:
    """A sampling step with its inputs in fixed buffers.

    Args:
        sample: The step; takes its number as int64 (1,).
        index: Number of the next token. Recording runs its step several times; the cache entries are overwritten when
            the token is sampled.
        previous: Tokens before it, (P, n).
        capture: Whether to record a CUDA graph. Otherwise each call runs the step, on any device. Defaults to True.

    Raises:
        RuntimeError: The step cannot be recorded.
    """

    def __init__(self, sample: SampleFunction, index: int, previous: Tensor, capture: bool = True) -> None:
        self.sample = sample
        self.index = torch.full((1,), index, device=previous.device)
        self.previous = previous.clone()
        self.graph: torch.cuda.CUDAGraph | None = None
        if capture:
            with torch.cuda.device(previous.device):  # streams and graphs belong to the current device
                self._record()

    def _record(self) -> None:
        # Libraries initialize themselves in the first calls, which must not be part of the graph.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.sample(self.index, self.previous)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.sampled = self.sample(self.index, self.previous)

    def __call__(self, index: int | Tensor, previous: Tensor | None) -> Tensor:
        """Samples tokens (P, n), which the next call overwrites."""
        assert previous is not None
        assert isinstance(index, int)
        self.index.fill_(index)
        self.previous.copy_(previous)
        if self.graph is None:
            return self.sample(self.index, self.previous)
        self.graph.replay()
        return self.sampled


def repeated(sample: SampleFunction, decoder: Decoding, index: int, previous: Tensor) -> SampleFunction:
    """Returns the step as a CUDA graph; unchanged if the decoder needs its number on the host or recording fails."""
    if not getattr(decoder, "on_device", False):
        return sample
    try:
        return RepeatedStep(sample, index, previous)
    except RuntimeError as error:
        logger.warning("sampling continues without a CUDA graph, which is slower: %s", error)
        return sample
