"""The judge, against a server on the loopback address that the test writes itself."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError

from artifacts import open_store
from artifacts.errors import DataError, RequestError, StageError
from stages.rollouts.judge import Judge
from stages.rollouts.judge_server import Retries
from stages.rollouts.rewards import RewardSet
from tests.rollouts.scored import prompts, score
from tests.rollouts.scored import spec as reward_spec
from tests.waiting import LIMIT_SECONDS

KEY = "sk-secret-of-the-test"


class Server(ThreadingHTTPServer):
    """Answers by `answer(question, times it was asked)`: text, or (status, headers, body)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.answer = lambda question, times: f"Fine.\nScore: {len(question) % 11}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            times = sum(other["messages"][-1]["content"] == question for _, _, other in server.asked)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        said = server.answer(question, times)
        status, headers, text = (200, {}, None) if isinstance(said, str) else said
        if text is None:
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        """The test's output stays quiet."""


@contextmanager
def serving():
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def server(monkeypatch):
    with serving() as made:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{made.url}/")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield made


def judged(texts, rows=None, **parameters):
    parameters = {"model": "m", "template": "{completion}", "backoff_seconds": 0, **parameters}
    return score(RewardSet([spec(parameters)]), rows or prompts("x"), [texts]).totals[0]


def spec(parameters):
    return reward_spec("judge", parameters=parameters)


def test_what_it_asks_and_how_it_reads_the_reply(server):
    # the last verdict counts: 2.5 for every "!", of which a text stands twice in the question
    server.answer = lambda question, times: f"Score: 1\nNo, more.\n**Score:** {question.count('!') * 1.25}"
    rows = prompts("42")
    rows[0].row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6 * 7?"}]
    template = "{prompt} / {answer} / {completion} / {completion}"
    found = judged(["!", "{answer}!!!!"], rows, template=template, system="You grade.", sampling={"top_p": 0.5})
    assert found == [0.25, 1.0]
    asked = sorted(server.asked, key=lambda entry: len(entry[2]["messages"][-1]["content"]))
    assert asked[0] == (
        "/v1/chat/completions",
        f"Bearer {KEY}",
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "You grade."},
                {"role": "user", "content": "system: Be brief.\n\nuser: 6 * 7? / 42 / ! / !"},
            ],
            "top_p": 0.5,
        },
    )
    # what a completion holds is never filled in
    assert asked[1][2]["messages"][1]["content"].endswith("/ 42 / {answer}!!!! / {answer}!!!!")


def test_the_scale_and_words(server):
    server.answer = lambda question, times: question
    assert judged(["score: 0", "Score: 10", "Score = 2.5"]) == [0.0, 1.0, 0.25]
    assert judged(["Score: -1", "Score: 1"], minimum=-1.0, maximum=1.0) == [0.0, 1.0]
    words = {"verdict": r"\[\[(\w+)\]\]", "labels": {"good": 1.0, "bad": -1.0}}
    assert judged(["[[bad]] no, [[Good]]", "[[BAD]]"], **words) == [1.0, -1.0]


def test_it_asks_again_after_what_can_pass(server):
    failures = [(503, {}, "busy"), (429, {"Retry-After": "0"}, "slow down"), "Score: 5"]
    server.answer = lambda question, times: failures[times - 1]
    assert judged(["a", "b"]) == [0.5, 0.5]
    assert len(server.asked) == 6


def test_waits_double_unless_the_server_asks_for_another():
    retries = Retries(5, 0.5)
    assert [retries.wait_seconds(failures, None) for failures in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 60.0]
    assert [retries.wait_seconds(1, asked) for asked in ("7", "9999", "Wed, 21 Oct", "-1")] == [7.0, 60.0, 0.5, 0.0]


FAILURES = [
    ((401, {}, f"Incorrect API key provided: {KEY}"), 1, r"status 401: Incorrect API key provided: \*\*\*"),
    ((400, {}, "no such model"), 1, "status 400: no such model"),
    ((500, {}, "down"), 3, r"status 500: down \(tries: 3\)"),
    ((200, {}, "not json"), 1, r"a reply without choices\[0\]\.message\.content: not json"),
    ((200, {}, '{"choices": []}'), 1, r"a reply without choices"),
    ("I cannot tell.", 1, r"found no verdict .* in the judge's reply 'I cannot tell\.'"),
    ("Score: 11", 1, "got verdict 11, which is not from 0 to 10"),
]


@pytest.mark.parametrize(("answer", "tries", "message"), FAILURES)
def test_failures_name_row_and_completion_and_no_key(server, answer, tries, message):
    server.answer = lambda question, times: answer if question == "bad" else "Score: 1"
    with pytest.raises(StageError, match=rf"'judge' .*{message}.*, for row row0, completion 1: 'bad'") as caught:
        judged(["good", "bad"], max_tries=3)
    assert KEY not in str(caught.value) and len(server.asked) == 1 + tries
    assert judged(["good", "bad"], max_tries=1, on_failure="none") == [0.1, None]


