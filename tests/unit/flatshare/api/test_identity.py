"""Who calls: no oracle for tenants, no way round, keys that end at once; and tokens of an issuer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from flatshare.api import identity
from flatshare.api.identity import Identities, OperatorKeys, Role
from flatshare.api.tokens import TokenVerifier
from flatshare.errors import SettingsError, Unauthenticated
from flatshare_registry import Quotas, Scope, TenantId
from flatshare_registry.errors import InvalidInput
from flatshare_registry.keys import new_key
from flatshare_registry.records import ApiKey

from .conftest import World

MODEL = "serve_multiplexed_model_id"
BODY = {"image": np.zeros((28, 28)).tolist()}
ACME = TenantId("acme")


@pytest.fixture
async def secured(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(
        app=world.secured(OperatorKeys.of(world.operators)), raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def ask(client: httpx.AsyncClient, key: str, model: str = "acme") -> httpx.Response:
    return await client.post("/predict", json=BODY, headers={MODEL: model, "authorization": f"Bearer {key}"})


async def test_another_tenant_and_an_unknown_one_look_the_same_and_neither_is_looked_up(
    world: World, secured: httpx.AsyncClient
) -> None:
    key = world.registry.tenancy.create_key(ACME).text
    assert (await ask(secured, key)).status_code == 200
    world.down = True  # whoever asked the store now would get a 503
    texts = []
    for model in ("globex", "nobody", "globex@1", "nobody:canary"):
        reply = await ask(secured, key, model)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
        tenant = model.partition("@")[0].partition(":")[0]
        texts.append(reply.json()["error"]["message"].replace(tenant, "X"))
    assert len(set(texts)) == 1


async def test_a_refusal_takes_the_same_time_whether_the_tenant_is_known_or_not(
    world: World, secured: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the look-up of an unknown one takes most of that time. The two kinds are asked at the same time,
    so that a busy machine is as busy for both, and the quickest of each are compared."""
    monkeypatch.setattr(identity, "REFUSAL_S", 0.5)
    good = world.registry.tenancy.create_key(ACME)
    await ask(secured, good.text)
    bad = f"fs_{good.id}_{'x' * 43}"
    slow = threading.Event()  # never set
    world.faulty.before = lambda operation, key: slow.wait(0.4) if "/t" in key else None

    async def refused(key: str) -> float:
        began = time.perf_counter()
        assert (await ask(secured, key)).status_code == 401
        return time.perf_counter() - began

    times = [await asyncio.gather(refused(bad), refused(new_key(f"t{number}").text)) for number in range(4)]
    known, unknown = (min(one) for one in zip(*times, strict=True))
    assert min(known, unknown) >= identity.REFUSAL_S
    assert abs(known - unknown) < 0.5 * identity.REFUSAL_S


async def test_a_key_ends_when_it_expires_and_when_it_is_revoked(
    world: World, secured: httpx.AsyncClient
) -> None:
    short = world.registry.tenancy.create_key(ACME, lifetime_s=60)
    other = world.registry.tenancy.create_key(ACME)
    assert (await ask(secured, short.text)).status_code == 200
    world.wall_clock.advance(60)
    assert (await ask(secured, short.text)).status_code == 401
    world.registry.tenancy.revoke_key(ACME, other.id)
    await world.heads.refresh(ACME)  # what the control plane's broadcast does
    assert (await ask(secured, other.text)).status_code == 401


async def test_a_stream_ends_with_its_key(world: World, secured: httpx.AsyncClient) -> None:
    made = world.registry.tenancy.create_key(ACME)

    async def lines() -> AsyncIterator[bytes]:
        yield json.dumps(BODY).encode() + b"\n"
        world.registry.tenancy.revoke_key(ACME, made.id)
        await world.heads.refresh(ACME)
        yield json.dumps(BODY).encode() + b"\n"

    headers = {MODEL: "acme", "authorization": f"Bearer {made.text}"}
    reply = await secured.post("/predict/stream", content=lines(), headers=headers)
    answers = {one["index"]: one for one in map(json.loads, reply.text.splitlines())}
    assert answers[1]["error"]["code"] == "unauthenticated"


