"""What a suite may say of servers, and what of it is part of the keys. Nothing here asks one."""

import pytest
from test_vllm_suite import ENGINE, keys

from harness.errors import SuiteError
from harness.schema_server import url_mistakes
from harness.suite import load_suite

LAUNCHED = '[engine]\nkind = "server"\nkernels = "w4a4_emulation"\nargs = { max_num_seqs = 8, concurrency = 4 }'
OWN = '[engine]\nkind = "server"\nkernels = "w4a4_emulation"\nlaunch = { command = ["serve", "{folder}", "--port={port}"], startup_s = 60 }'
GIVEN = '[engine]\nkind = "server"'
URL = "http://host:8000/v1"
SECRET = "sk-123"


def with_engine(tiny_suite, engine, endpoints=None):
    """The tiny suite with another engine, and endpoints by variant."""
    text = tiny_suite.read_text().replace(ENGINE, engine)
    for name, endpoint in (endpoints or {}).items():
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\nendpoint = {endpoint}\n')
    tiny_suite.write_text(text)
    return tiny_suite


def endpoint(name, **changes):
    given = {"url": f"http://{name}:8000/v1", "model": name} | changes
    return "{ " + ", ".join(f'{key} = "{value}"' for key, value in given.items()) + " }"


def everywhere(**changes):
    return {name: endpoint(name, **changes) for name in ("bf16", "ptq", "qat", "qad")}


def test_a_server_may_be_launched_by_default_by_a_command_or_be_there(tiny_suite, tmp_path):
    text = tiny_suite.read_text()
    assert load_suite(with_engine(tiny_suite, LAUNCHED)).engine.launch is None
    tiny_suite.write_text(text)
    assert load_suite(with_engine(tiny_suite, OWN)).engine.launch.command == ("serve", "{folder}", "--port={port}")
    tiny_suite.write_text(text)
    given = load_suite(with_engine(tiny_suite, GIVEN, everywhere(api_key_env="SOME_KEY")))
    assert {v.name: v.endpoint.url for v in given.variants}["qat"] == "http://qat:8000/v1"
    assert given.variants[0].endpoint.api_key_env == "SOME_KEY"


@pytest.mark.parametrize(
    ("engine", "endpoints", "message"),
    [
        ('[engine]\nkind = "server"', {}, 'engine.kernels: missing; kind = "server" needs it'),
        ('[engine]\nkind = "hf"\nlaunch = {}', {}, 'engine.launch: has no effect with kind = "hf"'),
        ('[engine]\nkind = "hf"', {"bf16": endpoint("bf16")}, r'variant\[0\].endpoint: has no effect with engine.kind = "hf"'),
        (OWN.replace("{port}", "80"), {}, r"engine.launch.command: \{port\} is missing; placeholders: \{folder\}, \{host\}"),
        (OWN.replace("{folder}", "x"), {}, r"engine.launch.command: \{folder\} is missing"),
        (
            OWN + "\nargs = { max_num_seqs = 8 }",
            {},
            "max_num_seqs: has no effect: the command is your own; allowed: concurrency",
        ),
        (
            OWN.replace("startup_s = 60", "startup_s = 0"),
            {},
            "engine.launch.startup_s: found 0; input should be greater than 0",
        ),
        (OWN.replace("startup_s", "startup"), {}, "engine.launch.startup: unknown key; did you mean startup_s"),
        (LAUNCHED.replace("= 4", "= 0"), {}, "engine.args.concurrency: found 0; allowed: a positive integer"),
        (
            LAUNCHED.replace("concurrency = 4", "timeout_s = -1"),
            {},
            "timeout_s: found -1; allowed: a positive number, in seconds",
        ),
        (LAUNCHED.replace("concurrency = 4", "retries = -1"), {}, "retries: found -1; allowed: a whole number, 0 or more"),
        (GIVEN, {"bf16": endpoint("bf16")}, r'variant\[1\].endpoint: missing; variant "bf16" has one: give one to every'),
        (GIVEN + "\nlaunch = {}", everywhere(), "engine.launch: has no effect: the variants name endpoints"),
        (GIVEN + "\nargs = { max_num_seqs = 8 }", everywhere(), "max_num_seqs: has no effect: the server is not started by"),
        (
            GIVEN,
            everywhere() | {"ptq": endpoint("bf16")},
            r'variant\[1\].endpoint: the same server and model as of variant "bf16"',
        ),
        (GIVEN, everywhere(api_key_env="sk-123"), r"endpoint.api_key_env: not a variable's name .*; never the key itself"),
        (GIVEN, everywhere(api_key="sk-123"), "endpoint.api_key: unknown key; did you mean api_key_env"),
        (GIVEN, everywhere(url="http://me:sk-123@host/v1"), "endpoint.url: a user, password, query or fragment in it"),
        (
            GIVEN,
            everywhere(url="host:8000"),
            "endpoint.url: found 'host:8000'; allowed: an address such as http://localhost:8000/v1",
        ),
    ],
)
def test_a_mistake_about_servers_is_a_line_without_any_key(tiny_suite, engine, endpoints, message):
    with pytest.raises(SuiteError, match=message) as caught:
        load_suite(with_engine(tiny_suite, engine, endpoints))
    assert SECRET not in str(caught.value)


