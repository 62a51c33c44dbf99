"""Commands between the servers that HAProxy has and those that it should have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flatshare.edge.servers import POOL_CHECKS, RunningServer, Server, commands, running_servers, same

HEAD = (
    "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight "
    "srv_time_since_last_change srv_check_status srv_check_result srv_check_health srv_check_state "
    "srv_agent_state bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord\n"
)


def row(name: str, host: str, port: int, admin: int = 0) -> str:
    return f"3 pool 1 {name} {host} 2 {admin} 100 100 0 15 3 2 6 0 0 1 - {port} - 0 0 - - 0\n"


def test_haproxys_word_is_read() -> None:
    text = (
        HEAD
        + row("p0", "127.0.0.1", 4000)
        + row("p12", "10.0.0.3", 4001, 1)
        + row("serve-proxy", "127.0.0.1", 8500)
    )
    assert running_servers(text) == [
        RunningServer(Server(0, "127.0.0.1", 4000), False),
        RunningServer(Server(12, "10.0.0.3", 4001), True),
    ]
    assert running_servers("") == []


def test_a_server_that_is_resting_for_a_failed_check_is_not_told_again() -> None:
    """Bits beside the first are others' reasons: a check, a dependency."""
    assert not running_servers(HEAD + row("p0", "127.0.0.1", 4000, 0x20))[0].resting


def test_one_that_comes_is_added_with_its_checks() -> None:
    assert commands("pool", [], [Server(2, "::1", 4000)], POOL_CHECKS) == [
        f"add server pool/p2 [::1]:4000 id 3 {POOL_CHECKS}",
        "enable server pool/p2",
        "enable health pool/p2",
    ]


def test_a_replacement_is_a_new_address_of_the_same_server() -> None:
    running = [RunningServer(Server(1, "127.0.0.1", 4000), False)]
    assert commands("pool", running, [Server(1, "127.0.0.1", 4009)], POOL_CHECKS) == [
        "set server pool/p1 addr 127.0.0.1 port 4009"
    ]


def test_one_that_goes_rests_before_it_is_deleted_and_is_asked_for_until_it_is() -> None:
    running = [RunningServer(Server(1, "127.0.0.1", 4000), False)]
    assert commands("pool", running, [], POOL_CHECKS) == [
        "set server pool/p1 state maint", "del server pool/p1",
    ]  # fmt: skip
    resting = [RunningServer(Server(1, "127.0.0.1", 4000), True)]
    assert commands("pool", resting, [], POOL_CHECKS) == ["del server pool/p1"]
    assert commands("pool", resting, [Server(1, "127.0.0.1", 4000)], POOL_CHECKS) == [
        "set server pool/p1 state ready"
    ]


def applied(running: list[RunningServer], told: list[str], refuse_deletion: bool) -> list[RunningServer]:
    """What a HAProxy that obeys has after some commands."""
    have = {one.server.place: (one.server, one.resting) for one in running}
    for text in told:
        verb, what, name, *rest = text.split()
        place = int(name.rpartition("/p")[2])
        if verb == "add":
            host, _, port = rest[0].rpartition(":")
            assert place not in have
            have[place] = (Server(place, host.strip("[]"), int(port)), True)
        elif verb == "enable" and what == "server":
            have[place] = (have[place][0], False)
        elif verb == "set" and rest[0] == "addr":
            have[place] = (Server(place, rest[1], int(rest[3])), have[place][1])
        elif verb == "set":
            have[place] = (have[place][0], rest[1] == "maint")
        elif verb == "del" and not refuse_deletion:
            assert have[place][1], "HAProxy deletes only what rests"
            del have[place]
    return [RunningServer(server, resting) for server, resting in have.values()]


SERVERS = st.dictionaries(st.integers(0, 6), st.integers(4000, 4003), max_size=6).map(
    lambda ports: [Server(place, "127.0.0.1", port) for place, port in ports.items()]
)


@given(st.lists(st.tuples(SERVERS, st.booleans(), st.integers(0, 20)), min_size=1, max_size=8))
def test_after_any_history_the_backend_is_as_wanted(history: list[tuple[list[Server], bool, int]]) -> None:
    """Also where HAProxy refuses to delete, and where the telling broke off: the next look mends it."""
    running: list[RunningServer] = []
    for wanted, refuse, heard in history:
        told = commands("pool", running, wanted, POOL_CHECKS)
        running = applied(running, told[:heard], refuse)
    running = applied(running, commands("pool", running, wanted, POOL_CHECKS), False)
    assert same(running, wanted)
    assert not commands("pool", running, wanted, POOL_CHECKS)
