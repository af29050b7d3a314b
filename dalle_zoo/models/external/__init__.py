"""Networks of other code bases, so that their published weights can be loaded; `dalle_zoo.convert` reads the weights.

Each network reproduces the architecture and the numerics of the original and has the name of its code base. The
paper's networks are in `dalle_zoo.models` and do not depend on this package.
"""

from dalle_zoo.models.external.dalle_mini import DalleMini
from dalle_zoo.models.external.dalle_pytorch import DallePytorch
from dalle_zoo.models.external.dalle_pytorch_vae import DallePytorchVAE
from dalle_zoo.models.external.mindalle import MinDALLE
from dalle_zoo.models.external.rudalle import RuDALLE
from dalle_zoo.models.external.vqgan import VQGAN

__all__ = ["VQGAN", "DalleMini", "DallePytorch", "DallePytorchVAE", "MinDALLE", "RuDALLE"]
