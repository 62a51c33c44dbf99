"""Who calls, and what they may do. Decided in each replica and in the control plane, before a body is read.

A caller shows an API key, as ``Authorization: Bearer`` or ``x-api-key``. The key names its owner, and
only that tenant's head is read to check it. For anything that a tenant's key may not touch the answer is the
same 404, whether it is another tenant's or does not exist. No look-up is made, so that there is no oracle.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from flatshare.api.local_only import check_local
from flatshare.api.tokens import TokenVerifier
from flatshare.errors import Forbidden, Unauthenticated
from flatshare.residency.fair_semaphore import FairSemaphore
from flatshare_registry.errors import InvalidInput, NotFound, Unavailable
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.keys import PresentedKey, is_valid, parse_key
from flatshare_registry.records import ApiKey, Scope, TenantHead

__all__ = ["LOCAL_OPERATOR", "Caller", "Heads", "Identities", "OperatorKeys", "Role"]

REFUSAL_S: Final = 0.1
"""A bad key is refused no sooner than this many seconds after it came. So a refusal takes the same time
whether the key's tenant is known here, only in the store, or not at all (if the store answers within that
time). It also slows down guessing."""

NOT_GOOD: Final = "this API key is not good: unknown, expired or revoked"

LOOK_UPS: Final = 16
"""Look-ups at a time for keys whose tenant is not known here: junk must fill neither the places of this
replica nor the threads that read the registry."""

LOOK_UP_TIMEOUT_S: Final = 3.0
"""Seconds that such a look-up may take."""


class Role(StrEnum):
    """What an operator may do."""

    ADMIN = "admin"
    VIEWER = "viewer"


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who is known.

    Attributes
    ----------
    name
        For audit entries: ``operator:<key id>``, ``key:<key id>``, ``token:<subject>``.
    role
        Of an operator; None for a tenant.
    tenant, scopes
        Of a tenant's key; an operator has none.
    background
        The caller's requests are tasks: other requests go first.
    """

    name: str
    role: Role | None = None
    tenant: TenantId | None = None
    scopes: frozenset[Scope] = frozenset()
    background: bool = False

    def may_predict(self, ref: ModelRef) -> None:
        """Return if this caller may use a model.

        Raises
        ------
        NotFound
            The model is another tenant's; the message is the same as for an unknown tenant.
        Forbidden
            The key has another scope.
        """
        self.may(ref.tenant, Scope.PREDICT)

    def may(self, tenant: TenantId, scope: Scope) -> None:
        """Return if this caller may do what a scope allows, with a tenant. Raises as :meth:`may_predict`."""
        if self.role is Role.ADMIN:
            return
        if self.role is Role.VIEWER:
            raise Forbidden("a viewer's key may look, and change or predict nothing")
        if self.tenant != tenant:
            raise NotFound(f"there is no tenant {tenant}")
        if scope not in self.scopes:
            raise Forbidden(f"this key does not have the scope {scope.value}")


LOCAL_OPERATOR: Final = Caller("local", Role.ADMIN)
"""Everybody on this machine, where authentication is off; the platform then listens on loopback only."""


@dataclass(frozen=True, slots=True)
class OperatorKeys:
    """Operators' keys, without their secrets: sha256 by key id. The id's owner is the role in capitals."""

    digests: Mapping[str, str]

    @staticmethod
    def of(keys: Mapping[Role, str]) -> OperatorKeys:
        """From whole keys, by role.

        Raises
        ------
        InvalidInput
            One is not a key of that role.
        """
        digests: dict[str, str] = {}
        for role, text in keys.items():
            presented = parse_key(text)
            if presented.owner != role.name:
                raise InvalidInput(f"key {presented.id} is not a key of the role {role.value}")
            digests[presented.id] = presented.sha256
        return OperatorKeys(digests)

    def caller(self, presented: PresentedKey) -> Caller | None:
        """The operator whose key this is; None when it is nobody's."""
        if not is_valid(presented, self.digests.get(presented.id)):
            return None
        return Caller(f"operator:{presented.id}", Role[presented.owner])


class Heads(Protocol):
    """Where tenants' heads come from: a replica's view, or the registry itself."""

    def head_now(self, tenant: TenantId) -> TenantHead | None:
        """A tenant's head if it is known well enough without waiting."""
        ...

    async def head(self, tenant: TenantId) -> TenantHead:
        """A tenant's head.

        Raises
        ------
        NotFound
            No such tenant.
        Unavailable
            It is not known, and the store does not answer.
        """
        ...


