"""The page where the service has keys: who has which scope sees what."""

from __future__ import annotations

import hashlib

import httpx2
from service_helpers import Serving, check_problem

KEYS = {"all": ["predict", "choose-defense", "explain"], "plain": ["predict"]}


def test_what_a_key_shows(serving: Serving, clean: list[bytes]) -> None:
    keys = [
        {"id": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": scopes}
        for name, scopes in KEYS.items()
    ]
    with serving(offer=["none"], keys=keys, lab=True) as client:

        def ask(path: str, key: str | None, method: str = "POST") -> httpx2.Response:
            headers = {"Content-Type": "image/png", **({"Authorization": f"Bearer {key}"} if key else {})}
            return client.request(method, path, content=clean[0] if method == "POST" else None, headers=headers)

        shell = client.get("/")
        assert shell.status_code == 200, "without the page there is nowhere to enter a key"
        assert "A key is needed" in shell.text
        assert "Digest" not in shell.text
        for path in ("/page/answer", "/page/lab", "/v1/lab/attack"):
            check_problem(ask(path, None), 401)
        check_problem(ask("/page/about", None, "GET"), 401)
        check_problem(ask("/page/exemplars/0.png", None, "GET"), 401)

        whole, plain = (ask("/page/answer", key).text for key in ("all", "plain"))
        assert "data:image/png" in whole
        assert "How it adapted" in whole
        assert "data:image/png" not in plain
        assert "How it adapted" not in plain
        assert "Only for callers who may explain" in plain
        for path in ("/page/lab", "/v1/lab/attack"):
            check_problem(ask(path, "plain"), 403)
            assert ask(path, "all").status_code == 200
        check_problem(ask("/page/exemplars/0.png", "plain", "GET"), 403)
        assert ask("/page/exemplars/0.png", "all", "GET").status_code == 200
        assert 'value="none"' in ask("/page/about", "all", "GET").text
        assert 'value="none"' not in ask("/page/about", "plain", "GET").text
        check_problem(ask("/page/answer?defense=none", "plain"), 403)
