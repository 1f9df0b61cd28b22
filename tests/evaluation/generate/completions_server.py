"""A server of OpenAI's completions that generates with a model, as vLLM does it.

As a program it takes the arguments of `vllm serve`.
"""

import argparse
import json
import os
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@dataclass
class Kind:
    """What servers differ in."""

    takes_ids: bool = True
    returns_ids: bool = True
    knows_stop_ids: bool = True
    adds: str = ""  # before every prompt
    lists: bool = True
    unknown_fields: tuple[str, ...] = ()  # that it refuses
    fails_after: int | None = None  # completions, then status 500
    positions: int | None = None
    ends_because: str | None = None  # instead of the true reason
    adds_to_ids: int = 0  # to every id that it returns
    counts: bool = True  # whether it counts tokens
    ignores_limit: bool = False
    page: str = ""  # instead of its list
    key: str = ""  # that requests need
    lists_to_all: bool = False  # without the key
    errors: tuple = ()  # with which the first completions are answered, with status 200


@dataclass
class Completions:
    directory: Path
    name: str
    kind: Kind = field(default_factory=Kind)

    def __post_init__(self):
        self.model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32)
        self.model.generation_config = GenerationConfig()
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        self.asked, self.lock = [], threading.Lock()

    def models(self):
        if not self.kind.lists:
            return 404, {"error": "no such path"}
        if self.kind.page:
            return 200, self.kind.page
        one = {"id": self.name, "object": "model", "root": str(self.directory)}
        if self.kind.positions:
            one["max_model_len"] = self.kind.positions
        return 200, {"object": "list", "data": [one]}

    def complete(self, body):
        with self.lock:
            self.asked.append(body)
            if wrong := [name for name in body if name in self.kind.unknown_fields]:
                return 400, {"error": f"unrecognised field {wrong[0]}"}
            if isinstance(body["prompt"], list) and not self.kind.takes_ids:
                return 422, {"error": "prompt: expected a string"}
            if body["model"] != self.name:
                return 404, {"error": f"no model {body['model']}"}
            if self.kind.fails_after is not None and len(self.asked) > self.kind.fails_after:
                return 500, {"error": "out of memory"}
            if len(self.asked) <= len(self.kind.errors):
                return 200, {"error": self.kind.errors[len(self.asked) - 1]}
            return 200, self._completion(body)

    def _completion(self, body):
        prompt = body["prompt"]
        if isinstance(prompt, str):  # a server adds the special tokens of a text
            prompt = self.tokenizer(prompt)["input_ids"]
        prompt = self.tokenizer(self.kind.adds, add_special_tokens=False)["input_ids"] + prompt
        stops = body.get("stop_token_ids", []) if self.kind.knows_stop_ids else []
        known = self.tokenizer.get_vocab()
        stops = [*stops, *(known[one] for one in body.get("stop", []) if one in known)]
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=body["max_tokens"] * (3 if self.kind.ignores_limit else 1), do_sample=False, eos_token_id=stops or None, pad_token_id=0,
            )  # fmt: skip
        ids = output[0, len(prompt) :].tolist()
        ended = ids[-1] in stops
        text = self.tokenizer.decode(
            ids[:-1] if ended else ids, skip_special_tokens=body.get("skip_special_tokens", True),
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
        ended = ended or self.kind.ignores_limit
        reason = self.kind.ends_because or ("stop" if ended else "length")
        choice = {"index": 0, "text": text, "finish_reason": reason}
        if body.get("return_token_ids") and self.kind.returns_ids:
            choice["token_ids"] = [one + self.kind.adds_to_ids for one in ids]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"choices": [choice], **({"usage": usage} if self.kind.counts else {})}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        completions = self.server.completions
        if not (self.has_key() or completions.kind.lists_to_all):
            self.answer(401, {"error": "who are you"})
        else:
            self.answer(*completions.models() if self.path == "/v1/models" else (404, {}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.path == "/v1/completions"
        if not self.has_key():
            self.answer(401, {"error": "who are you"})
        else:
            self.answer(*self.server.completions.complete(body) if known else (404, {}))

    def has_key(self):
        key = self.server.completions.kind.key
        return not key or self.headers.get("Authorization") == f"Bearer {key}"

    def answer(self, status, content):
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class CompletionsServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, completions, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.completions = completions
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", choices=["127.0.0.1"], required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--generation-config", choices=["vllm"], required=True)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--api-key", default="")
    asked = parser.parse_args()
    if folder := os.environ.get("RECORD_STARTS"):
        Path(folder, str(os.getpid())).write_text(" ".join(sys.argv))
    torch.set_num_threads(1)
    completions = Completions(
        asked.model, asked.served_model_name, Kind(positions=asked.max_model_len, key=asked.api_key)
    )
    CompletionsServer(completions, asked.port).serve_forever()


if __name__ == "__main__":
    main()
