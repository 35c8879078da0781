"""The JSON of the Open Inference Protocol, version 2: what its REST specification and Triton's extensions say.

Fields that are unknown are let pass, as the protocol wants it; parameters that are unknown are refused, so that nobody
is answered by another defence than the one that was misspelt. Null is as good as nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

EXTENSIONS = ("binary_tensor_data", "classification")
"""Of Triton's, those that are spoken."""

Datatype = Literal["BOOL", "UINT8", "INT64", "FP32", "BYTES"]
"""Those of the protocol's tensor types that occur here."""

ContentType = Annotated[str | None, Field(description="MLServer's name of a codec; ignored, the datatype says it")]
UInt64 = Annotated[StrictInt, Field(ge=0, lt=2**64)]


def _may_be_null(schema: dict[str, Any]) -> None:
    """Says so of every field that may be left out."""
    for name, field in schema["properties"].items():
        if name in schema.get("required", ()) or not {"type", "$ref"} & set(field):
            continue
        around = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
        schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **around}


class _Asked(BaseModel):
    """What a client sends: a field that it may leave out may be null as well."""

    model_config = ConfigDict(json_schema_extra=_may_be_null)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in fields.items() if value is not None or name not in optional}


def _no_sequence(value: Any) -> Any:
    if value in (0, ""):  # false too
        return value
    raise PydanticCustomError(
        "stateful",
        "this model keeps no state between requests; leave out sequence_id, sequence_start and sequence_end",
    )


NoSequence = Annotated[
    Any,
    AfterValidator(_no_sequence),
    WithJsonSchema({"enum": [0, "", False, None]}),
    Field(description="Triton's word for no sequence; any other is refused, for the model keeps no state"),
]


class _Parameters(_Asked):
    model_config = ConfigDict(extra="forbid")


class InferParameters(_Parameters):
    """Parameters of a request to infer."""

    defense: Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="One of GET /v1/defenses; the service's default unless given"
    )
    deadline_ms: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Answer within this time or with 504; at most the service's own deadline"
    )
    timeout: UInt64 | None = Field(
        default=None, description="Triton's deadline, in microseconds; 0 is none. The shorter of both counts"
    )
    priority: UInt64 | None = Field(default=None, description="Triton's; ignored, the oldest request is the next")
    sequence_id: NoSequence = None
    sequence_start: NoSequence = None
    sequence_end: NoSequence = None
    layout: Literal["NCHW", "NHWC"] = Field(default="NCHW", description="Order of the axes of UINT8 and FP32 images")
    binary_data_output: StrictBool = Field(
        default=False, description="Outputs as binary data, unless one says otherwise"
    )
    content_type: ContentType = None

    @property
    def allowed_ms(self) -> float | None:
        """The shorter of both deadlines, None without any."""
        stated = (self.deadline_ms, self.timeout / 1000 if self.timeout else None)
        return min((milliseconds for milliseconds in stated if milliseconds is not None), default=None)


class InputParameters(_Parameters):
    """Parameters of an input tensor."""

    binary_data_size: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None, description="The tensor is binary data of so many bytes, after the JSON"
    )
    content_type: ContentType = None


class OutputParameters(_Parameters):
    """Parameters of a requested output."""

    binary_data: StrictBool | None = Field(default=None, description="Whether to send it as binary data")
    classification: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Of scores: so many classes as BYTES, each value:index:label"
    )
    content_type: ContentType = None


class RequestInput(_Asked):
    """One input tensor, with ``data`` in JSON or as binary data."""

    name: str
    shape: Annotated[list[StrictInt], Field(max_length=8), FailFast()]
    datatype: str
    parameters: InputParameters = InputParameters()
    data: Any = Field(default=None, description="Flattened or nested, row-major. BYTES: base64")


class RequestedOutput(_Asked):
    """One output that the client wants."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(_Asked):
    """The JSON of a request to infer."""

    id: Annotated[str, Field(max_length=256)] | None = Field(default=None, description="Comes back with the answer")
    parameters: InferParameters = InferParameters()
    inputs: Annotated[list[RequestInput], Field(min_length=1, max_length=8), FailFast()]
    outputs: Annotated[list[RequestedOutput], Field(max_length=16), FailFast()] = Field(
        default=[], description="All outputs unless given"
    )


class ResponseOutput(BaseModel):
    """One output tensor; ``data`` is absent where it is sent as binary data."""

    name: str
    shape: list[int]
    datatype: Datatype
    parameters: dict[str, int] | None = None
    data: list[Any] | None = None


class InferResponse(BaseModel):
    """The JSON of an answer; binary data follows it."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, str | float]
    outputs: list[ResponseOutput]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1: of any size")
    parameters: dict[str, str] | None = None


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerLive(BaseModel):
    live: bool


class ServerReady(BaseModel):
    live: bool = Field(description="What the specification calls it")
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


class ErrorDocument(BaseModel):
    """The protocol's own form of an error."""

    error: str
