"""Asking a server: what is sent, what is asked again, what ends a run, what is never shown, and how a server is known again."""

import dataclasses
import json
import re
import socket
import threading
import time

import pytest
from fault_server import SECRET, FaultServer

from harness import loading
from harness.answering import answer_requests
from harness.engines import Answer, Failure, Likelihood, Request, Sampling
from harness.engines.fingerprint import LEAST_TOLERANCE, PROMPTS, READINGS, distance
from harness.engines.server import HOPELESS, NO_FINGERPRINT, UNVERIFIED, ServerEngine
from harness.errors import EngineError, StoreError
from harness.journal import Journal
from harness.schema_server import Endpoint

SAMPLING = Sampling(max_tokens=5, until=("stop here",), temperature=0.7, top_p=0.9, top_k=40)
GREEDY = Sampling(max_tokens=5, until=())


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loopback alone."""
    real = socket.socket.connect

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to reach the network: {address}")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


class Asking:
    """Engines on fault servers, closed at the end; `slept` holds what they would have waited."""

    def __init__(self, folder, tokenizer, records):
        self.folder, self.tokenizer, self.records = folder, tokenizer, records
        self.slept, self.open = [], []

    def serve(self, **settings):
        self.open.append(FaultServer(self.tokenizer, **settings).__enter__())
        return self.open[-1]

    def engine(self, server, *, url=None, key=None, weights="w" * 64, kernels=None, **args):
        async def sleep(seconds):
            self.slept.append(seconds)

        engine = ServerEngine(
            self.folder,
            self.tokenizer,
            eos_ids=loading.eos_ids(self.folder, self.tokenizer),
            weights=weights,
            kernels=kernels,
            args={"timeout_s": 30.0, "retries": 3} | args,
            records=self.records,
            endpoint=Endpoint(url=url or server.url, model=server.model if server else "m", api_key_env=key),
            sleep=sleep,
        )
        self.open.append(engine)
        self.slept.clear()
        return engine


@pytest.fixture
def asking(tiny_model, tiny_tokenizer, tmp_path):
    made = Asking(tiny_model, tiny_tokenizer, tmp_path / "endpoints")
    yield made
    for one in reversed(made.open):
        one.close() if isinstance(one, ServerEngine) else one.__exit__()


def requests(n, sampling=SAMPLING):
    return [Request(token_ids=(20, 30, 40 + i), sampling=sampling, seed=1000 + i) for i in range(n)]


def outcomes(engine, batch):
    return [outcome for _, outcome in sorted(engine.answer(batch), key=lambda found: found[0])]


def fault_once(name):
    """The fault the first time that a prompt is asked."""
    seen = set()

    def fault(number, body):
        prompt = tuple(body["prompt"])
        is_new = prompt not in seen
        seen.add(prompt)
        return name if is_new else None

    return fault


def test_every_parameter_is_sent_so_that_no_default_of_a_server_acts(asking):
    server = asking.serve()
    engine = asking.engine(server)
    outcomes(engine, requests(1))
    assert server.asked == [
        {
            "model": "m",
            "prompt": [20, 30, 40],
            "n": 1,
            "stream": False,
            "echo": False,
            "max_tokens": 5,
            "min_tokens": 0,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": 1000,
            "stop": ["stop here"],
            "stop_token_ids": [1],
            "ignore_eos": False,
            "include_stop_str_in_output": False,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
    ]


def test_vllm_is_told_to_take_ends_of_text_from_the_request_alone(asking):
    server = asking.serve(owner="vllm")
    outcomes(asking.engine(server), requests(1))
    assert server.asked[0]["ignore_eos"] and server.asked[0]["stop_token_ids"] == [1]


def test_answers_come_with_the_token_ids_of_the_server_each_under_its_own_seed(asking):
    server = asking.serve()
    engine = asking.engine(server)
    batch = [dataclasses.replace(request, token_ids=(20, 30, 40)) for request in requests(3)]
    found = outcomes(engine, batch)
    assert [a.token_ids for a in found] == [
        tuple(server.reply(b)["choices"][0]["token_ids"]) for b in sorted(server.asked, key=lambda b: b["seed"])
    ]
    assert len({a.token_ids for a in found}) == 3
    assert all(a.finish_reason == "length" and a.text == asking.tokenizer.decode(a.token_ids) and a.seconds > 0 for a in found)
    assert engine.protocol["token_ids"] == "returned" and engine.protocol["rendered_by"] == "harness"


def test_text_is_tokenized_where_a_server_gives_no_token_ids_and_the_record_says_so(asking):
    engine = asking.engine(asking.serve(token_ids=False))
    (answer,) = outcomes(engine, requests(1))
    assert answer.token_ids == tuple(asking.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
    assert engine.protocol["token_ids"] == "retokenized"


def test_a_sampled_request_without_a_seed_is_refused(asking):
    engine = asking.engine(asking.serve())
    with pytest.raises(EngineError, match="carries no seed"):
        outcomes(engine, [dataclasses.replace(requests(1)[0], seed=None)])


def test_likelihoods_are_summed_over_the_continuation(asking):
    server = asking.serve()
    engine = asking.engine(server)
    found = outcomes(
        engine, [Request(token_ids=(20, 30), continuation=(40, 42)), Request(token_ids=(20, 30), continuation=(40, 41))]
    )
    assert [(f.logprob, f.is_greedy) for f in found] == [(-1.0, True), (-1.0, False)]
    assert all(isinstance(f, Likelihood) for f in found) and server.asked[0]["prompt_logprobs"] == 0


def test_a_server_without_likelihoods_is_an_error_that_says_what_to_do(asking):
    engine = asking.engine(asking.serve(likelihoods=False))
    with pytest.raises(EngineError, match="gives no likelihoods .* leave out the tasks that need them, or ask vLLM"):
        outcomes(engine, [Request(token_ids=(20, 30), continuation=(40,))])


@pytest.mark.parametrize(
    "fault",
    [
        "429",
        "500",
        "503",
        "408",
        "nonsense",
        "list",
        "empty",
        "two",
        "null_text",
        "no_finish",
        "aborted",
        "strange",
        "error_200",
        "cut",
        "slow",
    ],
)
def test_what_may_pass_is_asked_again(asking, fault):
    server = asking.serve(faults=fault_once(fault))
    engine = asking.engine(server, **({"timeout_s": 1.5} if fault == "slow" else {}))
    found = outcomes(engine, requests(2))
    assert all(isinstance(answer, Answer) for answer in found), found
    assert len(server.asked) == 4 and len(asking.slept) == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "status 429: too many"),
        ("500", "status 500: status 500 with"),
        ("nonsense", "the answer is not JSON: '<html>gateway</html>'"),
        ("empty", "0 choices where 1 was asked for"),
        ("two", "2 choices where 1 was asked for"),
        ("null_text", "choices.0.text: input should be a valid string"),
        ("no_finish", "choices.0.finish_reason: input should be 'stop' or 'length'"),
        ("list", "an error in place of an answer"),
        ("error_200", "an error in place of an answer: out of luck"),
        ("cut", "the connection was cut"),
        ("slow", "no answer within 1.5 s"),
    ],
)
def test_what_never_passes_is_a_failure_with_its_reason_and_the_rest_is_answered(asking, fault, reason):
    server = asking.serve(faults=lambda number, body: fault if body["prompt"][-1] == 41 else None)
    engine = asking.engine(server, retries=1, **({"timeout_s": 1.5} if fault == "slow" else {}))
    found = outcomes(engine, requests(3))
    assert isinstance(found[1], Failure) and found[1].reason.startswith(reason)
    assert isinstance(found[0], Answer) and isinstance(found[2], Answer)
    assert len(server.asked) == 4


def test_a_server_that_gives_half_of_the_answers_leaves_the_other_half_as_failures(asking):
    server = asking.serve(faults=lambda number, body: "empty" if body["prompt"][-1] % 2 else None)
    found = outcomes(asking.engine(server), requests(20))
    assert [isinstance(outcome, Failure) for outcome in found] == [False, True] * 10


def test_attempts_wait_longer_each_time_and_not_all_for_the_same_time(asking):
    engine = asking.engine(asking.serve(faults=lambda number, body: "500" if body["prompt"][-1] == 40 else None), retries=8)
    outcomes(engine, requests(2))
    waits = asking.slept
    assert len(waits) == 8
    assert all(0.5 * min(60, 2**i) <= wait <= 1.5 * min(60, 2**i) for i, wait in enumerate(waits))
    assert len(set(waits)) == 8


def test_the_wait_that_a_server_asks_for_is_kept(asking):
    engine = asking.engine(asking.serve(faults=fault_once("429")), timeout_s=30)
    outcomes(engine, requests(1))
    assert len(asking.slept) == 1 and 7 <= asking.slept[0] <= 8


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        ("400", "status 400 with"),
        ("401", "set the variable that endpoint.api_key_env names"),
        ("404", "endpoint.url is the base of the API"),
    ],
)
def test_a_refusal_is_an_error_at_once_with_the_words_of_the_server(asking, status, advice):
    server = asking.serve(faults=lambda number, body: status)
    engine = asking.engine(server)
    with pytest.raises(
        EngineError, match=rf"/v1/completions: the server refuses with status {status}: status {status} with .*"
    ) as caught:
        outcomes(engine, requests(1))
    assert advice in str(caught.value) and len(server.asked) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("other_model", "asked for model m, answered by 'other'"),
        ("cut_prompt", r"the prompt was not taken as it was sent \(3 tokens sent"),
    ],
)
def test_a_server_that_does_something_else_is_an_error(asking, fault, message):
    engine = asking.engine(asking.serve(faults=lambda number, body: fault))
    with pytest.raises(EngineError, match=message):
        outcomes(engine, requests(1))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("cut_answer", "the server cut the answer at 2 tokens, 5 were asked for"),
        ("early_stop", "the server ended the answer at token .* which ends no text of this model"),
    ],
)
def test_an_answer_that_a_default_of_the_server_ended_is_a_failure(asking, fault, reason):
    engine = asking.engine(asking.serve(faults=lambda number, body: fault))
    (found,) = outcomes(engine, requests(1))
    assert re.match(reason, found.reason)


def test_no_more_requests_are_under_way_than_asked_for_and_their_order_is_kept(asking):
    server = asking.serve(delay=0.02)
    engine = asking.engine(server, concurrency=3)
    assert engine.plan(requests(12)) == [list(range(12))] and engine.plan([]) == []
    outcomes(engine, requests(12))
    assert server.most_in_flight == 3
    assert max(abs(body["prompt"][-1] - 40 - i) for i, body in enumerate(server.asked)) <= 3


def test_answers_are_given_as_they_finish(asking):
    server = asking.serve(faults=lambda number, body: "slow" if body["prompt"][-1] == 40 else None)
    engine = asking.engine(server, timeout_s=5.0, retries=0)
    places = [place for place, _ in engine.answer(requests(4))]
    assert places[-1] == 0 and sorted(places) == [0, 1, 2, 3]


def test_when_the_first_requests_all_fail_the_run_ends_and_says_why(asking):
    server = asking.serve(faults=lambda number, body: "500")
    engine = asking.engine(server, retries=0, concurrency=2)
    found = []
    with pytest.raises(
        EngineError, match=rf"/v1: the first {HOPELESS} requests all failed, the last one with: status 500.*same command"
    ):
        found.extend(engine.answer(requests(100)))
    assert len(found) == HOPELESS and len(server.asked) <= HOPELESS + 2


def test_a_server_that_goes_away_ends_the_run_and_what_it_answered_is_kept(asking, tmp_path):
    server = asking.serve()
    engine = asking.engine(server, retries=1, concurrency=1)
    batch = requests(100)
    with Journal(tmp_path / "journals", {"weights": "w", "task": "t"}) as journal:
        n_answered = 0

        def leave(done, total):
            nonlocal n_answered
            n_answered = done
            if done == 5:
                asking.open.remove(server)
                server.__exit__()

        with pytest.raises(EngineError, match=rf"{HOPELESS} requests in a row found no server.*What was answered is kept"):
            answer_requests(engine, journal, batch, leave)
    assert n_answered < 20
    with Journal(tmp_path / "journals", {"weights": "w", "task": "t"}) as journal:
        assert sum(journal.find(request) is not None for request in batch) in (5, 6)


def test_a_server_that_is_down_at_the_start_is_an_error_with_its_address(asking):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        EngineError, match=f"{url}: the server gives no answer .no connection.*; start it, or correct the address"
    ):
        asking.engine(None, url=url)


def test_a_server_that_shows_a_page_in_place_of_its_version_is_asked_all_the_same(asking):
    engine = asking.engine(asking.serve(is_page=True))
    assert engine.protocol["server"] is None
    assert isinstance(outcomes(engine, requests(1))[0], Answer)


def test_a_version_that_fails_to_come_is_asked_again_and_never_taken_for_none(asking):
    assert asking.engine(asking.serve(unready=1)).protocol["server"] == {"version": "0.0-faults"}
    with pytest.raises(EngineError, match="the server gives no answer .status 503: not yet"):
        asking.engine(asking.serve(unready=9))


def test_a_model_that_is_not_served_is_an_error_with_those_that_are(asking):
    server = asking.serve()
    server.model, name = "another", server.model
    with pytest.raises(EngineError, match="serves no model 'm'; it serves: another"):
        asking.engine(dataclasses.make_dataclass("Named", ["url", "model"])(server.url, name))


def test_an_interrupted_evaluation_ends_at_once(asking):
    server = asking.serve(faults=lambda number, body: "hang" if body["prompt"][-1] != 40 else None)
    engine = asking.engine(server, timeout_s=60.0)
    answers = engine.answer(requests(8))
    next(answers)
    began = time.monotonic()
    main = threading.main_thread().ident
    threading.Timer(0.1, lambda: __import__("signal").pthread_kill(main, 2)).start()
    with pytest.raises(KeyboardInterrupt):
        next(answers)
    engine.close()
    assert time.monotonic() - began < 4


def test_neither_key_nor_prompt_is_in_any_message_and_the_key_is_sent(asking, monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", SECRET)
    server = asking.serve(faults=lambda number, body: "echo" if number == 0 else "500")
    engine = asking.engine(server, key="SOME_KEY", retries=0)
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in server.headers)
    prompt = tuple(asking.tokenizer("A question that is nobody's business, and a long one at that.")["input_ids"])
    with pytest.raises(
        EngineError, match=r"refuses with status 400: bad key \[key\] for Bearer \[key\] and \[\[numbers\]\] \[prompt\]"
    ) as caught:
        outcomes(engine, [Request(token_ids=prompt, sampling=GREEDY)])
    assert SECRET not in str(caught.value) and "nobody" not in str(caught.value)
    (failure,) = outcomes(engine, requests(1))
    assert failure.reason == "status 500: status 500 with [key]"
    assert SECRET not in json.dumps(engine.protocol)
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_key_that_is_not_set_is_an_error_that_names_the_variable(asking, monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(EngineError, match="its key is to be in the variable SOME_KEY, which is not set"):
        asking.engine(asking.serve(), key="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "sk-é")
    with pytest.raises(EngineError, match="the variable SOME_KEY holds characters that no key has") as caught:
        asking.engine(asking.serve(), key="SOME_KEY")
    assert "sk-" not in str(caught.value)


def test_what_cannot_be_proven_is_recorded_as_unverified(asking):
    server = asking.serve()
    engine = asking.engine(server, kernels="w4a16")
    assert engine.kernels == {"linear": "unverified w4a16", "kv_cache": "unverified"}
    assert engine.flags == (UNVERIFIED,) and engine.context_length == 511
    assert engine.protocol["declared_checkpoint"] == "w" * 64 and engine.protocol["server"] == {"version": "0.0-faults"}
    (path,) = asking.records.iterdir()
    record = json.loads(path.read_text())
    assert record["models"] == {"id": "m", "max_model_len": 512, "owned_by": "tests"} and record["url"] == server.url
    assert record["tolerance"] == LEAST_TOLERANCE and len(record["reading"]) == len(PROMPTS)
    assert all(len(top) == 20 for top in record["reading"])
    assert not server.asked and all(body["logprobs"] == 20 and body["max_tokens"] == 1 for body in server.bodies)
    assert server.most_in_flight == 1


def test_the_same_server_is_known_again_at_another_address_and_asked_little(asking):
    first = asking.serve(noise=0.004)
    protocol = asking.engine(first).protocol
    second = asking.serve(noise=0.004)
    assert asking.engine(second).protocol == protocol
    assert len(first.bodies) == READINGS * len(PROMPTS) and len(second.bodies) == len(PROMPTS)


def test_another_model_behind_the_same_name_is_an_error_before_anything_is_asked(asking):
    asking.engine(asking.serve(noise=0.01))
    (path,) = asking.records.iterdir()
    tolerance = json.loads(path.read_text())["tolerance"]
    assert tolerance >= LEAST_TOLERANCE
    other = asking.serve(shift=0.5)
    with pytest.raises(
        EngineError,
        match=rf"is not what it was at first contact .* after the prompt '.*' the likeliest tokens differ by 0\.[45]\d* nats, {tolerance:.3g} are allowed .* move .*{path.name} away",
    ):
        asking.engine(other)
    assert not other.asked and len(other.bodies) == READINGS * len(PROMPTS)


def test_the_tolerance_grows_with_what_a_server_differs_from_itself(asking):
    asking.engine(asking.serve(noise=0.3))
    (path,) = asking.records.iterdir()
    assert json.loads(path.read_text())["tolerance"] > 0.1
    asking.engine(asking.serve(noise=0.3))


def test_another_checkpoint_or_name_is_another_first_contact(asking):
    asking.engine(asking.serve())
    asking.engine(asking.serve(shift=0.5), weights="v" * 64)
    asking.engine(asking.serve(shift=0.5, model="n"))
    assert len(list(asking.records.iterdir())) == 3


def test_a_server_without_log_probabilities_is_flagged_and_cannot_replace_one_that_had_them(asking):
    assert asking.engine(asking.serve(logprobs=False)).flags == (UNVERIFIED, NO_FINGERPRINT)
    asking.engine(asking.serve())
    with pytest.raises(EngineError, match="gave log probabilities at first contact and gives none now"):
        asking.engine(asking.serve(logprobs=False))


def test_a_damaged_fingerprint_is_an_error_with_its_file(asking):
    asking.engine(asking.serve())
    (path,) = asking.records.iterdir()
    path.write_text('{"schema": 1}')
    with pytest.raises(StoreError, match=f"{path.name}: not a fingerprint of this version"):
        asking.engine(asking.serve())


def test_the_distance_of_two_readings_counts_tokens_that_one_lacks_as_its_lowest():
    assert distance({"a": -1.0, "b": -2.0}, {"a": -1.0, "b": -2.0}) == 0
    assert distance({"a": -1.0, "b": -2.0}, {"a": -1.5, "b": -2.5}) == pytest.approx(0.5)
    assert distance({"a": -1.0, "b": -2.0}, {"a": -1.0, "c": -3.0}) == pytest.approx((0 + 1 + 1) / 3)
