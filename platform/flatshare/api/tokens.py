"""Optional: callers who show a JSON Web Token of their own issuer (OIDC) instead of an API key.

PyJWT does the cryptography. Only signatures of public keys count (RS, PS, ES, EdDSA): a shared secret
would let every verifier sign, and ``none`` is nobody's signature.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jwt

from flatshare.errors import SettingsError, Unauthenticated
from flatshare.settings import Settings
from flatshare_registry.errors import InvalidRef
from flatshare_registry.ids import TenantId
from flatshare_registry.records import Scope

__all__ = ["TokenVerifier", "Verified", "token_verifier"]

logger = logging.getLogger("flatshare.api")

ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_S: Final = 30
KEYS_LIFE_S: Final = 300.0
REREAD_S: Final = 10.0
"""Seconds between re-reads of the issuer's keys for tokens of unknown keys: junk must not flood it."""

READ_TIMEOUT_S: Final = 5
MAX_TOKEN_CHARS: Final = 8192


@dataclass(frozen=True, slots=True)
class Verified:
    """What a token says, after its signature, issuer, audience and times were checked."""

    subject: str
    tenant: TenantId
    scopes: frozenset[Scope]


class TokenVerifier:
    """Verifies tokens of one issuer.

    Parameters
    ----------
    issuer, audience
        What the token's ``iss`` and ``aud`` must be.
    jwks
        The issuer's public keys: an ``https://`` (or loopback ``http://``) URL, read again every five
        minutes, or a file.
    tenant_claim, scope_claim
        Which claims name the tenant, and the scopes (a list, or words with spaces between).

    Raises
    ------
    SettingsError
        The file can't be read, or holds no keys.
    """

    def __init__(
        self,
        *,
        issuer: str,
        audience: str,
        jwks: str,
        tenant_claim: str = "tenant",
        scope_claim: str = "scope",
    ) -> None:
        self._issuer = issuer
        self._audience = audience
        self._tenant_claim = tenant_claim
        self._scope_claim = scope_claim
        self._remote: jwt.PyJWKClient | None = None
        self._keys: jwt.PyJWKSet | None = None
        self._read_at = -math.inf
        self._reading = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokens")
        if jwks.startswith(("https://", "http://127.0.0.1:", "http://localhost:")):
            self._remote = jwt.PyJWKClient(jwks, cache_jwk_set=False, timeout=READ_TIMEOUT_S)
        elif "://" in jwks:
            raise SettingsError("jwt_jwks must be an https:// URL or a file")
        else:
            try:
                self._keys = jwt.PyJWKSet.from_dict(json.loads(Path(jwks).read_text()))
            except (OSError, ValueError, jwt.PyJWTError) as error:
                raise SettingsError(f"jwt_jwks: {jwks} can't be read as a JWKS: {error}") from error

    async def verify(self, token: str) -> Verified:
        """Check a token.

        Raises
        ------
        Unauthenticated
            It is not good, or names no tenant.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthenticated("the token is too long")
        if self._remote is None:
            return self._decode(token)
        # May fetch the issuer's keys; threads of its own, so that an issuer that hangs holds up only tokens.
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, token)

    def _decode(self, token: str) -> Verified:
        try:
            key = self._key(token)
            if key.algorithm_name not in ALGORITHMS:
                raise jwt.InvalidAlgorithmError("not a signature of a public key")
            claims = jwt.decode(
                token,
                key,  # with its algorithm: what the token's header says must be that one
                algorithms=[key.algorithm_name],
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
            tenant = TenantId(str(claims.get(self._tenant_claim, "")))
        except (jwt.PyJWTError, InvalidRef, TypeError, ValueError, OverflowError) as error:
            raise Unauthenticated("the token is not good") from error
        found: Any = claims.get(self._scope_claim, [])
        words = found.split() if isinstance(found, str) else found if isinstance(found, list) else []
        scopes = frozenset(scope for scope in Scope if scope.value in words)
        return Verified(ascii(str(claims["sub"]))[1:-1][:100], tenant, scopes)

    def _key(self, token: str) -> jwt.PyJWK:
        kid = jwt.get_unverified_header(token).get("kid")
        for life_s in (KEYS_LIFE_S, REREAD_S):
            for key in self._current(life_s).keys:
                if kid is None or key.key_id == kid:
                    return key
        raise jwt.InvalidKeyError("no key of this id")

    def _current(self, life_s: float) -> jwt.PyJWKSet:
        """The issuer's keys, re-read when older than ``life_s``; one thread reads, the others do not wait."""
        if self._remote is not None:
            age_s = time.monotonic() - self._read_at
            if age_s > (life_s if self._keys is not None else REREAD_S) and self._reading.acquire(
                blocking=False
            ):
                try:
                    self._keys = self._remote.get_jwk_set(refresh=True)
                except (jwt.PyJWTError, ValueError, OSError):
                    logger.warning("the issuer's keys can't be read from %s", self._remote.uri)
                finally:
                    self._read_at = time.monotonic()
                    self._reading.release()
        if self._keys is None:
            raise jwt.PyJWKClientError("the issuer's keys are not known yet")
        return self._keys


def token_verifier(settings: Settings) -> TokenVerifier | None:
    """What verifies an issuer's tokens, if the settings name one."""
    if not settings.jwt_issuer:
        return None
    return TokenVerifier(
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        jwks=settings.jwt_jwks,
        tenant_claim=settings.jwt_tenant_claim,
        scope_claim=settings.jwt_scope_claim,
    )
