"""A real HTTP server for the endpoints of the tests."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cpt_merge.evaluation.generate.config import ApiKey
from cpt_merge.evaluation.generate.endpoint import Endpoint


class Server(ThreadingHTTPServer):
    """Answers as `behave` decides, (status, text) or (status, text, headers), and remembers the
    requests."""

    daemon_threads = True

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.asked, self.keys, self.headers = behave, [], [], []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):  # what a client makes of a POST that is redirected
        self.server.asked.append((self.path, None))
        self.server.keys.append(self.headers.get("Authorization"))
        self.send_error(405)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.server.keys.append(self.headers.get("Authorization"))
        self.server.headers.append(self.headers)
        status, answer, *headers = self.server.behave(len(self.server.asked), body)
        data = answer.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers[0].items() if headers else ():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client waited no longer

    def log_message(self, *_):
        pass


def endpoint(url, variable="A_KEY", timeout=5.0, attempts=2):
    """The endpoint that `x` in a recipe would name."""
    return Endpoint(url, ApiKey(variable, "x.key_variable"), timeout, attempts, "x.url")


def completion(text, usage=(100, 10)):
    """What an OpenAI-compatible endpoint answers to chat/completions."""
    tokens = {"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} if usage else {}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], **tokens})


def judging(answer):
    """A judge that says `answer(prompt)` to every prompt."""
    return lambda number, body: (200, completion(answer(body["messages"][0]["content"])))
