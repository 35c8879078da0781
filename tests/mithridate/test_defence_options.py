"""A defence as text: it says all there is to say and leads back to itself; what cannot be read gets one clear line."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import pytest
import torch
from head_helpers import answer
from hypothesis import given, settings
from hypothesis import strategies as st

from mithridate.datasets import LabelledImages
from mithridate.defenses import Resources, build_defence, defence_name, parse_defence
from mithridate.defenses.head_adam import AdamConfig
from mithridate.defenses.head_ridge import RidgeConfig
from mithridate.defenses.options import canonical, fill, flatten, split_text
from mithridate.defenses.presets import PRESETS
from mithridate.defenses.rmc import RMC
from mithridate.errors import OptionError
from mithridate.types import Images, to_images

TEXTS = [
    "none",
    "webnn",
    "deepnn:neighbors=7",
    "webnn:scores=softmax,weights=cbw-d",
    "rmc",
    "rmc:scope=head",
    "rmc:solver=ridge,scope=head",
    "rmc:neighbors=32,balanced=true,gate=0.5",
    "rmc:adversarial=0.25,radius=4,temperature=0",
    "rmc:adversarial=none",
    "rmc:abstain=0.5,mix=0.125,anchor=1e-05,held_out=0.0",
    "rmc:preset=balanced",
    "rmc:preset=fast",
    "rmc:preset=fast,neighbors=24",
    "rmc:solver=adam,neighbors=24",
    "rmc:refit=false,solver=adam,neighbors=24,learning_rate=0.03",
    "rmc:scope=all,neighbors=8,epochs=1",
    "rmc:scope=all,preset=fast,neighbors=8,epochs=1,restore=last,precision=float32",
]


@pytest.fixture(scope="module")
def images(digits_test: LabelledImages) -> Images:
    return to_images(torch.from_numpy(digits_test.images[:3]))


def build_rmc(text: str, resources: Resources) -> RMC:
    defence = build_defence(text, resources)
    assert isinstance(defence, RMC)
    return defence


def everything(defence: RMC) -> dict[str, object]:
    """All options of a defence, by name."""
    parts = (defence.selection, defence.adapter.config, defence.guarding)  # type: ignore[attr-defined]
    return {key: value for part in parts for key, value in flatten(part).items()}


# There and back


@pytest.mark.parametrize("text", TEXTS)
def test_a_name_leads_back_to_the_same_answers(resources: Resources, images: Images, text: str) -> None:
    defence = build_defence(text, resources)
    again = build_defence(defence.name, resources)
    assert again.name == defence.name == defence_name(text, resources)  # which makes nothing
    assert torch.equal(answer(defence, images).scores, answer(again, images).scores)
    if isinstance(defence, RMC):
        assert isinstance(again, RMC)
        assert everything(again) == everything(defence)


NUMBERS = {
    "neighbors": st.integers(2, 65_536),
    "radius": st.floats(0, 1e9),
    "temperature": st.floats(0, 1e6),
    "mix": st.floats(0, 1),
    "gate": st.floats(0, 1),
    "abstain": st.floats(0, 1),
    "held_out": st.floats(0, 0.9),
    "anchor": st.floats(1e-9, 1e9),
}
ADAM = {
    "learning_rate": st.floats(1e-9, 100),
    "steps": st.integers(1, 10_000),
    "tolerance": st.floats(0, 100),
    "patience": st.integers(1, 10_000),
    "refit": st.booleans(),
}
SOURCES = [{}, {"balanced": True, "temperature": 0.5, "neighbors": 40}, {"adversarial": 0.3}, {"adversarial": None}]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), solver=st.sampled_from(["ridge", "adam"]), source=st.sampled_from(SOURCES))
def test_every_setting_survives_being_written_down(
    resources: Resources, data: st.DataObject, solver: str, source: dict[str, object]
) -> None:
    wanted = data.draw(st.fixed_dictionaries({}, optional=NUMBERS | (ADAM if solver == "adam" else {}))) | source
    written = [f"{key}={str(value).lower()}" for key, value in wanted.items()]
    defence = build_rmc("rmc:" + ",".join([f"solver={solver}", *written]), resources)
    assert {key: everything(defence)[key] for key in wanted} == wanted
    again = build_rmc(defence.name, resources)
    assert again.name == defence.name
    assert everything(again) == everything(defence)


def test_a_name_says_only_what_is_unusual(resources: Resources) -> None:
    names = {
        "rmc": "rmc",
        " rmc:scope=head,solver=ridge,neighbors=256,temperature=0.25,gate=auto ": "rmc",
        "rmc:gate=0.05": "rmc:gate=0.05",
        "rmc:temperature=0": "rmc:temperature=0.0",
        "rmc:gate=0.5,neighbors=32": "rmc:neighbors=32,gate=0.5",
        "rmc:solver=adam,refit=true": "rmc:solver=adam",
        "rmc:balanced=true,solver=adam,gate=0": "rmc:solver=adam,balanced=true,gate=0.0",
        "rmc:scope=all": "rmc:scope=all",
    }
    assert {text: build_defence(text, resources).name for text in names} == names


# Presets


@pytest.mark.parametrize("scope", ["head", "all"])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_expand_and_can_be_overridden(resources: Resources, preset: str, scope: str) -> None:
    plain = build_rmc(f"rmc:preset={preset},scope={scope}", resources)
    options, seen = PRESETS[preset][scope], everything(plain)
    for key, value in options.items():
        if key == "solver":
            assert isinstance(plain.adapter.config, AdamConfig if value == "adam" else RidgeConfig)  # type: ignore[attr-defined]
        else:
            kind = type(seen[key])
            assert seen[key] == (value == "true" if kind is bool else kind(value))
    other = build_rmc(f"rmc:scope={scope},neighbors=33,preset={preset},anchor=0.5", resources)
    assert everything(other) == {**seen, "neighbors": 33, "anchor": 0.5}
    again = build_rmc(plain.name, resources)
    assert (again.name, everything(again)) == (plain.name, seen)


def test_the_papers_presets_are_the_papers_numbers(resources: Resources) -> None:
    imagenet = everything(build_rmc("rmc:preset=paper-imagenet,scope=all", resources))
    cifar = everything(build_rmc("rmc:preset=paper-cifar10,scope=all", resources))
    assert (imagenet["neighbors"], imagenet["learning_rate"]) == (2048, 1e-5)
    assert (cifar["neighbors"], cifar["learning_rate"]) == (1024, 2.5e-5)
    for seen in (imagenet, cifar):
        assert (seen["epochs"], seen["batch_size"], seen["patience"], seen["held_out"]) == (100, 128, 5, 0.2)
        assert (seen["balanced"], seen["temperature"], seen["anchor"], seen["mix"]) == (False, 0, 0, 0)


def test_every_preset_knows_every_scope() -> None:
    assert {tuple(scopes) for scopes in PRESETS.values()} == {("head", "tail", "all")}
    for preset in PRESETS:
        parse_defence(f"rmc:preset={preset},scope=tail")


def test_tuned_is_refused_where_nothing_was_tuned(resources: Resources) -> None:
    assert resources.tuning is None
    with pytest.raises(OptionError, match=r"^this bundle has not been tuned; run mithridate bench BUNDLE --tune, or"):
        build_defence("rmc:preset=tuned", resources)
    assert everything(build_rmc("rmc", resources)) == everything(build_rmc("rmc:preset=balanced", resources))


@pytest.mark.parametrize(
    "tuning", ["rmc:neighbors=64", "rmc:solver=adam,neighbors=64,steps=10", "rmc:scope=all,neighbors=8,epochs=2", "rmc"]
)
def test_a_tuned_bundle_answers_rmc_with_what_it_was_tuned_to(
    resources: Resources, images: Images, tuning: str
) -> None:
    tuned, wanted = replace(resources, tuning=tuning), build_rmc(tuning, resources)
    for text in ("rmc", "rmc:preset=tuned"):
        defence = build_rmc(text, tuned)
        assert everything(defence) == everything(wanted)
        assert everything(build_rmc(defence.name, tuned)) == everything(wanted)
        assert torch.equal(answer(defence, images).scores, answer(wanted, images).scores)
    assert everything(build_rmc("rmc:preset=tuned,neighbors=9", tuned)) == {**everything(wanted), "neighbors": 9}
    # Whoever says anything at all does not mean what it was tuned to.
    assert everything(build_rmc("rmc:preset=fast", tuned)) == everything(build_rmc("rmc:preset=fast", resources))
    assert everything(build_rmc("rmc:gate=0.5", tuned)) == everything(build_rmc("rmc:gate=0.5", resources))


@pytest.mark.parametrize("text", ["rmc", "rmc:preset=balanced", "rmc:neighbors=256", "rmc:scope=head", "rmc:gate=0.5"])
def test_on_a_tuned_bundle_too_a_name_leads_back(resources: Resources, text: str) -> None:
    tuned = replace(resources, tuning="rmc:neighbors=64")
    defence = build_rmc(text, tuned)
    again = build_rmc(defence.name, tuned)
    assert everything(again) == everything(defence)
    assert again.name == defence.name == defence_name(text, tuned)


# What cannot be read

RIDGE_KEYS = "abstain, adversarial, anchor, balanced, gate, held_out, mix, neighbors, radius, temperature"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "rmcc",
            [
                "unknown defence 'rmcc'",
                "did you mean 'rmc'",
                "deepnn, knn-oat, none, pixel-deflection, prm, randomization, region, rmc, sap, tta, webnn",
            ],
        ),
        ("", ["unknown defence ''"]),
        ("RMC", ["unknown defence 'RMC'"]),
        ("none:steps=3", ["none takes no options"]),
        ("rmc:preset=fastest", ["unknown preset 'fastest'", "did you mean 'fast'", "balanced, fast", "tuned"]),
        ("rmc:preset=", ["cannot read 'preset='"]),
        ("rmc:preset=tuned,scope=tail", ["preset=tuned brings its own scope; leave out scope=tail"]),
        ("rmc:preset=tuned,solver=adam", ["preset=tuned brings its own solver; leave out solver=adam"]),
        ("rmc:preset=tuned,neighbours=3", ["unknown option of rmc 'neighbours'", "did you mean 'neighbors'"]),
        (
            "rmc:preset=paper-imagenet,solver=ridge",
            ["preset=paper-imagenet is for solver=adam; leave out solver=ridge"],
        ),
        ("rmc:preset=fast,solver=adam", ["preset=fast is for solver=ridge; leave out solver=adam"]),
        ("rmc:scope=tails", ["unknown scope 'tails'", "did you mean 'tail'", "all, head, tail"]),
        ("rmc:solver=newton", ["unknown solver 'newton'", "adam, ridge"]),
        ("rmc:scope=all,solver=adam", ["rmc:scope=all has no choice of solvers", "scope=head"]),
        ("rmc:neighbours=3", ["unknown option of rmc 'neighbours'", "did you mean 'neighbors'", RIDGE_KEYS]),
        ("rmc:steps=3", ["unknown option of rmc 'steps'"]),
        ("rmc:solver=adam,epochs=3", ["unknown option of rmc:solver=adam 'epochs'"]),
        ("rmc:scope=all,steps=3", ["unknown option of rmc:scope=all 'steps'"]),
        ("rmc:selection=3", ["unknown option of rmc 'selection'"]),
        ("rmc:balanced=yes", ["rmc: balanced='yes' is not true or false"]),
        ("rmc:balanced=True", ["balanced='True' is not true or false"]),
        ("rmc:solver=adam,balanced=true", ["rmc: gate asks what most neighbours are", "give gate=0 or a temperature"]),
        ("rmc:balanced=true,temperature=0,gate=0,abstain=0.1", ["rmc: abstain asks", "give abstain=0"]),
        ("rmc:balanced=true,adversarial=0.5", ["rmc: balanced and adversarial both say where"]),
        ("rmc:adversarial=half", ["rmc: adversarial='half' is not float"]),
        ("rmc:adversarial=2", ["rmc: adversarial=2.0 is out of range; allowed: 0 to 1"]),
        ("rmc:neighbors=many", ["rmc: neighbors='many' is not int"]),
        ("rmc:neighbors=2.5", ["neighbors='2.5' is not int"]),
        ("rmc:neighbors=none", ["neighbors='none' is not int"]),
        ("rmc:neighbors=1", ["neighbors=1 is out of range; allowed: 2 to 65536"]),
        ("rmc:anchor=x", ["anchor='x' is not float"]),
        ("rmc:anchor=nan", ["anchor=nan is out of range; allowed: 1e-09 to 1e+09"]),
        ("rmc:gate=automatic", ["rmc: gate='automatic' is not float or auto"]),
        ("rmc:mix=auto", ["rmc: mix='auto' is not float"]),
        ("rmc:gate=-1", ["rmc: gate=-1.0 is out of range; allowed: 0 to 1"]),
        ("rmc:radius=inf", ["radius=inf is out of range"]),
        ("rmc:scope=all,restore=worst", ["restore='worst' is not known; allowed: best, last"]),
        ("webnn:scores=guess", ["scores='guess' is not known; allowed: vote, softmax"]),
        ("webnn:neighbors=70000", ["neighbors=70000 is out of range"]),
        ("rmc:gate=0.3,gate=0.4", ["cannot read 'gate=0.4'", "once each"]),
        ("rmc:gate", ["cannot read 'gate'"]),
        ("rmc:", ["cannot read ''", "name:key=value"]),
        ("rmc:gate=0.3,", ["cannot read ''"]),
        ("rmc:=3", ["cannot read '=3'"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(text: str, parts: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        parse_defence(text)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30) | st.text(max_size=20).map(lambda tail: f"rmc:{tail}"))
def test_whatever_is_written_it_is_a_defence_or_one_clear_error(text: str) -> None:
    with contextlib.suppress(OptionError):
        parse_defence(text)


# The machinery


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 3
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    fast: bool = False


def test_options_reach_into_dataclasses_inside() -> None:
    filled = fill(Outer(), {"width": "5", "ratio": "0.5", "fast": "true", "name": "b"}, of="it")
    assert asdict(filled) == {"name": "b", "inner": {"width": 5, "ratio": 0.5}, "fast": True}
    assert flatten(filled) == {"name": "b", "width": 5, "ratio": 0.5, "fast": True}
    text = canonical("it", filled, Outer(), prefix={"kind": "x"})
    assert text == "it:kind=x,name=b,width=5,ratio=0.5,fast=true"
    name, options = split_text(text)
    assert name == "it"
    assert fill(Outer(), {k: v for k, v in options.items() if k != "kind"}, of="it") == filled
    assert canonical("it", Outer(), Outer()) == "it"
    assert canonical("it", Outer(), filled) == "it:name=a,width=3,ratio=none,fast=false"
    assert fill(filled, split_text(canonical("it", Outer(), filled))[1], of="it") == Outer()
    with pytest.raises(OptionError, match=r"^unknown option of it 'inner'; allowed: fast, name, ratio, width$"):
        fill(Outer(), {"inner": "1"}, of="it")
