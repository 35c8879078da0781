"""The Compose file gives a container what the image expects, and the time it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.settings import load_settings

yaml = pytest.importorskip("yaml", reason="reading the Compose file needs PyYAML")

ROOT = Path(__file__).parents[2]
SERVED = ("mithridate", "mithridate-cuda")


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    return found


@pytest.mark.parametrize("name", ["builder", *SERVED])
def test_containers_may_do_nothing_but_their_work(services: dict[str, dict[str, Any]], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.endswith(":ro") for mount in service["volumes"]] == [name != "builder"]
    if "build" in service:
        assert f"\nFROM runtime AS {service['build']['target']}\n" in (ROOT / "Dockerfile").read_text()
    assert service["image"] in ("mithridate:cpu", "mithridate:cuda")


@pytest.mark.parametrize("name", SERVED)
def test_it_is_given_longer_to_end_than_it_may_take(services: dict[str, dict[str, Any]], name: str) -> None:
    environment = {
        key.removeprefix("MITHRIDATE_").lower(): value for key, value in services[name]["environment"].items()
    }
    settings = load_settings(
        bundle="b", **{key: value for key, value in environment.items() if key.startswith("drain")}
    )
    allowed = int(services[name]["stop_grace_period"].removesuffix("s"))
    assert settings.drain_seconds + settings.drain_timeout_s < allowed


@pytest.mark.parametrize("name", SERVED)
def test_without_keys_only_the_loopback_of_the_host_is_published(
    services: dict[str, dict[str, Any]], name: str
) -> None:
    if services[name]["environment"].get("MITHRIDATE_INSECURE_NO_KEYS") == "true":
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])


def test_health_checks_ask_an_address_that_the_service_has(services: dict[str, dict[str, Any]]) -> None:
    addresses = {getattr(route, "path", None) for route in create_app(load_settings(bundle="not-opened")).routes}
    checks = [services[name]["healthcheck"]["test"][-1] for name in SERVED] + [(ROOT / "Dockerfile").read_text()]
    for check in checks:
        (asked,) = re.findall(r"""probe\.request\(['"]GET['"], ['"]([^'"]+)['"]\)""", check)
        assert asked in addresses
