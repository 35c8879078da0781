"""What can be set about a service: flags over environment (``MITHRIDATE_*``) over a TOML file over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mithridate.defenses import DEFAULT_DEFENCES
from mithridate.errors import OptionError
from service.keys import Key

ALL = "all"


class Settings(BaseSettings):
    """A service's settings; ``bundle`` is the only one without a default."""

    model_config = SettingsConfigDict(env_prefix="MITHRIDATE_", extra="forbid", frozen=True)

    bundle: Path
    """The bundle to serve."""
    host: str = "127.0.0.1"
    """The address to listen at."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port to listen at; 0 takes a free one."""
    defense: str = "rmc"
    """The defence for requests that do not name one."""
    offer: tuple[str, ...] = DEFAULT_DEFENCES
    """The defences that a request may name (``all``: every single one with its default options that the bundle allows,
    and the compositions of prm, rmc and sap). The default one is always among them."""
    arch: str | None = None
    """Must repeat package.module:factory where the bundle's network is your own code."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1 ..."""
    devices: str | None = None
    """Several devices instead, as in cuda:0,cuda:1: an engine process each, and a request goes to the idlest."""
    isolation: Literal["process", "thread"] | None = None
    """Whether the engine has a process of its own; unset, it has one under mithridate serve, and is a thread in an
    application that create_app makes elsewhere."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads for torch and FAISS; all of the process's cores unless given, shared among several engines on cpu."""
    keys_file: Path | None = None
    """A file of API keys, as ``mithridate keys new`` writes it; looked at again when it changes."""
    keys: tuple[Key, ...] = ()
    """API keys beside those of the file: a list of the same objects."""
    insecure_no_keys: bool = False
    """Listen at other addresses than loopback without keys, where something before the service asks who is there."""
    queue_size: Annotated[int, Field(ge=1)] = 64
    """Requests admitted at once; more are answered 429."""
    queue_seconds: Annotated[float, Field(gt=0)] = 10
    """Estimated seconds of the engine that all admitted requests may need together; more are answered 429."""
    engine_nice: Annotated[int, Field(ge=0, le=19)] = 5
    """How far engine processes give way to the service, and to all else on the machine, where processors are short."""
    engine_hang_s: Annotated[float, Field(gt=0)] = 60
    """Past a request's deadline by this, an engine process without its answer counts as hung; the service ends."""
    max_neighbors: Annotated[int, Field(ge=1)] | None = None
    """Neighbours an image that an offered defence may use; one with more is refused at the start."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps, or epochs, an image that an offered defence may adapt for; one with more is refused at the start."""
    max_passes: Annotated[int, Field(ge=1)] | None = None
    """Random passes an image that an offered defence may average; one with more is refused at the start."""
    confidence_decimals: Annotated[int, Field(ge=0, le=15)] | None = None
    """Decimals of a confidence that callers without the scope ``explain`` are shown; all unless given."""
    max_images: Annotated[int, Field(ge=1)] = 64
    """Images in one request."""
    max_batch_images: Annotated[int, Field(ge=1)] = 64
    """Images answered together where requests wait for the engine; a single request may have more."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 32 * 1024 * 1024
    """Bytes in one request."""
    max_pixels: Annotated[int, Field(ge=1)] = 16_777_216
    """Pixels in one image, checked before it is decoded."""
    max_request_pixels: Annotated[int, Field(ge=1)] = 67_108_864
    """Pixels in all images of one request, checked before they are decoded."""
    deadline_ms: Annotated[float, Field(gt=0)] = 30_000
    """Time allowed for an answer; a request may ask for less. Past it the answer is 504, never a weaker one."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30
    """Time allowed for a client to send its request's body."""
    min_body_rate: Annotated[float, Field(ge=0)] = 4096
    """Bytes a second that a body must come at, after its first 5 seconds; 0 asks for no rate."""
    max_buffered_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    """Bytes of bodies held at once for all requests; a request that would need more is answered 429."""
    max_decoding_pixels: Annotated[int, Field(ge=1)] = 25_165_824
    """Pixels being decoded at once, for all requests; an image with more than this is decoded alone."""
    header_timeout_s: Annotated[float, Field(gt=0)] = 10
    """Time allowed for a client to send its request's headers."""
    max_headers: Annotated[int, Field(ge=1)] = 100
    """Headers in one request."""
    max_header_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 16_384
    """Bytes of headers in one request."""
    max_connections: Annotated[int, Field(ge=1)] = 512
    """Connections at once. One more takes the place of the one that has waited longest without a request."""
    keep_alive_s: Annotated[int, Field(ge=1)] = 15
    """Time a connection may wait for its next request."""
    drain_seconds: Annotated[float, Field(ge=0)] = 0
    """After SIGTERM: how long to go on serving, not ready, before the port is closed."""
    bundle_root: Path | None = None
    """The directory whose bundles POST /admin/bundle may put live; unset, it puts none."""
    drain_timeout_s: Annotated[int, Field(ge=1)] = 30
    """After the port is closed: how long to wait for running requests."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    """A fixed seed for every request, for tests. Unset, each request gets a secret one."""
    docs: bool = True
    """Whether /docs and /openapi.json are served."""
    page: bool = True
    """Whether the page at / is served."""
    page_exemplars: bool | None = None
    """Whether the page may show training images, to callers who may explain. Unset: only while the service listens at a
    loopback address."""
    lab: bool = False
    """Whether images may be attacked on the spot (POST /v1/lab/attack and the page). Never where clients are not
    trusted."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""
    log_client_address: bool = False
    """Whether logs may name a client's network address."""
    otel: bool = False
    """Send OpenTelemetry traces (needs the extra ``otel``); where to, OpenTelemetry's own variables say."""
    query_telemetry: bool = True
    """Count queries that lie close to earlier ones of the same client. It changes no answer."""
    query_window: Annotated[int, Field(ge=10, le=100_000)] = 1000
    """A client's latest images that a new one is compared with."""
    query_memory_mb: Annotated[int, Field(ge=1)] = 64
    """Megabytes for all clients' latest images; whoever was silent for longest is forgotten first."""
    near_duplicate_distance: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What counts as close: below this share of the usual distance between an exemplar and the nearest other one."""
    near_duplicate_alert: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of a client's latest 100 images that must be close for a warning in the log."""

    @property
    def offer_is_explicit(self) -> bool:
        """Whether somebody said what to offer."""
        return "offer" in self.model_fields_set

    @property
    def used_devices(self) -> tuple[str, ...]:
        """Where an engine runs, each."""
        return (self.device,) if self.devices is None else tuple(part.strip() for part in self.devices.split(","))

    @model_validator(mode="after")
    def _devices_go_together(self) -> Self:
        if self.devices is None:
            return self
        if not all(self.used_devices):
            raise ValueError(f"devices {self.devices!r} names an empty one; allowed: cpu, cuda:0,cuda:1 ...")
        if "device" in self.model_fields_set and self.device != self.devices:
            raise ValueError(f"device {self.device!r} and devices {self.devices!r} are both given; leave one out")
        if len(self.used_devices) > 1 and self.isolation == "thread":
            raise ValueError(f"isolation thread has one device, not {self.devices!r}; allowed: isolation process")
        return self

    @property
    def offered(self) -> tuple[str, ...]:
        """The offered defences, each once, the default first."""
        return tuple(dict.fromkeys((self.defense, *self.offer)))


