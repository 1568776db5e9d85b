"""A server of the completions protocol without a model, which errs when told to. For tests of who asks it.

    with FaultServer(tokenizer, faults=lambda number, body: "500" if number < 3 else None) as server: ...

Answers depend on prompt and seed alone. As a program (`python fault_server.py PORT NAME`), one that can be launched.
"""

import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "sk-very/secret-123"


class FaultServer:
    """On a free port of loopback while it is entered.

    faults: by number of the completion (0, 1, ...) and its body, what goes wrong: a name that `_fault` knows, or None.
    render: makes token ids of the messages of a chat, and of what its template is given, as the model's processor would; without it there
        is no such path.
    shift, noise: what is added to the log probabilities of first tokens: always the same, and at random.
    """

    def __init__(self, tokenizer, *, faults=lambda number, body: None, port=0, model="m", **settings):
        self.tokenizer, self.faults, self.model = tokenizer, faults, model
        self.settings = {
            "shift": 0.0,
            "noise": 0.0,
            "likelihoods": True,
            "token_ids": True,
            "logprobs": True,
            "delay": 0.0,
            "owner": "tests",
            "is_page": False,
            "unready": 0,
            "render": None,
        } | settings
        self.bodies, self.headers, self.paths = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.is_gone = False
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"server_of_faults": self}))
        self.http.daemon_threads = True
        self.http.handle_error = lambda request, address: None  # who asked is gone

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    @property
    def asked(self):
        """Bodies that ask for more than a first token."""
        return [body for body in self.bodies if not is_look(body)]

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *unused):
        self.is_gone = True
        self.http.shutdown()
        self.http.server_close()

    def chat_reply(self, body):
        """What a good server says in a chat."""
        prompt = self.settings["render"](body["messages"], **body.get("chat_template_kwargs", {}))
        completion = self.reply(body | {"prompt": prompt})
        (choice,) = completion["choices"]
        found = {"prompt_token_ids": prompt} if choice.pop("prompt_token_ids", None) else {}
        return completion | found | {"choices": [choice | {"message": {"role": "assistant", "content": choice.pop("text")}}]}

    def reply(self, body):
        """What a good server says."""
        n, prompt = body["max_tokens"], body["prompt"]
        tokens = [(sum(prompt) + 7 * (body["seed"] or 0) + 3 * i) % 200 + 20 for i in range(n)]
        choice = {"index": 0, "text": self.tokenizer.decode(tokens), "finish_reason": "length"}
        if body.get("return_token_ids") and self.settings["token_ids"]:
            choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
        if body.get("logprobs") and self.settings["logprobs"]:
            top = {f"token_id:{i}": -1.0 - 0.1 * i + self.settings["shift"] * (i % 3) for i in range(20)}
            choice["logprobs"] = {
                "top_logprobs": [{t: v + random.uniform(-1, 1) * self.settings["noise"] for t, v in top.items()}]
            }
        if "prompt_logprobs" in body and self.settings["likelihoods"]:
            choice["prompt_logprobs"] = [None] + [{str(t): {"logprob": -0.5, "rank": 1 + t % 2}} for t in prompt[1:]]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": n}
        return {"model": self.model, "choices": [choice], "usage": usage}


def is_look(body):
    """Whether a body asks what a server is, rather than a question."""
    return "logprobs" in body or ("messages" in body and body["max_tokens"] == 1)


class Handler(BaseHTTPRequestHandler):
    server_of_faults: FaultServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet

    def do_GET(self):
        server = self.server_of_faults
        server.paths.append(self.path)
        if self.path == "/v1/models":
            self.send(200, {"data": [{"id": server.model, "max_model_len": 512, "owned_by": server.settings["owner"]}]})
        elif server.settings["unready"]:
            server.settings["unready"] -= 1
            self.send(503, {"error": "not yet"})
        elif server.settings["is_page"]:
            self.send(200, b"<html>Welcome</html>")
        elif self.path == "/version":
            self.send(200, {"version": "0.0-faults"})
        else:
            self.send(404, {"error": "no such path"})

    def do_POST(self):
        server = self.server_of_faults
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if server.is_gone:
            self.close_connection = True
            return
        with server.lock:
            number = len(server.asked)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            time.sleep(server.settings["delay"])
            fault = None if is_look(body) else server.faults(number, body)
            if self.path == "/v1/chat/completions":
                self.chat(fault, body)
            else:
                self.fail(fault, body) if fault else self.send(200, server.reply(body))
        finally:
            with server.lock:
                server.in_flight -= 1

    def chat(self, fault, body):
        server = self.server_of_faults
        if server.settings["render"] is None:
            self.send(400, {"error": {"message": "this model takes no images"}})
            return
        good = server.chat_reply(body)
        n = good["usage"]["prompt_tokens"]
        counted = good | {"prompt_token_ids": None}
        replies = {
            None: good,
            "other_ids": good | {"prompt_token_ids": [*good.get("prompt_token_ids", [])[:-1], 9]},
            "blind": counted | {"usage": {"prompt_tokens": n - 6}},
            "longer": counted | {"usage": {"prompt_tokens": n + 64}},
            "silent": counted,
            "no_text": good | {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
        }
        if fault == "echo":
            self.send(413, {"error": {"message": f"too large: {json.dumps(body['messages'])} with {SECRET}"}})
        else:
            self.send(200, replies[fault]) if fault in replies else self.fail(fault, body)

    def fail(self, fault, body):
        good = self.server_of_faults.reply({"prompt": [1]} | body)
        choice = good["choices"][0]
        replies = {
            "empty": good | {"choices": []},
            "two": good | {"choices": [choice, choice]},
            "null_text": good | {"choices": [choice | {"text": None}]},
            "no_finish": good | {"choices": [choice | {"finish_reason": None}]},
            "aborted": good | {"choices": [choice | {"finish_reason": "abort"}]},
            "strange": {"choices": "yes", "model": 3},
            "list": [1, 2],
            "error_200": {"error": {"message": "out of luck"}},
            "other_model": good | {"model": "other"},
            "cut_prompt": good | {"choices": [choice | {"prompt_token_ids": body.get("prompt", [])[1:]}]},
            "cut_answer": good | {"choices": [choice | {"token_ids": choice.get("token_ids", [])[:2]}]},
            "early_stop": good | {"choices": [choice | {"finish_reason": "stop"}]},
        }
        if fault in replies:
            self.send(200, replies[fault])
        elif fault == "nonsense":
            self.send(200, b"<html>gateway</html>")
        elif fault in ("slow", "hang"):
            time.sleep(3.0 if fault == "slow" else 10.0)
            self.close_connection = True
        elif fault == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.wfile.flush()
            self.close_connection = True
        elif fault == "429":
            self.send(429, {"error": {"message": "too many"}}, {"Retry-After": "7"})
        elif fault == "echo":
            words = f"bad key {SECRET} for {self.headers['authorization']} and {body['prompt']} "
            self.send(400, {"error": {"message": words + self.server_of_faults.tokenizer.decode(body["prompt"])}})
        else:
            self.send(int(fault), {"error": {"message": f"status {fault} with {SECRET}"}})

    def send(self, status, value, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *unused):
        pass


class Spaces:
    """A tokenizer good enough for a launched server: every token is a blank."""

    def decode(self, token_ids):
        return " " * len(token_ids)


if __name__ == "__main__":
    print("ready soon", flush=True)
    with FaultServer(Spaces(), port=int(sys.argv[1]), model=sys.argv[2]):
        time.sleep(600)
