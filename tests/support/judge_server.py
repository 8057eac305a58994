"""A judge behind a real HTTP server, which fails in chosen ways."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-very-secret-0123456789"


def biased(question):
    """Whichever is shown first is the better one."""
    return "Preferred: A"


def longest(question):
    """The longer text is the better one."""
    texts = re.findall(r"(?:Summary|Answer) [AB]:\n(.*?)\n\n", question, re.DOTALL)
    first, second = map(len, texts)
    return f"They differ. Preferred: {'A' if first > second else 'B' if second > first else 'tie'}"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answer, faults):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults, self.lock = answer, list(faults), threading.Lock()
        self.asked, self.bodies, self.keys = [], [], set()

    def handle_error(self, *_):
        """Clients go away in the middle: that is what is tested."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.lock:
            server.asked.append(question)
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"no, {self.headers['Authorization']}"}})
        elif fault == "slow":
            time.sleep(1.0)
            self._send(200, self._completion(question))
        elif fault == "wait":
            self._send(429, {"error": {"message": "later"}}, retry_after=1)
        elif fault == "cut":
            self._send(200, self._completion(question), cut=20)
        elif fault == "nonsense":
            self._send(200, "<html>busy</html>")
        elif fault == "schema":
            self._send(200, {"choices": []})
        else:
            self._send(200, self._completion(question))

    def _completion(self, question):
        message = {"role": "assistant", "content": self.server.answer(question)}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": "judge",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }  # fmt: skip

    def _send(self, status, values, cut=0, retry_after=None):
        body = (values if isinstance(values, str) else json.dumps(values)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])
        if cut:
            self.close_connection = True

    def log_message(self, *_):
        """Keep quiet."""


@contextmanager
def judge(answer=longest, faults=()):
    """Serve a judge; gives the server, whose `url` is the base URL."""
    server = Server(answer, faults)
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
