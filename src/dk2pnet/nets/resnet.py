"""ResNets for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2).

Shortcuts are identities; where the resolution halves they are subsampled and padded with zero channels (option A), so
that public checkpoints of these networks load. ResNet-n has ``(n - 2) / 6`` blocks in each of three stages.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet", "resnet20", "resnet20x2", "resnet20x4", "resnet32", "resnet44", "resnet56", "resnet110"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an identity shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()  # a module, so that a hint can be taken before it
        self.stride = stride
        self.extra = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return self.relu(y + x)


class CifarResNet(nn.Module):
    """(B, in_channels, 32, 32) -> (B, num_classes); any input side from 8 on works."""

    def __init__(self, depth: int, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-20: 269,722 parameters, 40.6 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(20, in_channels, num_classes)


def resnet20x2(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-20, twice as wide: 1,073,962 parameters, 161.3 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(20, in_channels, num_classes, 32)


def resnet20x4(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-20, four times as wide: 4,286,026 parameters, 643.5 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(20, in_channels, num_classes, 64)


def resnet32(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-32: 464,154 parameters, 68.9 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(32, in_channels, num_classes)


def resnet44(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-44: 658,586 parameters, 97.2 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(44, in_channels, num_classes)


def resnet56(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-56: 853,018 parameters, 125.5 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(56, in_channels, num_classes)


def resnet110(in_channels: int = 3, num_classes: int = 10) -> CifarResNet:
    """ResNet-110: 1,727,962 parameters, 252.9 M MACs at 3x32x32 with 10 classes."""
    return CifarResNet(110, in_channels, num_classes)
