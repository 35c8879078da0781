"""FastAPI, but for what it does by itself and this service does otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute


class WebApp(FastAPI):
    """Redirects nobody: the target would be made of the client's own ``Host``, before anybody asked who is there."""

    def __init__(self, **options: Any) -> None:
        super().__init__(redirect_slashes=False, docs_url=None, redoc_url=None, **options)

    def add_heads(self) -> None:
        """Takes HEAD wherever GET is taken so far, as HTTP wants it; the OpenAPI document does not repeat that."""
        for route in list(self._own_routes()):
            if "GET" in (route.methods or ()):
                self.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)

    def _own_routes(self) -> Iterator[APIRoute]:
        return (route for route in self.routes if isinstance(route, APIRoute))
