"""A batch from end to end: what there is to do, the actors that do it, and the results as they come.

Ray Data's actors read rows themselves, by number: only numbers, labels and digests travel. Rows of one model
are one unit after the other, so that a model is loaded about once, and fetched from the store once a node.

Imports ray, so it must be imported only after ``pool.environment.prepare``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from numpy.typing import NDArray

from flatshare.batch.actor import UnitRunner
from flatshare.batch.inputs import Input, open_input
from flatshare.batch.results import Manifest, Results
from flatshare.batch.units import MOST_ROWS, Unit, units_of
from flatshare.settings import Settings
from flatshare_registry.catalog import Registry
from flatshare_registry.errors import InvalidInput, NotFound
from flatshare_registry.ids import ModelRef, TenantId
from flatshare_registry.records import Action

__all__ = ["Batch", "BatchPlan", "BatchReport"]

logger = logging.getLogger("flatshare.batch")

PART_ROWS: Final = 1_000_000
PART_S: Final = 2.0
PART_SHARE: Final = 0.05
"""Results are written when there are this many, or when they are this old and have taken this share of the
batch's time so far. A batch that is killed has to do the unwritten ones again.
"""

UNITS_A_TASK: Final = 4
"""Full units in one task of an actor: seconds of work, which an actor that is killed does again."""

LOOK_UPS: Final = 16
"""Refs resolved, and audit entries written, at a time."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What to do.

    Attributes
    ----------
    input, output
        A path to read from, and a folder of this machine to write to.
    model, model_column
        The model of all rows; or what names each row's model: a column of Parquet, or for images the folder
        that an image lies in (then the column may have any name).
    actors
        Processes that work at a time; 0 for one per core, or one per GPU.
    gpus_per_actor
        GPUs of each actor: with a fraction, actors share one.
    ready
        Whether whole numbers of 0 to 255 that are not unsigned bytes are model-ready, and not raw pixels.
    """

    input: str
    output: str
    model: str = ""
    model_column: str = ""
    image_column: str = "image"
    actors: int = 0
    gpus_per_actor: float = 0.0
    ready: bool = False


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What was done.

    Attributes
    ----------
    rows
        Labelled by this run.
    done_before
        Labelled by runs before it.
    failed
        Rows without a label, by why.
    models
        Versions that this run used.
    loads
        Models that actors loaded; more than ``models`` where two actors had rows of one.
    seconds
        From the first row that an actor took to the last result.
    start_s
        Until then: reading what there is, and starting actors.
    """

    rows: int
    done_before: int
    failed: dict[str, int]
    models: int
    loads: int
    seconds: float
    start_s: float

    @property
    def rows_per_s(self) -> float:
        """Of ``seconds``."""
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Counts:
    rows: int = 0
    loads: int = 0
    began: float = float("inf")
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, columns: dict[str, NDArray[Any]]) -> None:
        """Count these results, and remove the columns that are not written."""
        errors = columns["error"]
        self.rows += int((errors == "").sum())
        self.failed.update(str(error) for error in errors if error)
        self.loads += int(columns.pop("loads").sum())
        self.began = min(self.began, float(columns.pop("began").min()))


class Batch:
    """A batch that is ready to run: its input was looked at, and its versions are resolved.

    One that was cut off goes on when it is made again with the same input and folder.

    Parameters
    ----------
    settings
        As of a replica of the pool: store, slots, host tier.
    actor
        Who does it, for the tenants' audit logs: an entry each, before the first row.

    Raises
    ------
    InvalidInput
        The input can't be read, or the folder holds something else's results.
    NotFound
        There is no such model.
    """

    def __init__(self, plan: BatchPlan, settings: Settings, actor: str) -> None:
        self._began = time.time()
        if bool(plan.model) == bool(plan.model_column):
            raise InvalidInput("give --model, or --model-column")
        self._plan = plan
        self._settings = settings
        self._source = open_input(plan.input, plan.image_column, plan.model_column)
        counts = [rows for _, rows in self._source.files]
        self.total = sum(counts)
        if not self.total:
            raise InvalidInput(f"{plan.input} holds no row")
        refs = self._source.models()
        self._results = Results(plan.output)
        self._registry = Registry(settings.open_store(), actor=actor)
        manifest = _manifest(plan, self._source, refs, self._results, self._registry)
        done = self._results.done(self.total)
        self.done_before = int(done.sum())
        versions = manifest.versions[plan.model] if refs is None else (refs, manifest.versions)
        self._units = units_of(counts, versions, done)

    def run(self, report: Callable[[int, int], None] = lambda done, total: None) -> BatchReport:
        """Label every row that has no label yet, within a Ray cluster that this process is connected to.

        Parameters
        ----------
        report
            Called with how many rows are done, and how many there are.
        """
        _note(self._registry, self._plan, self._units)
        report(self.done_before, self.total)
        found = _Counts()
        kept: list[dict[str, NDArray[Any]]] = []
        started_at = written_at = time.monotonic()
        try:
            for columns in _labelled(self._plan, self._settings, self._source, self._units):
                found.add(columns)
                kept.append(columns)
                now = time.monotonic()
                due = now - written_at > max(PART_S, PART_SHARE * (now - started_at))
                if due or sum(len(one["row"]) for one in kept) >= PART_ROWS:
                    self._results.add(kept)
                    kept, written_at = [], now
                report(self.done_before + found.rows, self.total)
        finally:  # also of one that is cut off by Ctrl-C
            self._results.add(kept)
        ended = time.time()
        first = min(found.began, ended)
        models = len({unit.version for unit in self._units})
        return BatchReport(
            found.rows, self.done_before, dict(found.failed), models, found.loads, ended - first,
            first - self._began,
        )  # fmt: skip


