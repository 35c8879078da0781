"""One source at a time, in miniature: what each reads, in which order, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import json
import pickle
import struct
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mithridate.datasets import load_dataset
from mithridate.errors import DatasetError
from mithridate.images import UInt8Image, decode_image, encode_png, to_channels

RNG = np.random.Generator(np.random.PCG64(3))


def random_images(count: int, channels: int = 3, height: int = 6, width: int = 6) -> UInt8Image:
    return RNG.integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def refused(spec: str, *parts: str, **options: Any) -> None:
    """``load_dataset`` refuses, and the message holds every one of ``parts``."""
    with pytest.raises(DatasetError) as caught:
        load_dataset(spec, **options)
    for part in parts:
        assert part in str(caught.value)


# MNIST and CIFAR


def write_idx(path: Path, array: UInt8Image, *, gzipped: bool) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".gz" * gzipped).write_bytes(gzip.compress(data) if gzipped else data)


@pytest.mark.parametrize("gzipped", [True, False])
def test_mnist_files_are_read_packed_or_not(tmp_path: Path, gzipped: bool) -> None:
    images, labels = random_images(7, channels=1)[:, 0], np.arange(7, dtype=np.uint8)
    write_idx(tmp_path / "MNIST/raw/t10k-images-idx3-ubyte", images, gzipped=gzipped)
    write_idx(tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte", labels, gzipped=gzipped)
    data = load_dataset("mnist[test,2:]", data_root=tmp_path)
    np.testing.assert_array_equal(data.images[:, 0], images[2:])
    assert data.labels.tolist() == [2, 3, 4, 5, 6]
    refused("mnist", "no train-images-idx3-ubyte", str(tmp_path), "--data-root", "--download", data_root=tmp_path)


def test_damaged_mnist_files_are_named(tmp_path: Path) -> None:
    for name in ("images-idx3", "labels-idx1"):
        write_idx(tmp_path / f"MNIST/raw/train-{name}-ubyte", np.zeros((4, 5, 6), np.uint8), gzipped=False)
    refused("mnist", "images [4, 5, 6] and labels [4, 5, 6]", data_root=tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    for damaged in (path.read_bytes()[:-1], b"", b"\0\0\x08", b"\0\0\x0d\x01"):
        path.write_bytes(damaged)
        refused("mnist", str(path), "truncated", data_root=tmp_path)
    path.rename(path.with_suffix(".gz"))
    refused("mnist", "cannot be read", data_root=tmp_path)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[str]:
    handler = functools.partial(QuietHandler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_download_goes_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a mirror on this machine: nothing here reaches a network."""
    from torchvision.datasets import FashionMNIST

    monkeypatch.setenv("no_proxy", "*")
    mirror, root = tmp_path / "mirror", tmp_path / "root"
    for stem in ("train", "t10k"):
        write_idx(mirror / f"{stem}-images-idx3-ubyte", random_images(3, channels=1)[:, 0], gzipped=True)
        write_idx(mirror / f"{stem}-labels-idx1-ubyte", np.arange(3, dtype=np.uint8), gzipped=True)
    monkeypatch.setattr(FashionMNIST, "resources", [(path.name, md5(path)) for path in mirror.iterdir()])
    with serve(mirror) as url:
        monkeypatch.setattr(FashionMNIST, "mirrors", [url])
        data = load_dataset("fashion-mnist[test]", data_root=root, download=True)
    assert [data.classes[label] for label in data.labels] == ["T-shirt/top", "Trouser", "Pullover"]
    refused("fashion-mnist", "torchvision says", "--data-root", data_root=tmp_path / "other", download=True)


