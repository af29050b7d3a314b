"""Sampling: noise, token choice and the decode loop."""

from dalle_zoo.sampling.decode import decode_logits, sample_codes
from dalle_zoo.sampling.noise import derive_seed, gumbel
from dalle_zoo.sampling.sampler import Sampler

__all__ = ["Sampler", "decode_logits", "derive_seed", "gumbel", "sample_codes"]
