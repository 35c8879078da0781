"""``/docs``: Swagger UI, from files that came with a package. A browser that opens it fetches nothing elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from service.problems import Problem

_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}
_HEADERS = {
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def add_docs(app: FastAPI) -> None:
    """``/docs`` and its files, for an application with an OpenAPI document."""
    directory = files("fastapi_offline") / "static"
    content = {name: (directory / name).read_bytes() for name in _MEDIA_TYPES}

    async def page(request: Request) -> Response:
        root = request.scope.get("root_path", "")
        html = get_swagger_ui_html(
            openapi_url=f"{root}{app.openapi_url}",
            title=f"{app.title}: the interface",
            oauth2_redirect_url=None,
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/favicon.png",
        ).body
        text = bytes(html).decode()
        return HTMLResponse(text, headers={**_HEADERS, "Content-Security-Policy": _policy(text)})

    async def file(name: str) -> Response:
        if name not in content:
            raise Problem(404, "there is no such file")
        return Response(content[name], media_type=_MEDIA_TYPES[name], headers=_HEADERS)

    for path, answer in (("/docs", page), ("/docs/{name}", file)):
        app.get(path, include_in_schema=False)(answer)


def _policy(html: str) -> str:
    """Its own script and files, and the one script that stands in the page; Swagger UI sets styles on elements."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _INLINE.findall(html)]
    scripts = " ".join(["script-src 'self'", *(f"'sha256-{one}'" for one in hashes)])
    rest = "style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
    return f"default-src 'none'; {scripts}; {rest}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
