import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from vtrain_post import Post, PostOptions, vtrain_trackers

from vtrain.testing import PluginTests, SpecTests, TrackerTests


class Service(ThreadingHTTPServer):
    """It keeps what is posted to it, and answers 503 while it is down."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.server.down:
                self.server.received.append(body)
            self.send_response(503 if self.server.down else 204)
            self.end_headers()

        def log_message(self, *words):
            pass

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.received, self.down = [], False
        self.url = f"http://127.0.0.1:{self.server_port}/events"


@pytest.fixture
def service():
    with Service() as service:
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        yield service
        service.shutdown()


class TestPostPlugin(PluginTests):
    entry_module = "vtrain_post"
    tables: Mapping[tuple[str, str], Mapping[str, object]] = {("tracker", "post"): {"url": "http://127.0.0.1:8000"}}


class TestPostSpec(SpecTests):
    table: Mapping[str, object] = {"url": "http://127.0.0.1:8000"}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls):
        return vtrain_trackers()[0]


class TestPost(TrackerTests):
    expects = frozenset({"SupportsWarnings"})

    @pytest.fixture
    def tracker(self, service):
        return Post(PostOptions(url=service.url))

    @pytest.fixture
    def received(self, service):
        return lambda: service.received

    @pytest.fixture
    def unreachable(self, service):
        service.server_close()
        return Post(PostOptions(url=service.url))

    def test_events_wait_while_the_service_is_down(self, tracker, service, info, events):
        service.down = True
        tracker.start(info, {"run": "earlier"})
        service.down = False
        self.follow(tracker, info, events)
        assert [record["event"] for record in service.received[:3]] == ["start", "start", "logged"]
        assert {record["run"] for record in service.received[1:]} == {tracker.state()["run"]}
        assert service.received[-1]["event"] == "finish"
        assert len(tracker.warnings()) == 1
