"""The registry against a plain dict: any sequence of operations, the same answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flatshare_registry.catalog import Registry
from flatshare_registry.errors import AlreadyExists, NotFound, StillReferenced
from flatshare_registry.ids import AliasName, ModelRef, TenantId
from flatshare_registry.stores.memory import MemoryStore
from flatshare_registry.testing.faults import ManualClock
from flatshare_registry.testing.files import TINY_SPECS, tiny_weights

TENANTS = st.sampled_from([TenantId("acme"), TenantId("globex")])
ALIASES = st.sampled_from([AliasName("production"), AliasName("canary")])
VALUES = st.integers(1, 4)
NUMBERS = st.integers(1, 8)


@dataclass
class Tenant:
    versions: dict[int, int] = field(default_factory=dict)  # number -> value of the weights
    aliases: dict[str, int] = field(default_factory=dict)
    moves: list[tuple[str, int | None, int | None]] = field(default_factory=list)
    changes: int = 1


class CatalogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(MemoryStore(), clock=ManualClock())
        self.active: dict[str, Tenant] = {}
        self.highest: dict[str, int] = {}
        self.changes: dict[str, int] = {}
        self.moves: dict[str, list[tuple[str, int | None, int | None]]] = {}

    def expect(self, tenant: str, error: type[Exception] | None, call: object) -> object:
        """Run it; it must raise exactly what the model says."""
        assert callable(call)
        try:
            result = call()
        except (NotFound, AlreadyExists, StillReferenced) as raised:
            assert type(raised) is error, raised
            return None
        assert error is None, f"expected {error}"
        return result

    def changed(self, tenant: str) -> None:
        self.changes[tenant] = self.changes.get(tenant, 0) + 1

    @rule(tenant=TENANTS)
    def create(self, tenant: TenantId) -> None:
        there = tenant in self.active
        self.expect(tenant, AlreadyExists if there else None, lambda: self.registry.create_tenant(tenant))
        if not there:
            self.active[tenant] = Tenant()
            self.changed(tenant)

    @rule(tenant=TENANTS)
    def delete(self, tenant: TenantId) -> None:
        there = tenant in self.active
        self.expect(tenant, None if there else NotFound, lambda: self.registry.delete_tenant(tenant))
        if there:
            del self.active[tenant]
            self.changed(tenant)

    @rule(tenant=TENANTS, value=VALUES, alias=st.none() | ALIASES)
    def register(self, tenant: TenantId, value: int, alias: AliasName | None) -> None:
        model = self.active.get(tenant)
        done = self.expect(
            tenant,
            None if model else NotFound,
            lambda: self.registry.register(tenant, tiny_weights(value), "tiny", TINY_SPECS, alias=alias),
        )
        if model is None:
            return
        known = [number for number, held in model.versions.items() if held == value]
        if known:
            assert not done.created and done.version.version == known[0]  # type: ignore[attr-defined]  # Registered
            if alias is not None and model.aliases.get(alias) != known[0]:
                self.move(tenant, alias, known[0])
            return
        number = self.highest.get(tenant, 0) + 1
        assert done.created and done.version.version == number  # type: ignore[attr-defined]  # Registered
        self.highest[tenant] = number
        if not model.versions:
            model.aliases["production"] = number
        model.versions[number] = value
        if alias is not None:
            self.moves.setdefault(tenant, []).append((alias, model.aliases.get(alias), number))
            if alias == "production" and len(model.versions) == 1:
                self.moves[tenant][-1] = (alias, None, number)
            model.aliases[alias] = number
        self.changed(tenant)

    def move(self, tenant: str, alias: str, number: int) -> None:
        aliases = self.active[tenant].aliases
        self.moves.setdefault(tenant, []).append((alias, aliases.get(alias), number))
        aliases[alias] = number
        self.changed(tenant)

    @rule(tenant=TENANTS, alias=ALIASES, number=NUMBERS)
    def set_alias(self, tenant: TenantId, alias: AliasName, number: int) -> None:
        model = self.active.get(tenant)
        good = model is not None and number in model.versions
        self.expect(
            tenant, None if good else NotFound, lambda: self.registry.set_alias(tenant, alias, number)
        )
        if model is not None and good and model.aliases.get(alias) != number:
            self.move(tenant, alias, number)

    @rule(tenant=TENANTS, alias=ALIASES)
    def rollback(self, tenant: TenantId, alias: AliasName) -> None:
        model = self.active.get(tenant)
        target = None
        if model is not None and alias in model.aliases:
            for name, before, after in reversed(self.moves.get(tenant, [])):
                if name == alias and after == model.aliases[alias] and before is not None:
                    target = before if before in model.versions else None
                    break
        self.expect(
            tenant, NotFound if target is None else None, lambda: self.registry.rollback(tenant, alias)
        )
        if target is not None:
            self.move(tenant, alias, target)

    @rule(tenant=TENANTS, alias=ALIASES)
    def remove_alias(self, tenant: TenantId, alias: AliasName) -> None:
        model = self.active.get(tenant)
        good = model is not None and alias in model.aliases
        self.expect(tenant, None if good else NotFound, lambda: self.registry.remove_alias(tenant, alias))
        if model is not None and good:
            del model.aliases[alias]
            self.changed(tenant)

    @rule(tenant=TENANTS, number=NUMBERS)
    def delete_version(self, tenant: TenantId, number: int) -> None:
        model = self.active.get(tenant)
        error: type[Exception] | None = None
        if model is None or number not in model.versions:
            error = NotFound
        elif number in model.aliases.values():
            error = StillReferenced
        self.expect(tenant, error, lambda: self.registry.delete_version(tenant, number))
        if model is not None and error is None:
            del model.versions[number]
            self.changed(tenant)

    @invariant()
    def same_answers(self) -> None:
        assert [head.tenant for head in self.registry.list_tenants()] == sorted(self.active)
        for tenant, model in self.active.items():
            head = self.registry.head(TenantId(tenant))
            assert dict(head.aliases) == model.aliases
            assert sorted(head.versions) == sorted(model.versions)
            for alias, number in model.aliases.items():
                assert self.registry.resolve(ModelRef.parse(f"{tenant}:{alias}")).version == number
        for tenant, changes in self.changes.items():
            entries = self.registry.audit(TenantId(tenant))
            assert [entry.revision for entry in entries] == list(range(1, changes + 1))


CatalogMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCatalogMachine = CatalogMachine.TestCase
