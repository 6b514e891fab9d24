"""The public app in this process: routes, keys, errors in OpenAI's shape, adapters; before a stand-in for replicas."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.testclient import TestClient

from rayswift.serve.gateway import app as gateway_app
from rayswift.serve.gateway.app import FORWARDED, Gateway
from rayswift.serve.gateway.forwarding import Forwarder, GatewayRequest, Response
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.adapters import AdapterKey

KEY = "sk-of-this-test"
CHAT = "/v1/chat/completions"
#: What a replica's own app says of itself: more than the gateway lets through.
ENGINE_SCHEMA = {
    "openapi": "3.1.0",
    "paths": {CHAT: {"post": {"summary": "Chat", "responses": {"200": {"description": "OK"}}}}, "/pause": {"post": {}}},
    "components": {"schemas": {"ChatRequest": {"type": "object"}}},
}


class Replicas:
    """Stands for the replicas of a model: what was asked of them, what they answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[GatewayRequest] = []
        self.broadcasts: list[tuple[Any, ...]] = []
        self.fails: Exception | None = None
        self.prepared = AdapterKey("")
        self.app_name = self.deployment_name = ""
        self.options: Any = None
        self.running: list[Any] = [("replica-1", "# TYPE own counter\nown 1\n")]  # what each answers to a broadcast
        monkeypatch.setattr(Forwarder, "send", self._send)
        monkeypatch.setattr(Forwarder, "prepare", self._prepare)
        monkeypatch.setattr(gateway_app, "keep_replica_ports_inside", lambda: None)
        monkeypatch.setattr(gateway_app.serve, "get_deployment_handle", lambda deployment, app: self)

    async def _prepare(self, adapter: str) -> None:
        self.prepared = AdapterKey.parse(adapter)
        if self.fails is not None:
            raise self.fails

    async def _send(self, request: GatewayRequest) -> AsyncIterator[Response]:
        self.asked.append(request)
        if self.fails is not None:
            raise self.fails
        if request.path == "/openapi.json":
            raw = json.dumps(ENGINE_SCHEMA).encode()
        else:
            raw = json.dumps({"path": request.path, "model": request.body.get("model")}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            yield raw

        yield Response(200, "application/json", pieces(), len(raw))

    def broadcast(self, method: str, *args: Any) -> Any:
        self.broadcasts.append((method, *args))
        answers = self.running

        class Answers:
            async def results_async(self, *, timeout_s: Any = None, return_exceptions: bool = False) -> list[Any]:
                """As Serve's: an error where none runs, when one hangs, and from one that dies unless asked for."""
                if not answers:
                    raise DeploymentUnavailableError(DeploymentID("d", "a"))
                if TimeoutError in answers:
                    raise TimeoutError
                if errors := [answer for answer in answers if isinstance(answer, Exception) and not return_exceptions]:
                    raise errors[0]
                return [2048] if method == "context_length" else answers

        return Answers()


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Replicas:
    return Replicas(monkeypatch)


@pytest.fixture
def make(replicas: Replicas, tmp_path: Path) -> Callable[..., tuple[Gateway, TestClient]]:
    root = tmp_path / "root"
    for name in ("one", "run/checkpoint-10"):
        (root / name).mkdir(parents=True)
        (root / name / "adapter_config.json").write_text("{}")

    def make(**options: Any) -> tuple[Gateway, TestClient]:
        model = {"name": "m", "app": "a", "deployment": "d", "adapters": {"start": "/x"}, "adapter_root": str(root)}

        async def build() -> tuple[Gateway, Any]:
            gateway = object.__new__(type("Gateway", (Gateway,), {"__del__": lambda self: None}))  # Serve awaits it
            await Gateway.__init__(gateway, [model], **options)  # type: ignore[misc]  # a coroutine
            await gateway._session.close()
            return gateway, await gateway.__serve_build_asgi_app__()

        gateway, app = asyncio.run(build())
        return gateway, TestClient(app, raise_server_exceptions=False)

    return make


@pytest.fixture
def client(make: Callable[..., tuple[Gateway, TestClient]]) -> TestClient:
    return make()[1]


def error_of(answer: Any) -> dict[str, Any]:
    assert answer.headers["content-type"].startswith("application/json")
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_path_that_is_not_there_and_a_method_that_is_not_taken_are_openai_errors(client: TestClient) -> None:
    for path in ("/no/such/path", "/v1/chat/completions/x", "/", "/v1", "/pause", "/redoc", "/docs/oauth2-redirect"):
        answer = client.get(path)
        assert (answer.status_code, error_of(answer)["type"]) == (404, "not_found_error"), path
    assert client.get("/no/such/path", headers={"Host": "["}).status_code == 404
    for method, path, taken in (
        ("GET", CHAT, "POST"), ("HEAD", CHAT, "POST"), ("PUT", "/v1/models", "GET"), ("POST", "/v1/models/m", "GET"),
        ("GET", "/v1/load_lora_adapter", "POST"), ("DELETE", "/health", "GET"), ("PROPFIND", "/metrics", "GET"),
        ("OPTIONS", "/v1/models", "GET"), ("POST", "/openapi.json", "GET"), ("PUT", "/ping", "GET, POST"),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert answer.status_code == 405, (method, path)
        if method != "HEAD":
            error = error_of(answer)
            assert error["type"] == "invalid_request_error"
            assert error["code"] == "method_not_allowed"
            assert error["message"].endswith(f"takes {taken}")


def test_head_is_answered_where_get_is_and_a_slash_at_the_end_changes_nothing(client: TestClient) -> None:
    for path in ("/v1/models", "/v1/models/m", "/health", "/ping", "/metrics", "/openapi.json", "/docs"):
        assert client.head(path).status_code == client.get(path).status_code == 200, path
        assert client.get(f"{path}/").status_code == 200, path
    assert client.post("/ping").json() == {"status": "ok", "models": ["m"]}
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.post(f"{CHAT}/", json={"model": "m"}).json()["path"] == CHAT


def test_no_key_is_never_the_right_one(make: Callable[..., tuple[Gateway, TestClient]]) -> None:
    _, client = make(api_keys=[hashlib.sha256(b"").hexdigest()])
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "}, {"api-key": ""}):
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_nothing_is_answered_without_the_key(make: Callable[..., tuple[Gateway, TestClient]]) -> None:
    gateway, client = make(api_keys=[hashlib.sha256(KEY.encode()).hexdigest()])
    for method in ("GET", "POST", "OPTIONS", "HEAD"):
        for path in ("/v1/models", CHAT, "/docs", "/openapi.json", "/health", "/no/such/path"):
            answer = client.request(method, path, headers={"Authorization": "Bearer wrong"})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(client.get("/v1/models"))["code"] == "invalid_api_key"
    for headers in ({"Authorization": f"bearer {KEY}"}, {"api-key": KEY}, {"x-api-key": KEY}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert gateway.counters.by_status == {401: 25, 200: 3}
    assert (gateway.counters.errors, gateway.counters.requests, gateway.counters.running) == (25, 28, 0)


def test_a_connection_is_known_once_it_has_shown_a_key(make: Callable[..., tuple[Gateway, TestClient]]) -> None:
    gateway, _ = make(api_keys=[hashlib.sha256(KEY.encode()).hexdigest()], allowed_origins=["*"])
    known: list[str] = []

    class Stranger:
        def __init__(self, key: str) -> None:
            self.admit = lambda: known.append(key)

    async def ask() -> None:
        app = await gateway.__serve_build_asgi_app__()
        for key in ("", "guess", KEY):
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/health",
                "query_string": b"",
                "root_path": "",
                "headers": [(b"api-key", key.encode())],
                "extensions": {"rayswift.connection": Stranger(key)},
            }

            async def send(message: Any) -> None:
                pass

            await app(scope, asyncio.Event().wait, send)  # type: ignore[arg-type]

    asyncio.run(ask())
    assert known == [KEY]


def test_models_and_adapters_are_listed_and_found(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["m", "one", "run/checkpoint-10", "start"]
    assert [(card["root"], card["parent"]) for card in cards] == [("m", None), *[("m", "m")] * 3]
    for card in cards:
        assert list(card) == [  # vLLM's fields
            "id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission",
        ]  # fmt: skip
        assert (card["max_model_len"], card["object"], card["owned_by"]) == (2048, "model", "rayswift")
        assert card["created"] > 1_700_000_000
        assert card["permission"][0]["allow_sampling"] is True
    assert client.get("/v1/models/run/checkpoint-10").json() == cards[2]
    missing = client.get("/v1/models/nobody")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
    listed = client.get("/v1/adapters").json()["data"]
    assert listed[0] == {"id": "one", "object": "adapter", "model": "m"}


def test_models_are_listed_when_no_replica_runs(client: TestClient, replicas: Replicas) -> None:
    class Nobody:
        async def results_async(self, **_: Any) -> list[Any]:
            raise DeploymentUnavailableError(DeploymentID(name="d"))

    replicas.broadcast = lambda method: Nobody()  # type: ignore[assignment, method-assign, misc]
    assert [card["max_model_len"] for card in client.get("/v1/models").json()["data"]] == [None] * 4


ORIGIN = "https://chat.example.com"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type,anthropic-version"}  # fmt: skip


def test_a_browser_may_ask_from_the_allowed_origins(make: Callable[..., tuple[Gateway, TestClient]]) -> None:
    client = make(allowed_origins=[ORIGIN], api_keys=[hashlib.sha256(KEY.encode()).hexdigest()])[1]
    for path in (CHAT, "/v1/models", "/v1/messages"):
        asked = client.options(path, headers=PREFLIGHT)  # browsers send no key with it
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in asked.headers
    key = {"Authorization": f"Bearer {KEY}"}
    for answer, status in (
        (client.post(CHAT, json={}, headers={"Origin": ORIGIN, **key}), 200),
        (client.get("/v1/models", headers={"Origin": ORIGIN, **key}), 200),
        (client.post(CHAT, json={}, headers={"Origin": ORIGIN}), 401),
        (client.post(CHAT, json={"model": "nobody"}, headers={"Origin": ORIGIN, **key}), 404),
        (client.get("/no/such/path", headers={"Origin": ORIGIN, **key}), 404),
        (client.get(CHAT, headers={"Origin": ORIGIN, **key}), 405),
    ):
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
    other = client.options(CHAT, headers={**PREFLIGHT, "Origin": "https://elsewhere.example.com"})
    refused = client.post(CHAT, json={}, headers={"Origin": "https://elsewhere.example.com", **key})
    for answer in (other, refused):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_every_origin_or_none_may_ask(make: Callable[..., tuple[Gateway, TestClient]]) -> None:
    everyone, nobody = make(allowed_origins=["*"])[1], make()[1]
    assert everyone.options(CHAT, headers=PREFLIGHT).headers["access-control-allow-origin"] == "*"
    for answer in (nobody.options(CHAT, headers=PREFLIGHT), nobody.post(CHAT, json={}, headers={"Origin": ORIGIN})):
        assert (answer.status_code, "access-control-allow-origin" in answer.headers) == (403, False)


@pytest.mark.parametrize(
    ("listening", "headers", "status"),
    [
        ("127.0.0.1", {"Host": "127.0.0.1:8000"}, 200),
        ("127.0.0.1", {"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ("::1", {"Host": "[::1]:8000"}, 200),
        ("127.0.0.1", {"Host": "chat.example.com", "Origin": ORIGIN}, 200),  # a proxy of --allowed_origins
        ("127.0.0.1", {"Host": "evil.example.com:8000"}, 403),  # a name that its owner points here
        ("127.0.0.1", {"Host": "evil.example.com:8000", "Origin": "http://evil.example.com:8000"}, 403),
        ("127.0.0.1", {"Host": "127.0.0.1.evil.example.com"}, 403),
        ("::1", {"Host": "[2001:db8::1]:8000"}, 403),
        ("localhost", {"Host": "127.0.0.1:8000", "Origin": "http://evil.example.com"}, 403),
        ("localhost", {"Host": "127.0.0.1:8000", "Origin": "null"}, 403),  # a file, or a sandboxed frame
        ("localhost", {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:3000"}, 403),  # another program's page
        ("0.0.0.0", {"Host": "models.lan:8000"}, 200),  # nobody knows by which name others reach it
        ("0.0.0.0", {"Host": "models.lan:8000", "Origin": "http://models.lan:8000"}, 200),
        ("0.0.0.0", {"Host": "models.lan:8000", "Origin": "http://evil.example.com"}, 403),
    ],
)
def test_foreign_pages_and_names_are_refused(
    make: Callable[..., tuple[Gateway, TestClient]], listening: str, headers: dict[str, str], status: int
) -> None:
    gateway = make()[0]
    gateway._host, gateway._origins = listening, [ORIGIN]
    client = TestClient(asyncio.run(gateway.__serve_build_asgi_app__()), raise_server_exceptions=False)
    for answer in (client.post(CHAT, content=b"{}", headers=headers), client.get("/v1/models", headers=headers)):
        assert answer.status_code == status
    if status == 403:
        assert "--allowed_origins" in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["responses", "messages", "messages/count_tokens", "rerank"])
def test_the_other_interfaces_are_forwarded(client: TestClient, replicas: Replicas, path: str) -> None:
    answer = client.post(f"/v1/{path}", json={"model": "m:start"}).json()
    assert answer == {"path": f"/v1/{path}", "model": "start"}
    assert replicas.asked[-1].adapter == str(AdapterKey("start"))


def test_what_is_forwarded_names_the_model_or_the_adapter(client: TestClient, replicas: Replicas) -> None:
    for asked, answered, adapter in (
        (None, "m", ""), ("m", "m", ""), ("one", "one", "one=one"), ("m:start", "start", "start="),
    ):  # fmt: skip
        assert client.post(CHAT, json={"model": asked}, headers={"x-request-id": "r"}).json()["model"] == answered
        assert (replicas.asked[-1].adapter.partition("#")[0], replicas.asked[-1].request_id) == (adapter, "r")
    for model, status in (("nobody", 404), (5, 400)):
        answer = client.post(CHAT, json={"model": model})
        assert (answer.status_code, error_of(answer)["param"]) == (status, "model")
    answer = client.post(CHAT, json={"messages": [{"role": "nobody"}]})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "messages")
    assert client.post("/tokenize", content=b"[1").status_code == 400


def test_adapters_are_loaded_and_unloaded_by_name(client: TestClient, replicas: Replicas) -> None:
    given = {"lora_name": "mine", "lora_path": "run/checkpoint-10"}
    assert client.post("/v1/load_lora_adapter", json=given).json()["id"] == "mine"
    assert replicas.prepared[:2] == ("mine", "run/checkpoint-10")
    assert client.get("/v1/models/mine").status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).json()["unloaded"] is True
    told = [one for one in replicas.broadcasts if one[0] != "context_length"]
    ((method, name, version),) = told
    assert (method, name) == ("forget_adapter", "mine")
    assert version > replicas.prepared.version
    assert client.get("/v1/models/mine").status_code == 404


def test_an_adapter_is_replaced_in_place_as_with_vllm(client: TestClient, replicas: Replicas) -> None:
    load = "/v1/load_lora_adapter"
    given = {"lora_name": "mine", "lora_path": "run/checkpoint-10"}
    assert client.post(load, json=given).status_code == 200
    first = replicas.prepared

    def asked() -> AdapterKey:
        assert client.post(CHAT, json={"model": "mine"}).status_code == 200
        return AdapterKey.parse(replicas.asked[-1].adapter)

    again = client.post(load, json=given)
    assert (again.status_code, "load_inplace" in error_of(again)["message"]) == (400, True)
    replicas.fails = ApiError(422, "adapter mine: broken")
    assert client.post(load, json=given | {"lora_path": "one", "load_inplace": True}).status_code == 422
    replicas.fails = None
    assert asked() == first  # the old one answers until the new one is loaded
    assert client.post(load, json=given | {"lora_path": "one", "load_inplace": True}).status_code == 200
    assert asked() == replicas.prepared == ("mine", "one", replicas.prepared.version)
    assert replicas.prepared.version > first.version


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("load", {}, 400, "lora_name", None),
        ("load", {"lora_name": 5}, 400, "lora_name", None),
        ("load", {"lora_name": "new", "lora_path": "/etc"}, 403, None, "adapter_refused"),
        ("load", {"lora_name": "new", "lora_path": 5}, 400, None, "adapter_refused"),
        ("load", {"lora_name": "m", "lora_path": "one"}, 400, None, "adapter_refused"),
        ("load", {"lora_name": "m", "lora_path": "one", "load_inplace": True}, 400, None, "adapter_refused"),
        ("load", {"lora_name": "new", "lora_path": "one", "load_inplace": "yes"}, 400, "load_inplace", None),
        ("load", {"lora_name": "new", "lora_path": "nothing"}, 404, None, "adapter_refused"),
        ("load", {"lora_name": "../new"}, 400, None, "adapter_refused"),
        ("load", {"lora_name": "new", "model": "nobody"}, 404, "model", "model_not_found"),
        ("load", [], 400, None, None),
        ("unload", {"lora_name": "nobody"}, 404, "lora_name", "adapter_not_found"),
        ("unload", {"lora_name": 5}, 404, "lora_name", "adapter_not_found"),
        ("unload", {"lora_name": "one", "model": []}, 404, "model", "model_not_found"),
    ],
)
def test_wrong_adapter_requests_say_why(
    client: TestClient, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    answer = client.post(f"/v1/{path}_lora_adapter", json=body)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)


def test_an_adapter_that_no_replica_can_load_is_forgotten(client: TestClient, replicas: Replicas) -> None:
    given = {"lora_name": "mine", "lora_path": "one"}
    for error, status in ((ApiError(422, "adapter mine: broken"), 422), (RuntimeError("the replica fails"), 500)):
        replicas.fails = error
        assert client.post("/v1/load_lora_adapter", json=given).status_code == status
        assert client.get("/v1/models/mine").status_code == 404


def test_a_failure_of_the_gateway_is_a_500_that_tells_nothing(
    make: Callable[..., tuple[Gateway, TestClient]], replicas: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    replicas.fails = RuntimeError("a secret")
    gateway, client = make()
    for answer in (client.post(CHAT, json={}), client.get("/openapi.json")):
        assert (answer.status_code, error_of(answer)["type"]) == (500, "server_error")
        assert "secret" not in answer.text
    assert caplog.text.count("a request failed") == gateway.counters.errors == 2
    replicas.fails = ApiError(429, "too many requests are waiting", retry_after=5)
    assert client.post(CHAT, json={}).headers["retry-after"] == "5"


def test_the_schema_has_the_public_paths_of_the_engine_and_the_gateways_own(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    assert schema["info"]["title"] == "RaySwift"
    assert set(schema["paths"]) == {
        CHAT, "/v1/models", "/v1/models/{model}", "/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/health", "/livez", "/metrics",
    }  # fmt: skip
    assert CHAT in FORWARDED
    assert {"200", "4XX", "503"} <= set(schema["paths"][CHAT]["post"]["responses"])
    assert "ChatRequest" in schema["components"]["schemas"]
    for path, method in (("/v1/models", "get"), ("/v1/models/{model}", "get"), ("/v1/load_lora_adapter", "post")):
        assert set(schema["paths"][path]) == {method}
        assert set(schema["paths"][path][method]["responses"]) == {"200", "4XX"}
    load = schema["paths"]["/v1/load_lora_adapter"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert load["required"] == ["lora_name"]
    assert set(load["properties"]) == {"lora_name", "lora_path", "load_inplace", "model"}
    assert "/openapi.json" in client.get("/docs").text


def test_metrics_are_those_of_the_gateway_and_of_each_replica(client: TestClient) -> None:
    text = client.get("/metrics").text
    assert "rayswift_requests_total 1" in text
    assert 'own{served_model="m",replica="replica-1"} 1' in text


def test_without_a_replica_the_server_still_says_what_is_true(client: TestClient, replicas: Replicas) -> None:
    """None runs: scaled to none, the first one starting, or all gone."""
    replicas.running = []
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": "one"}).status_code == 200
    unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert (unloaded.status_code, unloaded.json()["unloaded"], unloaded.json()["replicas"]) == (200, True, 0)
    metrics = client.get("/metrics")
    assert (metrics.status_code, "own" in metrics.text) == (200, False)
    assert "rayswift_requests_total 3" in metrics.text
    asked = len(replicas.asked)
    schema = client.get("/openapi.json")
    assert schema.status_code == 200
    assert set(FORWARDED) < set(schema.json()["paths"])
    assert len(replicas.asked) == asked  # to read it starts none
    for path in ("/v1/models", "/v1/models/m", "/v1/adapters", "/livez", "/docs"):
        assert client.get(path).status_code == 200, path
    for path in ("/health", "/ping"):
        answer = client.get(path)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "not_ready"), path
    replicas.running = [("replica-1", "")]
    assert client.get("/health").json() == {"status": "ok", "models": ["m"]}
    assert "ChatRequest" in client.get("/openapi.json").json()["components"]["schemas"]


def test_a_replica_that_dies_or_hangs_is_left_out(client: TestClient, replicas: Replicas) -> None:
    replicas.running += [RayActorError()]
    assert 'own{served_model="m",replica="replica-1"} 1' in client.get("/metrics").text
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "one"}).json()["replicas"] == 1
    replicas.running = [TimeoutError]
    assert client.get("/metrics").status_code == 200
    refused = client.post("/v1/unload_lora_adapter", json={"lora_name": "one"})
    assert (refused.status_code, error_of(refused)["type"]) == (503, "overloaded_error")


@pytest.mark.parametrize(
    ("running", "another", "may_sleep", "status", "healthy"),
    [
        ([None, None], None, False, None, True),
        ([None, RuntimeError("the engine is dead")], None, False, None, True),
        ([RuntimeError("the engine is dead")], None, False, None, False),
        ([TimeoutError], None, False, None, True),  # one is silent, and Serve finds another
        ([TimeoutError], BackPressureError(1, 1), False, None, True),
        ([TimeoutError], RayActorError(), False, None, False),
        ([TimeoutError], TimeoutError(), True, "HEALTHY", False),
        ([], None, False, "HEALTHY", False),
        ([], None, True, "HEALTHY", True),  # the next request starts one
        ([], None, True, "UPSCALING", True),
        ([], None, True, "UNHEALTHY", False),
        ([], None, True, "DEPLOY_FAILED", False),
        ([], None, True, None, False),  # somebody has deleted the model
    ],
)
def test_health_is_what_the_replicas_say(
    make: Callable[..., tuple[Gateway, TestClient]], replicas: Replicas, monkeypatch: pytest.MonkeyPatch,
    running: list[Any], another: Exception | None, may_sleep: bool, status: str | None, healthy: bool,
) -> None:  # fmt: skip
    class Asked:
        def __await__(self) -> Any:
            if another is not None:
                raise another
            yield from ()

        def cancel(self) -> None: ...

    deployments = {"d": SimpleNamespace(status=status, replica_states={})} if status else {}
    applications = {"a": SimpleNamespace(deployments=deployments)}
    monkeypatch.setattr(gateway_app.serve, "status", lambda: SimpleNamespace(applications=applications))
    replicas.running, replicas.app_name, replicas.deployment_name = running, "a", "d"
    replicas.options = lambda method_name: SimpleNamespace(remote=Asked)
    gateway, client = make()
    gateway.models["m"].may_sleep = may_sleep
    for path in ("/health", "/ping"):
        assert client.get(path).status_code == (200 if healthy else 503), path
    assert client.get("/livez").status_code == 200
    assert not replicas.asked


def test_hundreds_of_replicas_are_not_asked_anew_by_everyone_who_asks_for_their_health(
    client: TestClient, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("/health", "/v1/models") * 5:
        assert client.get(path).status_code == 200
    assert sorted(replicas.broadcasts) == [("check_health",), ("context_length",)]
    replicas.running = [RuntimeError("the engine is dead")]
    monkeypatch.setattr("rayswift.serve.gateway.forwarding.HEALTH_AGE", 1e-9)
    assert client.get("/health").status_code == 503
    monkeypatch.setattr("rayswift.serve.gateway.forwarding.HEALTH_AGE", 60)
    replicas.running = [None]
    assert client.get("/health").status_code == 200, "that none was well is not remembered"


def test_the_app_lives_as_serve_starts_and_ends_it(make: Callable[..., tuple[Gateway, TestClient]]) -> None:
    with make()[1] as client:
        assert client.get("/health").status_code == 200
