"""Image folders and tar files: the same images either way, cached or lazy, and errors that say what to do."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.base.errors import ConfigError
from pipeline.data import CachedImages, ImageData, LazyImages, open_data

TINY_GIB = 1e-6  # about 1,000 bytes: nothing fits
ALL = torch.arange(6)


def picture(number: int, width: int = 16, height: int = 16, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes with three training and two test images each, 16x16, and files that are no images."""
    root = tmp_path / "set"
    for split, count in (("train", 3), ("test", 2)):
        for number, label in enumerate(("cat", "dog")):
            for index in range(count):
                save(root / split / label / f"{index}.png", picture(100 * number + 10 * count + index))
    (root / "train" / "README.txt").write_text("not an image")
    (root / "train" / "cat" / "._0.png").write_bytes(b"left by another system")
    return root


def pack(root: Path, suffix: str = ".tar", top: str = "") -> Path:
    """A tar file of ``root``'s content, in an order that is not sorted; ``top`` goes before the names."""
    archive = root.parent / f"packed{suffix}"
    compression = {".tar": "", ".tar.gz": "gz", ".tar.bz2": "bz2", ".tar.xz": "xz"}[suffix]
    with tarfile.open(archive, f"w:{compression}") as tar:
        for path in sorted(root.rglob("*"), reverse=True):
            if path.is_file():
                tar.add(path, f"{top}{path.relative_to(root)}")
    return archive


def assert_equal(one: ImageData, other: ImageData) -> None:
    assert one.classes == other.classes
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images(torch.arange(len(a))), b.images(torch.arange(len(b))))


def error_of(root: Path | str, *, image_size: int = 0, cache_gib: float = 4.0) -> str:
    """The message of the ConfigError that opening ``root`` raises: always one line."""
    with pytest.raises(ConfigError) as caught:
        open_data("folder", str(root), image_size=image_size, cache_gib=cache_gib)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_directory(tree: Path) -> None:
    data = open_data("folder", str(tree))

    assert data.classes == ("cat", "dog") and data.image_shape == (3, 16, 16) and data.name == "folder"
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.train.labels.dtype == torch.int64
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert isinstance(data.train, CachedImages)
    expected = torch.from_numpy(np.array(Image.open(tree / "train" / "dog" / "1.png"))).permute(2, 0, 1)
    assert torch.equal(data.train.images(torch.tensor([4]))[0], expected)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.bz2", ".tar.xz"])
@pytest.mark.parametrize("top", ["", "./", "set-1.0/"])
def test_a_tar_file_equals_the_directory(tree: Path, suffix: str, top: str) -> None:
    before = sorted(tree.parent.rglob("*"))
    archive = pack(tree, suffix, top)

    assert_equal(open_data("folder", str(archive)), open_data("folder", str(tree)))
    assert sorted(tree.parent.rglob("*")) == sorted([*before, archive])  # nothing was extracted


def test_one_directory_above_the_splits_and_val_for_test(tree: Path) -> None:
    data = open_data("folder", str(tree))
    outer = tree.parent / "outer"
    shutil.copytree(tree, outer / "inner")
    (outer / "inner" / "test").rename(outer / "inner" / "val")

    assert_equal(open_data("folder", str(outer)), data)


@pytest.mark.parametrize("packed", [False, True])
def test_test_counts_if_there_is_val_too(tree: Path, packed: bool) -> None:
    data = open_data("folder", str(tree))
    shutil.copytree(tree / "train", tree / "val")

    assert_equal(open_data("folder", str(pack(tree) if packed else tree)), data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("image_size", [0, 8])
def test_lazy_equals_cached(tree: Path, packed: bool, image_size: int) -> None:
    root = str(pack(tree) if packed else tree)
    lazy = open_data("folder", root, image_size=image_size, cache_gib=TINY_GIB)

    assert isinstance(lazy.train, LazyImages) and isinstance(lazy.test, LazyImages)
    assert_equal(lazy, open_data("folder", root, image_size=image_size))
    order = torch.tensor([5, 0, 3])
    assert torch.equal(lazy.train.images(order), lazy.train.images(ALL)[order])
    assert lazy.train.images(order[:0]).shape == (0, 3, image_size or 16, image_size or 16)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("RGBA", "png"), ("L", "jpg"), ("CMYK", "jpg")]
)
def test_every_colour_mode_becomes_rgb(tree: Path, mode: str, suffix: str) -> None:
    path = tree / "train" / "cat" / f"0.{suffix}"
    (tree / "train" / "cat" / "0.png").unlink()
    save(path, picture(7, mode=mode))
    found = open_data("folder", str(tree)).train.images(torch.tensor([0]))[0]
    expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)

    assert found.shape == (3, 16, 16)
    assert (found.int() - expected.int()).abs().max() <= 2  # two JPEG decoders may round differently


