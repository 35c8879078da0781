"""What the page's visitor may see."""

from __future__ import annotations

from service.access import is_loopback
from service.settings import Settings


def shows_exemplars(settings: Settings) -> bool:
    """Whether training images may leave the service at all: as told, else only where nobody else can reach it."""
    if settings.page_exemplars is not None:
        return settings.page_exemplars
    return is_loopback(settings.host)
