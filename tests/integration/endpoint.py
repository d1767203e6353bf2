"""An OpenAI-compatible endpoint whose model writes words backwards, or not, by the request's seed; or says what a test
makes of its request."""

import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint(ThreadingHTTPServer):
    """`asked` are the bodies of all requests that were answered. `busy` of them are told 429 first."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        *,
        delay_s: float = 0.0,
        busy: int = 0,
        key: str | None = None,
        speak: Callable[[dict], dict] | None = None,
    ):
        """`speak`: the message that answers a request's body."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.speak = speak
        self.delay_s, self.busy, self.key = delay_s, busy, key
        self.asked: list[dict] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.key and self.headers.get("authorization") != f"Bearer {self.server.key}":
            return self._answer(401, {"error": {"message": "wrong key"}})
        with self.server.lock:
            self.server.busy -= 1
            is_busy = self.server.busy >= 0
        if is_busy:
            return self._answer(429, {"error": {"message": "too many requests"}}, {"retry-after": "0.05"})
        time.sleep(self.server.delay_s)
        with self.server.lock:
            self.server.asked.append(body)
        speak = self.server.speak
        return self._answer(200, _completion(body) if speak is None else _choice(speak(body), "stop", 1, 1))

    def _answer(self, status: int, content: dict, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _completion(body: dict) -> dict:
    word = body["messages"][-1]["content"]
    text = word[::-1] if body["seed"] % 3 else word
    message = {"role": "assistant", "content": text[: body["max_tokens"]]}
    reason = "length" if len(text) > body["max_tokens"] else "stop"
    return _choice(message, reason, len(text), len(word))


def _choice(message: dict, reason: str, num_tokens: int, num_prompt_tokens: int) -> dict:
    usage = {"completion_tokens": num_tokens, "prompt_tokens": num_prompt_tokens}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": usage}


if __name__ == "__main__":
    with Endpoint(delay_s=float(sys.argv[1])) as endpoint:
        print(endpoint.url, flush=True)
        threading.Event().wait()
