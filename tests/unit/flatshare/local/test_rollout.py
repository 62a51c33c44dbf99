"""What a rollout may change: settings that only replicas read, and no contradictions."""

from __future__ import annotations

import inspect
import re

import pytest

from flatshare.control import deployment as control_deployment
from flatshare.errors import SettingsError
from flatshare.live_settings import LIVE, changed
from flatshare.local.platform import edge_options
from flatshare.local.rollout import ROLLED_OUT, changed_settings
from flatshare.settings import Settings, settings_of
from flatshare_registry.records import Quotas

DEPLOYED = Settings(slots=7, store="memory://x", port=8123, plans={})


def test_what_is_not_named_stays_as_it_was_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_SLOTS", "99")
    changed = changed_settings(DEPLOYED, {"eviction": "sieve"})
    assert changed == DEPLOYED.model_copy(update={"eviction": "sieve"})


def test_nothing_of_this_processes_environment_is_mixed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes inherit the environment of who started them, and a plan that was taken away stays away."""
    monkeypatch.setenv("FLATSHARE_PLANS", '{"default": {"requests_per_s": 50}, "old": {"burst": 1}}')
    deployed = Settings()
    assert set(deployed.plans) == {"default", "old"}
    new = changed(deployed, {"plans": {"default": {"burst": 3}}}, LIVE, "")
    assert new.plans == {"default": Quotas(burst=3)}
    assert changed(new, {"tenant_share": 0.5}, LIVE, "").plans == new.plans
    assert settings_of(new.model_dump(mode="json")) == new


def test_a_value_is_read_as_the_setting_is() -> None:
    assert changed_settings(DEPLOYED, {"slots": "12"}).slots == 12
    with pytest.raises(SettingsError, match="slots"):
        changed_settings(DEPLOYED, {"slots": "many"})


@pytest.mark.parametrize("name", ["port", "store", "edge", "replicas", "min_replicas", "auth", "device"])
def test_what_others_have_read_can_not_change(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} can't change while the platform runs"):
        changed_settings(DEPLOYED, {name: "x"})


@pytest.mark.parametrize("name", LIVE)
def test_what_changes_in_place_needs_no_rollout(name: str) -> None:
    """Else a replica that starts in it would take over what was kept, and not what it was given."""
    assert name not in ROLLED_OUT
    assert name in Settings.model_fields
    with pytest.raises(SettingsError, match=f"flatshare settings set {name}="):
        changed_settings(DEPLOYED, {name: "x"})


def test_a_name_that_is_no_setting_is_refused() -> None:
    with pytest.raises(SettingsError, match="no setting slotz"):
        changed_settings(DEPLOYED, {"slotz": "1"})


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(SettingsError, match="body_memory_bytes"):
        changed_settings(DEPLOYED, {"body_memory_bytes": str(1024**2)})


def test_all_that_can_change_is_a_setting_that_nobody_but_replicas_has_read() -> None:
    """What the edge and the control plane read when they start stays as it was, whatever replicas are told."""
    assert set(Settings.model_fields) >= ROLLED_OUT
    read = "".join(
        inspect.getsource(one) for one in (control_deployment, edge_options, Settings.default_quotas.fget)
    )
    assert not [name for name in ROLLED_OUT if re.search(rf"\.{name}\b", read)]
