"""A web service for tests: python service.py [MIN_SECONDS]; it prints its port.

It answers logits of a fixed linear map (weights cos(1 + i + 10 j)), fails every 50th request, and answers 429 to
requests that come less than MIN_SECONDS after the last one. GET /counts tells what it answered.
"""

import json
import math
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CLASSES = 3
counts = {"requests": 0, "answered": 0, "failed": 0, "limited": 0}
last = [0.0]


def flat(row):
    return [value for part in row for value in (flat(part) if isinstance(part, list) else [part])]


def logits(row):
    return [sum(math.cos(1 + i + 10 * j) * v for i, v in enumerate(flat(row))) / 4 for j in range(CLASSES)]


def softmax(scores):
    top = [math.exp(each - max(scores)) for each in scores]
    return [each / sum(top) for each in top]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *words):
        pass

    def reply(self, status, content, headers=()):
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(200, counts)

    def do_POST(self):
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        counts["requests"] += 1
        if counts["requests"] % 50 == 0:
            counts["failed"] += 1
            return self.reply(500, "oh no")
        now = time.monotonic()
        if now - last[0] < LEAST:
            counts["limited"] += 1
            return self.reply(429, {"error": "slow down"}, [("Retry-After", "0.01")])
        last[0] = now
        kind = self.path.strip("/")
        if kind == "down":
            return self.reply(503, "busy")
        if kind == "secret":
            sent = self.headers.get("Authorization", "") + self.headers.get("X-Key", "")
            if sent not in ("Bearer s3cret", "s3cret"):
                return self.reply(401, f"bad key {sent}")
            kind = "logits"
        scores = [logits(row) for row in rows]
        answer = {
            "logits": {"logits": scores},
            "probabilities": {"probabilities": [softmax(each) for each in scores]},
            "labels": {"labels": [each.index(max(each)) for each in scores]},
            "four": {"logits": [[*each, 0.0] for each in scores]},
            "nan": {"logits": [[math.nan] * CLASSES for _ in rows]},
            "words": "hello",
            "empty": {"result": 1},
            "short": {"logits": scores[1:]},
            "ragged": {"logits": [[1.0], [1.0, 2.0]]},
            "wrong": {"labels": [CLASSES for _ in rows]},
            "negative": {"probabilities": [[-1.0, 1.0, 1.0] for _ in rows]},
        }[kind]
        counts["answered"] += len(rows)
        return self.reply(200, answer)


LEAST = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
sys.stdout.write(f"{server.server_port}\n")
sys.stdout.flush()
server.serve_forever()
