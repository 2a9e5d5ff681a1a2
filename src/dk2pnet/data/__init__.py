"""Data sets by name or by path, and the batches that calibration, training and measuring read.

    data = load("cifar10", "train", data_dir="~/data")         # nothing is decoded yet except the first image
    train, validation = split_training(data)                   # 45,000 and 5,000 images
    gather, held_out = calibration_split(train, 1000)          # 800 and 200 images, without labels
    for x, y in train.batches(128, Normalization.parse("cifar10"), augment="natural", shuffle=True):
        ...                                                    # x float32 (128, 3, 32, 32), y int64 (128,)

Images come through Hugging Face `datasets`, from the hub or from a folder in the hub's layout, or from a plain folder
of images. Nothing heavy is imported before it is needed.
"""

from dk2pnet.data.images import AUGMENTATIONS, USUAL_CROP, Batches, Crop, ImageData, Normalization
from dk2pnet.data.sources import has_split, load
from dk2pnet.data.splits import UserBatches, calibration_split, part_of_split, split_training

__all__ = [
    "AUGMENTATIONS",
    "USUAL_CROP",
    "Batches",
    "Crop",
    "ImageData",
    "Normalization",
    "UserBatches",
    "calibration_split",
    "has_split",
    "load",
    "part_of_split",
    "split_training",
]
