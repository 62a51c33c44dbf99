"""What ``door/protocol.py`` relies on of uvicorn's httptools protocol: a change of uvicorn fails here, loudly."""

from __future__ import annotations

import inspect
import re

from uvicorn import Config, Server
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from flatshare.door.protocol import DoorProtocol, _Exchange


def source(name: str) -> str:
    return inspect.getsource(getattr(HttpToolsProtocol, name))


def test_a_connection_is_made_with_these_arguments() -> None:
    assert list(inspect.signature(HttpToolsProtocol.__init__).parameters) == [
        "self", "config", "server_state", "app_state", "_loop",
    ]  # fmt: skip
    made = inspect.getsource(Server.startup)
    assert "config.http_protocol_class(" in made
    assert set(re.findall(r"(\w+)=(?:config|self|_loop)", made)) >= {
        "config",
        "server_state",
        "app_state",
        "_loop",
    }


def test_a_class_is_taken_as_it_is() -> None:
    config = Config(lambda: None, http=DoorProtocol, log_config=None)
    config.load()
    assert config.http_protocol_class is DoorProtocol


def test_what_uvicorn_asks_of_a_cycle_is_what_a_hot_request_has() -> None:
    methods = "connection_lost", "shutdown", "on_message_complete", "on_headers_complete"
    asked = {
        name
        for method in methods
        for variable in ("self.cycle", "existing_cycle")
        for name in re.findall(rf"{re.escape(variable)}\.(\w+)", source(method))
    }
    # A hot request's body is not kept by uvicorn: ``on_body`` and the end of it are ours.
    assert asked - {"more_body"} <= set(_Exchange.__slots__), asked
    assert "self.cycle.more_body = False" in source("on_message_complete")


def test_the_usual_way_begins_with_a_scope_of_the_same_headers() -> None:
    begun = source("on_message_begin")
    for line in (
        'self.url = b""',
        "self.expect_100_continue = False",
        "self.headers = []",
        '"headers": self.headers',
    ):
        assert line in begun, line
    # Nothing else is set there that our shorter one would leave out.
    assert set(re.findall(r"self\.(\w+) =", begun)) == {"url", "expect_100_continue", "headers", "scope"}
    assert "self.scope" not in source("on_url") + source("on_header") + source("data_received")


def test_the_end_of_an_answer_goes_on_with_the_connection() -> None:
    ended = source("on_response_complete")
    assert "self.pipeline.pop()" in ended
    assert "timeout_keep_alive_handler" in ended
    assert list(inspect.signature(HttpToolsProtocol.on_response_complete).parameters) == ["self"]


def test_an_answer_is_written_as_uvicorn_writes_it() -> None:
    sent = inspect.getsource(RequestResponseCycle.send)
    assert "headers = self.default_headers + list(" in sent
    assert 'content.extend([name, b": ", value, b"\\r\\n"])' in sent
    assert 'content.append(b"connection: close\\r\\n")' in sent
    assert STATUS_LINE[200] == b"HTTP/1.1 200 OK\r\n"


def test_a_server_can_be_started_and_stopped_in_a_loop_that_runs() -> None:
    assert list(inspect.signature(Server.startup).parameters) == ["self", "sockets"]
    assert list(inspect.signature(Server.shutdown).parameters) == ["self", "sockets"]
    assert "self.should_exit" in inspect.getsource(Server.main_loop) + inspect.getsource(Server.on_tick)
    assert "connection.shutdown()" in inspect.getsource(Server.shutdown)
