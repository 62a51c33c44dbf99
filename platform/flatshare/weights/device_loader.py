"""Loads onto one device: prepare in host memory, then place (``loader.py`` says what the cache asks for).

What tenants have in common is held once: tensors by digest, and whole stages by their tensors, so
that models with equal first layers hold the same objects (``models/stages.py``).
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor
from typing import Final
from weakref import WeakValueDictionary

import torch

from flatshare.device.protocol import Device
from flatshare.errors import DeviceBroken, DeviceFull, ModelFailed, ProbeFailed
from flatshare.models.architecture import Architecture
from flatshare.models.probe import check_probe
from flatshare.models.stages import Model, Stage, device_tensor, plan_of, tensor_view
from flatshare.telemetry.tracing import part
from flatshare.threads import in_thread
from flatshare.weights.fetch import Fetched, TensorSource
from flatshare.weights.host_cache import HostTensorCache
from flatshare.weights.known import Known, architecture_of
from flatshare.weights.loader import Held, Placed, Prepared
from flatshare.weights.tiers import Part, Tier
from flatshare_registry.records import TensorRecord, VersionRecord

__all__ = ["DeviceLoader", "part_of"]

WARM_SHARE: Final = 8
"""Beyond what its models hold, a process keeps at most one in this many of the host tier's bytes ready."""

PROOF_S: Final = 60.0
"""Seconds for which a version that was proven in this process need not answer its probe when it is loaded
again. A probe is a second row in its first pass: a sixth of a replica's work, if half of the requests
load."""

MAX_PROVEN: Final = 100_000
"""Versions that are remembered as having answered their probe in this process."""


def part_of(tensor: TensorRecord) -> Part:
    """What the device calls a tensor."""
    return Part(tensor.sha256, tensor.dtype, tensor.shape)


