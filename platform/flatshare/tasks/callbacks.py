"""Callbacks: a task's end, told to an address that its sender named.

The message is signed as Standard Webhooks require (https://www.standardwebhooks.com, version 1), with the
SHA-256 of the secret part of the key that sent the task: both sides have it, and the key itself is kept
nowhere. A URL is used only if it is https, the operator allows its host, and each address that the name
resolves to is public. An origin that the operator names as such is exempt. The connection goes to the
address that was checked: a name that resolves to something else a moment later leads nowhere else.
Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hmac
import json
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx

from flatshare.callback_rules import CallbackRules, is_public
from flatshare.errors import BadInput
from flatshare.tasks.records import TaskRecord
from flatshare_registry.errors import InvalidInput
from flatshare_registry.keys import parse_key

__all__ = ["CallbackRefused", "CallbackSender", "message_of", "signed_headers", "verify_callback"]

ANSWER_S: Final = 5.0
"""Seconds that a receiver has, connecting included."""

NOT_REACHED: Final = "the callback's host could not be reached"
"""The same message for every reason: the reason would reveal names and open ports of a network."""

OLDEST_S: Final = 300.0
"""Seconds after which :func:`verify_callback` takes a message for an old one that is sent again."""


logger = logging.getLogger("flatshare.tasks")


class CallbackRefused(Exception):
    """A receiver did not take a message; its words may be shown to the tenant.

    Attributes
    ----------
    for_good
        Whether another try would be in vain.
    """

    def __init__(self, message: str, *, for_good: bool = False) -> None:
        super().__init__(message)
        self.for_good = for_good


_RESOLVING: Final = ThreadPoolExecutor(4, thread_name_prefix="resolve callbacks")
"""Threads of its own: a slow name server must not hold up calls to the store."""


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name. Raises ``OSError``."""
    found = await asyncio.get_running_loop().run_in_executor(
        _RESOLVING, functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    )
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CallbackSender:
    """Sends messages.

    Parameters
    ----------
    rules
        Where they may go.
    find
        The addresses of a name.
    tls
        How certificates are checked; None: by the system's authorities.
    """

    def __init__(
        self,
        rules: CallbackRules,
        find: Callable[[str, int], Awaitable[Sequence[str]]] = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._rules = rules
        self._find = find
        # Once: it takes fifty milliseconds of the event loop.
        self._tls = tls if tls is not None else ssl.create_default_context()

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> None:
        """Post a message.

        Raises
        ------
        CallbackRefused
            It was not taken.
        """
        try:
            self._rules.check(url)  # the rules may have changed since it was taken
        except BadInput as error:
            raise CallbackRefused(error.message, for_good=True) from None
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await self._post(url, headers, body)
        except TimeoutError:
            raise CallbackRefused(f"the callback was not answered in {ANSWER_S:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            raise CallbackRefused(NOT_REACHED) from error
        except (ValueError, httpx.InvalidURL) as error:  # names that no resolver takes, too
            raise CallbackRefused(NOT_REACHED, for_good=True) from error
        if not 200 <= status < 300:
            raise CallbackRefused(f"the callback was answered {status}", for_good=status == 410)

    async def _post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        target = httpx.URL(url)
        port = target.port or (443 if target.scheme == "https" else 80)
        host = target.raw_host.decode("ascii")  # as it was allowed, not as somebody decodes it
        addresses = await self._find(host, port)
        if not addresses:
            raise CallbackRefused(NOT_REACHED)
        if not self._rules.is_origin(url) and not all(map(is_public, addresses)):
            logger.warning("a callback to %s was not sent: it has an address that is not public", host)
            raise CallbackRefused(NOT_REACHED, for_good=True)
        shown = {**headers, "host": target.netloc.decode(), "user-agent": "flatshare"}
        # No proxy of the environment: it would resolve the name anew.
        async with httpx.AsyncClient(
            verify=self._tls,
            trust_env=False, follow_redirects=False, timeout=ANSWER_S,
        ) as client:  # fmt: skip
            request = client.build_request(
                "POST", target.copy_with(host=addresses[0]), headers=shown, content=body,
                extensions={"sni_hostname": host},
            )  # fmt: skip
            reply = await client.send(request, stream=True)
            await reply.aclose()  # what it says beyond its status is not read
            return reply.status_code


def message_of(record: TaskRecord) -> bytes:
    """What a receiver is told of a task that has ended, as JSON; its answer is asked for by its URL."""
    answer, told = record.answer, record.callback
    ended_at = (told.ended_at if told else None) or record.updated_at  # the same in each try
    data = {
        "id": record.id,
        "state": record.state.value,
        "path": record.input.path,
        "model": record.pinned or record.input.ref,
        "attempts": record.attempts,
        "status": answer.status if answer else None,
        "version": answer.version if answer else None,
        "digest": answer.digest if answer else None,
        "result_url": f"/tasks/{record.id}/result" if answer else None,
        "error": record.error,
        "code": record.code,
    }
    message = {
        "type": f"task.{record.state}",
        "timestamp": ended_at.isoformat(),
        "data": {name: value for name, value in data.items() if value is not None},
    }
    return json.dumps(message, separators=(",", ":")).encode()


def signed_headers(secret_sha256: str, message_id: str, at: float, body: bytes) -> dict[str, str]:
    """The headers of a message.

    Parameters
    ----------
    secret_sha256
        Hex digest of the key's secret part.
    at
        Seconds since the epoch.
    """
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": f"{at:.0f}",
        "webhook-signature": signature(bytes.fromhex(secret_sha256), message_id, f"{at:.0f}", body),
    }


def signature(secret: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """``v1,<base64>`` of the HMAC-SHA256 over id, timestamp and body, with dots between."""
    signed = b".".join((message_id.encode(), timestamp.encode(), body))
    return "v1," + base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()


def verify_callback(key: str, headers: Mapping[str, str], body: bytes, now: float) -> None:
    """For receivers: return if a message is from the platform and of this moment.

    Parameters
    ----------
    key
        The API key that sent the task.
    headers
        Of the message; names in lower case, or a mapping that ignores case.
    body
        Its bytes, as they came.
    now
        Seconds since the epoch.

    Raises
    ------
    BadInput
        It is not.
    """
    try:
        secret = bytes.fromhex(parse_key(key).sha256)
        message_id, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
        given = headers["webhook-signature"].split(" ")
        age_s = abs(now - int(timestamp))
    except InvalidInput as error:
        raise BadInput(error.message) from None
    except (KeyError, ValueError):
        raise BadInput("the message has no signature") from None
    right = signature(secret, message_id, timestamp, body)
    if not any(hmac.compare_digest(one.encode(), right.encode()) for one in given):
        raise BadInput("the message's signature is another key's, or the message was changed")
    if age_s > OLDEST_S:
        raise BadInput(f"the message is {age_s:.0f} s old")
