"""Who runs next: shares between tenants, what shares a pass, and that nothing is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import example, given, settings
from hypothesis import strategies as st

from flatshare.engine.fair_queue import PASSES_BEFORE_BACKGROUND, FairQueue, PriorityQueue


@dataclass(eq=False)
class Job:
    tenant: str
    size: int = 1
    model: str = ""
    kind: str = ""
    number: int = field(default=0)
    background: bool = False

    @property
    def same(self) -> str:
        return self.model or self.tenant

    def __post_init__(self) -> None:
        self.kind = self.kind or self.same


def drain(queue: FairQueue[Job]) -> list[list[Job]]:
    passes = []
    while batch := queue.take():
        passes.append(batch)
    return passes


def fill(queue: FairQueue[Job], *jobs: Job) -> None:
    for job in jobs:
        queue.put(job)


def test_a_lone_tenant_fills_its_passes() -> None:
    queue: FairQueue[Job] = FairQueue(64)
    fill(queue, *(Job("a") for _ in range(100)))
    assert [len(batch) for batch in drain(queue)] == [64, 36]


def test_tenants_that_wait_get_equal_rows_whatever_they_ask_for() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(
        queue,
        *(Job("flood") for _ in range(800)),
        *(Job("b") for _ in range(100)),
        *(Job("c") for _ in range(100)),
    )
    served: Counter[str] = Counter()
    while sum(served.values()) < 300:
        for job in queue.take():
            served[job.tenant] += job.size
    assert abs(served["b"] - 100) <= 16
    assert abs(served["c"] - 100) <= 16


def test_large_requests_pay_for_their_size() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, *(Job("big", 64) for _ in range(10)), *(Job("small", 1) for _ in range(160)))
    order = [batch[0].tenant for batch in drain(queue)]
    # 64 rows of big for every 64 of small: four turns of 16.
    assert order[:10].count("small") >= 7


def test_one_huge_request_at_a_time_gets_no_more_than_its_share() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    names = ("b", "c", "d")
    fill(queue, Job("huge", 1024), *(Job(name) for name in names for _ in range(40)))
    served: Counter[str] = Counter()
    while served["b"] < 3000:
        for job in queue.take():
            served[job.tenant] += job.size
            queue.put(Job(job.tenant, job.size))  # a closed loop: the next comes when one is done
    assert served["huge"] <= 3000 + 1024 + 64


def test_a_tenant_that_was_alone_for_long_owes_nobody() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, *(Job("first") for _ in range(1000)))
    for _ in range(10):
        queue.take()
    fill(queue, *(Job("second") for _ in range(100)))
    order = [queue.take()[0].tenant for _ in range(4)]
    assert order.count("first") == 2


def test_a_new_tenant_waits_for_one_turn_of_each_other_at_most() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, *(Job("flood") for _ in range(500)), Job("b"))
    waited = 0
    while (batch := queue.take())[0].tenant != "b":
        waited += sum(job.size for job in batch)
    assert waited <= 16


def test_a_request_larger_than_a_pass_runs_alone() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, Job("a", 1), Job("a", 500), Job("a", 1))
    assert sorted(sum(job.size for job in batch) for batch in drain(queue)) == [2, 500]


def test_those_of_one_model_go_together_then_those_that_share_layers() -> None:
    queue: FairQueue[Job] = FairQueue(8)
    a, b, c = (Job(name, kind="base") for name in "abc")
    fill(queue, a, Job("x"), b, Job("a", kind="base"), c)
    batch = queue.take()
    assert [job.tenant for job in batch] == ["a", "a", "b", "c"]
    assert [job.tenant for job in queue.take()] == ["x"]
    assert queue.take() == []


def test_who_rides_along_pays_for_it_later() -> None:
    queue: FairQueue[Job] = FairQueue(32, quantum_rows=8)
    fill(
        queue,
        Job("a", 8, kind="base"),
        *(Job("rider", 8, kind="base") for _ in range(6)),
        *(Job("x", 8) for _ in range(6)),
    )
    order = [[job.tenant for job in batch] for batch in drain(queue)]
    assert order[0] == ["a", "rider", "rider", "rider"]
    assert order[1] == ["x"], "the rider ran 24 rows on credit, so x is next"
    after = [tenant for batch in order[1:5] for tenant in batch]
    assert after.count("x") > after.count("rider")


def test_a_job_can_be_taken_out_once() -> None:
    queue: FairQueue[Job] = FairQueue(8)
    one, two = Job("a"), Job("a")
    fill(queue, one, two)
    assert queue.remove(one)
    assert not queue.remove(one)
    assert queue.take() == [two]
    assert not queue.remove(two)
    assert len(queue) == 0


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 90), st.sampled_from(["", "base"])), max_size=60
    ),
    st.integers(1, 70),
    st.integers(1, 40),
)
def test_everybody_is_served_once_in_order_and_passes_are_bounded(
    wanted: list[tuple[str, int, str]], max_rows: int, quantum: int
) -> None:
    queue: FairQueue[Job] = FairQueue(max_rows, quantum)
    jobs = [
        Job(tenant, size, f"{tenant}{kind}", kind, number)
        for number, (tenant, size, kind) in enumerate(wanted)
    ]
    fill(queue, *jobs)
    passes = drain(queue)
    assert sorted(job.number for batch in passes for job in batch) == list(range(len(jobs)))
    for batch in passes:
        assert len(batch) == 1 or sum(job.size for job in batch) <= max_rows
        assert len({job.kind for job in batch}) == 1 or len({job.same for job in batch}) == 1


class History:
    """Phases of load: in each, some tenants send a few rows a round, of networks that may share a base."""

    def __init__(self, queue: FairQueue[Job]) -> None:
        self.queue = queue
        self.waiting: list[Job] = []

    def put(self, job: Job) -> Job:
        self.queue.put(job)
        self.waiting.append(job)
        return job

    def take(self) -> list[Job]:
        batch = self.queue.take()
        self.waiting = [one for one in self.waiting if one not in batch]
        return batch

    def leave(self, tenant: str) -> None:
        """Its callers go away."""
        for job in [one for one in self.waiting if one.tenant == tenant]:
            assert self.queue.remove(job)
            self.waiting.remove(job)


PHASES = st.lists(
    st.tuples(
        st.integers(1, 60),  # rounds
        st.dictionaries(
            st.sampled_from(["t0", "t1", "t2", "t3"]), st.tuples(st.integers(1, 64), st.integers(0, 1))
        ),
    ),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@example(phases=[(60, {"t0": (60, 0), "t1": (1, 0), "t2": (1, 0), "t3": (1, 0)})])
@given(phases=PHASES)
def test_nobody_waits_longer_than_a_bound_whatever_came_before(
    phases: list[tuple[int, dict[str, tuple[int, int]]]],
) -> None:
    """A job at the head of its queue runs within a number of passes that the ring and the sizes of today give;
    nothing that was served before counts."""
    most, quantum = 64, 16
    history = History(FairQueue(most, quantum))
    for rounds, load in phases:
        for _ in range(rounds):
            for tenant, (size, kind) in load.items():
                history.put(Job(tenant, size, f"{tenant}/{kind}", f"base {kind}"))
            history.take()
    history.leave("t0")
    for tenant in ("t1", "t2", "t3"):
        history.leave(tenant)
        history.put(Job(tenant, most))  # a network of its own, without end
    late = history.put(Job("t0", most, "late", "own"))
    # From the deepest debt to its own price, a quantum a turn; in each turn every other tenant has one pass.
    bound = 4 * -(-(most + quantum + most) // quantum)
    for _ in range(bound):
        if late in history.take():
            return
        for tenant in ("t1", "t2", "t3"):
            history.put(Job(tenant, most))
    raise AssertionError(f"it still waits after {bound} passes")


def test_who_rode_along_for_a_minute_does_not_make_up_for_a_minute() -> None:
    """15 tenants of one row, and one whose many rows fill their passes. They go; one with another network comes."""
    history = History(FairQueue(64, 16))
    for _ in range(1_000):
        for n in range(15):
            history.put(Job(f"t{n}", 1, kind="base"))
        for _ in range(8):
            history.put(Job("rider", 8, kind="base"))
        history.take()
    for n in range(15):
        history.leave(f"t{n}")
    for _ in range(500):
        history.put(Job("other", 64))
    waits = next(n for n in range(1, 501) if history.take()[0].tenant == "rider")
    assert waits <= -(-(64 + 16 + 8) // 16) + 1, "its debt is bounded, and so is its wait"


def test_a_tenant_that_comes_and_goes_saves_nothing_up() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, *(Job("flood") for _ in range(2000)))
    for _ in range(20):  # one row at a turn: fifteen that it did not use
        queue.put(Job("now-and-then"))
        while queue.take()[0].tenant != "now-and-then":
            pass
    fill(queue, *(Job("now-and-then") for _ in range(100)))
    while (batch := queue.take())[0].tenant != "now-and-then":
        pass
    assert len(batch) <= 16, "the turns that it did not use are gone"


def test_a_debt_outlives_an_empty_queue_while_others_wait() -> None:
    queue: FairQueue[Job] = FairQueue(32, quantum_rows=8)
    fill(
        queue,
        Job("a", 8, kind="base"),
        *(Job("rider", 8, kind="base") for _ in range(3)),
        *(Job("x", 8) for _ in range(20)),
    )
    assert [job.tenant for job in queue.take()] == ["a", "rider", "rider", "rider"]
    queue.put(Job("rider", 8))  # it had nothing to run for a moment, and 24 rows are not paid for
    order = [queue.take()[0].tenant for _ in range(6)]
    assert order.index("rider") >= 3


def test_a_debt_is_over_when_nobody_waits_any_more() -> None:
    queue: FairQueue[Job] = FairQueue(32, quantum_rows=8)
    fill(queue, Job("a", 8, kind="base"), *(Job("rider", 8, kind="base") for _ in range(3)))
    drain(queue)
    fill(queue, *(Job("rider", 8) for _ in range(4)), *(Job("x", 8) for _ in range(4)))
    order = [batch[0].tenant for batch in drain(queue)]
    assert order[:4].count("rider") == 2, "nobody had to wait for what it ran"


def test_what_was_taken_out_is_not_paid_for() -> None:
    queue: FairQueue[Job] = FairQueue(16, quantum_rows=16)
    gone = [Job("a", 16) for _ in range(3)]
    fill(queue, *gone, *(Job("b", 16) for _ in range(4)))
    for job in gone:
        assert queue.remove(job)
    fill(queue, *(Job("a", 16) for _ in range(4)))
    order = [batch[0].tenant for batch in drain(queue)]
    assert order[:4].count("a") == 2


def test_a_lone_tenant_owes_nothing_for_what_nobody_else_wanted() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, *(Job("first", 64) for _ in range(8)))
    for _ in range(4):
        queue.take()
    fill(queue, *(Job("second", 16) for _ in range(16)))
    rows: Counter[str] = Counter()
    for _ in range(10):
        for job in queue.take():
            rows[job.tenant] += job.size
    assert abs(rows["first"] - rows["second"]) <= 64


def test_its_own_jobs_of_another_kind_wait_and_keep_their_order() -> None:
    queue: FairQueue[Job] = FairQueue(64)
    jobs = [Job("a", kind="one", number=1), Job("a", kind="two", number=2), Job("a", kind="one", number=3)]
    fill(queue, *jobs)
    assert [[job.number for job in batch] for batch in drain(queue)] == [[1, 3], [2]]


def test_how_many_wait_is_known_at_every_moment() -> None:
    queue: FairQueue[Job] = FairQueue(2)
    fill(queue, *(Job("a") for _ in range(5)))
    counts = []
    while queue.take():
        counts.append(len(queue))
    assert counts == [3, 1, 0]


def test_what_a_turn_leaves_over_counts_for_the_next_while_others_wait() -> None:
    queue: FairQueue[Job] = FairQueue(64, quantum_rows=16)
    fill(queue, *(Job("ten", 10) for _ in range(200)), *(Job("sixteen", 16) for _ in range(200)))
    rows: Counter[str] = Counter()
    while sum(rows.values()) < 2000:
        for job in queue.take():
            rows[job.tenant] += job.size
    assert abs(rows["ten"] - rows["sixteen"]) <= 64, "whose jobs do not fill a turn gets no less"


def test_what_somebody_waits_for_goes_before_tasks_and_tasks_go_on() -> None:
    queue: PriorityQueue[Job] = PriorityQueue(1)
    tasks = [Job("acme", background=True) for _ in range(10)]
    for job in tasks:
        queue.put(job)
    assert queue.take() == [tasks[0]], "alone they have all passes"
    for number in range(30):
        queue.put(Job("acme", number=number))
    taken = [queue.take()[0].background for _ in range(16)]
    assert taken == ([False] * PASSES_BEFORE_BACKGROUND + [True]) * 2
    assert len(queue) == 9 - 2 + 30 - 14
    assert queue.remove(tasks[-1]) and not queue.remove(tasks[-1])
    left = [queue.take() for _ in range(len(queue))]
    assert all(left) and queue.take() == []


def test_the_rows_of_a_pass_are_both_queues() -> None:
    queue: PriorityQueue[Job] = PriorityQueue(64)
    queue.max_rows = 2
    for background in (True, False):
        for _ in range(3):
            queue.put(Job("acme", background=background))
    assert [len(queue.take()) for _ in range(4)] == [2, 1, 2, 1]
