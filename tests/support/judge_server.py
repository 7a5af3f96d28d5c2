"""A judge behind HTTP for the tests: a real server on this host, whose behaviour each test scripts."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers as `behave(text, number)` says: a text, (status, headers, body), or pieces of bytes, which are all
    that is sent, with a pause after each, before the connection ends. Keeps what it was sent."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = behave
        self.requests = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.pause = 0.0
        self.hung_up = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append({"path": self.path, "headers": dict(self.headers), "time": time.time(), **body})
            number = len(server.requests)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        answer = server.behave(body["messages"][0]["content"], number)
        with server.lock:
            server.at_once -= 1
        if isinstance(answer, list):
            self.pieces(answer)
            return
        status, headers, content = (200, {}, completion(answer)) if isinstance(answer, str) else answer
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has given up
            self.close_connection = True

    def pieces(self, pieces):
        self.close_connection = True
        try:
            for piece in pieces:
                self.wfile.write(piece)
                time.sleep(self.server.pause)
        except OSError:
            self.server.hung_up.set()

    def log_message(self, *args):
        pass


def completion(text, finish_reason="stop"):
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 4},
    }
