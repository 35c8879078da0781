"""The pixel robustness manipulator: what it reads, what it gives attackers, and who draws what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from index_builder.build import BuildPlan, build_bundle
from index_builder.prm_training import PRMPlan, reconstruction_error, train_prm
from mithridate.bundle import Bundle
from mithridate.datasets import LabelledImages
from mithridate.defenses import Budget, Resources, build_defence, defence_name
from mithridate.defenses.prm import SHIFTS, Manipulator, PRMConfig, shifted
from mithridate.defenses.sampled import Sampled
from mithridate.errors import MithridateError, ModelError, OptionError
from mithridate.models import PRM, PRMSpec, build_prm, load_classifier, load_prm, save_prm
from mithridate.models.prm import VARIANTS, lattice
from mithridate.types import Images, to_images

SHARES = {"v0": 0.25, "v1": 0.5, "v2": 0.5, "v3": 0.25, "v4": 0.25, "v5": 0.25}


def fresh(variant: str, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0, size: str = "small") -> PRM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec = PRMSpec(variant=variant, size=size, image_shape=shape)  # type: ignore[arg-type]
        return build_prm(spec).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def manipulated(resources: Resources) -> Resources:
    """Two modules with fresh weights: what they rebuild is poor, and that is as good for these tests."""
    return replace(resources, prms=(fresh("v0"), fresh("v1", seed=1)))


@pytest.fixture(scope="module")
def images(digits_test: LabelledImages) -> Images:
    return to_images(torch.from_numpy(digits_test.images[:6]))


def first(data: LabelledImages, count: int) -> LabelledImages:
    return replace(data, images=data.images[:count], labels=data.labels[:count])


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def scores(text: str, resources: Resources, images: Images, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return build_defence(text, resources).predict(images, generator=generator, budget=Budget()).scores


# What is read


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("size", "shape"),
    [("small", (3, 32, 32)), ("small", (1, 28, 28)), ("small", (3, 31, 29)), ("unet", (3, 32, 32))],
)
def test_the_gradient_is_zero_off_the_lattice_and_nowhere_on_it(
    variant: str, size: str, shape: tuple[int, int, int]
) -> None:
    prm, point = fresh(variant, shape, size=size), torch.rand(2, *shape, generator=generators(1)[0]).requires_grad_()
    rebuilt = prm(point)
    assert rebuilt.shape == point.shape
    (gradient,) = torch.autograd.grad(rebuilt.square().sum(), point)
    read = lattice(variant, *shape[1:])
    assert torch.equal(gradient.abs().sum((0, 1)) > 0, read)
    if shape[1] % 4 == 0:
        assert read.float().mean() == SHARES[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_served_defence_at_lambda_1_has_no_gradient_off_the_lattice(
    resources: Resources, images: Images, variant: str
) -> None:
    defence = build_defence("prm:shift=none", replace(resources, prms=(fresh(variant),)))
    point = images.clone().requires_grad_()
    logits = defence.surrogate(point, generator=torch.Generator(), budget=Budget())
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.zeros(6, dtype=torch.long)), point)
    read = lattice(variant, 8, 8)
    assert not gradient[..., ~read].any()
    assert gradient[..., read].any(1).any(0).all()


def test_every_shift_leaves_the_attacked_lattice_unread() -> None:
    """Why the published table says little: all eight moves of v0 read other pixels than an attack on no move moved."""
    read = lattice("v0", 32, 32)
    for move in SHIFTS.values():
        moved = shifted(read[None, None].float(), torch.tensor([move]), 0.0)[0, 0] > 0
        assert not (moved & read).any()


# What a pass sees


def by_hand(
    image: torch.Tensor, moves: Sequence[tuple[int, int]], shares: Sequence[float], modules: Sequence[PRM], fill: float
) -> torch.Tensor:
    """One image, module after module."""
    for (down, right), share, module in zip(moves, shares, modules, strict=True):
        padded = F.pad(image, (1, 1, 1, 1), value=fill)
        side = image.shape[-1]
        image = padded[:, 1 - down : 1 - down + side, 1 - right : 1 - right + side]
        image = (1 - share) * image + share * module(image[None])[0]
    return image


def test_a_pass_is_what_one_would_write_for_one_image(manipulated: Resources) -> None:
    config = PRMConfig(lambda_="0/0.5/1", stack="1/2/3")
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = Manipulator(resources=manipulated, config=config).apply(images, generators(200))
    seen = set()
    for image, result, generator in zip(images, found, generators(200), strict=True):
        draws = torch.rand(10, generator=generator, dtype=torch.float64).tolist()
        depth = int(draws[9] * 3) + 1
        moves = [list(SHIFTS.values())[int(draw * 8)] for draw in draws[:depth]]
        modules = [int(draw * 2) for draw in draws[3 : 3 + depth]]
        shares = [(0, 0.5, 1)[int(draw * 3)] for draw in draws[6 : 6 + depth]]
        wanted = by_hand(image, moves, shares, [manipulated.prms[m] for m in modules], 0.5)
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-5)
        seen.add((depth, *moves[:1], modules[0], shares[0]))
    assert len({move for _, move, _, _ in seen}) == 8
    assert {depth for depth, _, _, _ in seen} == {1, 2, 3}
    assert {module for _, _, module, _ in seen} == {0, 1}


def test_lambda_0_unmoved_is_the_base_model(manipulated: Resources, images: Images) -> None:
    torch.testing.assert_close(
        scores("prm:lambda=0,shift=none", manipulated, images), scores("none", manipulated, images), rtol=0, atol=1e-5
    )


def test_an_image_draws_for_itself_wherever_it_stands(manipulated: Resources, images: Images) -> None:
    together = scores("prm", manipulated, images)
    for row in range(6):
        torch.testing.assert_close(
            scores("prm", manipulated, images[row : row + 1])[0], together[row], rtol=0, atol=1e-5
        )
    torch.testing.assert_close(scores("prm", manipulated, images.flip(0)).flip(0), together, rtol=0, atol=1e-5)
    assert torch.equal(scores("prm", manipulated, images), together)
    assert not torch.allclose(scores("prm", manipulated, images, seed=4), together, atol=1e-3)


# What attackers are given


@pytest.mark.parametrize("at_a_time", [2**30, 1])
def test_the_averaged_surrogate_goes_through_all_eight_moves(
    manipulated: Resources, images: Images, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nothing is left to chance: it is the mean over the eight fixed moves, whatever was drawn, and in however
    many groups the passes are run."""
    monkeypatch.setattr("mithridate.defenses.averaging._BYTES_ATTACKED_AT_A_TIME", at_a_time)
    text = "prm:module=0"
    averaged = build_defence(text, manipulated).surrogate(images, generator=torch.Generator(), budget=Budget())
    fixed = [scores(f"{text},shift={name}", manipulated, images).double() for name in SHIFTS]
    torch.testing.assert_close(averaged.softmax(1), torch.stack(fixed).mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("attack", "apart"), [("sampled", True), ("none", False), ("sw", False)])