async def test_a_suspended_tenant_is_told_so_and_served_again_after(
    world: World, secured: httpx.AsyncClient
) -> None:
    key = world.registry.tenancy.create_key(ACME).text
    world.registry.tenancy.suspend(ACME)
    reply = await ask(secured, key)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "tenant_suspended")
    world.registry.tenancy.resume(ACME)
    await world.heads.refresh(ACME)
    assert (await ask(secured, key)).status_code == 200


async def test_with_the_store_down_known_keys_work_and_unknown_ones_are_told_to_wait(
    world: World, secured: httpx.AsyncClient
) -> None:
    key = world.registry.tenancy.create_key(ACME).text
    other = world.registry.tenancy.create_key(TenantId("globex")).text
    await ask(secured, key)
    world.down = True
    assert (await ask(secured, key)).status_code == 200
    assert (await ask(secured, other, "globex")).status_code == 503


async def test_good_keys_are_noted_and_bad_ones_are_not(world: World) -> None:
    noted: list[tuple[str, str]] = []
    made = world.registry.tenancy.create_key(ACME)

    def used(tenant: TenantId, key: ApiKey) -> None:
        noted.append((tenant, key.id))

    identities = Identities(world.heads, OperatorKeys.of(world.operators), used=used)
    caller = await identities.identify({"authorization": f"bearer {made.text}"})
    assert (caller.name, caller.tenant, caller.scopes) == (
        f"key:{made.id}",
        "acme",
        frozenset({Scope.PREDICT}),
    )
    with pytest.raises(Unauthenticated):
        await identities.identify({"authorization": f"Bearer fs_{made.id}_{'x' * 43}"})
    assert noted == [("acme", made.id)]


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Basic YTpi"}, {"x-api-key": ""},
     {"authorization": "Bearer x", "x-api-key": "fs_ADMIN.q3v7k2m9d1_" + "x" * 43}],
)  # fmt: skip
async def test_who_shows_no_key_is_nobody(world: World, headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated):
        await Identities(world.heads, OperatorKeys.of(world.operators)).identify(headers)


def test_a_key_of_another_role_is_refused_at_the_start() -> None:
    with pytest.raises(InvalidInput, match="viewer"):
        OperatorKeys.of({Role.VIEWER: new_key("ADMIN").text})


# -- tokens

ISSUER, AUDIENCE = "https://issuer.example", "flatshare"


class Issuer:
    def __init__(self, folder: Path) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.jwks = folder / "jwks.json"
        keys = [
            {**json.loads(RSAAlgorithm.to_jwk(self.rsa.public_key())), "kid": "r", "alg": "RS256"},
            {**json.loads(ECAlgorithm.to_jwk(self.ec.public_key())), "kid": "e", "alg": "ES256"},
        ]
        self.jwks.write_text(json.dumps({"keys": keys}))

    def token(self, key: Any = None, algorithm: str = "RS256", kid: str | None = "r", **claims: Any) -> str:
        document = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": "svc", "exp": time.time() + 60, "tenant": "acme",
            "scope": "openid predict", **claims,
        }  # fmt: skip
        document = {name: value for name, value in document.items() if value is not None}
        return jwt.encode(document, key or self.rsa, algorithm, headers={"kid": kid} if kid else {})


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path)


@pytest.fixture
def verifier(issuer: Issuer) -> TokenVerifier:
    return TokenVerifier(issuer=ISSUER, audience=AUDIENCE, jwks=str(issuer.jwks))


