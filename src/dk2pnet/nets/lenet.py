"""A small LeNet-style network without batch norm (after LeCun et al., "Gradient-Based Learning", 1998)."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LeNet", "lenet"]


class LeNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes), for 28x28 and 8x8 images: 5x5, 3x3, 3x3 and a linear layer."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(self.features(x).flatten(1))


def lenet(in_channels: int = 3, num_classes: int = 10) -> LeNet:
    """LeNet: 25,002 parameters, 3.6 M MACs at 3x32x32 with 10 classes."""
    return LeNet(in_channels, num_classes)