def _may_be_quoted(error: ErrorDetails) -> bool:
    """Whether what was seen may be said. Of keys nothing is: what stands in the wrong place could be one. And where
    several settings do not go together, what was seen is all of them."""
    if (
        error["type"] in ("missing", "extra_forbidden")
        or not error["loc"]
        or str(error["loc"][0]).lower().startswith("key")
    ):
        return False
    return isinstance(error["input"], (str, int, float, bool, Path)) or error["input"] is None


def load_settings(config: Path | None = None, **flags: Any) -> Settings:
    """Settings from all sources; flags that are None count as not given. Raises OptionError for what is not allowed."""
    if config is not None and not config.is_file():
        raise OptionError(f"there is no configuration file {config}")

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings
            files = () if config is None else (TomlConfigSettingsSource(settings_cls, toml_file=config),)
            return (init_settings, env_settings, *files)

    try:
        return Sourced(**{key: value for key, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        seen = f"; seen: {first['input']!r}" if _may_be_quoted(first) else ""
        where = f"setting {name}: " if name else "settings: "
        raise OptionError(f"{where}{first['msg']}{seen}") from error
    except ValueError as error:  # a TOML file that is not TOML, an environment variable that is not JSON
        raise OptionError(f"cannot read the settings: {error}") from error