class DeviceLoader:
    """Loads onto one device, in threads.

    Parameters
    ----------
    source
        Where tensors' bytes come from.
    device
        Where they go; the only difference between CPU and CUDA is this argument.
    threads
        Where loads from the store run.
    local_threads
        Where loads from the node's own files run: apart, so that a store that hangs holds up none of
        them (promise 11).
    """

    def __init__(
        self,
        source: TensorSource,
        device: Device,
        threads: Executor,
        local_threads: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.source = source
        self.device = device
        self._threads = threads
        self._local_threads = local_threads
        # Weak: only a model keeps its tensors and stages alive, so the end of the last model frees them.
        self._tensors: WeakValueDictionary[Part, torch.Tensor] = WeakValueDictionary()
        self._stages: WeakValueDictionary[tuple[str, int, tuple[Part, ...]], Stage] = WeakValueDictionary()
        # How many living models hold a part, placed or not: overwriting it requires to know them all.
        self._users: Counter[Part] = Counter()
        self._sharing = threading.RLock()  # reentrant: the collector may end a model while it is held
        tier = source.tier
        self._warm = HostTensorCache(tier.budget_bytes // WARM_SHARE if tier is not None else 0)
        if tier is not None:
            tier.on_pressure = self._warm.clear
        self._proven = Known[float](MAX_PROVEN)  # when, by the clock

    def check(self, record: VersionRecord) -> Mapping[Part, int]:
        """See :class:`Loader`."""
        architecture_of(record)
        return {part_of(one): self.device.footprint(one.size_bytes) for one in record.tensors}

    def hold(self, record: VersionRecord) -> Held:
        """See :class:`Loader`."""
        with self._sharing:
            found = {part: self._tensors.get(part) for part in map(part_of, record.tensors)}
        return {part: tensor for part, tensor in found.items() if tensor is not None}

    def distrust(self, record: VersionRecord) -> None:
        """See :class:`Loader`."""
        self._proven.forget((record.digest, record.architecture))
        self.let_go()  # drop all: once memory went wrong, we do not ask which part of it did
        with contextlib.suppress(RuntimeError):  # the replica is stopping: its threads take nothing more
            self.source.work.submit(self._local_threads, record.tenant, lambda: self.source.recheck(record))

    def let_go(self) -> None:
        """See :class:`Loader`."""
        self._warm.clear()

    def stop(self, tenant: str) -> None:
        """See :class:`Loader`."""
        self.source.work.stop(tenant)

    async def ended(self, tenant: str, timeout_s: float) -> bool:
        """See :class:`Loader`."""
        return await self.source.work.ended(tenant, timeout_s)

    def scrub(self, model: Model, parts: Collection[Part]) -> int:
        """See :class:`Loader`. No load under way can have these tensors, or come by them later."""
        if self.device.computes_in_host_memory:
            self._warm.clear()
        tensors = model.tensors
        assert isinstance(tensors, _Tensors), "this loader's"
        with self._sharing:
            going = {part: tensors[part] for part in parts if self._users[part] == 1}
            for part in going:
                self._tensors.pop(part, None)
            for key in tensors.stages:
                if not going.keys().isdisjoint(key[2]):
                    self._stages.pop(key, None)
        with self._judged(f"what {model.digest[:8]} held could not be overwritten"):
            return self.device.scrub(going.values())

    def scrub_held(self, held: Held, parts: Collection[Part], model: Model | None) -> int:
        """See :class:`Loader`."""
        own = model.tensors if model is not None else {}
        with self._sharing:
            going = {}
            for part in parts:
                tensor = held[part]
                assert isinstance(tensor, torch.Tensor), "hold() gave tensors"
                if self._users[part] == (part in own):
                    going[part] = tensor
                    self._tensors.pop(part, None)
            for key in [key for key in self._stages if not going.keys().isdisjoint(key[2])]:
                self._stages.pop(key, None)
        with self._judged("what a load held could not be overwritten"):
            return self.device.scrub(going.values())

    @property
    def overwrites_what_leaves(self) -> bool:
        """See :class:`Loader`."""
        return self.device.overwrites_what_leaves

    async def settle(self) -> None:
        """See :class:`Loader`."""
        await self.device.settle()

    async def prepare_local(self, record: VersionRecord, held: Held) -> Prepared | None:
        """See :class:`Loader`."""
        if self.source.tier is None:
            return None
        key = (record.digest, record.architecture)
        proven_at = self._proven.get(key)
        if self.device.computes_in_host_memory and proven_at is not None:
            # Here and now: handing this to a thread would cost more than doing it (measured: a reload in a
            # thread took 12 ms under load, for 1 ms of work, because each of its many small steps waits
            # for the interpreter lock).
            self._warm.touch(map(part_of, record.tensors))
            warm = self._warm.get(part for part in map(part_of, record.tensors) if part not in held)
            if warm is not None:
                # Mapped since they were proven. The scrubber checks the files; damage to this process's own
                # copies shows when the model answers its probe again, with its first rows.
                now = self._clock()
                is_due = now - proven_at > PROOF_S
                if is_due:
                    self._proven.put(key, now)
                model = self._build(record, warm, held, prove=False)
                return Prepared(warm, Tier.HOST, model, proven=not is_due)
        # Here and now too: no thread is needed to find out that a load must come from the store.
        if not self.source.is_local(record, {one.name for one in record.tensors if part_of(one) not in held}):
            return None
        return await self.source.work.run(
            self._local_threads,
            record.tenant,
            lambda: self._prepare(record, held, lambda names: self.source.read_local(record, names)),
        )

    async def prepare(self, record: VersionRecord, held: Held, timeout_s: float) -> Prepared:
        """See :class:`Loader`."""
        prepared = await self.source.work.run(
            self._threads,
            record.tenant,
            lambda: self._prepare(record, held, lambda names: self.source.read(record, names, timeout_s)),
        )
        assert prepared is not None, "the store answers or raises"
        return prepared

    async def place(self, record: VersionRecord, prepared: Prepared, held: Held) -> Placed:
        """See :class:`Loader`."""
        model = prepared.model
        if model is None:
            with self._judged(f"{record.name} could not be placed on {self.device.name}"), part("copy"):
                tensors = await in_thread(None, lambda: self.device.place(prepared.tensors))
            left_over = tensors
            try:
                # Here and now: putting tensors into layers takes less time than handing it to a thread, and a
                # store that hangs occupies all of the other threads.
                model = self._build(record, tensors, held, prove=False)
                used = model.tensors
                left_over = {part: one for part, one in tensors.items() if used[part] is not one}
            finally:  # what another load has brought meanwhile, or all of it
                if left_over and self.overwrites_what_leaves:
                    with self._judged(f"what {record.name} had twice could not be overwritten"):
                        self.device.scrub(left_over.values())
        sizes = {
            part: self.device.footprint(tensor.untyped_storage().nbytes())
            for part, tensor in model.tensors.items()
        }
        return Placed(model, sizes, prepared.proven)

    def _prepare(
        self, record: VersionRecord, held: Held, read: Callable[[Collection[str]], Fetched | None]
    ) -> Prepared | None:
        network = architecture_of(record)
        wanted = [one for one in record.tensors if part_of(one) not in held]
        with part("fetch") as span:
            fetched = read({one.name for one in wanted})
            if fetched is None:
                return None
            span.set_attribute("flatshare.tier", fetched.tier.value)
        tensors = {
            part_of(one): device_tensor(
                tensor_view(fetched.data.get(one.sha256, memoryview(b"")), one),
                channels_last=network.channels_last,
            )
            for one in wanted
        }
        if not self.device.computes_in_host_memory:
            # Tried out here, before room is made; on the device it answers its probe with its first rows.
            self._try_out(network, record, tensors, held)
            return Prepared(tensors, fetched.tier, proven=False)
        prepared = Prepared(tensors, fetched.tier, self._build(record, tensors, held))
        if self.source.tier is not None and self.source.keeps(record):
            self._warm.keep(tensors)
        return prepared

    def _try_out(
        self, network: Architecture, record: VersionRecord, tensors: Mapping[Part, torch.Tensor], held: Held
    ) -> None:
        """Build a version in host memory and let it answer its probe, once per process.

        For parts that the device has already, the node's files are used. If these are gone, only the device
        can check the version, with its first rows.
        """
        key = (record.digest, record.architecture)
        if self._proven.get(key) is not None:
            return
        names = {one.name for one in record.tensors if part_of(one) in held}
        others = self.source.read_local(record, names) if names else Fetched({}, Tier.HOST)
        if others is None:
            return
        named = {one.name: tensors.get(part_of(one)) for one in record.tensors}
        for one in record.tensors:
            if named[one.name] is None:
                view = tensor_view(others.data.get(one.sha256, memoryview(b"")), one)
                named[one.name] = device_tensor(view, channels_last=network.channels_last)
        plan = plan_of(network)
        with _as_model_failure(record):
            given = {name: tensor for name, tensor in named.items() if tensor is not None}
            model = Model(tuple(plan.stage(index, given) for index in range(len(plan.names))))
        self._prove(network, record, model, torch.device("cpu"))

    def _prove(
        self, network: Architecture, record: VersionRecord, model: Model, device: torch.device
    ) -> None:
        try:
            with part("probe"):
                check_probe(network, record, model, device)
        except ProbeFailed:
            self.source.recheck(record)
            raise
        self._proven.put((record.digest, record.architecture), self._clock())

    @contextlib.contextmanager
    def _judged(self, what: str) -> Iterator[None]:
        """Turn a device's error into what it says of the device; only "other" is the model's own failure."""
        try:
            yield
        except Exception as error:
            fault = self.device.judge(error)
            if fault == "memory":
                # From Python 3.13 on its traceback is part of a cycle, through frames that hold models: these
                # would keep their memory when they are evicted for the next try.
                error.__traceback__ = None
                raise DeviceFull(f"{what}: the device has no memory now; retry") from error
            if fault == "broken":
                raise DeviceBroken(f"{what}: the device failed; this replica is replaced, retry") from error
            raise ModelFailed(what) from error

    def _build(
        self, record: VersionRecord, tensors: Mapping[Part, torch.Tensor], held: Held, *, prove: bool = True
    ) -> Model:
        """Make the model of shared and new tensors, and let it answer its probe."""
        network = architecture_of(record)
        with part("build"), _as_model_failure(record):
            model = self._assemble(network, record, {**tensors, **held})
        if prove:
            self._prove(network, record, model, self.device.torch_device)
        return model

    def _assemble(self, network: Architecture, record: VersionRecord, given: Mapping[Part, object]) -> Model:
        plan = plan_of(network)
        parts = {one.name: part_of(one) for one in record.tensors}
        with self._sharing:
            shared = _Tensors()
            for part in parts.values():
                new = given[part]
                assert isinstance(new, torch.Tensor), "hold() gave tensors"
                shared[part] = self._tensors.setdefault(part, new)
            self._users.update(tuple(shared))
            weakref.finalize(shared, self._let_go_of, tuple(shared)).atexit = False
        named = {name: shared[part] for name, part in parts.items()}
        stages: list[Stage] = []
        for index, names in enumerate(plan.names):
            key = (network.name, index, tuple(parts[name] for name in names))
            with self._sharing:
                stage = self._stages.get(key)
            if stage is None:
                # Not under the lock: it may take milliseconds, and the event loop takes the lock too.
                made = plan.stage(index, named)
                with self._sharing:
                    stage = self._stages.setdefault(key, made)
            stages.append(stage)
            shared.stages.append(key)
        return Model(
            tuple(stages), shared, record.digest, network.name, network.channels_last, network.threads
        )

    def _let_go_of(self, parts: tuple[Part, ...]) -> None:
        """Called at a model's end, in the thread that released it last."""
        with self._sharing:
            for part in parts:
                self._users[part] -= 1
                if not self._users[part]:
                    del self._users[part]


class _Tensors(dict[Part, torch.Tensor]):
    """What a model holds; can be referred to weakly.

    Attributes
    ----------
    stages
        The loader's keys for the model's stages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[tuple[str, int, tuple[Part, ...]]] = []


@contextlib.contextmanager
def _as_model_failure(record: VersionRecord) -> Iterator[None]:
    """Whatever an operator's own architecture raises is that version's failure."""
    try:
        yield
    except ModelFailed:
        raise
    except Exception as error:
        raise ModelFailed(f"{record.name} could not be built: {type(error).__name__}") from error
