"""A small VGG-style network with batch norm (after Simonyan, Zisserman, "Very Deep Convolutional Networks", 2014)."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["SmallVGG", "vgg8"]


class SmallVGG(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes), for sides from 8 on: three stages of two 3x3 convolutions."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10, widths: tuple[int, ...] = (64, 128, 256)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.classifier(self.features(x).mean((2, 3)))


def vgg8(in_channels: int = 3, num_classes: int = 10) -> SmallVGG:
    """VGG-8: 1,148,874 parameters, 152.8 M MACs at 3x32x32 with 10 classes."""
    return SmallVGG(in_channels, num_classes)
