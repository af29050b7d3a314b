"""Registries of networks are complete after an import of their own package."""

from __future__ import annotations

import json
import subprocess
import sys

PRIORS = {"prior", "dalle_mini", "dalle_pytorch", "mindalle", "rudalle"}
IMAGE_TOKENIZERS = {"dvae", "dvae_encoder", "dalle_pytorch_vae", "vqgan"}


def test_registries_are_complete_after_import_of_models() -> None:
    script = (
        "import json; from dalle_zoo.models import IMAGE_TOKENIZERS, PRIORS; "
        "print(json.dumps([list(IMAGE_TOKENIZERS._members), list(PRIORS._members)]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    tokenizers, priors = json.loads(done.stdout)
    assert set(tokenizers) == IMAGE_TOKENIZERS
    assert set(priors) == PRIORS
