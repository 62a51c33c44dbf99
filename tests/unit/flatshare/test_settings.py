"""Settings: defaults, environment, contradictions."""

import pytest

from flatshare.errors import SettingsError
from flatshare.settings import Settings, load_settings, unknown_variables


def test_defaults_are_consistent_and_closed_to_the_world() -> None:
    settings = load_settings()
    assert (settings.host, settings.edge, settings.replicas, settings.slots) == (
        "127.0.0.1",
        "haproxy",
        2,
        10,
    )


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_SLOTS", "7")
    monkeypatch.setenv("FLATSHARE_REPLICAS", "3")
    settings = load_settings(slots=9, replicas=None)
    assert (settings.slots, settings.replicas) == (9, 3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"host": "0.0.0.0", "auth": "off"}, "not loopback"),
        ({"host": "192.168.1.5", "auth": "off"}, "not loopback"),
        ({"host": "192.168.1.5", "edge": "serve"}, "loopback only"),
        ({"tls_cert": "/x.pem", "edge": "serve"}, "edge=haproxy"),
        ({"trusted_proxies": "10.0.0.0/8", "edge": "serve"}, "edge=haproxy"),
        ({"access_log": "/var/log/x", "edge": "serve"}, "access_log needs edge=haproxy"),
        ({"access_log": "x.log"}, "neither off, nor"),
        ({"access_log": "udp://host:0"}, "neither off, nor"),
        ({"access_log": "udp://host:5140\n    nbthread 9"}, "neither off, nor"),
        ({"trusted_proxies": "10.0.0.0/8, lb.example"}, "lb.example"),
        ({"jwt_issuer": "https://i"}, "go together"),
        ({"jwt_jwks": "/x"}, "go together"),
        ({"plans": {"gold": {"speed": 3}}}, "plans.gold.speed"),
        ({"port": 8500}, "both 8500"),
        ({"port": 0}, "port"),
        ({"port": 99999}, "port"),
        ({"replicas": 0}, "replicas"),
        ({"slots": 0}, "slots"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda"}, "gpus_per_replica above 0"),
        ({"device": "cpu", "gpus_per_replica": 0.5}, "not use them"),
        ({"gpus_per_replica": 1.5}, "runs on one GPU"),
        ({"gpus_per_replica": 2}, "set more replicas"),
        ({"gpus_per_replica": -1}, "gpus_per_replica"),
        ({"retry_body_bytes": 100_000, "max_body_bytes": 50_000}, "larger than max_body_bytes"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"slots": "many"}, "slots"),
    ],
)
def test_contradictions_are_refused_in_one_line(given: dict[str, object], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**given)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().slots = 3  # type: ignore[misc]  # that it is refused is the point


@pytest.mark.parametrize(
    "given", [{"gpus_per_replica": 0.25}, {"gpus_per_replica": 1, "device": "cuda"}, {"host": "localhost"}]
)
def test_sensible_combinations_are_taken(given: dict[str, object]) -> None:
    load_settings(**given)


def test_no_error_shows_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are among the settings; also where somebody builds them without `load_settings`."""
    for name, value in (("FLATSHARE_API_KEY", "sec\nret"), ("FLATSHARE_PORT", "secret")):
        monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="validation error") as caught:
            Settings()
        assert "ret" not in str(caught.value)
        with pytest.raises(SettingsError, match=name) as refused:
            load_settings()
        assert "ret" not in refused.value.message
        monkeypatch.delenv(name)


def test_an_option_is_named_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATSHARE_SLOTS", "abc")
    with pytest.raises(SettingsError) as caught:
        load_settings(replicas=0)
    problems = caught.value.message.split("; ")
    assert [text.partition(":")[0] for text in sorted(problems)] == ["replicas", "slots (FLATSHARE_SLOTS)"]


@pytest.mark.parametrize("text", ["{", "gold", "[1"])
def test_what_is_no_json_is_a_settings_error(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FLATSHARE_PLANS", text)
    with pytest.raises(SettingsError, match="FLATSHARE_PLANS is not JSON"):
        load_settings()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"FLATSHARE_{name.upper()}", "")
    assert load_settings() == Settings.model_construct()


def test_variables_that_are_no_settings_are_found() -> None:
    names = [
        "FLATSHARE_SLOT",
        "FLATSHARE_SLOTS",
        "flatshare_slots",
        "FLATSHARE_UP_LOG",
        "PATH",
        "FLATSHARE_",
        "FLATSHARE_STROE",
    ]
    assert unknown_variables(names) == {
        "FLATSHARE_": None, "FLATSHARE_SLOT": "FLATSHARE_SLOTS", "FLATSHARE_STROE": "FLATSHARE_STORE",
    }  # fmt: skip


def test_trusted_proxies_are_networks_with_commas_between() -> None:
    given = load_settings(trusted_proxies="10.1.2.3/8, 192.0.2.7 ,2001:db8::1,")
    assert given.proxy_networks() == ("10.0.0.0/8", "192.0.2.7/32", "2001:db8::1/128")
    assert load_settings().proxy_networks() == ()
