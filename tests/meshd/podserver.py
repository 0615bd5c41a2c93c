"""An API server with what a test gives it: `python podserver.py PORT` takes ``{PATH: [STATUS, BODY]}`` line by line.

Prints one JSON object a line: that it is ready, that a line was taken, each event that was posted.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GONE = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404, "reason": "NotFound", "message": "gone"}
ANSWERS: dict[str, list[Any]] = {}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(*ANSWERS.get(self.path, [404, GONE]))

    def do_POST(self) -> None:
        event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print(json.dumps({"posted": event}), flush=True)
        self.answer(*ANSWERS.get(self.path, [201, event]))

    def answer(self, status: int, body: Any) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ANSWERS.update(json.loads(line))
        print(json.dumps({"taken": True}), flush=True)