async def test_a_token_of_the_issuer_is_a_key_of_its_tenant(
    world: World, issuer: Issuer, verifier: TokenVerifier
) -> None:
    identities = Identities(world.heads, OperatorKeys.of(world.operators), verifier)
    for token in (issuer.token(), issuer.token(issuer.ec, "ES256", "e", scope=["predict"])):
        caller = await identities.identify({"authorization": f"Bearer {token}"})
        assert (caller.tenant, caller.scopes, caller.name) == ("acme", {Scope.PREDICT}, "token:svc")
    caller = await identities.identify({"authorization": f"Bearer {issuer.token(scope='other')}"})
    assert caller.scopes == frozenset()


async def test_tokens_that_are_not_good_are_refused(issuer: Issuer, verifier: TokenVerifier) -> None:
    stranger = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = json.loads(issuer.jwks.read_text())["keys"][0]["n"]
    for token in (
        issuer.token(stranger),
        issuer.token(public, "HS256"),
        issuer.token(issuer.ec, "ES256", "r"),  # the key id of the RSA key
        issuer.token(issuer.rsa, "PS256"),
        jwt.encode({"iss": ISSUER}, None, "none"),
        issuer.token(exp=time.time() - 60),
        issuer.token(exp=None),
        issuer.token(iss="https://other.example"),
        issuer.token(aud="other"),
        issuer.token(sub=None),
        issuer.token(tenant=None),
        issuer.token(tenant="../up"),
        issuer.token(tenant="ADMIN"),
        issuer.token(kid="unknown"),
        "a.b.c",
        "a." + "b" * 10_000 + ".c",
    ):
        with pytest.raises(Unauthenticated):
            await verifier.verify(token)


def test_a_jwks_that_can_not_be_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("{}")
    for jwks in (str(tmp_path / "missing"), str(tmp_path / "junk"), "http://issuer.example/jwks"):
        with pytest.raises(SettingsError, match="jwt_jwks"):
            TokenVerifier(issuer=ISSUER, audience=AUDIENCE, jwks=jwks)


async def test_an_issuer_that_is_down_is_asked_again_and_not_by_everybody() -> None:
    asked: list[float] = []

    class Issuers(jwt.PyJWKClient):
        def get_jwk_set(self, refresh: bool = False) -> jwt.PyJWKSet:
            asked.append(time.monotonic())
            raise jwt.PyJWKClientError("down")

    verifier = TokenVerifier(issuer=ISSUER, audience=AUDIENCE, jwks="http://127.0.0.1:1/jwks")
    verifier._remote = Issuers("http://127.0.0.1:1/jwks")
    token = jwt.encode(
        {"iss": ISSUER}, rsa.generate_private_key(public_exponent=65537, key_size=2048), "RS256"
    )
    for _ in range(5):
        with pytest.raises(Unauthenticated):
            await verifier.verify(token)
    assert len(asked) == 1
    verifier._read_at -= 11
    with pytest.raises(Unauthenticated):
        await verifier.verify(token)
    assert len(asked) == 2


async def test_look_ups_of_junk_keys_leave_room_for_everybody_else(
    world: World, secured: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "LOOK_UP_TIMEOUT_S", 3600.0)  # who is refused is so at once, not after that
    good = world.registry.tenancy.create_key(ACME).text
    assert (await ask(secured, good)).status_code == 200
    release = threading.Event()

    def hang(operation: str, key: str) -> None:
        if "/junk-" in key:
            release.wait(20)

    world.faulty.before = hang
    junk = [asyncio.create_task(ask(secured, new_key(f"junk-{n}").text)) for n in range(200)]
    async with asyncio.timeout(15):  # all others hang for longer
        while sum(task.done() for task in junk) < 200 - 2 * identity.LOOK_UPS:
            await asyncio.wait(
                [task for task in junk if not task.done()], return_when=asyncio.FIRST_COMPLETED
            )
    assert {task.result().status_code for task in junk if task.done()} == {503}, "at once"
    assert (await asyncio.wait_for(ask(secured, good), 30)).status_code == 200
    release.set()
    await asyncio.gather(*junk)