JUDGE = """
[judge]
path = "x"
engine = {{ kind = "{kind}"{more} }}
endpoint = {endpoint}
"""


@pytest.mark.parametrize(
    ("kind", "more", "changes", "message"),
    [
        ("hf", "", {}, 'judge.endpoint: has no effect with judge.engine.kind = "hf"'),
        ("server", ", launch = {}", {}, "judge.engine.launch: has no effect: the judge has an endpoint"),
        (
            "server",
            ", args = { max_num_seqs = 8 }",
            {},
            "judge.engine.args.max_num_seqs: has no effect: the server is not started",
        ),
        ("server", "", {"url": "http://me:sk-123@host/v1"}, "judge.endpoint.url: a user, password"),
    ],
)
def test_a_mistake_about_the_server_of_a_judge_is_a_line_too(tiny_suite, kind, more, changes, message):
    judge = JUDGE.format(kind=kind, more=more, endpoint=endpoint("judge", **changes))
    tiny_suite.write_text(tiny_suite.read_text().replace('name = "mini_math"', 'name = "aa_lcr"') + judge)
    with pytest.raises(SuiteError, match=message) as caught:
        load_suite(tiny_suite)
    assert SECRET not in str(caught.value)


def test_an_endpoint_serves_one_checkpoint(tiny_suite):
    with_engine(tiny_suite, GIVEN, everywhere())
    text = tiny_suite.read_text()
    tiny_suite.write_text(text.replace('method = "qad"', 'method = "qad"\nseeds = [1, 2]'))
    with pytest.raises(SuiteError, match=r"variant\[3\].endpoint: serves one checkpoint, but seeds make 2 of them"):
        load_suite(tiny_suite)
    selecting = 'select = "best_of_k"\nselect_tasks = ["mini_math"]\nvalidate_every = 5\nlr = 1e-3'
    tiny_suite.write_text(text.replace("lr = 1e-3", selecting))
    with pytest.raises(
        SuiteError, match=r'variant\[2\].endpoint: serves one checkpoint, but select = "best_of_k" asks several'
    ):
        load_suite(tiny_suite)


def test_how_a_server_is_asked_is_no_part_of_the_keys_and_what_it_is_started_with_is(tiny_suite, tmp_path):
    text = tiny_suite.read_text()

    def found(engine):
        tiny_suite.write_text(text)
        return keys(with_engine(tiny_suite, engine), tmp_path)

    before = found(LAUNCHED)
    assert found(LAUNCHED.replace("concurrency = 4", "timeout_s = 9, retries = 1")) == before
    assert found(LAUNCHED + "\nlaunch = { startup_s = 9 }") == before
    assert found(LAUNCHED.replace("max_num_seqs = 8", "max_num_seqs = 9")) != before
    own = found(OWN)
    assert own != before and found(OWN.replace("= 60", "= 61")) == own
    assert found(OWN.replace('"serve"', '"serve", "--eager"')) != own


def test_where_an_endpoint_is_and_its_key_are_no_part_of_the_keys_and_its_model_is(tiny_suite, tmp_path):
    text = tiny_suite.read_text()

    def found(endpoints):
        tiny_suite.write_text(text)
        return keys(with_engine(tiny_suite, GIVEN, endpoints), tmp_path)

    before = found(everywhere())
    assert found(everywhere() | {"qad": endpoint("qad", url="http://elsewhere/v1", api_key_env="SOME_KEY")}) == before
    after = found(everywhere() | {"qad": endpoint("qad", model="other")})
    changed = {label for label in before if before[label] != after[label]}
    assert changed and all(label.startswith("qad: mini") for label in changed)


def test_one_checkpoint_under_one_model_name_at_two_addresses_is_refused(tiny_suite, tmp_path):
    text = tiny_suite.read_text().replace("[[task]]", '[[variant]]\nname = "again"\nmethod = "ptq"\n\n[[task]]', 1)
    tiny_suite.write_text(text)
    with_engine(tiny_suite, GIVEN, everywhere() | {"again": endpoint("again", model="ptq")})
    with pytest.raises(
        SuiteError, match='"ptq" and "again": the same checkpoint under the same model name "ptq" at two addresses'
    ):
        keys(tiny_suite, tmp_path)
    tiny_suite.write_text(text)
    assert keys(with_engine(tiny_suite, GIVEN, everywhere() | {"again": endpoint("again")}), tmp_path)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://a.example/api/v1/", "http://[::1]:80/v1"])
def test_addresses_of_servers(url):
    assert not list(url_mistakes(url))


@pytest.mark.parametrize(
    "url", ["ftp://a/v1", "http://", "http://a:b/v1", "http://a/v1?key=sk", "http://a/v1#x", "http://u@a/v1", "http://[::1/v1"]
)
def test_what_is_no_address_of_a_server(url):
    (message,) = url_mistakes(url)
    assert "sk" not in message
