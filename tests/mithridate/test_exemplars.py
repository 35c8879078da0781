"""The store: what is gathered is what was stored, and nothing else is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mithridate.errors import BundleError
from mithridate.exemplars import ExemplarStore, Layout

LAYOUT = Layout(sources=11, copies=("clean", "pgd10", "fgsm"), shard_size=4)
SHAPE = (3, 5, 2)


def make_store(*, activations: bool = True) -> ExemplarStore:
    rng = np.random.Generator(np.random.PCG64(0))
    rows = [LAYOUT.rows(shard).stop - LAYOUT.rows(shard).start for _, shard in LAYOUT.shards]
    return ExemplarStore(
        LAYOUT,
        shards=[rng.integers(0, 256, (count, 3, 2, 2), dtype=np.uint8) for count in rows],
        labels=rng.integers(0, 10, LAYOUT.sources),
        features=rng.normal(size=(len(LAYOUT), 7)).astype(np.float32),
        predictions=rng.integers(0, 10, len(LAYOUT)).astype(np.int32),
        activations=rng.normal(size=(len(LAYOUT), *SHAPE)).astype(np.float16) if activations else None,
    )


shapes = st.one_of(
    st.tuples(st.integers(0, 9)),
    st.tuples(st.integers(0, 4), st.integers(0, 6)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
)


@given(shapes, st.integers(0, 2**32))
def test_gathers_equal_indexing_one_by_one(shape: tuple[int, ...], seed: int) -> None:
    """Repeated ids, any order, any shape, also none at all."""
    store = make_store()
    ids = torch.randint(len(store), shape, generator=torch.Generator().manual_seed(seed))
    features, labels, activations = store.gather_features(ids), store.gather_labels(ids), store.gather_activations(ids)
    assert features.shape == (*shape, 7)
    assert features.dtype == torch.float32
    assert labels.shape == shape
    assert labels.dtype == torch.int64
    assert activations.shape == (*shape, *SHAPE)
    assert activations.dtype == torch.float16
    assert store.activations is not None
    for place in np.ndindex(*shape):
        number = int(ids[place])
        assert torch.equal(features[place], store.features[number])
        assert int(labels[place]) == int(store.labels[number]) == int(store.labels[number % LAYOUT.sources])
        assert torch.equal(activations[place], store.activations[number])


@given(st.lists(st.integers(0, len(LAYOUT) - 1), max_size=40))
def test_pixels_are_those_of_the_shards(ids: list[int]) -> None:
    store = make_store()
    everything = np.concatenate(store._shards)
    pixels = store.pixels(torch.tensor(ids, dtype=torch.int64))
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), everything[ids])


def test_gathers_leave_the_store_as_it_is() -> None:
    """What is gathered belongs to the caller: writing to it changes nothing for the next one."""
    store = make_store()
    ids = torch.tensor([[3, 3], [0, 32]])
    for gather in (store.gather_features, store.gather_labels, store.gather_activations):
        before = gather(ids).clone()
        gather(ids).zero_()
        assert torch.equal(gather(ids), before)
        assert before.any()


def test_a_store_without_activations_says_how_to_get_them() -> None:
    store = make_store(activations=False)
    assert store.activations is None
    with pytest.raises(BundleError, match="stores no activations; build it with --tail-layer"):
        store.gather_activations(torch.tensor([1]))


@pytest.mark.parametrize("number", [len(LAYOUT), -1])
def test_an_id_that_is_none_is_not_answered(number: int) -> None:
    store = make_store()
    for gather in (store.gather_features, store.gather_labels, store.gather_activations):
        with pytest.raises(IndexError):
            gather(torch.tensor([0, number]))


def test_origin_names_image_and_copy() -> None:
    store = make_store()
    assert [store.origin(number) for number in (0, 10, 11, 32)] == [
        (0, "clean"),
        (10, "clean"),
        (0, "pgd10"),
        (10, "fgsm"),
    ]
    assert store.clean_count == 11


def test_a_moved_store_answers_the_same_and_maps_what_is_large() -> None:
    store = make_store()
    moved = store.to("cpu")
    ids = torch.tensor([5, 6, 30])
    assert torch.equal(moved.gather_features(ids), store.gather_features(ids))
    assert torch.equal(moved.pixels(ids), store.pixels(ids))
    nowhere = store.to("meta")  # a device without memory: what is there has left the CPU, the rest has not
    assert nowhere.labels.device.type == nowhere.features.device.type == "meta"
    assert store.labels.device.type == store.features.device.type == "cpu"
    assert torch.equal(nowhere.gather_activations(ids), store.gather_activations(ids))
    assert torch.equal(nowhere.pixels(ids), store.pixels(ids))
    assert nowhere.gather_features(ids, "meta").shape == (3, 7)


def resident_megabytes(what: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def test_rows_of_a_file_larger_than_memory_should_be_are_read_alone(tmp_path: Path) -> None:
    """512 MB of activations and as much of features: what grows is what was asked for."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("this system does not tell the peak of a process")
    count = 16_384
    layout = Layout(sources=count, copies=("clean",), shard_size=count)
    features = np.lib.format.open_memmap(tmp_path / "f.npy", mode="w+", dtype=np.float32, shape=(count, 8192))
    large = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype=np.float16, shape=(count, 64, 16, 16))
    large[16_000], features[16_000] = 2, 3  # a sparse file: the rest takes no space on the disk
    store = ExemplarStore(
        layout,
        shards=[np.zeros((count, 1, 1, 1), np.uint8)],
        labels=np.zeros(count, np.int64),
        features=np.load(tmp_path / "f.npy", mmap_mode="c"),
        predictions=np.zeros(count, np.int32),
        activations=np.load(tmp_path / "a.npy", mmap_mode="c"),
    )
    del features, large
    ids = torch.arange(0, count, 500).reshape(3, 11)
    store.gather_activations(ids[:1, :1])
    reset.write_text("5")  # the peak is now what is in use
    before = resident_megabytes("VmHWM")
    for _ in range(3):
        activations, wide = store.gather_activations(ids), store.to("cpu").gather_features(ids)
    assert resident_megabytes("VmHWM") - before < 40
    assert activations.shape == (3, 11, 64, 16, 16)
    assert (activations[2, 10] == 2).all()
    assert (wide[2, 10] == 3).all()
