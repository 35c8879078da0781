"""The JSON of the API, as pydantic models: what is documented is what is sent."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictOptions(_Strict):
    """Options of a prediction: query parameters, or fields beside ``images`` in a JSON body."""

    defense: Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="One of GET /v1/defenses; the service's default unless given"
    )
    top_k: Annotated[int, Field(ge=1, le=1000)] = Field(default=1, description="How many classes to list under top")
    explain: bool = Field(default=False, description="List the neighbours that moved the answer")
    deadline_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Answer within this time or with 504; at most the service's own deadline"
    )


class PredictBody(PredictOptions):
    """The JSON body."""

    images: Annotated[list[str], Field(min_length=1)] = Field(description="PNG, JPEG or WebP files in base64")


class Scored(BaseModel):
    label: str
    class_index: int
    confidence: float


class Neighbor(BaseModel):
    """One exemplar that had a say: training image ``source``, as it was (``clean``) or as an attack left it."""

    exemplar: int
    source: int
    copy_name: str = Field(serialization_alias="copy")
    label: str
    distance: float = Field(description="Euclidean, in the embedding")


class HeldOutLoss(BaseModel):
    """The loss on the neighbours that were held out, before and after adaptation."""

    before: float
    after: float


class AdaptationReport(BaseModel):
    steps: int
    stop_reason: Literal["converged", "patience", "max_steps", "deadline", "cancelled"]
    answered_from: Literal["adapted", "base"] = Field(
        description="Which weights gave the answer: base where adaptation made the held-out neighbours worse, or a "
        "guard did not let it through"
    )
    held_out_loss: HeldOutLoss | None = Field(description="null where no neighbours were held out")
    neighbors: int
    neighbor_labels: dict[str, int]
    adversarial_fraction: float


class ImagePrediction(Scored):
    top: list[Scored]
    undefended: Scored | None = Field(description="The base model's answer; null for callers who may not explain")
    suspicious: bool = Field(description="Base and defended answers differ")
    abstained: bool = Field(description="The label is the defence's best guess, but it does not stand by it")
    adaptation: AdaptationReport | None = Field(
        description="null where the defence does not adapt, and for callers who may not explain"
    )
    neighbors: list[Neighbor] | None = Field(default=None, description="Only with explain, nearest first")


class BundleRef(BaseModel):
    name: str
    digest: str


class BatchReport(BaseModel):
    """The run of the defence that gave this answer; more than one request where several waited together."""

    requests: int
    images: int


class Timings(BaseModel):
    """Milliseconds by phase; a phase that a defence does not have is 0.

    ``queue``, ``decode`` and ``total`` are the request's own; ``embed``, ``search``, ``adapt`` and ``predict`` are
    those of the batch it was answered in.
    """

    queue: float
    decode: float
    embed: float
    search: float
    adapt: float
    predict: float
    total: float


class PredictResponse(BaseModel):
    id: str
    bundle: BundleRef
    defense: str
    predictions: list[ImagePrediction]
    batch: BatchReport
    timings_ms: Timings


class DefenseInfo(BaseModel):
    name: str
    description: str
    cost: float | None = Field(
        description="What an image takes, relative to the undefended model, as measured when the service started; null "
        "where fine-tuning takes as many steps as it needs"
    )


class DefensesResponse(BaseModel):
    default: str
    defenses: list[DefenseInfo]


class CopyInfo(BaseModel):
    name: str
    epsilon: str | None
    base_accuracy: float


class BundleResponse(BaseModel):
    name: str
    digest: str
    dataset: str
    classes: list[str]
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    resize: Literal["exact", "center-crop"]
    arch: str
    exemplars: int
    copies: list[CopyInfo]
    index: str
    prm: list[str] = Field(description="variants of its pixel robustness manipulators, numbered from 0")


class ProblemDocument(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
