"""MobileNet: parameters, files, and independence of batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dalle_zoo_eval.extractors import ExtractorFileError
from dalle_zoo_eval.extractors.mobilenet import WEIGHTS_FILE, MobileNet, load_mobilenet
from safetensors.torch import save_file

from dalle_zoo.files import sha256_file


def test_network_has_parameters_of_mobilenet() -> None:
    net = MobileNet()
    # 470,072 parameters; 5,472 channels also have a running mean and variance.
    assert sum(p.numel() for p in net.parameters()) == 470_072
    assert {"body.0.conv.weight", "body.26.norm.running_var", "head.bias"} <= net.state_dict().keys()


def test_features_do_not_depend_on_batches_or_on_the_type_of_pixels() -> None:
    torch.manual_seed(0)
    net = MobileNet().eval()
    images = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    together = net.features(images)
    assert together.shape == (3, 256)
    assert torch.allclose(net.features(images, batch_size=1), together, atol=1e-5)
    assert torch.allclose(net.features(images.float() / 255), together, atol=1e-5)


def test_stride_2_pads_only_at_the_end() -> None:
    """As in TensorFlow, the first output of a halving layer depends on rows 0 to 2, and the last one on padding."""
    torch.manual_seed(0)
    first = MobileNet().eval().body[0]
    image = torch.zeros(1, 3, 8, 8)
    image[..., 3, 3] = 1
    with torch.no_grad():
        changed = (first(image) - first(torch.zeros_like(image))).abs().sum(1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 1]]


def test_loads_from_file_or_folder(tmp_path: Path) -> None:
    net = MobileNet()
    save_file(net.state_dict(), tmp_path / WEIGHTS_FILE)
    for location in (tmp_path, tmp_path / WEIGHTS_FILE):
        opened = load_mobilenet(location)
        loaded, record = opened.net, opened.record
        assert record["sha256"] == sha256_file(tmp_path / WEIGHTS_FILE)
        assert torch.equal(loaded.head.weight, net.head.weight)
        assert not loaded.training


def test_wrong_files_raise(tmp_path: Path) -> None:
    with pytest.raises(ExtractorFileError, match=WEIGHTS_FILE):
        load_mobilenet(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ExtractorFileError, match=r"missing body\.0"):
        load_mobilenet(tmp_path)
