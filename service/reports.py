"""From a prediction to the JSON of the API."""

from __future__ import annotations

import math

import torch

from mithridate.bundle import Manifest
from mithridate.defenses import Adaptation, Neighborhood, Prediction
from mithridate.exemplars import ExemplarStore
from service.schemas import (
    AdaptationReport,
    BundleResponse,
    CopyInfo,
    HeldOutLoss,
    ImagePrediction,
    Neighbor,
    PredictOptions,
    Scored,
)


def count_entries(prediction: Prediction, options: PredictOptions) -> int:
    """At most so many classes, or neighbours, ``report_images`` lists."""
    neighbors = sum(len(one.ids) for one in prediction.neighborhoods if one) if options.explain else 0
    return max(len(prediction.scores) * min(options.top_k, prediction.scores.shape[1]), neighbors)


def report_images(
    manifest: Manifest, exemplars: ExemplarStore, prediction: Prediction, options: PredictOptions
) -> list[ImagePrediction]:
    """One entry an image."""
    count = len(prediction.scores)
    abstained = [False] * count if prediction.abstained is None else prediction.abstained.tolist()
    rows = zip(
        prediction.scores,
        prediction.base_scores,
        prediction.adaptations,
        prediction.neighborhoods,
        abstained,
        strict=True,
    )
    return [_report(manifest.classes, exemplars, options, *row) for row in rows]


def _report(
    classes: tuple[str, ...],
    exemplars: ExemplarStore,
    options: PredictOptions,
    scores: torch.Tensor,
    base_scores: torch.Tensor,
    adaptation: Adaptation | None,
    neighborhood: Neighborhood | None,
    abstained: bool,
) -> ImagePrediction:
    top = _ranked(scores, classes, options.top_k)
    undefended = _ranked(base_scores, classes, 1)[0]
    return ImagePrediction(
        **top[0].model_dump(),
        top=top,
        undefended=undefended,
        suspicious=undefended.class_index != top[0].class_index,
        abstained=abstained,
        adaptation=_report_adaptation(classes, adaptation, neighborhood),
        neighbors=_list_neighbors(classes, exemplars, neighborhood) if options.explain and neighborhood else None,
    )


def _ranked(scores: torch.Tensor, classes: tuple[str, ...], count: int) -> list[Scored]:
    # A stable sort, so that equal scores rank by index: the same rule as argmax.
    values, indices = scores.sort(descending=True, stable=True)
    pairs = zip(values[:count].tolist(), indices[:count].tolist(), strict=True)
    return [Scored(label=classes[index], class_index=index, confidence=value) for value, index in pairs]


def _report_adaptation(
    classes: tuple[str, ...], adaptation: Adaptation | None, neighborhood: Neighborhood | None
) -> AdaptationReport | None:
    if adaptation is None or neighborhood is None:
        return None
    return AdaptationReport(
        steps=adaptation.steps,
        stop_reason=adaptation.stop_reason,
        answered_from=adaptation.weights,
        held_out_loss=_report_loss(adaptation),
        neighbors=len(neighborhood.ids),
        neighbor_labels={classes[label]: count for label, count in neighborhood.label_counts.items()},
        adversarial_fraction=neighborhood.adversarial_fraction,
    )


def _report_loss(adaptation: Adaptation) -> HeldOutLoss | None:
    # JSON has no infinity: a loss without a bound must not cost the client the answer.
    if adaptation.held_out_loss is None or not all(map(math.isfinite, adaptation.held_out_loss)):
        return None
    before, after = adaptation.held_out_loss
    return HeldOutLoss(before=before, after=after)


def _list_neighbors(classes: tuple[str, ...], exemplars: ExemplarStore, neighborhood: Neighborhood) -> list[Neighbor]:
    listed = []
    for exemplar, squared in zip(neighborhood.ids.tolist(), neighborhood.distances.tolist(), strict=True):
        source, copy = exemplars.origin(exemplar)
        label = classes[int(exemplars.labels[exemplar])]
        listed.append(Neighbor(exemplar=exemplar, source=source, copy_name=copy, label=label, distance=squared**0.5))
    return listed


def report_bundle(manifest: Manifest, digest: str) -> BundleResponse:
    """What ``GET /v1/bundle`` says."""
    images = manifest.dataset.images
    return BundleResponse(
        name=manifest.name,
        digest=digest,
        dataset=manifest.dataset.spec,
        classes=list(manifest.classes),
        image_shape=manifest.image_shape,
        resize=manifest.resize,
        arch=manifest.model.arch,
        exemplars=len(manifest.layout),
        copies=[
            CopyInfo(name=copy.name, epsilon=copy.epsilon, base_accuracy=copy.base_correct / images)
            for copy in manifest.copies
        ],
        index=manifest.index,
        prm=[entry.variant for entry in manifest.prm],
    )
