"""A scripted OpenAI-compatible endpoint on 127.0.0.1, for verdicts and for faults.

A script maps the number of a request, from 0, and its JSON body to what the endpoint does: a text
(a chat completion with it), an int (that HTTP status), bytes (sent as they are, as a body), or one
of `CLOSED`, `SILENT` and `TRICKLE`.
"""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CLOSED, SILENT, TRICKLE = "closed", "silent", "trickle"
"""Close the connection without a reply; never reply; send a byte of the body every 20 ms."""
Script = Callable[[int, dict[str, Any]], Any]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections that wait; the usual 5 are fewer than a batch opens


class ChatEndpoint:
    """The endpoint's address, and what it was asked.

    Attributes:
        bodies: JSON bodies of all requests, retries included, in the order of arrival.
        keys: values of their Authorization headers.
        most: largest number of requests that were in progress at the same time.
    """

    def __init__(self, script: Script) -> None:
        self._script, self._lock = script, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.live = self.most = 0
        self.stop = threading.Event()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        try:
            body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        except (ConnectionResetError, ValueError):  # the client was killed
            return
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization", ""))
            self.live += 1
            self.most = max(self.most, self.live)
        try:
            self._act(handler, self._script(number, body))
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True
        finally:
            with self._lock:
                self.live -= 1

    def _act(self, handler: BaseHTTPRequestHandler, does: Any) -> None:
        handler.close_connection = does in (CLOSED, SILENT, TRICKLE)
        if does is SILENT:
            self.stop.wait()
        if does in (CLOSED, SILENT):
            return
        status = does if isinstance(does, int) else 200
        content = does if isinstance(does, bytes) else _body(does, handler)
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("retry-after-ms", "5")  # which the openai client obeys
        handler.end_headers()
        for start in range(len(content)) if does is TRICKLE else ():
            handler.wfile.write(content[start : start + 1])
            handler.wfile.flush()
            if self.stop.wait(0.02):
                return
        if does is not TRICKLE:
            handler.wfile.write(content)


def _body(does: Any, handler: BaseHTTPRequestHandler) -> bytes:
    if isinstance(does, int):
        sent = handler.headers.get("Authorization", "")
        return json.dumps({"error": {"message": f"no, says the endpoint to {sent}"}}).encode()
    message = {"role": "assistant", "content": "x" * 2000 if does is TRICKLE else does}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
    return json.dumps({"id": "1", "choices": [choice], "usage": usage}).encode()


@contextmanager
def serving(script: Script):
    """Serve a script until the block ends."""
    endpoint = ChatEndpoint(script)
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.stop.set()
        endpoint.server.shutdown()
        endpoint.server.server_close()
        thread.join()
