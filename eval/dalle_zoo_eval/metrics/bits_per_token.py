"""Bits per image token of the prior, with the right caption, another caption and no caption."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from dalle_zoo_eval.metrics.base import METRICS


def remark(values: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a remark on groups whose images are more likely without captions; empty if there are none.

    Args:
        values: Bits per token by group and part.
    """
    worse = [group for group, bits in values.items() if bits["none"] < bits["right"]]
    text = "the right captions cost bits: the model predicts these images better without a caption."
    return f"On {' and '.join(worse)} {text}" if worse else ""


@METRICS.register(
    "bits_per_token",
    extractor="prior",
    lower_is_better=True,
    label="bits per image token",
    format=".3f",
    section="Bits per image token",
    parts={"right": "right captions", "shuffled": "shuffled captions", "none": "no caption"},
    images=("real",),
    bars=True,
    remark=remark,
)
def bits_per_token(nll: Tensor, num_tokens: Tensor) -> dict[str, float]:
    """Returns the mean negative log-likelihood of image tokens, in bits, with ``right``, ``shuffled`` and no captions.

    Args:
        nll: Sum over the image tokens with the right, a shuffled and no caption, nats, (B, 3).
        num_tokens: Number of image tokens of each image, (B,).

    Example:
        >>> import torch
        >>> nll = math.log(2) * torch.tensor([[24.0, 32.0, 28.0]]).double()  # of an image with 8 tokens
        >>> bits_per_token(nll, torch.tensor([8]))
        {'right': 3.0, 'shuffled': 4.0, 'none': 3.5}
    """
    bits = nll.double().sum(0) / num_tokens.sum() / math.log(2)
    return dict(zip(("right", "shuffled", "none"), bits.tolist(), strict=True))
