"""Messages to receivers: signed as Standard Webhooks have it, and sent nowhere but where they may go."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from flatshare.callback_rules import CallbackRules
from flatshare.errors import BadInput
from flatshare.tasks import callbacks
from flatshare.tasks.callbacks import CallbackRefused, CallbackSender, signed_headers, verify_callback
from flatshare_registry.keys import new_key

KEY = new_key("acme")
BODY = b'{"type":"task.done"}'


def test_an_independent_library_takes_the_signature_and_so_does_ours() -> None:
    headers = signed_headers(KEY.sha256, "acme.01", time.time(), BODY)
    theirs = Webhook("whsec_" + base64.b64encode(bytes.fromhex(KEY.sha256)).decode())
    theirs.verify(BODY, headers)
    with pytest.raises(WebhookVerificationError):
        theirs.verify(BODY + b" ", headers)
    verify_callback(KEY.text, headers, BODY, time.time())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"webhook-id": "acme.02"}, "another key"), ({"webhook-timestamp": "1"}, "another key"),
        ({"webhook-signature": "v1,x"}, "another key"), ({"webhook-timestamp": "x"}, "no signature"),
    ],
)  # fmt: skip
def test_what_was_changed_is_not_taken(changed: dict[str, str], why: str) -> None:
    headers = signed_headers(KEY.sha256, "acme.01", time.time(), BODY)
    with pytest.raises(BadInput, match=why):
        verify_callback(KEY.text, headers | changed, BODY, time.time())
    with pytest.raises(BadInput, match="another key"):
        verify_callback(new_key("acme").text, headers, BODY, time.time())
    with pytest.raises(BadInput, match="old"):
        verify_callback(KEY.text, headers, BODY, time.time() + 301)
    with pytest.raises(BadInput, match="no signature"):
        verify_callback(KEY.text, {}, BODY, time.time())


class Receiver:
    """An HTTP server of a few lines, so that a test sees each byte."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[bytes] = []
        self.reply = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head + await reader.read(len(BODY)))
            writer.write(self.reply)
            await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    receiver = Receiver(0)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver


def certificate(folder: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = folder / f"{name}.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


async def loopback(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


@pytest.mark.parametrize("name", ["hooks.test", "other.test"])
async def test_the_certificate_is_asked_for_the_name_and_the_connection_goes_to_its_address(
    tmp_path: Path, name: str
) -> None:
    pem = certificate(tmp_path, "hooks.test")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=str(pem))
    server.load_cert_chain(pem)
    async with receiving(server) as receiver:
        url = f"https://{name}:{receiver.port}/done?x=1"
        sender = CallbackSender(CallbackRules.parse(url.removesuffix("/done?x=1")), loopback, client)
        headers = signed_headers(KEY.sha256, "acme.01", time.time(), BODY)
        if name == "other.test":
            with pytest.raises(CallbackRefused, match="could not be reached"):
                await sender.send(url, headers, BODY)
            return
        await sender.send(url, headers, BODY)
        (request,) = receiver.requests
        assert request.startswith(b"POST /done?x=1 HTTP/1.1\r\n") and request.endswith(BODY)
        assert f"host: hooks.test:{receiver.port}\r\n".encode() in request.lower()
        assert headers["webhook-signature"].encode() in request


async def test_a_name_of_a_private_address_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    async def find(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["93.184.215.14", str(ipaddress.ip_address("169.254.169.254"))]

    sender = CallbackSender(CallbackRules.parse("hooks.acme.com"), find)
    with pytest.raises(CallbackRefused) as refused:
        await sender.send("https://hooks.acme.com/x", {}, BODY)
    assert str(refused.value) == "the callback's host could not be reached", (
        "no word of what the name means here"
    )
    assert refused.value.for_good and asked == [("hooks.acme.com", 443)]


async def test_an_address_that_is_not_allowed_any_more_is_given_up() -> None:
    sender = CallbackSender(CallbackRules.parse("hooks.acme.com"), loopback)
    with pytest.raises(CallbackRefused, match="not allowed") as refused:
        await sender.send("https://other.net/x", {}, BODY)
    assert refused.value.for_good


@pytest.mark.parametrize(
    ("reply", "words", "for_good"),
    [
        ("302 Found\r\nlocation: http://169.254.169.254/", "answered 302", False),
        ("500 No", "answered 500", False), ("410 Gone", "answered 410", True),
    ],
)  # fmt: skip
async def test_redirects_are_not_followed_and_refusals_are_told(
    reply: str, words: str, for_good: bool
) -> None:
    async with receiving() as receiver:
        receiver.reply = f"HTTP/1.1 {reply}\r\ncontent-length: 0\r\n\r\n".encode()
        origin = f"http://127.0.0.1:{receiver.port}"
        with pytest.raises(CallbackRefused, match=words) as refused:
            await CallbackSender(CallbackRules.parse(origin)).send(f"{origin}/x", {}, BODY)
        assert (refused.value.for_good, len(receiver.requests)) == (for_good, 1)


async def test_an_endless_answer_is_not_read_and_a_silent_receiver_has_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with receiving() as receiver:
        receiver.reply = b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n" + b"x" * 100_000
        origin = f"http://127.0.0.1:{receiver.port}"
        sender = CallbackSender(CallbackRules.parse(origin))
        await sender.send(f"{origin}/x", {}, BODY)
    monkeypatch.setattr(callbacks, "ANSWER_S", 0.2)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(CallbackRefused, match="not answered in"):
            await CallbackSender(CallbackRules.parse(origin)).send(f"{origin}/x", {}, BODY)


async def test_what_is_told_of_a_host_that_is_away_names_no_reason() -> None:
    with pytest.raises(CallbackRefused) as refused:
        await CallbackSender(CallbackRules.parse("http://127.0.0.1:9")).send("http://127.0.0.1:9/", {}, BODY)
    assert str(refused.value) == "the callback's host could not be reached"


@pytest.mark.parametrize("url", ["https://xn--a.acme.com/", "https://a.acme.com/\x7f"])
async def test_a_name_that_no_resolver_takes_is_refused_and_raises_nothing_else(url: str) -> None:
    async def find(host: str, port: int) -> list[str]:
        raise UnicodeError("label empty or too long")

    with pytest.raises(CallbackRefused) as refused:
        await CallbackSender(CallbackRules.parse("*.acme.com"), find).send(url, {}, BODY)
    assert refused.value.for_good
