"""A quickened classifier is the same function, and never a stale one."""

from __future__ import annotations

import pytest
import torch

from mithridate.models import Classifier, build_classifier

ARCHES = [
    ("resnet20", (3, 32, 32), "layer3.1"),
    ("small-cnn", (1, 8, 8), None),
    ("mobilenet_v3_small", (3, 64, 64), None),
]


def _classifier(arch: str, shape: tuple[int, int, int], tail: str | None) -> Classifier:
    torch.manual_seed(0)
    classifier = build_classifier(arch, num_classes=10, image_shape=shape, tail_layer=tail)
    for name, buffer in classifier.network.named_buffers():  # statistics that change something
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return classifier


@pytest.mark.parametrize(("arch", "shape", "tail"), ARCHES, ids=[arch for arch, _, _ in ARCHES])
def test_it_gives_the_same_logits_embedding_activation_and_gradient(
    arch: str, shape: tuple[int, int, int], tail: str | None
) -> None:
    classifier = _classifier(arch, shape, tail)
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def all_of_it() -> list[torch.Tensor]:
        logits, trace = classifier(images), classifier.trace(images)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum() + trace.embedding.square().sum(), images)
        return [logits, trace.embedding, trace.head_input, gradient] + ([trace.activation] if tail else [])

    before = all_of_it()
    classifier.quicken()
    assert classifier.is_quick
    for one, other in zip(before, all_of_it(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_weights_that_are_loaded_later_count() -> None:
    classifier = _classifier(*ARCHES[0])
    other = {name: 2 * value for name, value in classifier.network.state_dict().items()}
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    classifier.quicken()
    before = classifier(images)
    classifier.network.load_state_dict(other)
    after = classifier(images)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, classifier.network(classifier.normalise(images)))


def test_what_may_be_trained_stays_as_it_is() -> None:
    classifier = _classifier(*ARCHES[0])
    names = [name for name, _ in classifier.private_network().named_parameters()]
    tail = [name for name, _ in classifier.private_tail().named_parameters()]
    classifier.quicken()
    assert [name for name, _ in classifier.private_network().named_parameters()] == names
    assert [name for name, _ in classifier.private_tail().named_parameters()] == tail
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