class Identities:
    """Tells who calls.

    Parameters
    ----------
    heads
        Where the heads of tenants, whose keys count, come from.
    operators
        None: authentication is off, everybody on this machine is the operator (``local_only.py``).
    tokens
        Verifies JSON Web Tokens of an issuer, for those who have one.
    used
        Called with each key that was found good, on every request: must be quick.
    """

    def __init__(
        self,
        heads: Heads,
        operators: OperatorKeys | None,
        tokens: TokenVerifier | None = None,
        *,
        used: Callable[[TenantId, ApiKey], None] = lambda tenant, key: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._heads = heads
        self._operators = operators
        self._tokens = tokens
        self._used = used
        self._clock = clock
        self._look_ups = FairSemaphore(LOOK_UPS, LOOK_UPS)

    @property
    def off(self) -> bool:
        """Whether authentication is off."""
        return self._operators is None

    async def identify(self, headers: Mapping[str, str]) -> Caller:
        """The caller that a request's headers stand for. Waits for nothing when its tenant is known.

        Raises
        ------
        NotLocal
            Authentication is off, and the request may be a web page's.
        Unauthenticated
            There is no key, or not a good one.
        Unavailable
            The tenant is not known here, and the store does not answer.
        """
        came = time.monotonic()
        caller = self.identify_now(headers)
        if caller is not None:
            return caller
        text = _credential(headers)
        assert text is not None, "who shows nothing is refused at once"
        try:
            if self._tokens is not None and _is_token(text):
                verified = await self._tokens.verify(text)
                return Caller(f"token:{verified.subject}", None, verified.tenant, verified.scopes)
            return await self._look_up_caller(parse_key(text))
        except InvalidInput as error:
            raise Unauthenticated(error.message) from None
        except (_NotGood, NotFound):
            await asyncio.sleep(came + REFUSAL_S - time.monotonic())
            raise Unauthenticated(NOT_GOOD) from None

    def identify_now(self, headers: Mapping[str, str]) -> Caller | None:
        """As :meth:`identify`, without waiting; None where a look-up, a token or a late refusal takes time.

        Raises
        ------
        NotLocal, Unauthenticated
            As :meth:`identify`, for what is refused at once.
        """
        if self._operators is None:
            check_local(headers)
            return LOCAL_OPERATOR
        text = _credential(headers)
        if text is None:
            raise Unauthenticated("name yourself: Authorization: Bearer <API key>, or x-api-key")
        if self._tokens is not None and _is_token(text):
            return None
        try:
            presented = parse_key(text)
        except InvalidInput as error:
            raise Unauthenticated(error.message) from None
        if presented.tenant is None:
            operator = self._operators.caller(presented)
            if operator is None:
                # At once: this reveals nothing about tenants, and must hold no place in the control plane.
                raise Unauthenticated(NOT_GOOD)
            return operator
        head = self._heads.head_now(presented.tenant)
        return None if head is None else self._owner(presented, presented.tenant, head)

    def _owner(self, presented: PresentedKey, tenant: TenantId, head: TenantHead) -> Caller | None:
        """Whose key it is, by the tenant's head; None when it is not good."""
        key = head.keys.get(presented.id)
        good = is_valid(presented, key.sha256 if key is not None else None)
        if key is None or not good or (key.expires_at and self._clock() >= key.expires_at.timestamp()):
            return None
        self._used(tenant, key)
        return Caller(f"key:{key.id}", None, tenant, frozenset(key.scopes))

    async def _look_up_caller(self, presented: PresentedKey) -> Caller:
        """Raises ``_NotGood`` when it is nobody's key."""
        tenant = presented.tenant
        assert tenant is not None, "operators are known at once"
        known = self._heads.head_now(tenant)
        caller = self._owner(presented, tenant, known or await self._look_up(tenant))
        if caller is not None:
            return caller
        if known is not None:
            # While look-ups are refused, so is a bad key of a tenant that needs no look-up: else a flood of
            # junk would show which tenants are known here.
            async with self._look_ups.hold(LOOK_UP_TIMEOUT_S):
                pass
        raise _NotGood

    async def _look_up(self, tenant: TenantId) -> TenantHead:
        """Raises ``Overloaded`` when too many wait already, ``Unavailable`` when it takes too long."""
        async with self._look_ups.hold(LOOK_UP_TIMEOUT_S):
            try:
                async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                    return await self._heads.head(tenant)
            except TimeoutError:
                raise Unavailable("the registry did not answer in time") from None


class _NotGood(Exception):
    """A key that does not count."""


def _is_token(text: str) -> bool:
    """Whether what is shown is a JSON Web Token rather than a key of ours."""
    return text.count(".") == 2 and not text.startswith("fs_")


def _credential(headers: Mapping[str, str]) -> str | None:
    """What the caller shows, if anything. ``Authorization`` wins."""
    given = headers.get("authorization")
    if given is not None:
        # Nothing is stripped: the edge counts refusals by the key as it stands here.
        scheme, _, text = given.partition(" ")
        return text if scheme.lower() == "bearer" else ""
    return headers.get("x-api-key")
