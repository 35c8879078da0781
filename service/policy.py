"""What of an answer a caller is shown."""

from __future__ import annotations

from collections.abc import Sequence

from service.keys import Caller
from service.schemas import ImagePrediction, PredictOptions, Scored


def needs_explain(options: PredictOptions) -> bool:
    """Whether more is asked for than the answer itself."""
    return options.explain or options.top_k > 1


def shown(
    predictions: Sequence[ImagePrediction], caller: Caller, *, confidence_decimals: int | None
) -> list[ImagePrediction]:
    """All of it to whoever may ``explain``. To others the answer, whether it is suspicious, and a rounded confidence.

    Not the base model's answer, which would be what ``choose-defense`` is for, and not the neighbours' labels. Rounding
    hides the slope from an attacker who asks; one who does without it is not stopped, so it is no robustness.
    """
    if caller.may("explain"):
        return list(predictions)
    return [
        prediction.model_copy(
            update={
                "confidence": _rounded(prediction.confidence, confidence_decimals),
                "top": [_round(scored, confidence_decimals) for scored in prediction.top],
                "undefended": None,
                "adaptation": None,
                "neighbors": None,
            }
        )
        for prediction in predictions
    ]


def _round(scored: Scored, decimals: int | None) -> Scored:
    return scored.model_copy(update={"confidence": _rounded(scored.confidence, decimals)})


def _rounded(confidence: float, decimals: int | None) -> float:
    return confidence if decimals is None else round(confidence, decimals)