class OldDtype:
    """Makes NumPy warn when it is unpickled, as the dtypes in the CIFAR files of 2009 do with 2.4.0 to 2.4.4."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("u1", 0)


@pytest.mark.parametrize(("name", "folder"), [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python")])
def test_cifar_is_read_and_its_checksums_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    import torchvision

    spec = name.lower()
    refused(spec, "no such directory", folder, "--download", data_root=tmp_path)
    images, fine = random_images(4, height=32, width=32), name == "CIFAR100"
    (tmp_path / folder).mkdir()
    batch, meta = tmp_path / folder / "batch", tmp_path / folder / "names"
    content = {"data": images.reshape(4, -1), "fine_labels" if fine else "labels": [0, 1, 1, 0], "old": OldDtype()}
    batch.write_bytes(pickle.dumps(content))
    meta.write_bytes(pickle.dumps({"key": ["cat", "dog"]}))
    refused(f"{spec}[test]", "torchvision says", "corrupted", data_root=tmp_path)
    cls = getattr(torchvision.datasets, name)
    monkeypatch.setattr(cls, "train_list", [])
    monkeypatch.setattr(cls, "test_list", [["batch", md5(batch)]])
    monkeypatch.setattr(cls, "meta", {"filename": "names", "key": "key", "md5": md5(meta)})
    data = load_dataset(f"{spec}[test,1:]", data_root=tmp_path)
    np.testing.assert_array_equal(data.images, images[1:])
    assert (data.labels.tolist(), data.classes) == ([1, 1, 0], ("cat", "dog"))


# npz


def test_npz_takes_every_layout(tmp_path: Path) -> None:
    images, labels = random_images(4), np.array([0, 1, 2, 1], np.int32)
    path = tmp_path / "x.npz"
    for stored in (images, images.transpose(0, 2, 3, 1)):
        np.savez(path, images=stored, labels=labels, classes=np.array(["a", "b", "c"]))
        data = load_dataset(f"npz:{path}[1:]")
        np.testing.assert_array_equal(data.images, images[1:])
        assert (data.labels.tolist(), data.classes) == ([1, 2, 1], ("a", "b", "c"))
        assert data.images.flags.c_contiguous
    np.savez_compressed(path, images=images[:, 0], labels=labels)
    data = load_dataset(f"npz:{path}")
    np.testing.assert_array_equal(data.images, images[:, :1])
    assert data.classes == ("0", "1", "2")
    np.savez(path, images=images, labels=labels)
    expected = np.stack([to_channels(image, 1) for image in images])
    np.testing.assert_array_equal(load_dataset(f"npz:{path}", channels=1).images, expected)


def test_npz_in_keras_layout_has_splits_that_share_their_classes(tmp_path: Path) -> None:
    path, images = tmp_path / "keras.npz", random_images(5).transpose(0, 2, 3, 1)
    np.savez(path, x_train=images[:3], y_train=[[0], [3], [1]], x_test=images[3:], y_test=[[1], [0]])
    train, test = load_dataset(f"npz:{path}"), load_dataset(f"npz:{path}[test]")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 3, 1], [1, 0])
    assert train.classes == test.classes == ("0", "1", "2", "3")
    np.testing.assert_array_equal(test.images, images[3:].transpose(0, 3, 1, 2))


def test_npz_that_cannot_be_used(tmp_path: Path) -> None:
    path, images, labels = tmp_path / "x.npz", random_images(2), np.array([0, 1])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"images": images}, "holds ['images']; needed are 'images' and 'labels', or 'x_train'"),
        ({"x_test": images, "y_test": labels}, "needed are"),
        ({"images": images / 255, "labels": labels}, "images is float64 [2, 3, 6, 6], allowed are uint8"),
        ({"images": random_images(2, 4), "labels": labels}, "[2, 4, 6, 6]"),
        ({"images": random_images(2, 3, 5, 3), "labels": labels}, "could be the second or the last axis"),
        ({"images": images, "labels": labels / 2}, "labels is float64 [2], allowed are integers"),
        ({"images": images, "labels": np.eye(2, dtype=int)}, "labels is int64 [2, 2]"),
        ({"images": images, "labels": [0, 1, 1]}, "labels are int64 [3], allowed are int64 [2]"),
        ({"images": images, "labels": [0, -1]}, "image 1 has label -1"),
        ({"images": images, "labels": [0, 10**9]}, "highest label is 1000000000"),
        ({"images": images, "labels": labels, "classes": ["a"]}, "image 1 has label 1, allowed are 0 to 0"),
        ({"images": images, "labels": np.array([0, None])}, "nothing is unpickled"),
    ]
    for arrays, message in bad:
        np.savez(path, **arrays)
        refused(f"npz:{path}", message)
    np.savez(path, images=images, labels=labels)
    refused(f"npz:{path}[test]", "without splits")
    path.write_bytes(path.read_bytes()[:-30])
    refused(f"npz:{path}", "damaged or not an .npz archive")
    np.save(tmp_path / "y.npy", images)
    refused(f"npz:{tmp_path / 'y.npy'}", "not an .npz archive")
    refused(f"npz:{tmp_path / 'no.npz'}[1,2]", "no file", "meant as a selection")


# folder


def write_classes(root: Path, counts: dict[str, int], *, channels: int = 3, side: int = 6) -> dict[str, UInt8Image]:
    files: dict[str, UInt8Image] = {}
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(random_images(count, channels, side, side)):
            (root / name / f"{number:03}.png").write_bytes(encode_png(image))
            files[f"{name}/{number:03}.png"] = image
    return files


def test_folder_is_mixed_complete_and_stable(tmp_path: Path) -> None:
    files = write_classes(tmp_path, {"dog": 20, "cat": 20})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".hidden").mkdir()
    (tmp_path / "cat" / ".hidden" / "copy.png").write_bytes(b"broken")
    data = load_dataset(f"folder:{tmp_path}")
    assert data.classes == ("cat", "dog")
    expected = sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest())
    np.testing.assert_array_equal(data.images, np.stack([files[name] for name in expected]))
    assert [data.classes[label] for label in data.labels] == [name[:3] for name in expected]
    assert 0 < data.labels[:8].sum() < 8
    (tmp_path / expected[5]).unlink()
    remaining = load_dataset(f"folder:{tmp_path}[:20]")
    kept = [*expected[:5], *expected[6:21]]
    np.testing.assert_array_equal(remaining.images, np.stack([files[name] for name in kept]))


def test_folder_with_splits(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 2, "c": 1})
    val = write_classes(tmp_path / "val", {"a": 1, "c": 2})
    assert len(load_dataset(f"folder:{tmp_path}")) == 5
    data = load_dataset(f"folder:{tmp_path}[test]")
    assert (sorted(data.labels.tolist()), data.classes) == ([0, 2, 2], ("a", "b", "c"))
    write_classes(tmp_path / "test", {"a": 4})
    assert len(load_dataset(f"folder:{tmp_path}[test]")) == 4 != len(val)
    (tmp_path / "test" / "z").mkdir()
    refused(f"folder:{tmp_path}[test]", "has classes that", "has not: z")
    refused(f"folder:{tmp_path / 'train'}[test]", "has no splits")
    write_classes(tmp_path / "only" / "test", {"a": 1})
    refused(f"folder:{tmp_path / 'only'}", "no train split, only test")


def test_folder_sizes_and_colors(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2}, channels=1)
    assert load_dataset(f"folder:{tmp_path}").image_shape == (1, 6, 6)
    write_classes(tmp_path, {"b": 1}, side=9)
    refused(f"folder:{tmp_path}", "6x6 px", "9x9 px", ".png is", "--image-size")
    assert load_dataset(f"folder:{tmp_path}", image_size=8).image_shape == (3, 8, 8)
    assert load_dataset(f"folder:{tmp_path}", image_size=8, channels=1).image_shape == (1, 8, 8)
    refused(f"folder:{tmp_path}", "quarter", ".png: image is", image_size=99)


def test_folder_takes_jpeg_and_webp_as_the_decoder_does(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    image = Image.fromarray(random_images(1)[0].transpose(1, 2, 0))
    image.save(tmp_path / "a" / "x.JPG", format="JPEG")
    image.save(tmp_path / "a" / "deep" / "y.webp")
    data = load_dataset(f"folder:{tmp_path}")
    paths = [tmp_path / "a" / "x.JPG", tmp_path / "a" / "deep" / "y.webp"]
    decoded = {decode_image(path.read_bytes(), channels=3).tobytes() for path in paths}
    assert {each.tobytes() for each in data.images} == decoded


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    refused(f"folder:{tmp_path / 'no'}", "no directory")
    refused(f"folder:{tmp_path}", "one folder a class")
    (tmp_path / "a").mkdir()
    refused(f"folder:{tmp_path}", "holds no image file", ".webp")
    (tmp_path / "a" / "x.png").write_bytes(b"GIF89a")
    refused(f"folder:{tmp_path}", str(tmp_path / "a" / "x.png"), "JPEG, PNG and WebP")
    refused(f"folder:{tmp_path}", "x.png", "JPEG, PNG and WebP", channels=3)
    refused(f"folder:{tmp_path}[5:]", "selection is empty")


# parquet


def write_parquet(path: Path, images: UInt8Image, labels: Sequence[int | None], **options: Any) -> None:
    cells = [{"bytes": encode_png(image), "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "id": pa.array(range(len(cells))),
        "img": pa.array(cells, kind),
        "label": pa.array(labels, pa.int64()),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(options.get("metadata")), path, row_group_size=3)


def hugging_face(**features: Any) -> dict[str, str]:
    return {"huggingface": json.dumps({"info": {"features": features}})}


def test_parquet_shards_are_read_in_order_and_only_as_far_as_needed(tmp_path: Path) -> None:
    images, labels = random_images(16), [0, 1] * 8
    metadata = hugging_face(label={"names": ["cat", "dog"], "_type": "ClassLabel"})
    write_parquet(tmp_path / "train-0.parquet", images[:8], labels[:8], metadata=metadata)
    write_parquet(tmp_path / "train-1.parquet", images[8:], labels[8:], metadata=metadata)
    (tmp_path / "train-2.parquet").write_bytes(b"not read")
    for start, stop in [(0, 1), (2, 4), (3, 6), (5, 11), (8, 16), (15, 16), (0, 16)]:
        data = load_dataset(f"parquet:{tmp_path}/train-[0-9].parquet[{start}:{stop}]")
        np.testing.assert_array_equal(data.images, images[start:stop])
        assert data.labels.tolist() == labels[start:stop]
        assert data.classes == ("cat", "dog")
    refused(f"parquet:{tmp_path}/train-[0-9].parquet[:17]", "cannot be read", "Parquet")


def test_parquet_splits_are_file_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", random_images(4), [0, 1, 2, 0])
    write_parquet(tmp_path / "test-0.parquet", random_images(2), [0, 1])
    assert len(load_dataset(f"parquet:{tmp_path}/*")) == 6
    test = load_dataset(f"parquet:{tmp_path}/*[test]")
    assert (test.labels.tolist(), test.classes) == ([0, 1], ("0", "1"))
    refused(f"parquet:{tmp_path}/train*[test]", "starts with 'test': train-0.parquet")


def test_parquet_columns_are_found_by_name_or_by_kind(tmp_path: Path) -> None:
    image, path = random_images(1, channels=1)[0], tmp_path / "x.parquet"
    cell, other = encode_png(image), pa.array([9])
    struct_cell = pa.array([{"path": "p", "bytes": cell}])
    tables = [
        {"picture": pa.array([cell], pa.large_binary()), "target": pa.array([2], pa.uint8())},
        {"label": pa.array([2]), "mask": pa.array([b"junk"]), "image": struct_cell, "id": other},
        {"coarse_label": other, "fine_label": pa.array([2]), "img": struct_cell},
    ]
    for table in tables:
        pq.write_table(pa.table(table), path)
        data = load_dataset(f"parquet:{path}")
        np.testing.assert_array_equal(data.images[0], image)
        assert (data.labels.tolist(), data.classes) == ([2], ("0", "1", "2"))


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    refused(f"parquet:{tmp_path}/*.parquet", "no file matches")
    tables: list[tuple[dict[str, list[Any]], str]] = [
        ({"label": [1], "text": ["x"]}, "no image column among label (int64), text (string)"),
        ({"img": [b"x"], "label": ["cat"]}, "no label column among img (binary), label (string)"),
        ({"img": [b"x"], "a": [1], "b": [1]}, "no label column"),
        ({"img": [b"x", b"y"], "label": [0, None]}, "x.parquet row 0: image starts with"),
        ({"img": [None], "label": [0]}, "no image column"),
    ]
    for table, message in tables:
        pq.write_table(pa.table(table), path)
        refused(f"parquet:{path}", message)
    good = random_images(5)
    bad: list[tuple[list[int | None], str]] = [
        ([0, 0, 0, 0, None], "row 4: has no label"),
        ([0, 0, -1, 0, 0], "row 2 has label -1"),
    ]
    for labels, message in bad:
        write_parquet(path, good, labels)
        refused(f"parquet:{path}", message)
    write_parquet(path, good, [0, 1, 2, 1, 0], metadata=hugging_face(label={"names": ["a", "b"]}))
    refused(f"parquet:{path}", "row 2 has label 2, allowed are 0 to 1")
    assert len(load_dataset(f"parquet:{path}[:2]")) == 2
    pq.write_table(
        pa.table({"img": [{"bytes": None, "path": "a.png"}, {"bytes": b"", "path": ""}], "label": [0, 0]}),
        path,
    )
    refused(f"parquet:{path}", "row 0: has no image bytes")