def test_a_server_that_does_not_answer(monkeypatch, server):
    wait = threading.Event()
    server.answer = lambda question, times: wait.wait(LIMIT_SECONDS) and ""
    try:
        with pytest.raises(StageError, match=r"got no answer of the judge at 127\.0\.0\.1: (Read|Connect)Timeout"):
            judged(["a"], request_seconds=0.05, max_tries=2)
    finally:
        wait.set()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(StageError, match=r"127\.0\.0\.1: ConnectError: .*\(tries: 2\), for row row0, completion 0"):
        judged(["a"], max_tries=2)


def test_at_most_so_many_requests_at_a_time(server):
    meeting = threading.Barrier(3)

    def answer(question, times):
        meeting.wait(LIMIT_SECONDS)  # passes only when three are here together
        return "Score: 10"

    server.answer = answer
    assert judged([str(number) for number in range(6)], max_concurrent=3) == [1.0] * 6
    assert server.busiest == 3


def test_what_is_missing_is_said_before_anything_runs(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = {"model": "m"}
    with pytest.raises(RequestError, match="OPENAI_BASE_URL, which is not set; set it to one like http"):
        RewardSet([spec(judge)])
    monkeypatch.setenv("OPENAI_BASE_URL", "file:///etc/passwd")
    with pytest.raises(RequestError, match="OPENAI_BASE_URL, which holds no http address"):
        RewardSet([spec(judge)])
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(RequestError, match=r"OPENAI_API_KEY, which is not set.*api_key_variable: null"):
        RewardSet([spec(judge)])
    RewardSet([spec({**judge, "api_key_variable": None})])
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Header: 1")
    with pytest.raises(RequestError, match="OPENAI_API_KEY, which holds characters that no key has") as caught:
        RewardSet([spec(judge)])
    assert KEY not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    RewardSet([spec(judge)])


def test_a_question_is_paid_once_on_a_store(server, tmp_path):
    store = open_store(str(tmp_path / "store"))

    def repeated(texts, row_id="row0"):
        """In a fresh run, whose rows may have other names."""
        rows = prompts("x")
        rows[0].row_id = rows[0].row["row_id"] = row_id
        rewards = RewardSet(
            [spec({"model": "m", "template": "{completion}", "max_tries": 1})], open_shards=store.shards
        )
        return score(rewards, rows, [texts]).totals[0]

    server.answer = lambda question, times: (500, {}, "down") if question == "bad" else f"Score: {len(question)}"
    with pytest.raises(StageError, match="for row row0, completion 1: 'bad'"):
        repeated(["a", "bad", "ccc"])
    assert len(server.asked) == 3
    server.answer = lambda question, times: "Score: 9"
    assert repeated(["a", "bad", "ccc"], "other") == [0.1, 0.9, 0.3]
    assert [body["messages"][-1]["content"] for _, _, body in server.asked[3:]] == ["bad"]
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert everything and KEY.encode() not in everything


def test_two_servers_may_call_their_models_alike(server, tmp_path, monkeypatch):
    def asked(url):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        rewards = RewardSet([spec({"model": "default"})], open_shards=open_store(str(tmp_path / "store")).shards)
        return score(rewards, prompts("x"), [["answer"]]).totals[0]

    with serving() as other:
        server.answer, other.answer = lambda *_: "Score: 2", lambda *_: "Score: 7"
        assert (asked(server.url), asked(other.url), asked(server.url)) == ([0.2], [0.7], [0.2])
        # the same one, however it is written; its password is no part of it
        assert asked(other.url.replace("//", "//user:wordwordword@") + "/?key=keykeykey") == [0.7]
        assert (len(server.asked), len(other.asked)) == (1, 1)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    for text in ("wordword", "keykey", "127.0.0.1"):
        assert not [path for path in kept if text in str(path) or text.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"template": "Is it good?"}, r"template has no \{completion\}"),
        ({"verdict": r"\d"}, "needs one group in brackets"),
        ({"verdict": "("}, "is no regular expression"),
        ({"minimum": 10.0}, "maximum 10 must be above minimum 10"),
        ({"max_tries": 0}, "parameter max_tries"),
        ({"modle": "m"}, r"judge has no parameter 'modle'; did you mean 'model'\?"),
        ({"model": None}, "parameter model"),
    ],
)
def test_parameters_that_cannot_work(parameters, message):
    with pytest.raises(ValidationError, match=message):
        spec({"model": "m", **parameters})


def test_a_column_that_is_not_there(server):
    with pytest.raises(DataError, match=r"template has \{gold\}, but the dataset has no such column; there are comple"):
        judged(["a"], template="{gold} {completion}")


def test_it_looks_at_what_the_template_names():
    judge = Judge(model="m", template="{prompt} {answer} {completion}")
    assert judge.columns_used() == {"prompts", "completions", "answer"}
