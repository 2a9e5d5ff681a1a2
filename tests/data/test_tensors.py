"""A user's own batches as images: whole, shuffled, cropped, the same in every pass."""

import pytest
import torch

from dk2pnet.data import Crop
from dk2pnet.data.tensors import TensorImages, image_like, images_of

NUMBERED = [(torch.arange(start, start + 6.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), None) for start in (0, 6, 12)]


def seen(images, **how):
    return [x for x, _ in images.batches(**{"batch_size": 4, "augment": "none"} | how)]


@pytest.mark.parametrize(
    ("shape", "are"),
    [((2, 3, 32, 32), True), ((2, 1, 8, 9), True), ((2, 4, 32, 32), False), ((2, 3, 4, 32), False), ((2, 3), False)],
)
def test_what_images_are(shape, are):
    assert image_like(torch.zeros(shape)) is are
    assert not image_like(torch.zeros(shape, dtype=torch.int64))
    batches = [(torch.zeros(shape), None)]
    assert isinstance(images_of(batches, 1e9), TensorImages) is are


def test_every_image_once_in_batches_of_one_size_in_another_order_each_epoch():
    images = TensorImages(NUMBERED, 1e9)
    first, again, other = (torch.cat(seen(images, epoch=epoch))[:, 0, 0, 0].tolist() for epoch in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == len(first) == 16  # 18 in batches of 4, the rest is left out
    assert len(images.batches(4, augment="none")) == 4
    assert [len(x) for x in seen(images, batch_size=50)] == [18]


def test_what_does_not_fit_into_memory_comes_as_it_is():
    images = TensorImages(NUMBERED, memory=4 * 8 * 8 * 7)
    assert all(torch.equal(x, wanted) for x, (wanted, _) in zip(seen(images), NUMBERED, strict=True))
    assert len(images.batches(4, augment="none")) == 3


def test_images_of_several_sizes_are_not_put_together():
    images = TensorImages([(torch.zeros(2, 1, 8, 8), None), (torch.zeros(3, 1, 9, 9), None)], 1e9)
    assert [x.shape[2] for x in seen(images, batch_size=2)] == [8, 9]


@pytest.mark.parametrize("size", [16, 80])
@pytest.mark.parametrize("augment", ["natural", "digits"])
def test_augmented_images_are_parts_of_the_images(size, augment):
    """Columns hold their number: a crop keeps the order of the columns, a mirror turns it round."""
    columns = torch.arange(float(size)).expand(24, 3, size, size)
    x = torch.cat(seen(TensorImages([(columns, None)], 1e9), batch_size=24, augment=augment, crop=Crop(0.5)))
    assert x.shape == columns.shape
    assert float(x.min()) >= 0
    assert float(x.max()) <= size - 1
    assert not torch.equal(x, columns)
    middle = x[:, 0, size // 2, size // 4 : -size // 4].diff(dim=1).mean(1).sign()
    assert set(middle.tolist()) == ({1.0, -1.0} if augment == "natural" else {1.0})


@pytest.mark.parametrize(
    ("window", "whole", "size"),
    [
        (1, (224, 225), (224, 225)),
        (5 / 7, (224, 224), (160, 160)),
        (5 / 7, (720, 1280), (512, 928)),
        (5 / 7, (80, 65), (64, 32)),
        (5 / 7, (33, 20), (32, 20)),
    ],
)
def test_the_size_of_a_window(window, whole, size):
    assert Crop(window=window).size_of(whole) == size


def test_in_a_window_things_are_as_large_as_in_the_whole():
    """Channels hold the row and the column of every pixel: those of a window lie as close as before, but for its
    aspect, and the windows together reach over the image."""
    side = torch.arange(140.0)
    image = torch.stack([side.view(-1, 1).expand(140, 140), side.expand(140, 140)])
    crop = Crop(least=1.0, window=0.5)
    batches = [(torch.cat([image, image[:1]]).expand(64, -1, -1, -1), None)]
    (x,) = seen(TensorImages(batches, 1e9), batch_size=64, augment="digits", crop=crop)
    assert x.shape[2:] == (64, 64)
    steps = x[:, 0].diff(dim=1)[:, 8:-8].mean((1, 2)) * x[:, 1].diff(dim=2)[:, :, 8:-8].mean((1, 2))
    torch.testing.assert_close(steps, torch.ones(64), atol=0.05, rtol=0)  # the area of a pixel
    assert float(x[:, 1].min()) < 10
    assert float(x[:, 1].max()) > 130


def test_what_is_filled_in_is_black_whatever_the_normalisation():
    x = torch.full((8, 1, 16, 16), 5.0)
    x[:, :, 0, 0] = -3.0  # black
    shifted = torch.cat(seen(TensorImages([(x, None)], 1e9), batch_size=8, augment="digits"))
    assert set(shifted.unique().tolist()) == {-3.0, 5.0}
