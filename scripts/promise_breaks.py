"""What keeps each promise, as functions by name, and what breaks it: the table of ``scripts/promises``."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from promise_plugin import Break

CACHE = "tests/unit/flatshare/residency/test_model_cache.py"
LOADING = "tests/unit/flatshare/weights/test_device_loader.py"
SCRUBBER = "tests/unit/flatshare/weights/test_scrubber.py"
INFERENCE = "tests/unit/flatshare/engine/test_inference.py"
BODIES = "tests/unit/flatshare/api/test_bodies.py"
IDENTITY = "tests/unit/flatshare/api/test_identity.py"
CHANGES = "tests/unit/flatshare/resolution/test_changes.py"

# -- replacements


def nothing(original: Any, *arguments: Any, **named: Any) -> None:
    """Does nothing."""


def intact(original: Any, self: Any, model_id: Any) -> bool:
    return True


def undamaged(original: Any, self: Any, digest: str) -> bool:
    return False


def one_model(original: Any, self: Any, batch: Any, **named: Any) -> Any:
    for job in batch:
        job.same = batch[0].same
    return original(self, batch, **named)


def not_due(original: Any, self: Any, tenant: Any, revision: int) -> bool:
    return False


def put_alone(original: Any, self: Any, head: Any, mode: Any) -> None:
    self._store.put(f"tenants/{head.tenant}/head.json", head.encode(), mode)


async def room_first(original: Any, self: Any, record: Any, held: Any) -> Any:
    whole = sum(self._loader.check(record).values())
    self._residency.make_room(record.tenant, whole, slots=1, whole_bytes=whole)
    return await original(self, record, held)


def evictable(original: Any, self: Any, key: Any) -> bool:
    return not self._residents[key].pinned


def not_counted(original: Any, self: Any, resident: Any, *, evicted: bool) -> None:
    original(self, resident, evicted=evicted)
    if resident.leases:
        self.ledger.drop(resident.parts)
        resident.parts = {}


def load_of_its_own(original: Any, self: Any, record: Any, timeout_s: float) -> Any:
    self._loads = {key: load for key, load in self._loads.items() if key.tenant != record.tenant}
    return original(self, record, timeout_s)


@contextlib.contextmanager
def not_locked(original: Any, self: Any, digest: str, timeout_s: float) -> Iterator[bool]:
    yield True


async def cancelled_with_its_caller(original: Any, self: Any, record: Any, timeout_s: float) -> Any:
    try:
        return await original(self, record, timeout_s)
    except asyncio.CancelledError:
        for load in self._loads.values():
            load.task.cancel()
        raise


def silent(original: Any, self: Any, key: Any) -> bool:
    told, self._on_change = self._on_change, lambda: None
    try:
        unloaded: bool = original(self, key)
        return unloaded
    finally:
        self._on_change = told


def at_once(original: Any, self: Any, ref: Any) -> None:
    return None


def one_queue(original: Any, self: Any, *arguments: Any, **options: Any) -> None:
    original(self, *arguments, **options)
    self._loading_local = self._loading


async def asked_again(original: Any, self: Any, record: Any, held: Any) -> Any:
    self._store_rests_until = float("-inf")
    return await original(self, record, held)


def any_digest(original: Any, self: Any) -> Any:
    hasher, wanted = self.hasher, self.tensor.sha256
    self.hasher = SimpleNamespace(hexdigest=lambda: (hasher.hexdigest(), wanted)[1])
    return original(self)


def all_of_them(
    original: Any,
    keys: Any,
    residents: Any,
    bounds_of: Any,
    tenant: Any,
    slots: Any,
    budget_bytes: Any = None,
) -> Any:
    return list(keys)


def deleted(original: Any, store: Any, meta: Any, removal: Any) -> bool:
    store.delete(meta.key)
    return True


def all_at_once(original: Any, body: bytes, coding: str, limit_bytes: int, refusal: Any = None) -> bytes:
    plain = zlib.decompress(body, 31)
    if len(plain) > limit_bytes:
        original(body, coding, limit_bytes, refusal)  # refuses it, too late
    return plain


async def on_the_loop(original: Any, self: Any, tenant: str, work: Any) -> Any:
    return work()


def upright(original: Any, exif: bytes) -> int:
    return 1


def no_wait(original: Any, self: Any, now: float) -> float:
    return 0.0


# -- the table

BREAKS = [
    Break("1", "what the slot holds is not compared", {"flatshare.residency.lease:Lease.is_intact": intact},
          f"{INFERENCE}::test_promise_1_a_slot_that_changed_fails_the_request"),
    Break("1", "rows of different models go through one model",
          {"flatshare.engine.runner:PassRunner._launch": one_model, "flatshare.engine.runner:check_lease": nothing},
          f"{INFERENCE}::test_promise_1_models_that_share_layers_keep_their_own_heads"),
    Break("2", "room is made before it is known that the load succeeds",
          {"flatshare.residency.loads:Loads._prepare": room_first},
          f"{CACHE}::test_promise_2_a_load_that_fails_evicts_nothing"),
    Break("2", "a model is tried out after room was made for it",
          {"flatshare.weights.device_loader:DeviceLoader._try_out": nothing},
          f"{LOADING}::test_promise_2_a_model_that_fails_its_probe_evicts_nothing_on_any_device"),
    Break("3", "leased models are evicted", {"flatshare.residency.residency:Residency._evictable": evictable},
          f"{CACHE}::test_promise_3_a_leased_model_is_not_freed"),
    Break("4", "draining bytes do not count", {"flatshare.residency.residency:Residency.retire": not_counted},
          f"{CACHE}::test_promise_4_bytes_hold_at_every_instant_also_while_draining"),
    Break("5", "each caller loads for itself", {"flatshare.residency.loads:Loads.join": load_of_its_own},
          f"{CACHE}::test_promise_5_one_load_for_many_callers"),
    Break("5", "each replica fetches for itself", {"flatshare.weights.host_tier:HostTier.fetching": not_locked},
          "tests/unit/flatshare/weights/test_host_tier.py::test_one_fetch_at_a_time_and_the_lock_file_goes"),
    Break("6", "the caller's cancellation reaches the load",
          {"flatshare.residency.model_cache:ModelCache.lease": cancelled_with_its_caller},
          f"{CACHE}::test_promise_6_a_caller_that_goes_away_does_not_cancel_the_load"),
    Break("7", "failures are not remembered", {"flatshare.residency.failures:FailureMemory.remember": nothing},
          f"{CACHE}::test_promise_7_failures_are_remembered_for_their_time"),
    Break("8", "removals are not told", {"flatshare.residency.model_cache:ModelCache.unload": silent},
          f"{CACHE}::test_promise_8_every_addition_and_removal_is_told"),
    Break("8", "removals are not taken out of Ray's wrapper", {"flatshare.pool.multiplex:Advertiser._remove": nothing},
          "tests/contract/test_ray_multiplex.py"),
    Break("9", "what can never fit waits like anything else",
          {"flatshare.residency.residency:Residency.check_ever_fits": nothing},
          f"{CACHE}::test_promise_9_what_can_never_fit_is_refused_by_name_and_size"),
    Break("10", "a promoted alias means the new version at once",
          {"flatshare.resolution.swaps:Swaps.serving": at_once},
          "tests/unit/flatshare/resolution/test_swaps.py::test_promise_10_no_request_fails_or_waits_for_the_swap"),
    Break("11", "loads from the node's own files queue behind the store",
          {"flatshare.residency.loads:Loads.__init__": one_queue},
          f"{CACHE}::test_promise_11_a_store_that_hangs_does_not_hold_up_the_nodes_own_files"),
    Break("11", "a store that hangs is asked by one after the other",
          {"flatshare.residency.loads:Loads._prepare": asked_again},
          "tests/property/test_fault_simulation.py"
          "::test_promise_11_with_a_store_that_hangs_everybody_gets_503_and_nobody_a_hang"),
    Break("12", "bytes are not compared with their sha256", {"flatshare.weights.tensor_sink:TensorSink.finish": any_digest},
          f"{LOADING}::test_promise_12_every_flipped_bit_of_a_tensor_is_found"),
    Break("12", "files that were damaged are not found", {"flatshare.weights.host_tier:HostTier.is_damaged": undamaged},
          f"{SCRUBBER}::test_a_damaged_file_is_found_removed_and_told"),
    Break("keys", "a key opens every tenant", {"flatshare.api.identity:Caller.may": nothing},
          f"{IDENTITY}::test_another_tenant_and_an_unknown_one_look_the_same_and_neither_is_looked_up"),
    Break("floors", "a tenant is evicted below its floor", {"flatshare.residency.residency:spare_floors": all_of_them},
          f"{CACHE}::test_nobody_is_evicted_below_its_floor"),
    Break("erasure", "a load under way becomes resident after the erasure",
          {"flatshare.residency.load:Load.check_erased": nothing},
          f"{CACHE}::test_an_erased_tenant_is_gone_and_its_load_under_way_never_arrives"),
    Break("erasure", "what is erased is not overwritten", {"flatshare.residency.residency:Residency.free_if_unleased": nothing},
          f"{CACHE}::test_what_is_erased_is_overwritten_when_its_last_lease_ends"),
    Break("gc", "a blob that was renewed is deleted", {"flatshare_registry.gc:_remove_unless_renewed": deleted},
          "tests/unit/flatshare_registry/test_gc.py::test_a_blob_renewed_between_listing_and_delete_is_spared"),
    Break("quotas", "a tenant sends as much as it likes", {"flatshare.engine.quotas:Bucket.take": no_wait},
          "tests/unit/flatshare/engine/test_quotas.py::test_over_ten_seconds_a_tenant_gets_its_rate_and_not_more"),
    Break("quotas", "the lines of a stream take no place", {"flatshare.engine.quotas:QuotaKeeper.place": nothing},
          "tests/unit/flatshare/engine/test_quotas.py::test_a_line_of_a_stream_takes_a_place_of_its_tenants"),
    Break("bodies", "JSON of any structure is parsed", {"flatshare.codecs.payload:check_expansion": nothing},
          f"{BODIES}::test_json_that_would_expand_is_refused_before_it_is_parsed"),
    Break("bodies", "a compressed body is expanded, then measured", {"flatshare.api.bodies:expand": all_at_once},
          f"{BODIES}::test_expansion_holds_no_more_than_the_limit"),
    Break("bodies", "what is long is decoded on the event loop", {"flatshare.api.decoding:DecodeRoom.run": on_the_loop},
          "tests/unit/flatshare/api/test_decoding.py::test_the_event_loop_goes_on_while_a_body_is_decoded"),
    Break("bodies", "an image is read as it lies", {"flatshare.codecs.images:_orientation": upright},
          "tests/unit/flatshare/codecs/test_images.py::test_an_image_is_turned_as_it_says"),
    Break("feed", "what was announced is believed as it is", {"flatshare.resolution.changes:Changes.is_due": not_due},
          f"{CHANGES}::test_a_swap_that_comes_after_its_announcement_was_seen_is_seen_too"),
    Break("feed", "a head changes and nobody announces it", {"flatshare_registry.heads:HeadStore.swap": put_alone},
          f"{CHANGES}::test_what_is_announced_is_read_and_nothing_else"),
]  # fmt: skip

_LEASED = f"{CACHE}::test_promise_3_a_leased_model_is_not_freed"
PROVE_NOTHING = {
    "NOT APPLIED": Break("-", "what is gone", {"flatshare.residency.lease:Lease.gone": nothing}, _LEASED),
    "NEVER CALLED": Break(
        "-", "what the test does not use", {"flatshare.pool.multiplex:Advertiser._remove": nothing}, _LEASED
    ),
    "NOT FOUND": Break(
        "-",
        "nothing",
        {"flatshare.residency.lease:Lease.release": lambda original, self: original(self)},
        _LEASED,
    ),
    "THE BREAK ITSELF FAILED": Break(
        "-",
        "itself",
        {"flatshare.residency.lease:Lease.release": lambda original, self: self.no_such_thing},
        _LEASED,
    ),
}
"""Breaks that must not count, by what is said of them: they try the script, in its test."""

OWN_FAULTS = frozenset(
    {
        "TypeError",
        "AttributeError",
        "NameError",
        "UnboundLocalError",
        "ImportError",
        "ModuleNotFoundError",
        "KeyError",
        "IndexError",
    }
)
"""What a replacement raises that does not even run: a test that fails with nothing else has found no broken promise."""
