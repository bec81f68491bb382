"""The server under load: many clients, slow clients, full queues, failures and signals."""

import asyncio
import http.client
import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="pip install fastapi uvicorn")

import serve  # noqa: E402
from tests.serving import (  # noqa: E402
    WHOLE,
    Server,
    make_body,
    make_scorer,
    raw_request,
    write_checkpoint,
)
from util.request_bodies import FewAtOnce  # noqa: E402

pytestmark = pytest.mark.usefixtures("starts_at_once")


def test_a_request_that_fails_does_not_fail_its_neighbours(tiny_positions):
    batcher = serve.RequestBatcher(make_scorer(write_checkpoint(WHOLE)))
    good = batcher.scorer.read(json.dumps(make_body()).encode())
    bad = good._replace(images=[{"images": torch.zeros(4, 7)}])
    answers = batcher.score([good, bad, good])
    assert isinstance(answers[1], Exception) and answers[0] == answers[2]
    assert answers[0].keys() == {"sim_t2i", "sim_i2t"} and batcher.score([]) == []


def test_a_refusal_reaches_a_client_that_is_still_sending(tiny_positions):
    server = Server(write_checkpoint(WHOLE), "--max_body_mb", "1", "--max_waiting", "1")
    try:
        large = b" " * (30 * 2**20)
        for _ in range(3):
            status, answer = server.ask(raw=large)
            assert status == 413 and "expected at most 1048576" in answer["error"]
        body = json.dumps(make_body(0, [0] * 250)).encode()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.ask(raw=body), range(40)))
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
    finally:
        server.process.kill()
        server.process.communicate()


