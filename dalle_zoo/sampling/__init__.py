"""Samples code grids from priors: options, noise, and the decoding loop."""

from dalle_zoo.sampling.decode import check_given, decode_logits, sample_codes
from dalle_zoo.sampling.likelihood import token_log_likelihood
from dalle_zoo.sampling.noise import derive_seed, gumbel
from dalle_zoo.sampling.options import SamplingDefaults, SamplingOptions
from dalle_zoo.sampling.progress import SAMPLE, Callback, Progress

__all__ = [
    "SAMPLE",
    "Callback",
    "Progress",
    "SamplingDefaults",
    "SamplingOptions",
    "check_given",
    "decode_logits",
    "derive_seed",
    "gumbel",
    "sample_codes",
    "token_log_likelihood",
]
