"""What flags of a deployment reach: sampling, seed, fingerprints, TLS, the hub's token."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rayswift import hub, private
from rayswift.arguments import make_arguments
from rayswift.chat_page import command as chat_page
from rayswift.generate.model_spec import ModelSpec, hub_token, model_spec
from rayswift.generate.transformers import TransformersEngine
from rayswift.generate.vllm_pool import resolve_on_every_node
from rayswift.modeling.resolved import resolve_model
from rayswift.serve import running
from rayswift.serve.application import serve_config
from rayswift.serve.model_cards import model_cards
from rayswift.serve.replica.server import LLMServer
from rayswift.serve.replica.transformers import TransformersServing

ASK = {"model": "m", "messages": [{"role": "user", "content": "Say something."}]}


def spec_of(model: str, **settings: Any) -> ModelSpec:
    args = make_arguments(
        "deploy", model=model, use_gpu=False, served_model_name="m", torch_dtype="float32", **settings
    )
    return ModelSpec(**model_spec(resolve_model(args)).to_dict())  # as it travels


@contextlib.contextmanager
def replica(spec: ModelSpec) -> Iterator[TestClient]:
    """What a replica of the Transformers engine answers."""
    serving = TransformersServing.from_plan(spec, spec.encoders(spec.model))
    try:
        yield TestClient(serving.app, raise_server_exceptions=False)
    finally:
        serving.runner.close()


def said(http: TestClient, **fields: Any) -> str:
    reply = http.post("/v1/chat/completions", json={**ASK, **fields}).json()
    assert "choices" in reply, reply
    return str(reply["choices"][0]["message"]["content"])


def test_sampling_flags_and_the_seed_reach_requests_that_do_not_say(
    tiny_dir: str, tiny_served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "load", lambda *_, **__: tiny_served.serving.engine)
    with replica(spec_of(tiny_dir, temperature=0, max_new_tokens=4)) as http:
        greedy = said(http)
        assert greedy == said(http, temperature=0, max_tokens=4) == said(http, max_tokens=9)  # also the most
        assert greedy != said(http, temperature=2.0, seed=1)  # a request's own counts
    found = []
    for seed in (1, 1, 2):
        with replica(spec_of(tiny_dir, seed=seed, temperature=1.5, max_new_tokens=4)) as http:
            found.append([said(http), said(http)])
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_other_weights_in_the_folder_make_another_deployment(tiny_dir: str, tmp_path: Path) -> None:
    """Serve leaves an application alone whose configuration is the same."""
    folder = Path(shutil.copytree(tiny_dir, tmp_path / "m"))
    before, again = spec_of(str(folder)), spec_of(str(folder))
    assert before == again
    (folder / "generation_config.json").write_text('{"temperature": 0.3}')
    after = spec_of(str(folder))
    assert before != after
    entry = serve_config([after], make_arguments("deploy", model="m"), listen=True)["applications"][-1]["args"][
        "models"
    ]
    cards = model_cards("m", ["a"], created=0, owned_by="o", max_model_len=1, fingerprints=entry[0]["fingerprints"])
    assert [card.get("fingerprint") for card in cards] == [after.fingerprints["m"], None]


def certificate(tmp_path: Path) -> dict[str, str]:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("")
    return {"ssl_certfile": str(tmp_path / "cert.pem"), "ssl_keyfile": str(tmp_path / "key.pem")}


@pytest.mark.parametrize("command", ["app", "eval"])
def test_a_command_speaks_http_to_a_deployment_that_does(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = []

    @contextlib.contextmanager
    def deployed(settings: Any, specs: Any) -> Iterator[None]:
        started.append(settings)
        yield

    monkeypatch.setattr(running, "deployment", deployed)
    more = {"eval_dataset": ["gsm8k"]} if command == "eval" else {}
    for tls, host in ((certificate(tmp_path), "127.0.0.1"), ({}, "0.0.0.0"), ({}, "::1")):
        args = make_arguments(command, model="m", host="0.0.0.0" if tls else host, api_key=["k"], **tls, **more)
        with running.running_deployment(args, [ModelSpec("m", "m", "vllm")]) as endpoint:
            shown = f"[{host}]" if ":" in host else host
            assert endpoint.base_url == f"http://{shown}:{started[-1].port}/v1"
            assert (started[-1].host, started[-1].ssl_certfile, started[-1].ssl_keyfile) == (host, None, None)
    assert ("--ssl_certfile, --ssl_keyfile have no effect here: only this command asks" in caplog.text) == (
        command == "eval"
    )


def test_the_page_has_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launched: dict[str, Any] = {}

    class Page:
        def launch(self, **options: Any) -> tuple[None, str, None]:
            launched.update(options)
            return None, "https://127.0.0.1:7860/", None

        def close(self, verbose: bool) -> None: ...

    monkeypatch.setattr(chat_page.threading.Event, "wait", lambda self: None)
    monkeypatch.setattr(chat_page.signal, "signal", lambda *_: None)
    tls = certificate(tmp_path)
    chat_page.serve(Page(), make_arguments("app", model="m", **tls))
    assert launched.items() >= {**tls, "ssl_verify": False}.items()
    caplog.clear()
    make_arguments("app", base_url="http://h/v1", **tls)
    assert not caplog.text
    make_arguments("app", model="m", host="0.0.0.0", api_key=["k"], **tls)
    assert "--host: no effect with --ssl_certfile" in caplog.text


def test_the_hubs_token_reaches_the_replicas_of_a_cluster_and_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    used: list[Any] = []

    def resolve(model: str, *, token: str | None = None, **_: Any) -> str:
        used.append(token)
        raise RuntimeError("enough")

    monkeypatch.setattr(hub, "resolve_model", resolve)
    args = make_arguments("deploy", model="org/m", hub_token="secret-token", address="auto", use_gpu=False)
    spec = ModelSpec("m", "org/m", "vllm", local=False)
    assert "secret-token" not in str(serve_config([spec], args, listen=True))
    with pytest.raises(RuntimeError, match="enough"):
        resolve_on_every_node(spec, args.hub_token)
    assert used == ["secret-token"]
    private.keep_secret(hub_token("rayswift-m"), "secret-token")
    assert private.kept_secret(hub_token("rayswift-m")) == "secret-token"

    async def start_replica() -> None:
        await LLMServer.__init__(object.__new__(LLMServer), spec.to_dict())  # type: ignore[misc]

    import asyncio
    from types import SimpleNamespace

    from rayswift.serve.replica import server

    monkeypatch.setattr(server, "keep_replica_ports_inside", lambda: None)
    monkeypatch.setattr(server.serve, "get_replica_context", lambda: SimpleNamespace(app_name="rayswift-m"))
    with pytest.raises(RuntimeError, match="enough"):
        asyncio.run(start_replica())
    assert used == ["secret-token"] * 2
    private.keep_secret(hub_token("rayswift-m"), None)
    assert private.kept_secret(hub_token("rayswift-m")) is None
