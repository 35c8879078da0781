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


class AdaptationReport(BaseModel):
    steps: int
    stop_reason: Literal["converged", "patience", "max_steps", "deadline", "cancelled"]
    neighbors: int
    neighbor_labels: dict[str, int]
    adversarial_fraction: float


class ImagePrediction(Scored):
    top: list[Scored]
    undefended: Scored
    suspicious: bool = Field(description="Base and defended answers differ")
    adaptation: AdaptationReport | None
    neighbors: list[Neighbor] | None = Field(default=None, description="Only with explain, nearest first")


class BundleRef(BaseModel):
    name: str
    digest: str


class Timings(BaseModel):
    """Milliseconds by phase; a phase that a defence does not have is 0."""

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
    timings_ms: Timings


class DefenseInfo(BaseModel):
    name: str
    description: str


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


class ProblemDocument(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
