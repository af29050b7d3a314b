"""Attention, once, for every mask: the pattern is data, the back-end is a name.

========= =============================================================================================
dense     the formula, every score written out: the oracle that all others must equal
sdpa      PyTorch's fused attention over all positions, forbidden ones too
lines     text and each line of the grid apart in fused calls, which share one softmax
auto      ``lines`` where a mask's lines are short, ``sdpa`` elsewhere: the default
flex      PyTorch's FlexAttention, after a check of its gradients on the device
========= =============================================================================================

All of text and image shares one softmax, which the paper found better than normalizing the interactions apart
(appendix B.1, footnote 7).
"""

from dalle_zoo.models.attention.backends import BACKENDS, Backend, dense, sdpa
from dalle_zoo.models.attention.choice import auto
from dalle_zoo.models.attention.flex import flex
from dalle_zoo.models.attention.layer import Attention
from dalle_zoo.models.attention.lines import lines

__all__ = ["BACKENDS", "Attention", "Backend", "auto", "dense", "flex", "lines", "sdpa"]