async def test_a_flood_of_junk_does_not_show_who_is_known_here(
    world: World, secured: httpx.AsyncClient
) -> None:
    """With all look-ups taken, a bad key of a known tenant is told what one of an unknown tenant is told."""
    good = world.registry.tenancy.create_key(ACME).text
    assert (await ask(secured, good)).status_code == 200
    release = threading.Event()

    def hang(operation: str, key: str) -> None:
        if "/junk-" in key:
            release.wait(20)

    world.faulty.before = hang
    junk = [
        asyncio.create_task(ask(secured, new_key(f"junk-{n}").text)) for n in range(2 * identity.LOOK_UPS)
    ]
    for _ in range(200):
        await asyncio.sleep(0)
    known, unknown = await ask(secured, new_key("acme").text), await ask(secured, new_key("nobody").text)
    assert known.status_code == unknown.status_code == 503
    assert known.json()["error"]["message"] == unknown.json()["error"]["message"]
    release.set()
    await asyncio.gather(*junk)
    assert (await ask(secured, new_key("acme").text)).status_code == 401


async def test_a_bad_operators_key_is_refused_at_once(
    world: World, secured: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "REFUSAL_S", 3600.0)
    assert (await asyncio.wait_for(ask(secured, new_key("ADMIN").text), 30)).status_code == 401


@pytest.mark.parametrize("between", ["\t", "  ", " \t"])
async def test_a_key_is_read_as_the_edge_counts_it(
    world: World, secured: httpx.AsyncClient, between: str
) -> None:
    good = world.registry.tenancy.create_key(ACME).text
    headers = {MODEL: "acme", "authorization": f"Bearer{between}{good}"}
    assert (await secured.post("/predict", json=BODY, headers=headers)).status_code == 401


async def test_rows_over_a_tenants_quota_are_refused_before_they_are_decoded(
    world: World, secured: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = world.registry.tenancy.create_key(ACME).text
    world.registry.tenancy.set_quotas(ACME, Quotas(rows_per_request=2))
    packed: list[str] = []
    monkeypatch.setattr("flatshare.codecs.payload.struct.pack", lambda *args: packed.append("called"))
    body = {"image": np.zeros((3, 28, 28)).tolist()}
    headers = {MODEL: "acme", "authorization": f"Bearer {key}"}
    refused = await secured.post("/predict", json=body, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "over_rows_per_request")
    assert packed == []


async def test_a_stream_counts_as_one_request_for_as_long_as_it_lasts(
    world: World, secured: httpx.AsyncClient
) -> None:
    key = world.registry.tenancy.create_key(ACME).text
    world.registry.tenancy.set_quotas(ACME, Quotas(concurrent_requests=1))
    began, go_on = asyncio.Event(), asyncio.Event()

    async def lines() -> AsyncIterator[bytes]:
        yield json.dumps(BODY).encode() + b"\n"
        began.set()
        await go_on.wait()
        yield json.dumps(BODY).encode() + b"\n"

    headers = {MODEL: "acme", "authorization": f"Bearer {key}"}
    stream = asyncio.create_task(secured.post("/predict/stream", content=lines(), headers=headers))
    await began.wait()
    refused = await ask(secured, key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "over_concurrent_requests")
    go_on.set()
    answers = [json.loads(line) for line in (await stream).text.splitlines()]
    assert all("predicted_label" in one for one in answers), answers
    assert (await ask(secured, key)).status_code == 200


async def test_retry_after_says_when_there_will_be_room(world: World, secured: httpx.AsyncClient) -> None:
    key = world.registry.tenancy.create_key(ACME).text
    world.registry.tenancy.set_quotas(ACME, Quotas(requests_per_s=0.1))
    assert (await ask(secured, key)).status_code == 200
    refused = await ask(secured, key)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "11")
