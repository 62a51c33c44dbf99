"""From a ref to the version that answers it here and now: the head's, or the old one while a swap goes on.

Only this module knows both. Requests, pinning, unpinning and unloading by a ref, and the ids that Ray is told
all ask here. Each once looked for itself, and two forgot the version that serves during a swap.
"""

from __future__ import annotations

from flatshare.resolution.heads import TenantHeads
from flatshare.resolution.swaps import Swaps
from flatshare.weights.tiers import ModelKey
from flatshare_registry.errors import InvalidRef
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import TenantHead, VersionRecord

__all__ = ["Resolver"]


class Resolver:
    """Resolves refs for one replica. All methods must be called on one event loop.

    Parameters
    ----------
    heads
        What the registry says.
    swaps
        Which old version still answers for an alias that was moved.
    """

    def __init__(self, heads: TenantHeads, swaps: Swaps) -> None:
        self._heads = heads
        self._swaps = swaps

    def head_now(self, tenant: TenantId) -> TenantHead | None:
        """A tenant's head if its keys and state can be believed without waiting."""
        return self._heads.head_now(tenant)

    async def head(self, tenant: TenantId) -> TenantHead:
        """A tenant's head. Raises as :meth:`TenantHeads.head`."""
        return await self._heads.head(tenant)

    def serving_now(self, ref: ModelRef) -> VersionRecord | None:
        """The version that answers a ref, if that is known without waiting. The hot path.

        Raises
        ------
        NotFound
            It is known that there is none.
        """
        # Before the swaps: the look at a head may begin one.
        said = self._heads.resolve_now(ref)
        return self._swaps.serving(ref) or said

    async def serving(self, ref: ModelRef, timeout_s: float) -> VersionRecord:
        """The version that answers a ref. Raises as :meth:`TenantHeads.resolve`."""
        said = await self._heads.resolve(ref, timeout_s)
        return self._swaps.serving(ref) or said

    async def said(self, ref: ModelRef, timeout_s: float) -> VersionRecord:
        """The version that the head names, whichever still answers: this is the one to load and to pin."""
        return await self._heads.resolve(ref, timeout_s)

    async def meant(self, ref: ModelRef, timeout_s: float) -> list[ModelKey]:
        """All that a ref stands for here: the version that still answers, and the one that the head names."""
        said = await self._heads.resolve(ref, timeout_s)
        return list(
            dict.fromkeys(ModelKey.of(one) for one in (self._swaps.serving(ref), said) if one is not None)
        )

    def refs_of(self, record: VersionRecord) -> set[str]:
        """Every ref that a version answers here: by its number, and the aliases that mean it."""
        tenant = TenantId(record.tenant)
        found = {record.name}
        head = self._heads.last_head(tenant)
        for alias, number in head.aliases.items() if head is not None else ():
            try:
                ref = ModelRef.parse(f"{tenant}:{alias}")
            except InvalidRef:  # one damaged head must not stop the others' ids
                continue
            serving = self._swaps.serving(ref)
            if (serving.version if serving is not None else number) == record.version:
                found.add(str(ref))
        return found
