"""A stand-in for wandb's server, as far as wandb's own client needs one for an online run.

It answers the queries of the client's start, takes files and rows, and says that the run was stopped in wandb's page
once `stop` is set. It keeps what it was sent.
"""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "e", "name": "us"}
BUCKET = {
    "id": "b",
    "name": "run-1",
    "displayName": "n",
    "description": "",
    "config": "{}",
    "sweepName": None,
    "historyLineCount": 0,
    "project": {"id": "p", "name": "growth", "entity": ENTITY},
}


class StandIn(ThreadingHTTPServer):
    """The server; see `wandb_server`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stop = threading.Event()
        self.queries: list[dict[str, Any]] = []

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs in its environment to use this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": "0" * 40}

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if path.endswith("file_stream"):
            return {"stopped": self.stop.is_set()}
        query = str(body.get("query", ""))
        self.queries.append(body)
        if "UpsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": BUCKET, "inserted": True}}}
        if "CreateRunFiles" in query:
            names, url = body["variables"]["files"], self.variables["WANDB_BASE_URL"]
            files = [{"name": name, "uploadUrl": f"{url}/put"} for name in names]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "viewer" in query.lower():
            viewer = {"id": "u", "entity": "us", "username": "u", "flags": "{}", "teams": {"edges": []}}
            return {"data": {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}}
        return {"data": {}}


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *parts: Any) -> None:
        """Keeps quiet."""

    def _body(self) -> dict[str, Any]:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        with contextlib.suppress(ValueError):
            found = json.loads(raw)
            return found if isinstance(found, dict) else {}
        return {}

    def _reply(self) -> None:
        data = json.dumps(self.server.answer(self.path, self._body())).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _reply


@contextlib.contextmanager
def wandb_server() -> Iterator[StandIn]:
    """A server of this test, on a port of its own."""
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
