"""A chat endpoint on a local port that behaves, and misbehaves, as told; and the records that it understands."""

import json
import re
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COLOURS = ("red", "blue", "green", "white")
NOUNS = ("car", "dog", "kite", "truck", "horse")
TOKENS = (210, 30)  # of every answer, in and out


def raw_record(number: int, **changes) -> dict:
    """A raw record whose question names its number, so that the server can tell them apart."""
    noun, colour = NOUNS[number % len(NOUNS)], COLOURS[number % len(COLOURS)]
    turns = [
        ("human", f"<video>\nPlease describe <object1><region> in clip {number}."),
        ("gpt", f"The {colour} {noun} moves to the left and then stops."),
    ]
    return {
        "index": f"raw_{number}",
        "video": f"{number}.mp4",
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "annotation": [{"0": {"segmentation": {"size": [8, 8], "counts": [8, 8, 48]}}}],
        **changes,
    }


def tagged(number: int) -> str:
    """The question of such a record as it should come out."""
    noun, colour = NOUNS[number % len(NOUNS)], COLOURS[number % len(COLOURS)]
    return f"<video>\nPlease describe the {colour} <ins>{noun}</ins> in clip {number}."


class FakeOpenAI:
    """Counts requests per record and answers them by `plan`: a list of behaviours per record, then "good" for ever.

    good: the right JSON; fenced: the same with prose and fences around; prose: no JSON; two: one expression too many;
    invented: a noun that is not in the answer; unnamed: says that the object is never named; limit: 429 with
    Retry-After; broken: 500; slow: longer than any time-out; drop: closes the connection; garbage: 200 without a
    completion; denied: 401; long: 400.
    """

    def __init__(self, plan=None, delay=0.0, retry_after="0.4"):
        self.plan = defaultdict(list, {number: list(steps) for number, steps in (plan or {}).items()})
        self.delay, self.retry_after = delay, retry_after
        self.requests = Counter()
        self.answered = Counter()  # requests that got an answer that costs tokens
        self.moments = defaultdict(list)
        self.limited = []
        self.chats = defaultdict(list)
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._held_from: int | None = None
        self._released = threading.Event()

    def hold_from(self, count: int) -> None:
        """Let requests wait for `release` once there have been so many, all records together."""
        self._released.clear()
        self._held_from = count

    def release(self) -> None:
        self._held_from = None
        self._released.set()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        text = body["messages"][1]["content"]
        number = int(re.search(r"clip (\d+)", text).group(1))
        with self._lock:
            self.requests[number] += 1
            self.moments[number].append(time.monotonic())
            self.chats[number].append(body["messages"])
            behaviour = self.plan[number].pop(0) if self.plan[number] else "good"
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if behaviour == "limit":
                self.limited.append(time.monotonic())
            held = self._held_from is not None and sum(self.requests.values()) >= self._held_from
        try:
            if held:
                self._released.wait()
            time.sleep(self.delay)
            self._answer(handler, behaviour, text, number)
        finally:
            with self._lock:
                self._at_once -= 1

    def _answer(self, handler, behaviour, text, number):
        if behaviour == "drop":
            handler.connection.close()
        elif behaviour == "slow":
            time.sleep(1.5)
        elif behaviour == "limit":
            self._send(handler, 429, {"error": {"message": "too fast"}}, {"Retry-After": self.retry_after})
        elif behaviour in ("broken", "denied", "long"):
            status = {"broken": 500, "denied": 401, "long": 400}[behaviour]
            self._send(handler, status, {"error": {"message": behaviour}})
        elif behaviour == "garbage":
            self._send(handler, 200, {"hello": "world"})
        else:
            self._send(handler, 200, self._completion(getattr(self, f"_{behaviour}")(text)))
            with self._lock:
                self.answered[number] += 1

    def _send(self, handler, status, body, headers=None):
        data = json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(data)

    def _completion(self, content):
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "fake",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}},
            ],
            "usage": {
                "prompt_tokens": TOKENS[0],
                "completion_tokens": TOKENS[1],
                "total_tokens": sum(TOKENS),
            },
        }

    def _items(self, text):
        phrases = re.findall(r"[Tt]he (\w+ \w+) moves", text)
        count = len(set(re.findall(r"\{(\d)\}", text)))
        phrases = phrases if len(phrases) == count else phrases[:1] * count
        return [
            {"placeholder": i, "expression": f"the {phrase}", "noun": phrase.split()[1]}
            for i, phrase in enumerate(phrases, 1)
        ]

    def _good(self, text):
        return json.dumps({"expressions": self._items(text)})

    def _fenced(self, text):
        return f"Sure! Here it is [as JSON]:\n```json\n{self._good(text)}\n```\nTell me if {{anything}} is missing."

    def _prose(self, text):
        return "I would call it the thing in the middle."

    def _two(self, text):
        return json.dumps({"expressions": [{**self._items(text)[0], "placeholder": i} for i in (1, 2, 3)]})

    def _invented(self, text):
        return json.dumps({"expressions": [{"expression": "the unicorn", "noun": "unicorn"}]})

    def _unnamed(self, text):
        return json.dumps({"expressions": None, "reason": "only pronouns"})


@contextmanager
def serving(server: FakeOpenAI):
    """The server's base URL, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            try:
                server.handle(self)
            except OSError:
                self.close_connection = True  # the client is gone, or was thrown out

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_):
            pass  # a client that was killed or gave up

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
