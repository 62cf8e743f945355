"""Parts of `segvit serve` in this process: batches, budgets, counts; the application with a slow model."""

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("starlette", reason="comes with the extra serve")

from segvit.config import BackboneConfig, SegViTConfig
from segvit.options import ServeConfig
from segvit.serve import app
from segvit.serve.admission import Budget
from segvit.serve.answers import Answers
from segvit.serve.app import Service
from segvit.serve.asking import Asked
from segvit.serve.batches import Batches
from segvit.serve.http import local_names
from segvit.serve.metrics import Counter, Histogram, exposition


class Waiting:
    """Runs items when it is let, and keeps what ran together."""

    def __init__(self):
        self.go, self.begun, self.ran = threading.Event(), threading.Event(), []

    def __call__(self, key, items):
        self.begun.set()
        assert self.go.wait(30)
        self.ran.append((key, list(items)))
        if "bad" in items:
            raise ValueError("a bad one")
        return [f"{item}!" for item in items]


def batches(function, most=3, most_size=10):
    seen = []
    found = Batches(function, most, most_size, contextlib.nullcontext(), lambda n, seconds: seen.append(n))
    return found, seen


def test_what_waits_and_may_runs_together_the_oldest_first():
    function = Waiting()
    found, seen = batches(function)
    first = found.submit("a", 0, 1)
    function.begun.wait(30)
    futures = [found.submit(key, item, 1) for item, key in enumerate("abaabaa", 1)]
    futures[3].cancel()
    assert len(found) == 7
    function.go.set()
    assert first.result(30).batch == 1
    results = [future.result(30) for number, future in enumerate(futures) if number != 3]
    found.close()
    assert function.ran == [("a", [0]), ("a", [1, 3, 6]), ("b", [2, 5]), ("a", [7])]
    assert [done.result for done in results] == ["1!", "2!", "3!", "5!", "6!", "7!"]
    assert [done.batch for done in results] == [3, 2, 3, 2, 3, 1] and seen == [1, 3, 2, 1]
    assert all(done.waited >= 0 and done.ran >= 0 for done in results)


def test_a_batch_is_no_larger_than_it_may_be():
    function = Waiting()
    found, _ = batches(function)
    futures = [found.submit("x", "0", 1)]
    function.begun.wait(30)
    futures += [
        found.submit("a", item, size) for item, size in (("1", 4), ("2", 4), ("3", 4), ("4", 99), ("5", 2))
    ]
    function.go.set()
    [future.result(30) for future in futures]
    found.close()
    assert [items for _, items in function.ran] == [["0"], ["1", "2", "5"], ["3"], ["4"]]


def test_one_bad_item_fails_alone_and_an_end_cancels_what_waits():
    function = Waiting()
    found, seen = batches(function)
    futures = [found.submit("x", "0", 1)]
    function.begun.wait(30)
    futures += [found.submit("a", item, 1) for item in ("1", "bad", "3")]
    function.go.set()
    assert [futures[i].result(30).result for i in (0, 1, 3)] == ["0!", "1!", "3!"]
    with pytest.raises(ValueError, match="a bad one"):
        futures[2].result(30)
    assert seen == [1, 1, 1]
    function.go.clear()
    function.begun.clear()
    running = found.submit("a", "4", 1)
    function.begun.wait(30)
    left = found.submit("a", "5", 1)
    closing = threading.Thread(target=found.close)
    closing.start()
    while not left.cancelled():
        closing.join(0.01)
    function.go.set()
    closing.join(30)
    assert running.result(30).result == "4!"
    with pytest.raises(RuntimeError, match="closed"):
        found.submit("a", "6", 1)


def test_what_ran_out_of_memory_lets_go_of_it():
    """The error of a batch while its items run by themselves, and that of an item until it is answered."""
    go, held = threading.Event(), []

    def function(key, items):
        assert go.wait(30) and not [tensor for tensor in held if tensor() is not None]
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if len(items) > 1 or "large" in items:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items

    found, _ = batches(function)
    items = (("x", "0"), ("a", "large"), ("a", "2"), ("b", "3"))
    futures = [found.submit(key, item, 1) for key, item in items]
    go.set()
    with pytest.raises(torch.OutOfMemoryError):
        futures[1].result(30)
    assert [futures[i].result(30).result for i in (0, 2, 3)] == ["0", "2", "3"] and len(held) == 5
    found.close()


