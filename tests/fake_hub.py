"""A hub that is none, in the place of the network, for models that are gated, renamed or unknown: it answers as the real one does, and writes down what it was asked."""

import json

import httpx

COMMIT = "a" * 40


class FakeHub:
    """models: of each id its config.json, None for a gated one; renamed: the new id of an old one. asked: method and path, in order."""

    def __init__(self, models, renamed=None):
        self.models, self.renamed, self.asked = models, renamed or {}, []

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if is_api else parts[:2])
        if name in self.renamed:
            return 307, {"Location": path.replace(name, self.renamed[name])}, b""
        if name not in self.models:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if COMMIT not in path:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if is_api:
            return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": [], "tags": [], "downloads": 0}).encode()
        config = self.models[name]
        if config is None:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if not path.endswith("config.json"):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"ETag": '"etag"', "X-Repo-Commit": COMMIT}, json.dumps(config).encode()

    def handle(self, request: httpx.Request) -> httpx.Response:
        """The answer, for `httpx.MockTransport`."""
        status, headers, body = self.answer(request.method, request.url.path)
        given = {**headers, "Content-Length": str(len(body))}
        return httpx.Response(status, headers=given, content=b"" if request.method == "HEAD" else body, request=request)