def test_the_other_surrogates(manipulated: Resources, images: Images, attack: str, apart: bool) -> None:
    """A known move costs one pass, not eight that are the same."""
    defence, generator = build_defence(f"prm:module=0,attack={attack}", manipulated), torch.Generator().manual_seed(0)
    first, second = (defence.surrogate(images, generator=generator, budget=Budget()) for _ in range(2))
    assert (not torch.allclose(first, second, atol=1e-3)) == apart
    if not apart:
        unmoved = scores(f"prm:module=0,shift={attack}", manipulated, images)
        assert isinstance(defence, Sampled)
        assert defence.averaging.attack_passes == 1
        torch.testing.assert_close(first.softmax(1).float(), unmoved, rtol=0, atol=1e-5)


# Training, files, bundles


def test_training_learns_to_fill_in_and_repeats(digits_train: LabelledImages) -> None:
    data, plan = first(digits_train, 1024), PRMPlan(epochs=12, batch_size=64)
    trained = train_prm(data, plan)
    read = lattice("v0", 8, 8)
    pixels = to_images(torch.from_numpy(data.images))
    interpolated = F.interpolate(pixels[:, :, ::2, ::2], scale_factor=2, mode="bilinear")
    assert reconstruction_error(trained, data) < 0.8 * float((interpolated - pixels).square().mean().sqrt())
    assert float((trained(pixels) - pixels)[..., read].square().mean().sqrt()) < 0.15
    again = train_prm(data, plan)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_a_file_leads_back(tmp_path: Path) -> None:
    prm, path = fresh("v3"), tmp_path / "prm.safetensors"
    save_prm(prm, path)
    found = load_prm(path, image_shape=(1, 8, 8))
    assert found.spec == prm.spec
    images = torch.rand(2, 1, 8, 8, generator=generators(1)[0])
    assert torch.equal(found(images), prm(images))
    with pytest.raises(ModelError, match=r"was trained on \[1, 8, 8\] images \(C, H, W\); the data has \[3, 32, 32\]"):
        load_prm(path, image_shape=(3, 32, 32))
    with pytest.raises(ModelError, match="is a PRM, not a classifier"):
        load_classifier(path, arch="small-cnn", num_classes=10, image_shape=(1, 8, 8))


def test_what_is_no_prm_is_refused(tmp_path: Path, digits_bundle: Path) -> None:
    with pytest.raises(ModelError, match="is not a PRM; make one with mithridate train --prm v0"):
        load_prm(digits_bundle / "model.safetensors", image_shape=(1, 8, 8))
    with pytest.raises(ModelError, match="no model file at"):
        load_prm(tmp_path / "none.safetensors", image_shape=(1, 8, 8))
    broken = fresh("v0")
    broken.last.bias.data[0] = torch.nan
    save_prm(broken, tmp_path / "nan.safetensors")
    with pytest.raises(ModelError, match="NaN or infinite"):
        load_prm(tmp_path / "nan.safetensors", image_shape=(1, 8, 8))


