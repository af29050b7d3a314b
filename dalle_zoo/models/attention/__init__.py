"""Attention for every mask: the mask is data, the back-end is a name.

========= =============================================================================================
dense     the formula with all scores in memory: the reference that all others must equal
sdpa      PyTorch's fused attention over all positions, including forbidden ones
lines     separate fused calls for text and for each line of the grid, which share one softmax
auto      ``lines`` if the lines of a mask are short, otherwise ``sdpa``: the default
flex      PyTorch's FlexAttention, after a check of its gradients on the device
========= =============================================================================================

Text and image share one softmax, which the paper found better than normalizing their interactions separately
(appendix B.1, footnote 7).
"""

from dalle_zoo.models.attention.backends import BACKENDS, Backend, dense, sdpa
from dalle_zoo.models.attention.choice import auto
from dalle_zoo.models.attention.flex import flex
from dalle_zoo.models.attention.layer import Attention
from dalle_zoo.models.attention.lines import lines

__all__ = ["BACKENDS", "Attention", "Backend", "auto", "dense", "flex", "lines", "sdpa"]
