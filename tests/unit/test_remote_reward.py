"""A reward service over HTTP: asked again when it fails, and never waited for without an end."""

import contextlib
import json
import socket
import threading
import time

import pytest
import torch.distributed as dist

from lightrft.errors import ConfigError, RewardError
from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy
from lightrft.trainer.experience import Sample
from lightrft.trainer.rewards import RemoteReward, reward_source
from lightrft.trainer.settings import TrainerConfig

SAMPLES = [
    Sample(prompt=f"p{i}", response="é" * i, label={"n": i}, prompt_token_ids=(1,), output_token_ids=(2,))
    for i in range(3)
]


def reply(body, status="200 OK", *headers):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(text)}", *headers, "", ""]
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + text)


def hang(connection):
    with contextlib.suppress(OSError):
        connection.recv(1)  # until the other end closes


def close(connection):
    """The connection ends without an answer."""


def cut(connection):
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"rewards": [1, ')


def drip(text):
    """One byte at a time, for ever: each comes in time, and the whole never does."""

    def answer(connection):
        with contextlib.suppress(OSError):
            connection.sendall(text)
            while True:
                connection.sendall(b"x")
                time.sleep(0.005)

    return answer


@pytest.fixture
def service():
    """Starts a server that answers its connections by the given functions in turn, the last one over and over."""
    started = []

    def start(*answers):
        listener = socket.create_server(("127.0.0.1", 0))
        questions = []

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    questions.append(_question(connection))
                    answers[min(len(questions), len(answers)) - 1](connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        started.append((listener, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/score?model=a", questions

    yield start
    for listener, thread in started:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        assert not thread.is_alive()


def _question(connection):
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(4096)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
    while len(body) < length:
        body += connection.recv(4096)
    return head.decode(), json.loads(body)


def remote(url, **more):
    return RemoteReward(url, **{"timeout": 5.0, "backoff": 0.0, **more})


def test_a_service_is_asked_and_answers(service):
    url, questions = service(reply({"rewards": [0.5, 1, 2], "accuracy": [0, 1, 1]}))
    found = remote(url, headers={"Authorization": "Bearer x"})(SAMPLES)
    assert found.rewards.tolist() == [0.5, 1.0, 2.0]
    assert found.metrics["accuracy"].tolist() == [0, 1, 1]
    ((head, body),) = questions
    assert head.startswith("POST /score?model=a HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Authorization: Bearer x" in head
    assert body == {"prompts": ["p0", "p1", "p2"], "responses": ["", "é", "éé"], "labels": [{"n": i} for i in range(3)]}


def test_a_list_is_an_answer_too(service):
    url, _ = service(reply([1, 2, 3]))
    assert remote(url)(SAMPLES).rewards.tolist() == [1, 2, 3]


def test_many_samples_are_several_requests(service):
    url, questions = service(reply([1, 2]), reply([3]))
    assert remote(url, batch_size=2)(SAMPLES).rewards.tolist() == [1, 2, 3]
    assert [len(body["prompts"]) for _, body in questions] == [2, 1]


def test_k11_nobody_is_asked_for_nothing():
    assert remote("http://127.0.0.1:1/")([]).rewards.shape == (0,)


@pytest.mark.parametrize(
    "trouble",
    [
        close, cut, reply({}, "503 Service Unavailable"), reply({}, "429 Too Many Requests"), reply(b"<html>"),
        reply([1]), reply({"score": [1, 2, 3]}), reply([1, 2, None]), reply(b'{"rewards": [1, 2, NaN]}'),
        lambda connection: connection.sendall(b"nonsense\r\n\r\n"),
    ],
    ids=["close", "cut", "503", "429", "html", "too few", "no rewards", "null", "NaN", "no HTTP"],
)  # fmt: skip
def test_an_attempt_that_fails_is_repeated(trouble, service):
    url, questions = service(trouble, trouble, reply([1, 2, 3]))
    assert remote(url)(SAMPLES).rewards.tolist() == [1, 2, 3]
    assert len(questions) == 3


def told(url, samples=SAMPLES, **more):
    with pytest.raises(RewardError) as error:
        remote(url, attempts=2, **more)(samples)
    return str(error.value)


def test_the_error_names_address_attempts_and_last_answer(service):
    url, _ = service(reply({"error": "no such model"}, "500 Internal Server Error"))
    assert told(url) == (
        f"the reward service {url} gave no rewards for 3 samples in 2 of 2 attempts of up to 5 s: the last time it "
        'answered with status 500: \'{"error": "no such model"}\''
    )


def test_the_last_answer_counts(service):
    url, _ = service(close, reply(b"<html>it works"))
    assert "the last time it answered '<html>it works', which are no rewards" in told(url)


def test_nobody_there_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert "the last time the connection failed (ConnectionRefusedError" in told(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "slow",
    [
        hang,
        drip(b""),
        drip(b"HTTP/1.1 200 OK\r\nX: "),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"),
    ],
    ids=["hang", "status", "header", "body"],
)
def test_a_service_that_hangs_or_drips_is_given_up_in_time(slow, service):
    url, questions = service(slow)
    begin = time.monotonic()
    message = told(url, timeout=0.05)
    assert time.monotonic() - begin < 2
    assert message.endswith("in 2 of 2 attempts of up to 0.05 s: the last time it did not answer in time")
    assert len(questions) == 2


def test_a_request_that_is_wrong_is_not_repeated(service):
    url, questions = service(reply({"error": "bad"}, "400 Bad Request"))
    assert "in 1 of 2 attempts" in told(url)
    assert len(questions) == 1


def test_pauses_grow_and_the_service_may_ask_for_longer_ones(service, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    url, _ = service(close, close, reply({}, "503 Busy", "Retry-After: 7"), reply({}, "503 Busy", "Retry-After: 999"),
                     reply([1, 2, 3]))  # fmt: skip
    remote(url, backoff=1.0, most_backoff=10.0)(SAMPLES)
    assert len(pauses) == 4
    assert 1 <= pauses[0] <= 1.5
    assert 2 <= pauses[1] <= 3
    assert pauses[2:] == [7.0, 10.0]


def test_labels_that_are_no_json_are_told():
    bad = [Sample(prompt="", response="", label=object(), prompt_token_ids=(), output_token_ids=(1,))]
    with pytest.raises(RewardError, match="cannot be sent to http://h/ as JSON"):
        remote("http://h/")(bad)


@pytest.mark.parametrize("url", ["localhost:80", "ftp://a/", "http://"])
def test_an_address_that_is_none_is_told(url):
    with pytest.raises(ConfigError, match="expected http://host:port/path"):
        RemoteReward(url)


def test_numbers_that_cannot_work_are_told():
    with pytest.raises(ConfigError, match="attempts=0"):
        RemoteReward("http://h/", attempts=0)


def test_k10_a_service_that_fails_one_rank_is_an_error_on_all(service):
    """On simulated ranks, where pauses take no time and services are as real as ever."""
    good, _ = service(close, reply([1, 2, 3]))
    bad, _ = service(hang)

    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 2})
        rewards = reward_source(remote(good, backoff=20.0), strategy, TrainerConfig())(SAMPLES)
        assert rewards.rewards.tolist() == [1, 2, 3]
        url = [good, bad][strategy.get_rank()]
        with pytest.raises(RewardError, match=f"rank 1: the reward service {bad[:20]}.* it did not answer in time"):
            reward_source(remote(url, attempts=2, timeout=0.05), strategy, TrainerConfig())(SAMPLES)
        dist.destroy_process_group()

    begin = time.monotonic()
    SimWorld(2, stall_limit=15).run(program)
    assert time.monotonic() - begin < 10