def test_shares_are_given_in_order_and_come_back():
    async def run():
        budget, order = Budget(10), []

        async def take(name, amount, wait):
            async with budget.hold(amount):
                order.append(name)
                await wait.wait()

        gates = {name: asyncio.Event() for name in "abcde"}
        tasks = {}
        for name, amount in (("a", 6), ("b", 6), ("c", 1), ("d", 99), ("e", 1)):
            tasks[name] = asyncio.create_task(take(name, amount, gates[name]))
            await asyncio.sleep(0)
        assert order == ["a"] and budget.left == 4  # c would fit, and does not overtake
        tasks["b"].cancel()
        await asyncio.sleep(0.01)
        assert order == ["a", "c"]
        gates["a"].set()
        gates["c"].set()
        await asyncio.sleep(0.01)
        assert order == ["a", "c", "d"] and budget.left == 0  # more than there is counts as all
        gates["d"].set()
        gates["e"].set()
        await asyncio.gather(*(tasks[name] for name in "acde"))
        assert order == list("acde") and budget.left == 10 and not budget.waiting
        # Cancelled in the moment in which its turn came.
        held = budget.hold(10)
        await held.__aenter__()
        late = asyncio.create_task(take("f", 5, asyncio.Event()))
        await asyncio.sleep(0)
        await held.__aexit__(None, None, None)
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        assert budget.left == 10

    asyncio.run(run())


def test_exposition():
    counter, times = Counter("x_total", "X.", ("path",)), Histogram("y", "Y.", (0.5, 1), ("part",))
    counter.add('a"\\\n')
    counter.add("b")
    counter.add("b")
    for value in (0.5, 0.75, 3):
        times.add(value, "p")
    assert exposition([counter, times, Counter("z_total", "Z.")]) == (
        "# HELP x_total X.\n# TYPE x_total counter\n"
        'x_total{path="a\\"\\\\\\n"} 1\nx_total{path="b"} 2\n'
        "# HELP y Y.\n# TYPE y histogram\n"
        'y_bucket{part="p",le="0.5"} 1\ny_bucket{part="p",le="1"} 2\ny_bucket{part="p",le="+Inf"} 3\n'
        'y_sum{part="p"} 4.250000\ny_count{part="p"} 3\n'
        "# HELP z_total Z.\n# TYPE z_total counter\nz_total 0\n"
    )


def test_more_classes_than_a_byte_holds():
    palette = np.random.default_rng(0).integers(0, 256, (300, 3), dtype=np.uint8)
    answers = Answers([f"class {i}" for i in range(300)], palette, False)
    labels = np.array([[0, 299], [299, 299]], np.int16)
    asked = Asked(b"", include=("colors",))
    answer = answers.prediction(asked, torch.zeros(3, 2, 2, dtype=torch.uint8), labels)
    pictures = {
        kind: np.asarray(Image.open(io.BytesIO(base64.b64decode(answer[kind]))))
        for kind in ("labels", "colors")
    }
    np.testing.assert_array_equal(pictures["labels"], labels)
    np.testing.assert_array_equal(pictures["colors"], palette[labels])
    assert [(c["index"], c["share"]) for c in answer["classes"]] == [(299, 0.75), (0, 0.25)]


# The application


class Model:
    """Labels of zeros, when it is let."""

    config = SegViTConfig(BackboneConfig(width=32, depth=2, heads=2, patch_size=8), 3, taps=(0, 1))

    def __init__(self):
        self.go, self.begun = threading.Event(), threading.Event()
        self.sizes, self.problem = [], None

    def predict(self, images, options):
        self.begun.set()
        assert self.go.wait(30)
        self.sizes.append(len(images))
        if self.problem is not None:
            raise self.problem
        return torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.uint8)


def picture(height=8, width=16):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def serving(**options):
    model = Model()
    service = Service(model, ServeConfig(checkpoint="x", **options), "x", similarity=False)
    try:
        yield service, model
    finally:
        model.go.set()
        service.close()


