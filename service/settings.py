"""What can be set about a service: flags over environment (``MITHRIDATE_*``) over a TOML file over defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from mithridate.defenses import DEFAULT_DEFENCES
from mithridate.errors import OptionError

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
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads for torch and FAISS; all of the process's cores unless given."""
    queue_size: Annotated[int, Field(ge=1)] = 64
    """Requests admitted at once; more are answered 429."""
    max_images: Annotated[int, Field(ge=1)] = 64
    """Images in one request."""
    max_batch_images: Annotated[int, Field(ge=1)] = 64
    """Images answered together where requests wait for the engine; a single request may have more."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 32 * 1024 * 1024
    """Bytes in one request."""
    max_pixels: Annotated[int, Field(ge=1)] = 16_777_216
    """Pixels in one image, checked before it is decoded."""
    deadline_ms: Annotated[float, Field(gt=0)] = 30_000
    """Time allowed for an answer; a request may ask for less. Past it the answer is 504, never a weaker one."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 30
    """Time allowed for a client to send its request."""
    drain_seconds: Annotated[float, Field(ge=0)] = 0
    """After SIGTERM: how long to go on serving, not ready, before the port is closed."""
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

    @property
    def offer_is_explicit(self) -> bool:
        """Whether somebody said what to offer."""
        return "offer" in self.model_fields_set

    @property
    def offered(self) -> tuple[str, ...]:
        """The offered defences, each once, the default first."""
        return tuple(dict.fromkeys((self.defense, *self.offer)))


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
        seen = "" if first["type"] == "missing" else f"; seen: {first['input']!r}"
        raise OptionError(f"setting {name}: {first['msg']}{seen}") from error
    except ValueError as error:  # a TOML file that is not TOML, an environment variable that is not JSON
        raise OptionError(f"cannot read the settings: {error}") from error