def test_image_size_resizes_the_shorter_side_and_crops_the_centre(tree: Path) -> None:
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (16, 0, 48, 32))  # the centre square is blue
    save(tree / "train" / "cat" / "0.png", wide)
    data = open_data("folder", str(tree), image_size=8)
    found = data.train.images(torch.tensor([0]))[0]

    assert data.image_shape == (3, 8, 8)
    assert found[2, :, 1:-1].eq(255).all() and found[0, :, 1:-1].eq(0).all()


@pytest.mark.parametrize("cache_gib", [4.0, TINY_GIB])
@pytest.mark.parametrize("packed", [False, True])
def test_different_sizes_name_the_file_and_the_fix(tree: Path, packed: bool, cache_gib: float) -> None:
    save(tree / "test" / "dog" / "1.png", picture(1, width=20))
    root = pack(tree) if packed else tree

    assert error_of(root, cache_gib=cache_gib) == (
        f"'{root}/test/dog/1.png' is 20x16 pixels, the first image is 16x16; "
        "bring all to one size with --set data.image_size=N (for example 16)"
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["text", "cut.png", "cut.jpg", "empty"])
def test_a_damaged_image_is_named(tree: Path, packed: bool, kind: str) -> None:
    buffer = io.BytesIO()
    picture(3).save(buffer, "JPEG" if kind == "cut.jpg" else "PNG")
    content = {"text": b"hello", "empty": b""}.get(kind, buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tree / "train" / "dog" / "2.png").write_bytes(content)
    root = pack(tree) if packed else tree
    message = error_of(root)

    assert message.startswith(f"'{root}/train/dog/2.png' is no readable image (")
    assert message.endswith("; remove or replace this file") and "0x" not in message


def test_a_damaged_image_of_a_lazy_set_is_named_when_it_is_needed(tree: Path) -> None:
    data = open_data("folder", str(tree), image_size=8, cache_gib=TINY_GIB)
    (tree / "train" / "dog" / "2.png").write_bytes(b"hello")

    with pytest.raises(ConfigError, match=re.escape(f"'{tree}/train/dog/2.png' is no readable image")):
        data.train.images(ALL)


def test_missing_roots(tmp_path: Path) -> None:
    fix = "set it to a directory or tar file with train/CLASS/*.jpg and test/CLASS/*.jpg"
    text = tmp_path / "notes.tar"
    text.write_text("hello")

    assert error_of("") == f"data.root is empty; {fix}"
    assert error_of(tmp_path / "no") == f"data.root = '{tmp_path}/no' does not exist; {fix}"
    assert error_of(text) == f"data.root = '{text}' is no directory and no (gzip, bzip2, xz) tar file; {fix}"


@pytest.mark.parametrize("place", ["train/cat/9.png", "train/cow", "train"])
def test_a_link_that_leads_back_to_itself_is_called_that(tree: Path, place: str) -> None:
    link = tree / place
    if link.exists():
        shutil.rmtree(link)
    link.symlink_to(link.name)

    assert error_of(tree) == (
        f"data.root = '{tree}' cannot be read: '{link}' is a symbolic link that leads back to itself; remove it, or "
        "let it lead to a file"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_without_permission_is_called_that(tree: Path) -> None:
    (tree / "train" / "cat").chmod(0)

    assert error_of(tree).endswith("Permission denied; check its permissions")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "wanted"), [("train", "train/"), ("test", "test/ or val/")])