async def ask(
    service, path, data=None, *, query=b"", host="localhost", headers=(), gone=None, reads=None, sent=None
):
    """Status, headers and body; `gone` is set when the client is to leave, `reads` when it is to read.

    `sent` gets the messages of the answer.
    """
    body = b""
    if data is not None:
        head = b'--edge\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        body = head + data + b"\r\n--edge--\r\n"
    named = {
        "host": host,
        "content-length": str(len(body)),
        "content-type": "multipart/form-data; boundary=edge",
        **dict(headers),
    }
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET" if data is None else "POST", "path": path,
        "raw_path": path.encode(), "query_string": query, "root_path": "", "scheme": "http",
        "headers": [(k.encode(), v.encode()) for k, v in named.items()],
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent = [] if sent is None else sent

    async def receive():
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if reads is not None:
            await reads.wait()
        sent.append(message)

    await service(scope, receive, send)
    return answered(sent)


def answered(sent):
    """What the messages of an answer say; None where there are none."""
    if not sent:
        return None
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    body = b"".join(message["body"] for message in sent[1:])
    return SimpleNamespace(status=sent[0]["status"], headers=found, body=body)


async def later(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def counts(service):
    return {tuple(re.findall(r'"(.*?)"', line)): int(line.split()[-1]) for line in service.requests.lines()}


def test_the_loop_goes_on_while_the_model_runs():
    """Others are answered; what comes meanwhile runs together; whoever goes is not waited for."""

    async def run():
        with serving(batch=4) as (service, model):
            gone = asyncio.Event()
            tasks = [asyncio.create_task(ask(service, "/predict", picture()))]
            await later(model.begun.is_set)
            tasks += [asyncio.create_task(ask(service, "/predict", picture())) for _ in range(3)]
            leaving = asyncio.create_task(ask(service, "/predict", picture(), gone=gone))
            other = asyncio.create_task(ask(service, "/predict", picture(24, 8)))
            await later(lambda: len(service.batches) == 5)
            health = await ask(service, "/healthz")
            assert json.loads(health.body) == {"status": "ok", "model": "x"}
            assert b"segvit_queue_length 5\n" in (await ask(service, "/metrics")).body
            gone.set()
            assert await leaving is None
            model.go.set()
            answers = await asyncio.gather(*tasks, other)
            assert [answer.status for answer in answers] == [200] * 5
            assert [json.loads(answer.body)["batch"] for answer in answers] == [1, 3, 3, 3, 1]
            assert model.sizes == [1, 3, 1] and service.at_hand == 0
            assert service.pixels.left == service.pixels.total and service.bodies.left == service.bodies.total
            assert counts(service)["/predict", "499"] == 1 and counts(service)["/predict", "200"] == 5

    asyncio.run(run())


def test_time_and_room_come_to_an_end():
    async def run():
        with serving(queue=2, timeout=1.5) as (service, model):
            tasks = [asyncio.create_task(ask(service, "/predict", picture())) for _ in range(2)]
            await later(lambda: service.at_hand == 2)
            full = await ask(service, "/predict", picture())
            assert (full.status, full.headers["retry-after"]) == (503, "1")
            late = await asyncio.gather(*tasks)
            assert [answer.status for answer in late] == [503, 503]
            assert json.loads(late[0].body)["error"] == "not done within 1.5 seconds"
            model.go.set()
            # A client that does not read its answer has no place for ever.
            stuck = asyncio.create_task(ask(service, "/predict", picture(), reads=asyncio.Event()))
            await later(lambda: service.at_hand == 1)
            await asyncio.wait_for(stuck, 30)
            assert service.at_hand == 0 and service.pixels.left == service.pixels.total

    asyncio.run(run())


def test_a_narrow_picture_of_a_given_short_side():
    """It would become a giant one; and pictures that grow count in a batch as what they become."""

    async def run():
        with serving(short_side=64, max_pixels=64 * 128) as (service, model):
            narrow = await ask(service, "/predict", picture(1, 16))
            assert narrow.status == 413 and service.pixels.left == service.pixels.total
            said = "image: 16x1 pixels, 64x1024 with the short side that the model gets, more than 8192"
            assert json.loads(narrow.body)["error"] == said
            tasks = [asyncio.create_task(ask(service, "/predict", picture(9, 9)))]
            await later(model.begun.is_set)
            tasks += [asyncio.create_task(ask(service, "/predict", picture(8, 8))) for _ in range(3)]
            await later(lambda: len(service.batches) == 3)
            model.go.set()
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 4
            assert model.sizes == [1, 2, 1]

    asyncio.run(run())


def test_what_is_in_memory_at_a_time():
    """Eight decoded pictures of full size, whatever waits; eight bodies of full length."""

    async def run():
        with serving(max_pixels=128, batch=1) as (service, model):
            tasks = [asyncio.create_task(ask(service, "/predict", picture())) for _ in range(12)]
            await later(lambda: service.at_hand == 12 and len(service.pixels.waiting) == 4)
            await later(lambda: len(service.batches) == 7)  # and one that runs
            model.go.set()
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 12
        with serving(max_bytes=1000, batch=1) as (service, model):
            headers = [("content-length", str(1000 + (1 << 16)))]
            tasks = [
                asyncio.create_task(ask(service, "/predict", picture(), headers=headers)) for _ in range(12)
            ]
            await later(lambda: service.at_hand == 12 and len(service.bodies.waiting) == 4)
            await later(lambda: len(service.batches) == 7)
            model.go.set()
            assert [answer.status for answer in await asyncio.gather(*tasks)] == [200] * 12

    asyncio.run(run())


def test_work_is_not_done_in_the_loop(monkeypatch):
    seen = {}

    def noting(name, function):
        def noted(*arguments, **named):
            seen[name] = threading.current_thread().name.split("_")[0]
            return function(*arguments, **named)

        return noted

    for name in ("read_request", "probe", "read_image"):
        monkeypatch.setattr(f"segvit.serve.app.{name}", noting(name, getattr(app, name)))
    monkeypatch.setattr(Answers, "prediction", noting("prediction", Answers.prediction))
    monkeypatch.setattr(Model, "predict", noting("predict", Model.predict))

    async def run():
        with serving() as (service, model):
            model.go.set()
            assert (await ask(service, "/predict", picture())).status == 200

    asyncio.run(run())
    others = dict.fromkeys(("read_request", "probe", "read_image", "prediction"), "pictures")
    assert seen == {**others, "predict": "model"}


@pytest.mark.parametrize(
    ("problem", "status", "message"),
    [
        (ValueError("scales: too many"), 422, "scales: too many"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), 422, "not enough memory; try smaller"),
        (RuntimeError("something else"), 500, "a fault of the server; its log has more"),
    ],
)
def test_what_goes_wrong_in_the_model_is_answered(problem, status, message, capsys):
    async def run():
        with serving() as (service, model):
            model.go.set()
            model.problem = problem
            sent = []
            with contextlib.nullcontext() if status < 500 else pytest.raises(RuntimeError, match="something"):
                await ask(service, "/predict", picture(), sent=sent)
            answer = answered(sent)
            assert answer.status == status and json.loads(answer.body)["error"].startswith(message)
            assert ("Traceback" in capsys.readouterr().err) == (status == 500)
            model.problem = None
            assert (await ask(service, "/predict", picture())).status == 200

    asyncio.run(run())


