"""What the supervisor asks of vLLM, without a model: ``python standin.py --port N``."""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    version = ""

    def answer(self, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.send_header("x-model-version", Handler.version)
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or "{}")
        Handler.version = body.get("weight_version", Handler.version)
        choices = [{"logprobs": {"token_logprobs": [-0.5]}}]
        self.answer({"results": [""], "choices": choices})


parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
ThreadingHTTPServer(("127.0.0.1", parser.parse_known_args()[0].port), Handler).serve_forever()