def test_a_bundle_stores_and_checks_them(tmp_path: Path, digits_bundle: Path, digits_train: LabelledImages) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, file in enumerate(files):
        save_prm(fresh(f"v{number}", seed=number), file)
    model = digits_bundle / "model.safetensors"

    def plan(name: str, prm: Sequence[Path]) -> BuildPlan:
        data = first(digits_train, 64)
        return BuildPlan(
            data=data, out=tmp_path / name, model=model, prm=prm, attacks=["pgd10@prm"] if prm else [], batch_size=16
        )

    build_bundle(plan("with", files))
    opened = Bundle.open(tmp_path / "with")
    assert [(entry.variant, entry.size) for entry in opened.manifest.prm] == [("v0", "small"), ("v1", "small")]
    loaded = Resources.load(opened)
    assert [prm.spec.variant for prm in loaded.prms] == ["v0", "v1"]
    build_defence("prm", loaded).predict(torch.rand(1, 1, 8, 8), generator=torch.Generator(), budget=Budget())
    build_bundle(plan("without", ()))
    assert b'"prm": []' not in (tmp_path / "without" / "manifest.json").read_bytes().split(b'"plan"')[0]
    (tmp_path / "with" / "prm-1.safetensors").unlink()
    with pytest.raises(MithridateError, match=r"prm-1\.safetensors is missing"):
        Bundle.open(tmp_path / "with")
    with pytest.raises(ModelError, match="no model file at"):
        plan("other", [tmp_path / "gone.safetensors"])


# What is said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("prm:lambda=2", "prm: lambda=2.0 is out of range; allowed: 0 to 1"),
        ("prm:lambda=nan", "prm: lambda='nan' is not a number"),
        ("prm:lambda=\u0660", "is not a number"),
        ("prm:stack=1e99", "stack=1e+99 is out of range"),
        ("prm:module=" + "9" * 5000, "is not known; allowed: all, or a number from 0"),
        ("prm:module=0/1", "module='0/1' is not known"),
        ("prm:lambda=" + "1/" * 100, "is too long; allowed: 100 characters"),
        ("prm:attack=up", "unknown attack of prm 'up'"),
        ("prm:lambda=a/b", "prm: lambda='a/b' is not a number, or numbers joined by /"),
        ("prm:stack=0", "stack=0.0 is out of range; allowed: 1 to 8"),
        ("prm:stack=1.5", "stack=1.5 is not whole numbers"),
        ("prm:shift=up", "unknown shift of prm 'up'"),
        ("prm:module=v0", "module='v0' is not known; allowed: all, or a number from 0"),
        ("prm:module=2", "module=2 is not there; the bundle has 2, numbered from 0"),
        ("prm:passes=0", "passes=0 is out of range"),
        ("prm:lambda_=1", "unknown option of prm 'lambda_' (did you mean 'lambda'?)"),
    ],
)
def test_what_is_wrong_is_said(manipulated: Resources, text: str, part: str) -> None:
    with pytest.raises(OptionError) as caught:
        build_defence(text, manipulated)
    assert part in str(caught.value)


def test_a_bundle_without_one_says_how_to_get_it(resources: Resources) -> None:
    with pytest.raises(OptionError, match="the bundle has no PRM; train one with mithridate train --prm v0"):
        build_defence("prm", resources)


@pytest.mark.parametrize("text", ["prm", "prm:lambda=0.5", "prm:lambda=0/1,shift=ne,module=1,stack=1/2"])
def test_a_name_leads_back(manipulated: Resources, text: str) -> None:
    assert build_defence(text, manipulated).name == text == defence_name(text, manipulated)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("prm:lambda=1.0", "prm"),
        ("prm:stack=1.0,module=01", "prm:module=1"),
        ("prm:lambda=0.50/1e0", "prm:lambda=0.5/1"),
    ],
)
def test_one_defence_has_one_name(manipulated: Resources, text: str, name: str) -> None:
    assert defence_name(text, manipulated) == name


@pytest.mark.parametrize("shape", ["5", "[3.0, 32, 32]", "[" * 100_000, '["a"]', "[1, 8]"])
def test_a_crafted_header_is_refused(tmp_path: Path, shape: str) -> None:
    metadata = {"kind": "prm", "variant": "v0", "size": "small", "image_shape": shape}
    save_file({"x": torch.zeros(1)}, tmp_path / "prm.safetensors", {"mithridate": json.dumps(metadata)})
    with pytest.raises(ModelError):
        load_prm(tmp_path / "prm.safetensors", image_shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"variant": "v9"}, "unknown PRM variant 'v9'; allowed: v0, v1"),
        ({"size": "large"}, "unknown PRM size 'large'; allowed: unet, small"),
        ({"epochs": 0}, "epochs=0 is out of range"),
        ({"learning_rate": 2}, "learning rate 2 is out of range"),
        ({"batch_size": 0}, "batch size 0 is too small"),
    ],
)
def test_a_plan_is_checked(options: dict[str, object], part: str) -> None:
    with pytest.raises(OptionError) as caught:
        PRMPlan(**options)  # type: ignore[arg-type]
    assert part in str(caught.value)
