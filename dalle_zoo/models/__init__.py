"""Networks, their losses, and the registries of image tokenizers and priors, which are complete after this import.

| registry | name | class | file |
|---|---|---|---|
| `IMAGE_TOKENIZERS` | `dvae`, `dvae_encoder` | `DVAE`, `DVAEEncoder` | `dvae.py`: the paper's stage 1 |
| | `vqgan`, `dalle_pytorch_vae` | `VQGAN`, `DallePytorchVAE` | `external/` |
| `PRIORS` | `prior` | `Prior` | `prior.py`: the paper's stage 2 |
| | `dalle_mini`, `dalle_pytorch`, `mindalle`, `rudalle` | `DalleMini`, … | `external/` |

To add a network, write a file with a class that registers itself, and import it here. A third party adds an entry
point in the group ``dalle_zoo.image_tokenizers`` or ``dalle_zoo.priors``.
"""

from dalle_zoo.models import external
from dalle_zoo.models.dvae import DVAE, DVAEEncoder
from dalle_zoo.models.image_prior import PRIORS, ImagePrior
from dalle_zoo.models.prior import Prior
from dalle_zoo.models.tokenizer import IMAGE_TOKENIZERS, ImageTokenizer

__all__ = [
    "DVAE",
    "IMAGE_TOKENIZERS",
    "PRIORS",
    "DVAEEncoder",
    "ImagePrior",
    "ImageTokenizer",
    "Prior",
    "external",
]
