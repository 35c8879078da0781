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

    def openapi(self) -> dict[str, Any]:
        """The document, with what the routes declare and nothing beside it."""
        document = super().openapi()
        for route in self._own_routes():
            if route.include_in_schema:
                for method in route.methods or ():
                    _as_declared(document["paths"][route.path_format][method.lower()]["responses"], route)
        for unused in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(unused, None)
        return document

    def _own_routes(self) -> Iterator[APIRoute]:
        return (route for route in self.routes if isinstance(route, APIRoute))


def _as_declared(responses: dict[str, Any], route: APIRoute) -> None:
    """The framework adds an error 422 of a form that is never sent, and leaves null out of examples."""
    declared = {str(status): response.get("content", {}) for status, response in route.responses.items()}
    if "422" not in declared:
        responses.pop("422", None)
    for status, content in declared.items():
        for media_type, shown in content.items():
            if "example" in shown:
                responses[status]["content"][media_type]["example"] = shown["example"]
