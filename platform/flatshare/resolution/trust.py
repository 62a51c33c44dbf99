"""How long keys are trusted that can't be confirmed: a revoked key must not be valid for ever."""

from __future__ import annotations

from flatshare.resolution.heads import TenantHeads
from flatshare_registry.errors import Unavailable
from flatshare_registry.ids import TenantId
from flatshare_registry.records import TenantHead

__all__ = ["TrustedHeads"]


class TrustedHeads:
    """Tenants' heads for checking keys: those that a replica holds, while they are fresh enough.

    Models are still served from older heads (promise 11): to operators, to an issuer's tokens, and to keys
    until this bound.

    Parameters
    ----------
    trust_s
        Seconds for which a head is believed after the store last confirmed it.
    """

    def __init__(self, heads: TenantHeads, trust_s: float) -> None:
        self._heads = heads
        self._trust_s = trust_s

    def head_now(self, tenant: TenantId) -> TenantHead | None:
        """A tenant's head if it is known well enough without waiting."""
        head = self._heads.head_now(tenant)
        return head if head is not None and self._heads.unconfirmed_s(tenant) <= self._trust_s else None

    async def head(self, tenant: TenantId) -> TenantHead:
        """A tenant's head.

        Raises
        ------
        NotFound
            No such tenant.
        Unavailable
            It is not known, or was last confirmed too long ago, and the store does not answer.
        """
        head = await self._heads.head(tenant)
        if self._heads.unconfirmed_s(tenant) > self._trust_s:
            raise Unavailable(f"the store has not confirmed the keys of {tenant} for {self._trust_s:g} s")
        return head
