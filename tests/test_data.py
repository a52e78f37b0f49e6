"""The data sets of ``train``: what is read from files, what is refused, and that seeds decide all that is random."""

from __future__ import annotations

import os
import pickle
import tarfile

import pytest
import torch

pytest.importorskip("numpy")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")

import numpy as np
from PIL import Image

from deepcontrol_cuda.training import data, imagefolder
from deepcontrol_cuda.training.errors import TrainingError

CIFAR10 = [f"data_batch_{i}" for i in range(1, 6)]


def batch(count: int, seed: int, labels: bytes = b"labels", classes: int = 10) -> dict:
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, 3072), dtype=np.uint8)
    return {b"data": images, labels: rng.integers(classes, size=count).tolist(), b"batch_label": b"one of some"}


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    for seed, name in enumerate([*CIFAR10, "test_batch"]):
        write(folder / name, batch(4, seed))
    return folder


@pytest.fixture
def photographs(tmp_path):
    """Two classes of three images for training and one for testing: RGB, grey and with a palette; not all square."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / part / name / "nested"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(256, size=(40, 30 + 10 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(("RGB", "L", "P")[i]).save(folder / f"{i}.{('jpg', 'png', 'bmp')[i]}")
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def read_all(part, seed: int | None = None, size: int = 4):
    images, labels = zip(*part.batches(torch.arange(len(part)).split(size), seed))
    return torch.cat(images), torch.cat(labels)


def test_digits():
    digits = data.load("digits", None)
    assert (len(digits.train), len(digits.test), digits.classes, digits.channels) == (1347, 450, 10, 1)
    images = digits.normalise(digits.train.images)
    assert images.shape == (1347, 1, 8, 8)
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-5
    assert data.load("digits", None).fingerprint == digits.fingerprint


@pytest.mark.parametrize("where", ["folder", "parent", "tar"])
def test_cifar10(cifar10, tmp_path, where):
    path = {"folder": cifar10, "parent": tmp_path, "tar": tmp_path / "cifar-10-python.tar.gz"}[where]
    if where == "tar":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(cifar10, cifar10.name)
    cifar = data.load("cifar10", path)
    images, labels = read_all(cifar.train)
    wanted = [batch(4, seed) for seed in range(5)]
    assert torch.equal(images, torch.from_numpy(np.concatenate([b[b"data"] for b in wanted])).view(-1, 3, 32, 32))
    assert labels.tolist() == [label for b in wanted for label in b[b"labels"]]
    assert torch.equal(read_all(cifar.test)[0].flatten(1), torch.from_numpy(batch(4, 5)[b"data"]))
    normal = cifar.normalise(images).double()
    assert torch.allclose(normal.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6)
    assert torch.allclose(normal.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-6)


def test_cifar100(tmp_path):
    for seed, name in enumerate(("train", "test")):
        write(tmp_path / name, batch(20, seed, b"fine_labels", 100))
    cifar = data.load("cifar100", tmp_path)
    assert (cifar.classes, len(cifar.train), len(cifar.test)) == (100, 20, 20)


def test_cifar_of_numpy_1_and_python_2(cifar10):
    """The published files name ``numpy.core`` and hold the bytes of arrays as strings."""
    array = np.arange(3072, dtype=np.uint8)[None]
    content = pickle.dumps({"data": array, "labels": [3]}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in content
    # Text of Python 3 becomes text of Python 2: BINUNICODE with a length of four bytes to SHORT_BINSTRING with one.
    for name in (b"data", b"labels"):
        content = content.replace(b"X" + len(name).to_bytes(4, "little") + name, b"U" + bytes([len(name)]) + name)
    (cifar10 / "test_batch").write_bytes(content)
    images, labels = read_all(data.load("cifar10", cifar10).test)
    assert images.flatten().tolist() == array.flatten().tolist()
    assert labels.tolist() == [3]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": batch(4, 0)[b"data"]}, "wanted a dict with data and labels"),
        ([1], "wanted a dict"),
        ({**batch(4, 0), b"data": np.zeros((4, 3072))}, r"holds data float64 \(4, 3072\), wanted uint8"),
        ({**batch(4, 0), b"data": np.zeros((4, 3), np.uint8)}, r"\(4, 3\), wanted uint8 \(N, 3072\)"),
        ({**batch(4, 0), b"data": "text"}, "holds data str"),
        ({**batch(4, 0), b"labels": [0, 1, 2]}, "4 images and 3 labels"),
        ({**batch(4, 0), b"labels": [0, 1, 2, 10]}, "labels from 0 to 10, wanted 0 to 9"),
        ({**batch(4, 0), b"labels": [0.5] * 4}, "no list of integers"),
        ({**batch(4, 0), b"extra": Malicious()}, "asks for posix.system"),
        ({**batch(4, 0), b"extra": pickle.Unpickler}, "asks for pickle.Unpickler"),
        ({**batch(4, 0), b"extra": np.random.default_rng}, "asks for numpy.random"),
    ],
)
def test_what_is_no_batch_of_cifar_is_refused(cifar10, content, message, monkeypatch):
    monkeypatch.chdir(cifar10)
    write(cifar10 / "data_batch_3", content)
    with pytest.raises(TrainingError, match=message) as error:
        data.load("cifar10", cifar10)
    assert "data_batch_3" in str(error.value)
    assert not (cifar10 / "owned").exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: os.urandom(1000)])
def test_damaged_cifar_is_refused(cifar10, tmp_path, damage):
    file = cifar10 / "test_batch"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TrainingError, match=r"test_batch .* is no batch of CIFAR or damaged"):
        data.load("cifar10", cifar10)
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar10, cifar10.name)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(TrainingError, match=r"cifar.tar.gz (cannot be read|has no)"):
        data.load("cifar10", archive)


def test_one_flipped_bit_of_an_archive_is_found(cifar10, tmp_path):
    archive = tmp_path / "cifar.tar.gz"
    # Stored, not compressed, pixels can be found.
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        tar.add(cifar10, cifar10.name)
    content = bytearray(archive.read_bytes())
    # Protocol 2 keeps bytes as text.
    pixels = batch(4, 2)[b"data"][1].tobytes().decode("latin1").encode()[:100]
    place = content.index(pixels)
    content[next(i for i in range(place, place + 100) if content[i] < 128)] ^= 1
    archive.write_bytes(content)
    with pytest.raises(TrainingError, match=r"cifar.tar.gz cannot be read: CRC check failed"):
        data.load("cifar10", archive)


def test_missing_data_is_named(cifar10, tmp_path):
    (cifar10 / "data_batch_2").unlink()
    with pytest.raises(TrainingError, match=r"has no data_batch_2; wanted the files of cifar-10-batches-py"):
        data.load("cifar10", cifar10)
    with pytest.raises(TrainingError, match=r"nowhere does not exist"):
        data.load("cifar10", tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=r"cifar100 wants --data PATH"):
        data.load("cifar100", None)
    with pytest.raises(TrainingError, match=r"digits come with scikit-learn"):
        data.load("digits", tmp_path)


def test_crop_and_flip():
    """Every cropped image is one of the 2 x 81 that padding by 4 allows, and all offsets and both sides come up."""
    images = torch.randint(1, 256, (600, 1, 5, 5), dtype=torch.uint8)
    part = data.InMemory(images, torch.zeros(600, dtype=torch.int64), padding=4, flip=True)
    cropped, _ = read_all(part, seed=0)
    padded = torch.nn.functional.pad(images, (4,) * 4)
    found = set()
    for i in range(600):
        for top in range(9):
            for left in range(9):
                window = padded[i, 0, top : top + 5, left : left + 5]
                for flipped in (False, True):
                    if torch.equal(cropped[i, 0], window.flip(1) if flipped else window):
                        found.add((i, top, left, flipped))
    assert len({i for i, *_ in found}) == 600
    for axis, values in ((1, 9), (2, 9), (3, 2)):
        assert len({place[axis] for place in found}) == values


def test_draws_depend_on_seed_and_sample_only():
    part = data.InMemory(torch.rand(32, 3, 8, 8), torch.arange(32), padding=2, flip=True)
    whole, _ = read_all(part, seed=5, size=32)
    assert torch.equal(read_all(part, seed=5, size=3)[0], whole)
    assert torch.equal(next(iter(part.batches([torch.tensor([7, 3])], 5)))[0], whole[[7, 3]])
    assert not torch.equal(read_all(part, seed=6)[0], whole)
    assert torch.equal(read_all(part)[0], part.images)


def test_order_is_new_each_epoch_and_the_same_again():
    digits = data.digits()
    first, again, next_epoch, other_seed = (
        torch.cat(digits.order(*key, 64)) for key in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert len(first) == 21 * 64 == len(first.unique())
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    assert not torch.equal(first, other_seed)


def test_image_folder(photographs):
    folder = data.load("imagefolder", photographs, image_size=16)
    assert (folder.classes, folder.channels, len(folder.train), len(folder.test)) == (2, 3, 6, 2)
    images, labels = read_all(folder.train, seed=1)
    assert images.shape == (6, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(read_all(folder.train, seed=1, size=1)[0], images)
    assert not torch.equal(read_all(folder.train, seed=2)[0], images)
    assert torch.equal(read_all(folder.train)[0], read_all(folder.train)[0])
    assert folder.sample(4, seed=0).shape == (4, 3, 16, 16)
    before = folder.fingerprint
    (photographs / "train/cat/nested/1.png").rename(photographs / "train/cat/nested/9.png")
    assert data.load("imagefolder", photographs, image_size=16).fingerprint != before


def test_workers_give_the_same_images(photographs):
    alone, helped = (data.load("imagefolder", photographs, image_size=16, workers=n).train for n in (0, 2))
    assert torch.equal(read_all(alone, seed=3, size=2)[0], read_all(helped, seed=3, size=2)[0])


def test_test_images_are_the_middle(tmp_path):
    pixels = np.zeros((256, 512, 3), np.uint8)
    pixels[16:240, 144:368] = 200
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "0.png")
    images, _ = read_all(data.load("imagefolder", tmp_path, image_size=224).test)
    assert (images == 200).all()


def test_random_boxes_lie_in_the_image_and_reach_everywhere():
    draws = imagefolder.random.Random(0)
    boxes = np.array([imagefolder._random_box(60, 40, draws) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 60 + 1e-9
    assert bottom.max() <= 40 + 1e-9
    area, aspect = (right - left) * (bottom - top) / 2400, (right - left) / (bottom - top)
    assert 0.08 - 1e-9 <= area.min() < 0.1
    assert 0.85 < area.max() <= 1
    assert 0.75 - 1e-9 <= aspect.min() < 0.8
    assert 1.25 < aspect.max() <= 4 / 3 + 1e-9
    assert imagefolder._random_box(1000, 1, draws) == (499.5, 0.0, 500.5, 1.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(photographs, workers):
    broken = photographs / "train" / "dog" / "nested" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    folder = data.load("imagefolder", photographs, image_size=16, workers=workers)
    with pytest.raises(TrainingError, match=r"dog/nested/0.jpg cannot be read as an image"):
        read_all(folder.train, seed=0)


@pytest.mark.parametrize(("dtype", "suffix"), [("uint16", "png"), ("int32", "tif"), ("float32", "tif")])
def test_images_of_more_than_8_bits_are_refused(photographs, dtype, suffix):
    ramp = np.linspace(0, 60000, 1600).reshape(40, 40).astype(dtype)
    Image.fromarray(ramp).save(photographs / "train" / "cat" / f"ramp.{suffix}")
    with pytest.raises(TrainingError, match=rf"cat/ramp.{suffix} is in mode [IF].* wanted 8 bits a channel"):
        read_all(data.load("imagefolder", photographs, image_size=16).train)


def test_images_are_turned_as_the_camera_was(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right, so that the top lies on the right
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / part / "a" / "0.png", exif=exif)
    (image,), _ = read_all(data.load("imagefolder", tmp_path, image_size=28).test)
    assert (image[..., 14:] == 200).all()
    assert (image[..., :14] == 0).all()


def test_images_behind_links_are_found_once(photographs, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (photographs / "train" / "dog" / "nested" / "2.bmp").rename(elsewhere / "2.bmp")
    (photographs / "train" / "dog" / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(photographs / "train" / "dog")
    folder = data.load("imagefolder", photographs, image_size=16)
    cat, dog = [b"0.jpg", b"1.png", b"2.bmp"], [b"2.bmp", b"0.jpg", b"1.png"]
    assert [os.path.basename(file) for file in folder.train.files] == cat + dog


def test_image_folders_that_are_wrong_are_refused(photographs):
    (photographs / "val" / "horse").mkdir()
    with pytest.raises(TrainingError, match=r"val has classes that .*train lacks: horse"):
        data.load("imagefolder", photographs)
    (photographs / "train" / "horse").mkdir()
    with pytest.raises(TrainingError, match=r"train/horse holds no images \(\.bmp, "):
        data.load("imagefolder", photographs)
    with pytest.raises(TrainingError, match=r"train: No such file .* wanted a folder with train/CLASS"):
        data.load("imagefolder", photographs / "train")
    (photographs / "flat" / "train").mkdir(parents=True)
    with pytest.raises(TrainingError, match="has no folders; wanted one for each class"):
        data.load("imagefolder", photographs / "flat")