def test_a_linear_head_has_no_similarity_maps():
    async def run():
        with serving() as (service, _):
            assert json.loads((await ask(service, "/model")).body)["similarity"] is False
            answer = await ask(service, "/similarity", picture(), query=b"class=0")
            assert answer.status == 422
            assert json.loads(answer.body)["error"].endswith("decoder has no similarity maps")

    asyncio.run(run())


def test_names_of_the_server():
    """Only a server that others cannot reach knows what it may be called."""
    assert local_names("0.0.0.0") is None and local_names("192.0.2.1") is None
    assert {"localhost", "127.0.0.1", "::1"} == local_names("127.0.0.1") and "127.0.0.2" in local_names(
        "127.0.0.2"
    )
    for host in ("LOCALHOST", "0:0:0:0:0:0:0:1", "127.1"):  # written in another way
        assert {"localhost", "127.0.0.1", "::1", host.lower()} == local_names(host)
    assert local_names("no such name") is None

    async def run():
        for host, name, status in (
            ("127.0.0.1", "LocalHost:8000", 200),
            ("127.0.0.1", "[::1]:8000", 200),
            ("127.0.0.1", "[::1]", 200),
            ("127.0.0.1", "localhost.evil.example", 421),
            ("127.0.0.1", "", 421),
            ("0.0.0.0", "street.example", 200),
        ):
            with serving(host=host) as (service, _):
                assert (await ask(service, "/healthz", host=name)).status == status, name
        with serving() as (service, _):
            page = await ask(service, "/", headers=[("origin", "http://localhost")])
            assert page.status == 200 and "default-src 'none'" in page.headers["content-security-policy"]
            assert (await ask(service, "/", headers=[("origin", "null")])).status == 403

    asyncio.run(run())
