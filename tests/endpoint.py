"""A real HTTP server on loopback that speaks OpenAI's chat protocol as judges need it."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Speaks OpenAI's chat protocol; prefers the longer response, and misbehaves as told.

    A fault is one of the names below, or the status and the body of an answer; `odd` may give one for a question.
    """

    daemon_threads = True

    def __init__(self, *faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.lock = list(faults), [], threading.Lock()
        self.reply = lambda body: longer(body)
        self.odd = lambda body: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def parts(body):
    """Code and responses of a question, as a reader of its marks finds them."""
    text = body["messages"][1]["content"]
    found = re.findall(r"<<<(REQUEST|RESPONSE A|RESPONSE B) (\w{12})>>>\n(.*?)\n<<<END \2>>>", text, re.DOTALL)
    assert [name for name, *_ in found] == ["REQUEST", "RESPONSE A", "RESPONSE B"]
    assert text.count("<<<") == 6 and len({code for _, code, _ in found}) == 1
    return found[0][1], found[1][2], found[2][2]


def longer(body):
    code, first, second = parts(body)
    better = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "TIE"
    return f"It says: {first}\n{second}\nThe longer one.\nVERDICT {code}: {better}"


def completion(*choices, **more):
    usage = {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340}
    shown = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage}
    return {**shown, "choices": [*choices], **more}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(
                (time.monotonic(), body, {name.lower(): value for name, value in self.headers.items()})
            )
            fault = self.server.faults.pop(0) if self.server.faults else None
        fault = fault or self.server.odd(body)
        if isinstance(fault, tuple):
            self._send(*fault)
        elif fault == "drop":
            self.connection.close()
        elif fault == "limit":
            self._send(429, {"error": {"message": f"too many for {KEY}"}}, {"Retry-After": "0.3"})
        elif fault == "broken":
            self._send(500, {"error": {"message": "oh"}})
        elif fault == "malformed":
            self._send(200, "{not json")
        elif fault == "busy":
            self._send(200, {"error": {"message": "the provider is busy", "code": 502}})
        elif fault == "refuse":
            self._send(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
        else:
            if fault == "slow":
                time.sleep(1.5)
            message = {"role": "assistant", "content": self.server.reply(body)}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self._send(200, completion(choice))

    def _send(self, status, content, headers=None):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