def _manifest(
    plan: BatchPlan, source: Input, refs: NDArray[Any] | None, results: Results, registry: Registry
) -> Manifest:
    """What the folder's results belong to: as it was begun earlier, or begun now."""
    known = results.manifest()
    columns = f"{plan.image_column}/{plan.model_column}"
    asked = (plan.input, source.fingerprint, plan.model, columns)
    if known is not None:
        if (known.input, known.fingerprint, known.model, known.columns) != asked:
            raise InvalidInput(
                f"{plan.output} holds results of another batch, or of {known.input} before it changed; "
                "name a new folder"
            )
        return known
    names = [plan.model] if refs is None else sorted({str(ref) for ref in refs})

    def resolved_of(name: str) -> str:
        try:
            return registry.resolve(ModelRef.parse(name)).name
        except NotFound:
            if refs is None:
                raise
            return name  # its rows say so, and the others have their labels

    with ThreadPoolExecutor(LOOK_UPS) as threads:
        resolved = threads.map(resolved_of, names)
        manifest = Manifest(*asked, dict(zip(names, resolved, strict=True)))
    results.begin(manifest)
    return manifest


def _note(registry: Registry, plan: BatchPlan, units: Sequence[Unit]) -> None:
    """An entry in the log of each tenant whose model is going to be used."""
    rows: Counter[str] = Counter()
    for unit in units:
        rows[unit.version] += len(unit.numbers)

    def note(version: str) -> None:
        # Not the input's whole path: a tenant may read this.
        name = plan.input.rstrip("/").rpartition("/")[2].partition("?")[0]
        detail = {"version": version, "rows": str(rows[version]), "input": name}
        with contextlib.suppress(NotFound):  # a tenant that left: its rows say so, one by one
            registry.note(TenantId(ModelRef.parse(version).tenant), Action.BATCH_RUN, detail)

    with ThreadPoolExecutor(LOOK_UPS) as threads:
        list(threads.map(note, rows))


def _labelled(
    plan: BatchPlan, settings: Settings, source: Input, units: Sequence[Unit]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Results of units, in the order in which they are done."""
    if not units:
        return
    import ray.data

    actors = min(plan.actors or _actors(plan.gpus_per_actor), len(units))
    # Units of one task overlap; between two tasks a process waits for some 20 ms.
    blocks = max(sum(len(unit.numbers) for unit in units) // (UNITS_A_TASK * MOST_ROWS), 4 * actors)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    labelled = ray.data.from_items(
        [
            {
                "version": one.version,
                "file": one.file,
                "first": one.first,
                "numbers": one.numbers.tobytes(),
                "once": one.once,
            }
            for one in units
        ],
        override_num_blocks=min(blocks, len(units)),
    ).map_batches(
        UnitRunner,
        fn_constructor_args=(source, settings, plan.ready),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=plan.gpus_per_actor or None,
        batch_format="numpy",
        # A process that can't go on ends itself. If every process does, the batch ends, instead of never.
        max_restarts=8,
        max_task_retries=3,
        # Without this, an actor on a GPU host sees all GPUs, although it reserved none.
        runtime_env={"env_vars": {} if plan.gpus_per_actor else {"CUDA_VISIBLE_DEVICES": ""}},
    )
    for batch in labelled.iter_batches(batch_size=None, batch_format="numpy"):
        yield dict(batch)


def _actors(gpus_per_actor: float) -> int:
    """One a core that this process may use, or as many as the cluster's GPUs have room for."""
    if gpus_per_actor:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's
        return max(int(resources.get("GPU", 0) / gpus_per_actor), 1)
    return len(os.sched_getaffinity(0))