def test_replies_on_a_kept_connection_are_not_held_back(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    times = []
    for _ in range(20):
        start = time.monotonic()
        connection.request("GET", "/health")
        assert json.load(connection.getresponse())["status"] == "ok"
        times.append(time.monotonic() - start)
    assert min(times) < 0.03  # a delayed acknowledgement would add 40 ms to each


def test_sigterm_as_soon_as_it_serves(tiny_positions):
    path = write_checkpoint(WHOLE)
    for number in (signal.SIGTERM, signal.SIGINT):
        server = Server(path)
        server.process.send_signal(number)
        out = server.process.communicate(timeout=30)[0]
        assert server.process.returncode == 0 and "Traceback" not in out


def test_a_client_that_leaves_or_is_slow_does_no_harm(tiny_positions):
    server = Server(write_checkpoint(WHOLE), "--timeout", "1")
    head = "host: x\r\ncontent-type: application/json\r\ncontent-length: 100"
    got = raw_request(server, head, b'{"sentence"')  # only a part of the body
    assert b" 408 " in got and b"no whole body in 1 s" in got
    for _ in range(20):
        server.send(f"POST /scan_sentence_image_score HTTP/1.1\r\n{head}\r\n\r\n".encode()).close()
    assert server.ask(make_body())[0] == 200
    status, health = server.ask(path="/health")
    assert health["waiting"] == 0
    code, out = server.stop()
    assert code == 0 and "Traceback" not in out


def test_too_much_at_once_is_refused_and_late_answers_are_named(tiny_positions, monkeypatch):
    scorer = make_scorer(write_checkpoint(WHOLE))
    score = scorer.score

    scored = []

    def slowly(queries):
        time.sleep(0.5)
        scored.append(len(queries))
        return score(queries)

    monkeypatch.setattr(scorer, "score", slowly)
    raw = json.dumps(make_body()).encode()

    class Request:
        headers = {"content-type": "application/json"}

        def __init__(self, seconds=60):
            self.seconds = seconds

        async def stream(self):
            yield raw

        async def receive(self):
            await asyncio.sleep(self.seconds)
            return {"type": "http.disconnect"}

    async def go(limits, n, seconds=60):
        scorer.limits = limits
        batcher = serve.RequestBatcher(scorer)
        work = asyncio.create_task(batcher.work())
        answers = await asyncio.gather(
            *(batcher.answer(Request(seconds)) for _ in range(n)), return_exceptions=True
        )
        await asyncio.sleep(1)
        work.cancel()
        assert (batcher.in_flight, batcher.held_bytes) == (0, 0)
        return answers

    answers = asyncio.run(go(serve.Limits(waiting=3), 5))
    refused = [answer for answer in answers if isinstance(answer, serve.Refused)]
    assert [r.status for r in refused] == [503, 503]
    assert len([a for a in answers if isinstance(a, dict)]) == 3
    answers = asyncio.run(go(serve.Limits(held_bytes=2 * len(raw)), 3))
    assert sorted(getattr(a, "status", 200) for a in answers) == [200, 200, 503]
    answers = asyncio.run(go(serve.Limits(seconds=0.2), 2))
    assert [a.status for a in answers] == [504, 504]
    scored.clear()
    answers = asyncio.run(go(serve.Limits(batch=1), 4, seconds=0.2))  # all clients have left
    assert all(isinstance(a, serve.ClientDisconnect) for a in answers)
    assert sum(scored) == 1  # the others were still waiting


def test_the_worker_outlives_a_failure(tiny_positions, monkeypatch):
    batcher = serve.RequestBatcher(make_scorer(write_checkpoint(WHOLE)))
    raw = bytearray(json.dumps(make_body()).encode())
    submit = batcher.worker.submit

    def once(*args):
        monkeypatch.setattr(batcher.worker, "submit", submit)
        raise RuntimeError("can't start new thread")

    async def go():
        work = asyncio.create_task(batcher.work())
        monkeypatch.setattr(batcher.worker, "submit", once)
        with pytest.raises(RuntimeError, match="new thread"):
            await batcher.scores(raw)
        answer = await batcher.scores(raw)
        work.cancel()
        return answer

    assert len(asyncio.run(asyncio.wait_for(go(), 20))["sim_t2i"]) == 15  # it does not hang


def test_many_clients_and_sigterm_with_requests_in_flight(server):
    bodies = [make_body(c, range(c % 5, 15)) for c in range(12)]
    want = [server.ask(body)[1] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        for _ in range(3):
            for got, one in zip(pool.map(server.ask, bodies), want, strict=True):
                assert got[0] == 200
                for name in one:
                    np.testing.assert_allclose(got[1][name], one[name], rtol=0, atol=2e-6)

        # 24 requests have sent everything except their last byte when the signal arrives.
        data = json.dumps(make_body(0, [k % 15 for k in range(200)])).encode()
        connections, sent = [], threading.Barrier(25)
        for _ in range(24):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.putrequest("POST", "/scan_sentence_image_score")
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(data)))
            connection.endheaders(data[:-1])
            connections.append(connection)

        def finish(connection):
            sent.wait()
            connection.send(data[-1:])
            reply = connection.getresponse()
            return reply.status, len(json.load(reply)["sim_t2i"])

        with ThreadPoolExecutor(24) as many:
            replies = [many.submit(finish, connection) for connection in connections]
            while server.ask(path="/health")[1]["waiting"] < 24:
                time.sleep(0.02)
            sent.wait()
            server.process.send_signal(signal.SIGTERM)
            assert [reply.result() for reply in replies] == [(200, 200)] * 24
    code, out = server.process.wait(60), server.process.stdout.read()
    assert code == 0 and "Traceback" not in out and out.endswith("stopped\n")


def test_few_requests_are_worked_on_at_once():
    """In order, and one whose client does not read its answer keeps nobody waiting."""
    working, most, order = set(), 0, []

    async def work(scope, receive, send):
        nonlocal most
        working.add(scope["path"])
        most = max(most, len(working))
        order.append(scope["path"])
        for _ in range(3):
            await asyncio.sleep(0)
        working.remove(scope["path"])
        await send({"type": "http.response.start"})
        await send({"type": "http.response.body"})

    async def unread(message):
        await asyncio.sleep(60)

    async def read(message):
        pass

    async def go():
        app = FewAtOnce(work, most=2)

        def ask(path, send, method="GET"):
            return asyncio.ensure_future(
                app({"type": "http", "method": method, "path": path}, None, send)
            )

        slow = [ask(f"slow {k}", unread) for k in range(4)]
        await asyncio.wait_for(asyncio.gather(*(ask(f"{k}", read) for k in range(20))), 10)
        assert most == 2 and order == [f"slow {k}" for k in range(4)] + [f"{k}" for k in range(20)]
        gone = [ask(f"gone {k}", read) for k in range(4)]  # waiting, or at work
        await asyncio.sleep(0)
        for task in (*gone, *slow):
            task.cancel()
        await asyncio.gather(*gone, *slow, return_exceptions=True)
        working.clear()
        await asyncio.wait_for(ask("last", read), 10)
        bodies = [ask(f"body {k}", read, "POST") for k in range(9)]  # not counted here
        await asyncio.gather(*bodies)
        assert most == 9

    asyncio.run(go())