def test_a_missing_split(tree: Path, packed: bool, split: str, wanted: str) -> None:
    shutil.rmtree(tree / split)
    root = pack(tree) if packed else tree

    assert error_of(root) == (
        f"data.root = '{root}' has no {wanted} directory; put the {split} images in {split}/CLASS/*.jpg"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_an_empty_split(tree: Path, packed: bool) -> None:
    shutil.rmtree(tree / "test")
    (tree / "test" / "cat").mkdir(parents=True)
    (tree / "test" / "cat" / "README.txt").write_text("to do")
    save(tree / "test" / "0.png", picture(0))  # in no class
    root = pack(tree) if packed else tree

    assert error_of(root) == (
        f"data.root = '{root}': test/ has no images in class directories; put them in test/CLASS/*.jpg"
    )


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_different_classes(tree: Path, split: str, other: str) -> None:
    save(tree / split / "cow" / "0.png", picture(0))
    counts = "3 and 2" if split == "train" else "2 and 3"

    assert error_of(tree) == (
        f"data.root = '{tree}': class 'cow' has images in the {split} split but not in the {other} split "
        f"({counts} classes in train and test); give both the same classes"
    )


def test_one_class(tree: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(tree / split / "dog")

    assert error_of(tree) == (
        f"data.root = '{tree}' has only one class ('cat'); make a directory for each class, at least two"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_two_data_sets_side_by_side(tree: Path, packed: bool) -> None:
    outer = tree.parent / "outer"
    shutil.copytree(tree, outer / "a")
    shutil.copytree(tree, outer / "b")
    root = pack(outer) if packed else outer

    assert error_of(root) == (
        f"data.root = '{root}' has train/, test/ or val/ in several directories ('a', 'b'); "
        "set data.root to one data set"
    )


@pytest.mark.parametrize(("cache_gib", "what"), [(4e-7, "holds more than"), (6e-6, "its images take")])
def test_a_compressed_tar_cannot_be_lazy(tree: Path, cache_gib: float, what: str) -> None:
    for path in tree.rglob("[0-9].png"):
        save(path, Image.new("RGB", (16, 16)))  # small as a file, not as pixels
    message = error_of(pack(tree, ".tar.xz"), cache_gib=cache_gib)

    assert what in message and "is compressed" in message
    assert message.endswith("extract it and set data.root to the directory, or raise data.cache_gib")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
@pytest.mark.parametrize("spare", [0, 100])
def test_a_tar_file_that_is_cut_short(tree: Path, suffix: str, spare: int) -> None:
    archive = pack(tree, suffix)
    content = archive.read_bytes()
    keep = len(content) // 2
    if suffix == ".tar":
        with tarfile.open(archive) as tar:
            keep = tar.getmembers()[3].offset  # between two files
    archive.write_bytes(content[: keep - spare])
    message = error_of(archive)

    assert message.startswith(f"data.root = '{archive}' cannot be read as a tar file (")
    assert message.endswith("it may be cut short, copy it again")


def test_links_in_a_tar_file_are_refused(tree: Path) -> None:
    archive = pack(tree)
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("train/cat/9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        tar.addfile(link)

    assert "'train/cat/9.png' is a link, not an image; pack the files themselves" in error_of(archive)


def test_real_photographs(tmp_path: Path) -> None:
    """The first JPEG images of the shared CIFAR-10 archive: reading all of it would take long."""
    shared = os.environ.get("LOCALPIPE_SHARED", "")
    archive = Path(shared) / "data" / "cifar10-jpeg.tar.xz"
    if not shared or not archive.is_file():
        pytest.skip("set LOCALPIPE_SHARED to a directory with data/cifar10-jpeg.tar.xz to run this test")
    photographs: list[bytes] = []
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if member.isfile() and member.name.startswith("train/airplane/"):
                file = tar.extractfile(member)
                assert file is not None
                photographs.append(file.read())
            if len(photographs) == 40:
                break
    for number, content in enumerate(photographs):
        path = tmp_path / ("train", "test")[number % 2] / str(number // 2 % 2) / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    data = open_data("folder", str(tmp_path))
    first = torch.from_numpy(np.array(Image.open(io.BytesIO(photographs[0])))).permute(2, 0, 1)

    assert (len(data.train), len(data.test), data.image_shape) == (20, 20, (3, 32, 32))
    assert (data.train.images(torch.tensor([0]))[0].int() - first.int()).abs().max() <= 2
