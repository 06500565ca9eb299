"""A completions server for tests: a tiny policy behind http.server, and faults by schedule, in place of vLLM or SGLang."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What a request may meet in place of its answer, and be the better for asking again.
FAULTS = (
    "500",
    "429",
    "503",
    "reset",
    "truncated",
    "garbage",
    "null",
    "none",
    "two",
    "words",
    "beyond",
    "long",
    "abort",
)
SLOW_FAULTS = ("hang", "drip")
FRESH = {"allow_reuse_address": True, "daemon_threads": True}


class PolicyServer:
    """Answers by `answer(body, headers)`, a completion; request number n meets faults[n] instead, where there is one.

    requests: the bodies that came. gate: called with the number of each request, before anything else.
    """

    def __init__(self, answer, faults=None, gate=None):
        self.answer, self.faults, self.gate = answer, dict(faults or {}), gate
        self.requests, self.headers, self.lock = [], [], threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                self.reply(200, b"{}")

            def reply(self, status, data, headers=(), length=None):
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    number = len(owner.requests)
                    owner.requests.append(body)
                    owner.headers.append(dict(self.headers))
                if owner.gate is not None:
                    owner.gate(number)
                fault = owner.faults.get(number)
                if fault in (None, "none", "two", "words", "beyond", "long", "abort", "model"):
                    with owner.lock:
                        completion = owner.answer(body, self.headers)
                    self.reply(200, json.dumps(distort(completion, fault)).encode())
                elif fault in ("500", "503", "400", "401"):
                    self.reply(int(fault), b"out of order" + (self.headers["Authorization"] or "").encode())
                elif fault == "429":
                    self.reply(429, b"slow down", [("Retry-After", "1000")])
                elif fault == "garbage":
                    self.reply(200, b'{"model": "\xff')
                elif fault == "null":
                    self.reply(200, b"null")
                elif fault == "truncated":
                    self.reply(200, b'{"model": "toy", "cho', length=400)
                    self.close_connection = True
                elif fault == "hang":
                    time.sleep(2.5)
                elif fault == "drip":
                    self.reply(200, b"", length=400)
                    for _ in range(25):
                        self.wfile.write(b" ")
                        self.wfile.flush()
                        time.sleep(0.1)
                self.close_connection = fault is not None
                if fault == "reset":
                    self.connection.shutdown(socket.SHUT_RDWR)

            def handle(self):
                with contextlib.suppress(OSError):  # the client gave up
                    super().handle()

        self.server = type("Server", (ThreadingHTTPServer,), FRESH)(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


def distort(completion, fault):
    choice = completion["choices"][0]
    if fault == "none":
        completion["choices"] = []
    elif fault == "two":
        completion["choices"] = [choice | {"token_ids": [5, 5, 1], "finish_reason": "stop"}, choice]
    elif fault == "words":
        choice["token_ids"] = ["a", "b"]
    elif fault == "beyond":
        choice["token_ids"] = [1 << 40]
    elif fault == "long":
        choice["token_ids"] = [5] * 1000
    elif fault == "abort":
        choice["finish_reason"] = "abort"
    elif fault == "model":
        completion["model"] = "somebody else's"
    return completion


def forward(port, upstream, weights):
    """A server process in three lines of work: what it is asked goes upstream with the weights that it was started for."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.reply(b"{}")

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {"X-Weights": weights, "X-Pid": str(os.getpid()), "Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(upstream + "/completions", body, headers)) as answer:
                self.reply(answer.read())

        def reply(self, data):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    type("Server", (ThreadingHTTPServer,), FRESH)(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    forward(int(sys.argv[1]), sys.argv[2], sys.argv[3])
