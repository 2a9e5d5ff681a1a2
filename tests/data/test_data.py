import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from dk2pnet.data import Crop, ImageData, Normalization, UserBatches, calibration_split, has_split, load, split_training
from dk2pnet.data import images as module
from dk2pnet.errors import InputError

PLAIN = Normalization((0.0,), (1.0,))
PLAIN3 = Normalization((0.0,) * 3, (1.0,) * 3)


@pytest.fixture(autouse=True)
def _own_world(tmp_path, monkeypatch):
    """No cache outside the test's folder, no data folder, no hub."""

    def offline(*_, **__):
        raise ConnectionError("no network here\nand more")

    real = datasets.load_dataset
    monkeypatch.delenv("DK2PNET_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, *a, **k: (real if path == "parquet" else offline)(path, *a, **k)
    )


@pytest.fixture
def decoded(monkeypatch):
    """The images that were decoded so far."""
    seen = []
    real = module._decode

    def count(value, where):
        seen.append(where)
        return real(value, where)

    monkeypatch.setattr(module, "_decode", count)
    return seen


def pixels(count, height=8, width=8, channels=3, seed=0):
    shape = (count, height, width, channels) if channels > 1 else (count, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def shards(folder, images, labels=None, split="train", count=1, column="image", label="label", classes=None):
    """Write a split in the hub's layout."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {column: [Image.fromarray(image) for image in images]}
    if labels is not None:
        table[label] = list(labels)
    made = datasets.Dataset.from_dict(table).cast_column(column, datasets.Image())
    if classes:
        made = made.cast_column(label, datasets.ClassLabel(names=classes))
    for number in range(count):
        made.shard(count, number, contiguous=True).to_parquet(folder / f"{split}-{number:05}-of-{count:05}.parquet")


def in_memory(count=20, height=8, width=8, channels=1):
    images = torch.from_numpy(pixels(count, height, width, channels)).view(count, channels, height, width)
    return ImageData("made", images, torch.arange(count))


def gathered(batches):
    return torch.cat([x for x, _ in batches])


# -- normalisation -----------------------------------------------------------------------------------------------------


def test_normalization_applies_what_it_says():
    images = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    y = Normalization.parse("0.5,0.2/0.25,0.1").apply(images)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.tensor([[[[-2.0, 2.0]], [[0.0, 2.0]]]]))


@pytest.mark.parametrize("text", ["imagenet", "cifar10", "cifar100", "mnist", "svhn", "0.1,0.2/0.3,0.4"])
def test_normalization_survives_a_round_trip(text):
    normalization = Normalization.parse(text)
    assert Normalization.from_dict(normalization.to_dict()) == normalization


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ("mnist", (0.1307,), (0.3081,)),
        ("svhn", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ],
)
def test_names_are_the_normalisations_that_networks_of_others_expect(name, mean, std):
    assert Normalization.parse(name) == Normalization(mean, std)


@pytest.mark.parametrize("text", ["nonsense", "0.5", "0.5/a", "0.5/0.2/0.1", "0.5,0.5/0.2", "0.5/0", "nan/1"])
def test_normalization_rejects(text):
    with pytest.raises(InputError, match=r"normalisation .*; expected one"):
        Normalization.parse(text)


@pytest.mark.parametrize("values", [{"mean": [0.5]}, {"mean": 0.5, "std": 0.5}])
def test_normalization_rejects_other_dictionaries(values):
    with pytest.raises(InputError, match="'mean' and 'std'"):
        Normalization.from_dict(values)


def test_normalization_of_other_channels():
    with pytest.raises(InputError, match=r"3 channel\(s\) and the images have 1"):
        in_memory().batches(4, PLAIN3)
    with pytest.raises(InputError, match=r"1 channel\(s\) and the images have 3"):
        PLAIN.apply(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))


def test_measure():
    images = torch.from_numpy(pixels(30)).permute(0, 3, 1, 2)
    measured = Normalization.measure(images)
    assert measured == Normalization.measure(ImageData("made", images))
    assert measured.mean == pytest.approx((images / 255.0).mean((0, 2, 3)).tolist(), abs=6e-5)
    assert measured.std == pytest.approx((images / 255.0).std((0, 2, 3), correction=0).tolist(), abs=6e-5)
    assert all(value == round(value, 4) for value in measured.mean + measured.std)


# -- images in memory --------------------------------------------------------------------------------------------------


def test_importing_is_cheap():
    code = "import sys, dk2pnet.data; sys.exit(bool({'datasets', 'sklearn', 'torchvision'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_digits():
    from sklearn.datasets import load_digits

    train, test = load("digits"), load("digits", "test")
    assert (len(train), len(test), train.channels, train.size) == (1438, 359, 1, (8, 8))
    assert train.classes == [str(digit) for digit in range(10)]
    source = load_digits()
    rows = {(pixels.tobytes(), label) for pixels, label in zip(source.images, source.target, strict=True)}
    both = [
        ((image[0].double() * 16 / 255).round().numpy().tobytes(), int(label))
        for part in (train, test)
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert set(both) == rows  # all of them, with their labels
    assert len(both) == len(rows) == 1797  # and none twice
    assert torch.equal(test.images, load("digits", "test").images)
    assert test.labels.bincount().min() > 20


def test_a_split_that_names_its_classes_in_another_order_gets_the_numbers_of_the_first():
    train = ImageData("mine", torch.zeros(3, 1, 2, 2, dtype=torch.uint8), [0, 1, 2], ["cat", "dog", "fox"])
    test = ImageData("mine", torch.zeros(4, 1, 2, 2, dtype=torch.uint8), [0, 1, 2, 0], ["dog", "fox", "cat"])
    found = test.numbered_like(train)
    assert found.labels.tolist() == [1, 2, 0, 1]
    assert found.classes == train.classes
    assert test.labels.tolist() == [0, 1, 2, 0]
    assert train.numbered_like(train) is train
    with pytest.raises(InputError, match="has the classes dog, .*expected the same"):
        ImageData("mine", test.images, [0] * 4, ["dog", "cow", "cat"]).numbered_like(train)


def test_batches_cover_everything_in_order():
    data = in_memory(10)
    batches = data.batches(4, PLAIN)
    assert len(batches) == 3
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert torch.equal(gathered(batches), data.images / 255)
    assert torch.equal(torch.cat([y for _, y in batches]), data.labels)
    assert all(y is None for _, y in data.without_labels().batches(4, PLAIN))
    assert data.subset([]).batches(4, PLAIN).__len__() == 0
    assert list(data.subset([]).batches(4, PLAIN)) == []


def test_shuffling_keeps_images_and_labels_together():
    data = in_memory(10)
    labels = []
    for x, y in data.batches(4, PLAIN, shuffle=True):
        assert torch.equal(x, data.images[y] / 255)
        labels += y.tolist()
    assert labels != list(range(10))
    assert sorted(labels) == list(range(10))


def test_parts_for_several_processes_are_every_batch_once_from_the_first_asked_for():
    batches = in_memory(22).batches(8, PLAIN, shuffle=True)
    whole, shards = list(batches)[1:], [list(batches.part(1, rank, 3)) for rank in range(3)]
    assert [len(shard) for shard in shards] == [len(whole)] * 3 == [2] * 3
    for number, (x, y) in enumerate(whole):
        for rank in range(3):
            part, labels = shards[rank][number]
            assert torch.equal(part, x[rank::3])
            assert torch.equal(labels, y[rank::3])


@pytest.mark.parametrize("augment", ["digits", "natural"])
def test_passes_repeat_and_epochs_and_seeds_differ(augment):
    data = in_memory(16, 16, 16)
    options = {"augment": augment, "shuffle": True}
    batches = data.batches(4, PLAIN, **options)
    first = gathered(batches)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(first, gathered(batches))
    assert torch.equal(first, gathered(data.batches(4, PLAIN, seed=0, epoch=0, **options)))
    assert torch.equal(torch.get_rng_state(), before)  # the global state is neither read nor moved
    assert not torch.equal(first, gathered(data.batches(4, PLAIN, epoch=1, **options)))
    assert not torch.equal(first, gathered(data.batches(4, PLAIN, seed=1, **options)))


@pytest.mark.parametrize(("augment", "flips"), [("digits", {False}), ("natural", {False, True})])
def test_augmented_images_are_shifted_and_mirrored_images(augment, flips):
    data = in_memory(300, 16, 24, 3)  # shifts by up to 2 down and 3 across
    seen = set()
    for image, result in zip(data.images / 255, gathered(data.batches(128, PLAIN3, augment=augment)), strict=True):
        padded = torch.nn.functional.pad(image, (3, 3, 2, 2))
        matches = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(7)
            for flip in (False, True)
            if torch.equal(result.flip(2) if flip else result, padded[:, dy : dy + 16, dx : dx + 24])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {flip for *_, flip in seen} == flips
    assert {dy for dy, *_ in seen} == set(range(5))
    assert {dx for _, dx, _ in seen} == set(range(7))


def test_image_data_rejects():
    with pytest.raises(InputError, match=r"torch.float32 of shape \(2, 3\); expected torch.uint8"):
        ImageData("made", torch.zeros(2, 3))
    with pytest.raises(InputError, match="2 images and 3 labels"):
        ImageData("made", torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1, 2])
    with pytest.raises(InputError, match="batch size is 0"):
        in_memory().batches(0, PLAIN)
    with pytest.raises(InputError, match="augmentation is 'other'; expected one of none, digits, natural"):
        in_memory().batches(1, PLAIN, augment="other")


# -- parquet and the hub -----------------------------------------------------------------------------------------------


def test_parquet_shards(tmp_path, decoded):
    images = pixels(20)
    shards(tmp_path / "set" / "data", images, np.arange(20) % 3, count=3, column="img", classes=["a", "b", "c"])
    shards(tmp_path / "set" / "data", images[:4], np.zeros(4, int), split="test", column="img", classes=["a", "b", "c"])
    data = load(tmp_path / "set")
    assert (len(data), data.channels, data.size, data.classes) == (20, 3, (8, 8), ["a", "b", "c"])
    assert torch.equal(data.labels, torch.arange(20) % 3)
    assert len(decoded) == 1  # the first image tells channels and size
    part = data.subset([7, 3]).subset(torch.tensor([1, 0]))
    assert len(decoded) == 1
    assert part.images.permute(0, 2, 3, 1).tolist() == images[[3, 7]].tolist()
    assert part.labels.tolist() == [0, 1]
    assert len(decoded) == 3
    for _ in range(2):
        gathered(part.batches(1, PLAIN3))
        gathered(part.without_labels().batches(1, PLAIN3))
        assert part.subset([0]).images.shape == (1, 3, 8, 8)
    assert len(decoded) == 3  # decoded once
    assert data.images.permute(0, 2, 3, 1).tolist() == images.tolist()
    assert has_split(tmp_path / "set", "test")
    assert not has_split(tmp_path / "set", "other")


def test_a_set_without_test_gives_its_validation(tmp_path):
    shards(tmp_path, pixels(3), [0, 1, 2], split="validation", label="fine_label")
    data = load(tmp_path, "test")
    assert data.labels.tolist() == [0, 1, 2]
    assert data.classes is None
    assert has_split(tmp_path, "test")


@pytest.mark.parametrize("labels", [None, [-1, -1, -1], [None, None, None]])
def test_sets_without_labels(tmp_path, labels):
    shards(tmp_path, pixels(3), labels)
    assert load(tmp_path).labels is None


def test_a_label_missing(tmp_path):
    shards(tmp_path, pixels(3), [0, None, 1])
    with pytest.raises(InputError, match="row 1 of data set .* has no label"):
        load(tmp_path)


def test_hub_names_find_local_copies(tmp_path, monkeypatch):
    shards(tmp_path / "cifar10", pixels(4), [0, 1, 2, 3], column="img")
    shards(tmp_path / "svhn" / "full_numbers", pixels(2), [0, 1])
    shards(tmp_path / "svhn" / "cropped_digits", pixels(3), [0, 1, 2])
    shards(tmp_path / "owner" / "name", pixels(5), [0] * 5)
    assert len(load("cifar10", data_dir=tmp_path)) == 4
    monkeypatch.setenv("DK2PNET_DATA", str(tmp_path))
    assert [len(load(name)) for name in ("cifar10", "uoft-cs/cifar10", "svhn", "owner/name")] == [4, 4, 3, 5]
    assert len(load("ufldl-stanford/svhn")) == 3
    asked = []
    monkeypatch.setattr("dk2pnet.data.sources._hub_splits", lambda *what: asked.append(what) or {})
    with pytest.raises(InputError, match="alice/cifar10"):
        load("alice/cifar10")
    assert asked == [("alice/cifar10", None)]  # not the folder's cifar10
    shards(tmp_path / "alice" / "cifar10", pixels(6), [0] * 6)
    shards(tmp_path / "other", pixels(7), [0] * 7)
    assert [len(load(name)) for name in ("alice/cifar10", "owner/other")] == [6, 7]
    assert has_split("cifar10", "train")
    assert not has_split("cifar10", "test")


def test_hub_names_are_asked_of_the_hub(monkeypatch):
    asked = []

    def hub(*arguments):
        asked.append(arguments)
        rows = {"image": [Image.fromarray(image) for image in pixels(3)], "label": [2, 1, 0]}
        made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        return datasets.DatasetDict({"train": made, "test": made.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load("svhn").labels.tolist() == load("ufldl-stanford/svhn").labels.tolist() == [2, 1, 0]
    assert len(load("someone/something", "test")) == 1
    assert asked == [("ufldl-stanford/svhn", "cropped_digits")] * 2 + [("someone/something", None)]


def test_grey_and_colour(tmp_path):
    grey = pixels(2, channels=1)
    shards(tmp_path / "grey", grey)
    data = load(tmp_path / "grey")
    assert data.channels == 1
    assert data.images[:, 0].tolist() == grey.tolist()
    assert load(tmp_path / "grey", channels=3).images.tolist() == data.images.expand(-1, 3, -1, -1).tolist()
    colour = pixels(2, channels=4)
    save(tmp_path / "colour" / "0.png", colour[0])
    Image.fromarray(colour[1][..., :3]).convert("P").save(tmp_path / "colour" / "1.png")
    data = load(tmp_path / "colour")
    assert data.channels == 3
    assert data.images[0].permute(1, 2, 0).tolist() == colour[0][..., :3].tolist()  # RGBA loses its alpha
    expected = np.array(Image.fromarray(colour[0][..., :3]).convert("L"))
    # RGBA and RGB turn grey by the same weights
    assert load(tmp_path / "colour", channels=1).images[0, 0].tolist() == expected.tolist()


def test_a_colour_image_among_grey_ones(tmp_path):
    for number in range(40):
        save(tmp_path / f"{number:02}.png", pixels(1, channels=1)[0])
    save(tmp_path / "01.png", pixels(1)[0])  # not one of those that are looked at
    with pytest.raises(InputError, match=r"01\.png is in colour and others are grey"):
        _ = load(tmp_path).images
    assert load(tmp_path, channels=1).images.shape == (40, 1, 8, 8)


def test_the_first_image_may_be_grey_among_coloured_ones(tmp_path):
    grey, colour = pixels(1, channels=1)[0], pixels(1)[0]
    save(tmp_path / "0.png", grey)
    for number in range(1, 40):
        save(tmp_path / f"{number}.png", colour)
    data = load(tmp_path)
    assert data.channels == 3
    assert data.images[0].tolist() == [grey.tolist()] * 3


# -- large images ------------------------------------------------------------------------------------------------------


def large(tmp_path, count=5):
    for number in range(count):
        save(tmp_path / "large" / f"{number}.png", pixels(1, 90 + number, 120, seed=number)[0])
    return load(tmp_path / "large", size=70)


def test_large_images_are_decoded_for_every_batch(tmp_path, decoded):
    data = large(tmp_path)
    assert data.size == (70, 70)
    assert not data.in_memory
    batches = data.subset([0, 3]).batches(2, PLAIN3, workers=0)
    first = gathered(batches)
    assert len(decoded) == 3
    assert torch.equal(first, gathered(batches))
    assert len(decoded) == 5
    # shorter side to 70 * 256 / 224 = 80, then the centre
    image = Image.fromarray(pixels(1, 93, 120, seed=3)[0]).resize((103, 80), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 5:75, 16:86]
    assert torch.equal((first[1] * 255).round().byte(), expected)


@pytest.mark.parametrize("augment", ["none", "digits", "natural"])
def test_workers_change_nothing(tmp_path, augment):
    data = large(tmp_path)
    options = {"augment": augment, "shuffle": True, "seed": 3}
    before = torch.get_rng_state()
    alone = gathered(data.batches(2, PLAIN3, workers=0, **options))
    assert alone.shape == (5, 3, 70, 70)
    assert torch.equal(alone, gathered(data.batches(2, PLAIN3, workers=2, **options)))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(alone, gathered(data.batches(2, PLAIN3, workers=0, epoch=1, **options)))


def test_large_crops_are_mirrored_only_if_natural(tmp_path):
    ramp = np.tile(np.arange(100, dtype=np.uint8), (100, 1))  # brighter to the right, until mirrored
    for number in range(16):
        save(tmp_path / f"{number:02}.png", ramp)
    for augment, kinds in (("digits", {True}), ("natural", {False, True})):
        x = gathered(load(tmp_path).batches(4, PLAIN, augment=augment, workers=0))
        assert x.shape == (16, 1, 100, 100)
        assert {bool(image[0, 0, 0] < image[0, 0, -1]) for image in x} == kinds


def test_a_window_is_decoded_in_its_size(tmp_path):
    for images in (large(tmp_path), large(tmp_path).kept(2**29)):
        batches = images.batches(2, PLAIN3, augment="natural", crop=Crop(0.5, 0.5), workers=0)
        assert gathered(batches).shape == (5, 3, 32, 32)
        assert gathered(images.batches(2, PLAIN3, crop=Crop(0.5, 0.5), workers=0)).shape == (5, 3, 70, 70)  # whole


def test_kept_large_images_are_the_same_and_decoded_once(tmp_path, monkeypatch):
    data, kept, asked = large(tmp_path), large(tmp_path).kept(2**29), []
    assert kept.in_memory
    real = module._from_workers
    monkeypatch.setattr(module, "_from_workers", lambda *args: asked.append(1) or real(*args))
    before = torch.get_rng_state()
    first = gathered(kept.batches(2, PLAIN3))
    assert len(asked) == 1
    assert torch.equal(first, gathered(kept.batches(3, PLAIN3)))
    crops = [gathered(kept.batches(2, PLAIN3, augment="natural", seed=seed)) for seed in (0, 0, 1)]
    assert len(asked) == 1
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert not torch.equal(crops[0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, gathered(data.batches(2, PLAIN3)))
    assert not data.in_memory  # which is left as it was


def test_more_than_fits_is_not_kept(tmp_path):
    memory = 5 * 3 * 70 * 70 - 1
    assert not large(tmp_path).kept(memory).in_memory
    assert large(tmp_path).subset([0, 1]).kept(memory).in_memory


def test_large_images_shrunk_to_small_ones_are_kept(tmp_path, decoded):
    large(tmp_path)
    data = load(tmp_path / "large", size=32)
    assert data.in_memory
    decoded.clear()
    for _ in range(2):
        assert gathered(data.batches(2, PLAIN3)).shape == (5, 3, 32, 32)
    assert len(decoded) == 5


def test_sizes(tmp_path):
    save(tmp_path / "s" / "0.png", pixels(1, 8, 10)[0])
    assert load(tmp_path / "s").size == (8, 10)
    save(tmp_path / "s" / "1.png", pixels(1, 10, 10)[0])
    with pytest.raises(InputError, match=r"1\.png is 10x10 and the first one 8x10; .* --input-size"):
        _ = load(tmp_path / "s").images
    assert load(tmp_path / "s", size=12).images.shape == (2, 3, 12, 12)
    save(tmp_path / "b" / "0.png", pixels(1, 80, 80)[0])
    save(tmp_path / "b" / "1.png", pixels(1, 80, 81)[0])
    for workers in (0, 2):  # an error in a worker reads the same
        with pytest.raises(InputError, match=r"^image \S+1\.png is 80x81 and the first one 80x80; .* --input-size$"):
            list(load(tmp_path / "b").batches(1, PLAIN3, workers=workers))
    with pytest.raises(InputError, match="side is 0"):
        load("digits", size=0)
    with pytest.raises(InputError, match="channels is 2"):
        load("digits", channels=2)
    digits = load("digits", "test", size=32, channels=3).subset(range(3))
    assert digits.images.shape == (3, 3, 32, 32)


# -- folders of images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folder_with_splits(tmp_path, test):
    images = pixels(6)
    for number, path in enumerate(["train/cat/0.png", "train/dog/1.PNG", "train/emu/a/2.bmp", f"{test}/dog/3.png"]):
        save(tmp_path / path, images[number])
    save(tmp_path / ".hidden" / "4.png", images[4])
    save(tmp_path / "train" / ".5.png", images[5])
    (tmp_path / "train" / "notes.txt").write_text("not an image")
    train, held_out = load(tmp_path), load(tmp_path, "test")
    assert train.classes == held_out.classes == ["cat", "dog", "emu"]
    assert train.labels.tolist() == [0, 1, 2]
    assert held_out.labels.tolist() == [1]  # as in train, though cat is missing
    assert train.images.permute(0, 2, 3, 1).tolist() == images[:3].tolist()
    with pytest.raises(InputError, match=f"no split 'other'; it has ({test}, train|train, {test})"):
        load(tmp_path, "other")


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing")])
def test_folders_of_splits_under_other_names(tmp_path, names):
    for number, split in enumerate(names):
        for label in ("cat", "dog"):
            save(tmp_path / split / label / "0.png", pixels(1, seed=number)[0])
    for split in ("train", "test"):
        assert load(tmp_path, split).classes == ["cat", "dog"]
        assert len(load(tmp_path, split)) == 2


def test_a_split_beside_something_else_is_not_taken_for_a_class(tmp_path):
    save(tmp_path / "train" / "cat" / "0.png", pixels(1)[0])
    save(tmp_path / "unlabeled" / "0.png", pixels(1)[0])
    with pytest.raises(InputError, match="train/, unlabeled/: a split with classes in it, and others"):
        load(tmp_path)
    (tmp_path / "unlabeled").rename(tmp_path / "Train")
    save(tmp_path / "Train" / "cat" / "0.png", pixels(1)[0])
    with pytest.raises(InputError, match="twice the same split"):
        load(tmp_path)


@pytest.mark.parametrize("names", [("images", "masks"), ("jpegs", "labels"), ("leftImg8bit", "gtFine")])
@pytest.mark.parametrize("inside", ["", "train"])
def test_masks_are_no_class(tmp_path, inside, names):
    for name in names:
        save(tmp_path / inside / name / "0.png", pixels(1)[0])
    with pytest.raises(InputError, match=rf"images and, by their name, masks.*alone: .*{names[0]}$"):
        load(tmp_path)
    (tmp_path / inside / names[0]).rename(tmp_path / inside / "no_mask")  # faces with and without
    (tmp_path / inside / names[1]).rename(tmp_path / inside / "mask")
    assert load(tmp_path).classes == ["mask", "no_mask"]


def test_a_link_to_a_folder_above_gives_no_image_twice(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png", pixels(1)[0])
    (tmp_path / "a" / "self").symlink_to("../a")
    (tmp_path / "b" / "all").symlink_to("..")
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "b" / "deep" / "above").symlink_to(tmp_path.parent)
    data = load(tmp_path)
    assert data.labels.tolist() == [0, 1]  # b/all/a would be images of a under the name of b


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        save(tmp_path / name / "0.png", pixels(1)[0])
    assert load(tmp_path).classes == ["bus", "train"]


def test_folder_with_classes_or_images_only(tmp_path):
    images = pixels(3)
    save(tmp_path / "classes" / "train" / "0.png", images[0])  # a class of that name
    save(tmp_path / "classes" / "plane" / "1.png", images[1])
    data = load(tmp_path / "classes")
    assert data.classes == ["plane", "train"]
    assert data.labels.tolist() == [0, 1]
    assert not has_split(tmp_path / "classes", "test")
    for number in range(3):
        save(tmp_path / "only" / f"{number}.png", images[number])
    data = load(str(tmp_path / "only"))
    assert data.labels is None
    assert data.classes is None
    assert data.images.permute(0, 2, 3, 1).tolist() == images.tolist()


def test_relative_folders(tmp_path, monkeypatch):
    save(tmp_path / "here" / "0.png", pixels(1)[0])
    monkeypatch.chdir(tmp_path)
    assert len(load("here")) == len(load("./here")) == 1


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such", r"'no_such' is not known; expected digits, mnist, cifar10, .* --data-dir"),
        ("", "'' is not known"),
        ("./no/such", r"folder \./no/such does not exist"),
        ("svhn_10k", "not on the hub: give the folder .* --data-dir"),
        ("cifar10", r"'uoft-cs/cifar10' could not be loaded .*\(no network here\); .* --data-dir"),
        ("owner/name", r"'owner/name' could not be loaded .*\(no network here\)"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(InputError, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_serve(tmp_path):
    with pytest.raises(InputError, match=r"data folder .*nowhere does not exist; .* --data-dir"):
        load("cifar10", data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither images nor parquet shards"):
        load(tmp_path / "empty")
    shards(tmp_path / "part", pixels(4), count=2)
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        load(tmp_path / "part", "test")
    (tmp_path / "part" / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match="1 of 2 shards of split 'train'"):
        load(tmp_path / "part")
    save(tmp_path / "mixed" / "0.png", pixels(1)[0])
    save(tmp_path / "mixed" / "cat" / "1.png", pixels(1)[0])
    with pytest.raises(InputError, match="both directly and in sub-folders"):
        load(tmp_path / "mixed")


def test_parquet_that_does_not_serve(tmp_path, monkeypatch):
    paths = [tmp_path / name / "train-00000-of-00001.parquet" for name in ("bad", "text")]
    for path in paths:
        path.parent.mkdir()
    paths[0].write_bytes(b"not parquet")
    datasets.Dataset.from_dict({"words": ["a"], "label": [1]}).to_parquet(paths[1])
    with pytest.raises(InputError, match=r"split 'train' in .*bad cannot be read \(.*\); fetch them again"):
        load(tmp_path / "bad")
    with pytest.raises(InputError, match="has the columns words, label; expected one of images"):
        load(tmp_path / "text")
    empty = datasets.Dataset.from_dict({"image": []}, datasets.Features({"image": datasets.Image()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict({"train": empty}))
    with pytest.raises(InputError, match="holds no images in this split"):
        load("owner/name")


def test_images_that_cannot_be_read(tmp_path):
    for number in range(3):
        save(tmp_path / "files" / f"{number}.png", pixels(1)[0])
    (tmp_path / "files" / "1.png").write_bytes((tmp_path / "files" / "1.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"image \S+1\.png cannot be read"):
        _ = load(tmp_path / "files").images
    assert len(load(tmp_path / "files").subset([0, 2]).images) == 2
    rows = [{"bytes": (tmp_path / "files" / name).read_bytes(), "path": None} for name in ("0.png", "1.png")]
    features = datasets.Features({"image": datasets.Image()})
    made = datasets.Dataset.from_dict({"image": rows}, features)
    (tmp_path / "rows").mkdir()
    made.to_parquet(tmp_path / "rows" / "train-00000-of-00001.parquet")
    with pytest.raises(
        InputError, match=f"the image in row 1 of data set '{re.escape(str(tmp_path))}.* cannot be read"
    ):
        _ = load(tmp_path / "rows").subset([1]).images
    save(tmp_path / "deep" / "0.png", np.zeros((8, 8), np.uint16))
    with pytest.raises(InputError, match=r"0\.png has pixels of mode I;16; expected 8 bits"):
        load(tmp_path / "deep")


@pytest.mark.parametrize(
    ("size", "made"), [((8, None), (8, 24)), ((None, 24), (8, 24)), ((40, None), (40, 128)), ((8, 8), (8, 8))]
)
def test_a_side_that_is_left_open_follows_from_the_images(tmp_path, caplog, size, made):
    """Lines of text, three times as wide as high, with one that is not; 120 pixels become 4 x 32."""
    caplog.set_level("INFO")
    for number, width in enumerate((30, 30, 10, 30, 30)):
        save(tmp_path / f"{number}.png", np.zeros((10, width, 3), np.uint8))
    assert load(tmp_path, size=size).size == made
    assert (f"are scaled to {made[0]} x {made[1]}" in caplog.text) == (None in size)


# -- splits ------------------------------------------------------------------------------------------------------------


def test_split_training():
    train, validation = split_training(in_memory(57))
    assert (len(train), len(validation)) == (52, 5)
    assert sorted(train.labels.tolist() + validation.labels.tolist()) == list(range(57))
    assert torch.equal(validation.labels, split_training(in_memory(57))[1].labels)
    assert not torch.equal(validation.labels, split_training(in_memory(57), seed=1)[1].labels)
    assert [len(part) for part in split_training(in_memory(3))] == [2, 1]
    with pytest.raises(InputError, match=r"1 image\(s\); expected at least 2"):
        split_training(in_memory(1))


@pytest.mark.parametrize(("count", "sizes"), [(20, (16, 4)), (2, (1, 1)), (9, (7, 2)), (100, (24, 6))])
def test_calibration_split(count, sizes):
    data = in_memory(30)
    parts = calibration_split(data, count)
    assert tuple(map(len, parts)) == sizes
    assert all(part.labels is None for part in parts)
    images = {image.numpy().tobytes() for part in parts for image in part.images}
    assert len(images) == sum(sizes)
    assert images <= {image.numpy().tobytes() for image in data.images}
    assert torch.equal(parts[0].images, calibration_split(data, count)[0].images)


@pytest.mark.parametrize(("length", "count"), [(30, 1), (1, 30), (30, -5)])
def test_calibration_needs_two_images(length, count):
    with pytest.raises(InputError, match="expected at least 2"):
        calibration_split(in_memory(length), count)
    with pytest.raises(InputError, match="expected at least 2"):
        UserBatches([torch.zeros(length, 1, 2, 2)]).calibration_split(count)


def test_splits_decode_nothing(tmp_path, decoded):
    for number in range(12):
        save(tmp_path / f"{number}.png", pixels(1)[0])
    train, _ = split_training(load(tmp_path))
    _, held_out = calibration_split(train, 10)
    assert len(decoded) == 1
    assert len(held_out.images) == 2
    assert len(decoded) == 3


# -- a user's own batches ----------------------------------------------------------------------------------------------


def stream(count, batch):
    return list(torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 4).split(batch))


@pytest.mark.parametrize(("count", "batch", "take"), [(23, 4, 100), (23, 4, 11), (23, 23, 11), (23, 1, 2), (10, 3, 9)])
def test_user_batches_split(count, batch, take):
    gather, held_out = UserBatches(stream(count, batch)).calibration_split(take)
    expected = range(min(count, take))
    for _ in range(2):
        assert [int(v) for v in gathered(held_out)[:, 0, 0, 0]] == [n for n in expected if n % 5 == 0]
        assert [int(v) for v in gathered(gather)[:, 0, 0, 0]] == [n for n in expected if n % 5 != 0]
    assert all(y is None for _, y in gather)


def test_user_batches_reads_no_more_than_it_needs():
    class Stream:
        made = 0

        def __iter__(self):
            for x in stream(100, 5):
                Stream.made += 1
                yield x

    gather, _ = UserBatches(Stream()).calibration_split(10)
    assert Stream.made == 2  # one batch to look at, one to count to two
    assert len(gathered(gather)) == 8
    assert Stream.made == 4


def test_user_batches_yields_pairs():
    x, y = torch.randn(6, 3, 4, 5), torch.arange(6)
    loader = UserBatches(DataLoader(TensorDataset(x, y), batch_size=4))
    assert (loader.channels, loader.size) == (3, (4, 5))
    for _ in range(2):
        assert torch.equal(gathered(loader), x)
        assert torch.equal(torch.cat([y for _, y in loader]), y)
    for batches in ([x], [(x,)], [[x, None]], DataLoader(TensorDataset(x))):
        assert all(y is None for _, y in UserBatches(batches))
    assert next(iter(UserBatches([(x, [0, 1, 2, 3, 4, 5])])))[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([torch.zeros(2, 3, 4, 4)]), "can be read only once"),
        ((x for x in [torch.zeros(2, 3, 4, 4)]), "generator, which can be read only once"),
        (5, "data is of type int"),
        (torch.zeros(2, 3, 4, 4), "data is of type Tensor"),
        ([], "list holds no batches"),
        ([{"x": 1}], "a batch is dict"),
        ([()], "a batch is empty"),
        ([torch.zeros(3, 4, 4)], r"a batch is torch.float32 of shape \(3, 4, 4\)"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], "a batch is torch.uint8"),
        ([(torch.zeros(2, 3, 4, 4), 1, 2)], r"\(2, 3, 4, 4\) and int and int; expected a float tensor"),
    ],
)
def test_user_batches_rejects(data, message):
    with pytest.raises(InputError, match=message):
        UserBatches(data)
