"""`segvit serve`: as a process of its own on the loopback address, under load, with rubbish, in a browser."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import named_model as tiny_model

from segvit.cli import main
from segvit.data.pictures import PictureBytes, TooLargeError, probe, read_image
from segvit.inference.similarity import similarity_maps
from segvit.model.heads import load_model
from segvit.pictures.visualize import overlay_with_legend, similarity_panels, similarity_picture

pytest.importorskip("starlette", reason="comes with the extra serve")

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = "/usr/bin/chromium"
MAX_BYTES, MAX_PIXELS = 1 << 18, 1 << 16


def drawn(seed: int, height: int, width: int) -> np.ndarray:
    """A picture (height, width, 3) of more than one class."""
    coarse = np.random.default_rng(seed).integers(
        0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8
    )
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


PIXELS = drawn(0, 40, 60)
PNG = encoded(PIXELS)


def form(*fields: tuple[str, bytes | str], filename: str = "x.png") -> tuple[bytes, dict[str, str]]:
    """A form's body and its headers."""
    body = b""
    for name, value in fields:
        value = value.encode() if isinstance(value, str) else value
        file = f'; filename="{filename}"' if name == "image" else ""
        body += (
            f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
            + value
            + b"\r\n"
        )
    return body + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}


class Server:
    """A server as a process.

    Attributes:
        port: where it listens.
        sent: how many requests `ask` has sent.
    """

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [sys.executable, "-m", "segvit", "serve", str(checkpoint), "--port", "0", *options]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*command, "--accelerator", "cpu"],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.first = self.process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+) \(from this machine only; ", self.first)
        assert found, self.process.communicate(timeout=60)
        self.port, self.sent, self.lock = int(found[1]), 0, threading.Lock()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        with self.lock:
            self.sent += 1
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def predict(self, picture: bytes, path: str = "/predict", *fields: tuple[str, str]) -> dict:
        status, _, answer = self.ask(path, *form(("image", picture), *fields))
        assert status == 200, answer
        return json.loads(answer)

    def raw(self, data: bytes, *, after: bytes = b"", times: int = 0) -> bytes:
        """What comes back for bytes on a connection, `after` sent again and again until it does."""
        with self.lock:
            self.sent += 1
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            with contextlib.suppress(OSError):
                for _ in range(times):
                    connection.sendall(after)
            got = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):
                    got += part
                    if b'"error"' in got or b"Invalid" in got:
                        break
            return got

    def memory(self) -> int:
        """The largest resident memory so far, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) >> 10

    def metrics(self) -> dict[str, float]:
        lines = self.ask("/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, stdout and stderr after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint).eval().fuse()


@pytest.fixture(scope="module")
def server(checkpoint):
    limits = ["--max-bytes", str(MAX_BYTES), "--max-pixels", str(MAX_PIXELS), "--timeout", "30"]
    with Server(checkpoint, *limits) as found:
        yield found
        code, out, err = found.end(signal.SIGINT)
    assert (code, err) == (0, "") and out.endswith("ended\n")


def stored(data: bytes | str) -> np.ndarray:
    data = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(data)))


def test_answers_are_those_of_predict(server, model, tmp_path):
    """Labels, legend, overlay, similarity maps: of forms and of JSON, as JSON and as PNG."""
    (tmp_path / "x.png").write_bytes(PNG)
    truth = model.predict(tmp_path / "x.png").numpy()
    assert len(np.unique(truth)) > 1
    answer = server.predict(PNG, "/predict", ("include", "colors,picture"))
    np.testing.assert_array_equal(stored(answer["labels"]), truth)
    np.testing.assert_array_equal(stored(answer["picture"]), PIXELS)
    assert (answer["width"], answer["height"]) == (60, 40)
    shares = {entry["index"]: entry["share"] for entry in answer["classes"]}
    assert shares == {int(i): pytest.approx((truth == i).mean()) for i in np.unique(truth)}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    first = answer["classes"][0]
    assert first["name"] == model.config.class_names[first["index"]]
    colors = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["colors"]))).convert("RGB"))
    red, green, blue = colors[truth == first["index"]][0]
    assert first["color"] == f"#{red:02x}{green:02x}{blue:02x}"
    times = answer["times"]
    assert list(times) == ["decode", "queue", "network", "encode", "total"] and min(times.values()) >= 0
    assert sum(times.values()) - times["total"] <= times["total"] and answer["batch"] == 1

    text = base64.b64encode(PNG).decode()
    for image in (text, f"data:image/png;base64,{text}"):
        body = json.dumps({"image": image, "format": "png"}).encode()
        status, headers, labels = server.ask("/predict", body, {"Content-Type": "application/json"})
        assert status == 200 and headers["content-type"] == "image/png"
        assert re.match(r"decode;dur=[\d.]+, queue;", headers["server-timing"])
        np.testing.assert_array_equal(stored(labels), truth)
    palette = server_palette(server)
    body, headers = form(("image", PNG), ("show", "overlay"))
    overlay = server.ask("/predict?alpha=0.3", body, {**headers, "Accept": "image/png, */*;q=0.5"})[2]
    wanted = overlay_with_legend(PIXELS, truth, model.config.class_names, palette, alpha=0.3)
    np.testing.assert_array_equal(stored(overlay), np.asarray(wanted))

    with torch.inference_mode():
        stages, mask = similarity_maps(model, read_image(tmp_path / "x.png"), [2])
    wanted = np.asarray(similarity_picture(PIXELS, stages, mask, ["car"]))
    for word in ("CAR", "2"):
        body, headers = form(("image", PNG), ("class", word))
        np.testing.assert_array_equal(stored(server.ask("/similarity?format=png", body, headers)[2]), wanted)
    answer = server.predict(PNG, "/similarity?class=car")
    assert answer["class"]["name"] == "car"
    for got, panel in zip(
        answer["panels"], similarity_panels(PIXELS, [maps[0] for maps in stages], mask[0]), strict=True
    ):
        assert (got["title"], got["note"], got["range"]) == panel[:3]
        np.testing.assert_array_equal(stored(got["picture"]), panel.picture)


def server_palette(server: Server) -> np.ndarray:
    classes = json.loads(server.ask("/model")[2])["classes"]
    return np.array([[int(c["color"][i : i + 2], 16) for i in (1, 3, 5)] for c in classes], np.uint8)


def test_pictures_are_read_as_predict_reads_them(server, model, tmp_path):
    """Turned by EXIF, 16-bit, TIFF, arrays, transparent: the one reader, on bytes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = PIXELS[..., 0].astype(np.uint16) * 16
    clear = np.concatenate([PIXELS, np.full((40, 60, 1), 100, np.uint8)], -1)
    array = io.BytesIO()
    np.save(array, deep)
    files = {
        "turned.jpg": encoded(PIXELS, "JPEG", exif=exif),
        "deep.png": encoded(deep),
        "tiff.tif": encoded(PIXELS, "TIFF", compression="tiff_lzw"),
        "clear.png": encoded(clear),
        "grey.webp": encoded(PIXELS, "WEBP", lossless=True),
        "array.npy": array.getvalue(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(
            stored(server.predict(data)["labels"]), model.predict(tmp_path / name).numpy(), err_msg=name
        )
        width, height = probe(PictureBytes(data))
        assert (width, height) == probe(tmp_path / name)
        with pytest.raises(TooLargeError, match=rf"^image: {width}x{height} pixels, more than 2399"):
            read_image(PictureBytes(data, max_pixels=2399))


def test_load(server, model):
    """200 requests at once, of mixed sizes: none lost, none mixed up; batches, memory, right counts."""
    sizes = [(40, 60), (64, 64), (33, 47), (120, 90)]
    pictures = [drawn(i, *sizes[i % 4]) for i in range(24)]
    files = [encoded(pixels) for pixels in pictures]
    truths = [model.predict(pixels).numpy() for pixels in pictures]
    assert all((truths[i] != truths[i + 4]).any() for i in range(20))  # mixed up would show
    for file in files[:4]:
        server.predict(file)
    before, memory = server.metrics(), server.memory()
    barrier = threading.Barrier(200)

    def one(number: int) -> dict:
        barrier.wait()
        return server.predict(files[number % 24])

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, range(200)))
    for number, answer in enumerate(answers):
        np.testing.assert_array_equal(stored(answer["labels"]), truths[number % 24])
    assert max(answer["batch"] for answer in answers) > 1
    assert server.memory() - memory < 150
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['segvit_requests_total{path="/predict",status="200"}'] == 200
    assert grown['segvit_request_seconds_count{path="/predict"}'] == 200
    for part in ("decode", "queue", "network", "encode"):
        assert grown[f'segvit_part_seconds_count{{part="{part}"}}'] == 200
        assert grown[f'segvit_part_seconds_bucket{{part="{part}",le="+Inf"}}'] == 200
    assert grown["segvit_batch_size_sum"] == 200 and grown["segvit_batch_size_count"] < 200
    assert grown['segvit_batch_size_bucket{le="8"}'] == grown["segvit_batch_size_count"]
    assert after["segvit_queue_length"] == after["segvit_requests_at_hand"] == 0


# Rubbish


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def npy_header(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    file = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(10)


def tiff_of_another_file() -> bytes:
    """A TIFF that says its picture is in another one."""
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="60" '
        'SizeY="40" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData IFD="0" FirstC="0" PlaneCount="1"><UUID FileName="secret.tif">urn:uuid:1</UUID></TiffData>'
        '<TiffData IFD="0" FirstC="1" PlaneCount="1"><UUID FileName="secret.tif">urn:uuid:1</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    return encoded(PIXELS.astype(np.uint16)[..., 0], "TIFF", description=xml)


def jpeg(width: int, height: int) -> bytes:
    """A JPEG file that says it has so many pixels."""
    data = bytearray(encoded(PIXELS, "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def image(data: bytes, **options) -> tuple[str, bytes, dict[str, str]]:
    return ("/predict", *form(("image", data), **options))


def as_json(value: object, **headers: str) -> tuple[str, bytes, dict[str, str]]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return "/predict", body, {"Content-Type": "application/json", **headers}


GOOD, HEADERS = form(("image", PNG))
TEXT = base64.b64encode(PNG).decode()
BAD = [
    # not a picture, or a damaged one
    (422, "image: not a picture", image(b"GIF87 is what this is not")),
    (400, "image: an empty file", image(b"")),
    (422, "image: not a picture", image(b"\x00" * 1000)),
    (422, "image: not a picture", image(b"<svg><image href='/etc/passwd'/></svg>")),
    (422, "image: not a picture", image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\nshowpage")),
    (422, "image: not a picture", image(b"PK\x03\x04" + bytes(200))),
    (422, "image: cannot be decoded", image(PNG[: len(PNG) // 2])),
    (422, "image: ", image(PNG[:20])),
    (422, "image: cannot be decoded", image(encoded(PIXELS, "JPEG")[:400])),
    (422, "image: cannot be decoded", image(PNG[:60] + bytes(60) + PNG[120:])),
    (422, "image: ", image(encoded(PIXELS, "TIFF")[:-5000])),
    (422, "image: ", image(encoded(PIXELS, "WEBP")[:200])),
    (422, "image: ", image(b"\x93NUMPY\x01\x00")),
    (422, "image: ", image(b"\x93NUMPY\x01\x00\x0a\x00{'descr':1}")),
    (422, "image: cannot be decoded", image(npy_header((40, 60)))),
    (422, "image: cannot be decoded", image(npy_header((40, 60), "|O"))),
    (422, "image: cannot be decoded", image(npy_header((-1, 60)))),
    (422, "image: ", image(tiff_of_another_file() + b"")[:1] + form(("image", b"II*\x00" + bytes(20)))),
    # a giant one
    (413, "image: 65000x65000 pixels, more than 65536", image(png_header(65000, 65000))),
    (413, "image: 60000x60000 pixels, more than 65536", image(jpeg(60000, 60000))),
    (413, "image: 100000x100000 pixels, more than 65536", image(npy_header((100000, 100000)))),
    (413, "256x256 pixels of 9 channels, more than 65536 of 4", image(npy_header((9, 256, 256)))),
    (413, "image: 300000 bytes, more than 262144", image(bytes(300000))),
    (413, "body: 1000054 bytes, more than", ("/predict", bytes(1000054), HEADERS)),
    (413, "body: 1073741824 bytes", ("/predict", b"", {**HEADERS, "Content-Length": "1073741824"})),
    (413, "more than", as_json({"image": "A" * 400000})),
    # wrong fields
    (400, "'picture': no such field; expected", ("/predict", *form(("picture", PNG)))),
    (400, "'imag': no such field; did you mean image?", ("/predict", *form(("imag", PNG)))),
    (400, "image: missing", ("/predict", *form(("alpha", "0.5")))),
    (400, "image: missing", ("/predict", *form())),
    (400, "image: got two", ("/predict", *form(("image", PNG), ("image", PNG)))),
    (400, "alpha: got 'much', expected 0 to 1", ("/predict?alpha=much", GOOD, HEADERS)),
    (400, "alpha: got 'nan', expected 0 to 1", ("/predict?alpha=nan", GOOD, HEADERS)),
    (400, "format: got 'gif', expected json or png", ("/predict?format=gif", GOOD, HEADERS)),
    (400, "include: got 'all', expected colors or picture", ("/predict?include=all", GOOD, HEADERS)),
    (400, "'file': no such parameter", ("/predict?file=/etc/passwd", GOOD, HEADERS)),
    (400, "alpha: in the address, and", ("/predict?alpha=1", *form(("image", PNG), ("alpha", "1")))),
    (400, "alpha: longer", ("/predict", *form(("image", PNG), ("alpha", "1" * 2000)))),
    (400, "class: missing", ("/similarity", GOOD, HEADERS)),
    (400, "class: no class 'zebra'; The 5 classes: road", ("/similarity?class=zebra", GOOD, HEADERS)),
    # wrong content
    (415, "content-type: got 'text/plain', expected", ("/predict", PNG, {"Content-Type": "text/plain"})),
    (415, "content-type: got '', expected", ("/predict", PNG, {})),
    (400, "without its boundary", ("/predict", GOOD, {"Content-Type": "multipart/form-data"})),
    (400, "body: ", ("/predict", GOOD, {"Content-Type": "multipart/form-data; boundary=other"})),
    (400, "body: a form that breaks off", ("/predict", GOOD[:-20], HEADERS)),
    (400, "body: not JSON", as_json(b'{"image": ')),
    (400, "body: got '[1, 2]', expected an object", as_json([1, 2])),
    (400, "body: not UTF-8 text", as_json(b'{"image": "\xff"}')),
    (400, "body: not JSON that can be read", as_json(b'{"image": ' + b"[" * 9000)),
    (400, "body: the key 'image' occurs twice", as_json(b'{"image": "", "image": ""}')),
    (400, "image: not base64", as_json({"image": "!" + TEXT})),
    (400, "image: not base64", as_json({"image": "é"})),
    (400, "image: got 5, expected", as_json({"image": 5})),
    (400, "expected a data URI in base64", as_json({"image": "data:image/png,abc"})),
    (422, "image: not a picture", as_json({"image": "/etc/passwd+"})),
    (400, "'path': no such parameter", as_json({"path": "/etc/passwd"})),
    (400, "image: got {'href': '/etc/passwd'}", as_json({"image": {"href": "/etc/passwd"}})),
    # wrong places
    (404, "no such address", ("/../../etc/passwd", None, {})),
    (404, "no such address", ("/%2e%2e/%2e%2e/etc/passwd", None, {})),
    (405, "GET is not for this address", ("/predict", None, {})),
    (421, "host: got 'evil.example', expected", ("/", None, {"Host": "evil.example"})),
    (403, "origin: got 'http://evil.example'", ("/predict", GOOD, {**HEADERS, "Origin": "http://evil.example"})),
]  # fmt: skip


def test_rubbish(server, model, tmp_path):
    """Each a 4xx with one line, and the server goes on."""
    assert len(BAD) >= 50
    wrong = []
    for number, (status, text, (path, body, headers)) in enumerate(BAD):
        got, _, answer = server.ask(path, body, headers)
        error = json.loads(answer).get("error", "") if got != 200 else answer.decode()
        if got != status or text not in error or "\n" in error or len(error) > 300:
            wrong.append((number, status, text, got, error[:200]))
    assert wrong == []
    secret = "../../../etc/passwd"
    assert server.ask(*image(PNG, filename=secret))[0] == 200  # a name is not a path
    truth = model.predict(PIXELS).numpy()
    np.testing.assert_array_equal(stored(server.predict(PNG)["labels"]), truth)


def test_rubbish_below_http(server):
    """Bodies without end, bodies that break off, and what is no request."""
    head = (
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
    )
    memory = server.memory()
    endless = server.raw(
        head + b"Transfer-Encoding: chunked\r\n\r\n", after=b"10000\r\n" + bytes(65536) + b"\r\n", times=3000
    )
    assert b" 413 " in endless.split(b"\r\n")[0] and b"more than 327680 bytes" in endless
    assert server.memory() - memory < 30
    assert b" 400 " in server.raw(b"what?\r\n\r\n").split(b"\r\n")[0]
    server.sent -= 1  # is none, and not counted
    with socket.create_connection(("127.0.0.1", server.port)) as connection:  # breaks off
        connection.sendall(head + b"Content-Length: 1000\r\n\r\nhalf")
    server.sent += 1
    deadline = time.monotonic() + 20
    while server.metrics().get('segvit_requests_total{path="/predict",status="499"}') != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.predict(PNG)["width"] == 60


def test_nothing_else_is_opened(tmp_path, monkeypatch):
    """A TIFF that names another file gives its own pixels, not those of the other."""
    monkeypatch.chdir(tmp_path)
    tifffile = pytest.importorskip("tifffile", reason="comes with the extra tiff")
    tifffile.imwrite("secret.tif", np.full((40, 60), 999, np.uint16))
    data = tiff_of_another_file()
    (tmp_path / "asked.tif").write_bytes(data)
    opened: list[str] = []
    real = open

    def watched(path, *arguments, **named):
        opened.append(str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", watched)
    read_image("asked.tif", channels=2)
    assert any("secret" in name for name in opened)  # on disk the kind of file does what it says
    opened.clear()
    with pytest.raises(ValueError, match="image: has 1 channels, expected 2"):
        read_image(PictureBytes(data), channels=2)
    assert not [name for name in opened if name.endswith(".tif")]


# The page


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="comes with the extra dev")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser, server, **options):
    """The page, on which nothing goes wrong and which asks nobody but its server."""
    context = browser.new_context(**options)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type in ("error", "warning") else None)
    address = f"http://127.0.0.1:{server.port}/"
    page.on("request", lambda asked: seen.append(asked.url))
    seen: list[str] = []
    page.set_default_timeout(30000)
    page.goto(address)
    until(page, "document.getElementById('model').textContent")
    try:
        yield page, problems
    finally:
        context.close()
        server.sent += sum(url.startswith(address) for url in seen)
    assert all(url.startswith((address, "blob:", "data:")) for url in seen)


def until(page, expression: str) -> None:
    """Wait for what JavaScript says; Playwright's own way would be eval, which the page forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, (expression, page.inner_text("body"))
        time.sleep(0.05)


FILE = """([name, text]) => {
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], name));
"""
PASTE = (
    FILE
    + """
    document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: carried}));
}"""
)
DROP = (
    FILE
    + """
    for (const kind of ["dragenter", "dragover", "drop"])
        document.body.dispatchEvent(
            new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true}));
}"""
)


def test_page(browser, server, model, tmp_path):
    """A picture is dropped, another pasted; legend, maps of a class, opacity and downloads by keyboard."""
    truth = model.predict(PIXELS).numpy()
    with opened(browser, server, color_scheme="dark", accept_downloads=True) as (page, problems):
        page.evaluate(DROP, ["street.png", TEXT])
        page.wait_for_selector("#legend button")
        assert page.inner_text("#status") == "street.png: 60 × 40 pixels"
        names = page.locator("#legend .name").all_inner_texts()
        counts = np.bincount(truth.ravel(), minlength=5)
        assert names == [model.config.class_names[i] for i in np.argsort(-counts, kind="stable") if counts[i]]
        parts = page.locator("#times th").all_inner_texts()
        assert parts == ["decode", "queue", "network", "encode", "other", "sending", "in all"]
        # From the start of the page on by Tab: choice, slider, downloads, classes.
        visited = []
        page.evaluate("document.activeElement.blur()")
        for _ in range(5):
            page.keyboard.press("Tab")
            visited.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
            if visited[-1] == "opacity":
                page.keyboard.press("Home")
                page.keyboard.press("ArrowRight")
        assert visited[:4] == ["file", "opacity", "save-labels", "save-overlay"]
        assert visited[4].startswith(names[0])
        assert page.inner_text("#percent") == "5 %"
        assert page.evaluate("getComputedStyle(document.getElementById('labels')).opacity") == "0.05"
        page.keyboard.press("Enter")
        page.wait_for_selector("#panels figure")
        assert page.inner_text("#similarity-title") == f"Similarity maps: {names[0]}"
        titles = [text.split("\n")[0] for text in page.locator("#panels figcaption").all_inner_texts()]
        assert titles == ["image", "stage 1", "stage 2", "accumulated mask"]
        until(page, "[...document.querySelectorAll('#panels img')].every(image => image.naturalWidth == 240)")
        assert page.locator("#legend [aria-pressed=true] .name").all_inner_texts() == names[:1]
        # A place of the picture chooses its class too.
        row, column = np.argwhere(truth == np.argsort(-counts)[1])[0]
        box = page.locator("#labels").bounding_box()
        place = {"x": (column + 0.5) * box["width"] / 60, "y": (row + 0.5) * box["height"] / 40}
        page.locator("#labels").click(position=place)
        until(page, f"document.querySelector('#panels img').alt.startsWith('{names[1]}')")
        for button in ("labels", "overlay"):
            with page.expect_download() as waiting:
                page.focus(f"#save-{button}")
                page.keyboard.press("Enter")
            assert waiting.value.suggested_filename == f"street_{button}.png"
            waiting.value.save_as(tmp_path / f"{button}.png")
        np.testing.assert_array_equal(stored((tmp_path / "labels.png").read_bytes()), truth)
        with Image.open(tmp_path / "overlay.png") as picture:
            difference = np.asarray(picture.convert("RGB")).astype(int) - PIXELS
        assert np.abs(difference).max() <= 0.05 * 255 + 2 and np.abs(difference).mean() > 0.5
        assert problems == []
        # What is refused is said, and the page goes on.
        page.evaluate(DROP, ["notes.txt", base64.b64encode(b"no picture").decode()])
        until(page, "document.getElementById('error').textContent.includes('not a picture')")
        page.evaluate(DROP, ["large.tif", base64.b64encode(bytes(MAX_BYTES + 1)).decode()])
        until(page, "document.getElementById('error').textContent.includes('more than 0.3 MB')")
        problems.clear()
        # A format that browsers do not show: the server's picture takes its place.
        page.evaluate(PASTE, ["deep.tif", base64.b64encode(encoded(PIXELS, "TIFF")).decode()])
        until(page, "document.getElementById('status').textContent.startsWith('deep.tif: 60')")
        assert page.evaluate("document.getElementById('picture').naturalWidth") == 60
        assert page.inner_text("#error") == "" and page.locator("#similarity").is_hidden() and problems == []


def test_page_on_a_narrow_screen_and_for_a_screen_reader(browser, server):
    with opened(browser, server, viewport={"width": 360, "height": 740}) as (page, problems):
        file = {"name": "a.png", "mimeType": "image/png", "buffer": PNG}
        page.set_input_files("#file", files=file)
        page.wait_for_selector("#legend button")
        page.locator("#legend button").first.click()
        page.wait_for_selector("#panels figure")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        tree = page.locator("body").aria_snapshot()
        for line in (
            'heading "SegViT" [level=1]',
            'button "Choose a picture"',
            "status: ",
            'slider "Opacity of the labels"',
            'img "Label map: ',
            'region "Classes"',
            "[pressed]",
            'row "network ',
            'img "road: stage 1"' if "road: stage 1" in tree else ': stage 1"',
        ):
            assert line in tree, (line, tree)
        assert problems == []


def test_every_request_was_counted(server):
    """After all that was sent above."""
    counts = {k: v for k, v in server.metrics().items() if k.startswith("segvit_requests_total")}
    assert sum(counts.values()) == server.sent - 1  # but the one that asks
    assert not [name for name in counts if re.search(r'status="5\d\d"', name)], counts


# Limits of time and number


def test_a_full_queue_and_an_end_in_the_middle(checkpoint):
    """503 with Retry-After when full, 408 for a body that does not come; SIGTERM answers what is at hand."""
    with Server(checkpoint, "--queue", "2", "--timeout", "6") as server:
        fill_and_end(server)


def fill_and_end(server: Server) -> None:
    body, headers = form(("image", PNG))
    half = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    half = half % (headers["Content-Type"].encode(), len(body)) + body[:-10]
    with contextlib.ExitStack() as stack:
        late, last = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            for _ in "ab"
        )
        late.sendall(half)
        last.sendall(half)
        while server.metrics()["segvit_requests_at_hand"] < 2:
            time.sleep(0.02)
        status, found, answer = server.ask("/predict", body, headers)
        assert (status, found["retry-after"]) == (503, "1")
        assert json.loads(answer)["error"] == "2 requests are at hand, come back later"
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)
        last.sendall(body[-10:])
        got = [b"".join(iter(lambda c=c: c.recv(1 << 16), b"")) for c in (last, late)]
    assert got[0].startswith(b"HTTP/1.1 200 ") and b'"labels"' in got[0]
    assert got[1].startswith(b"HTTP/1.1 408 ") and b"not sent within 6 seconds" in got[1]
    out, err = server.process.communicate(timeout=30)
    assert (server.process.returncode, err) == (0, "") and out.endswith("ended\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere"),
        (
            ["CHECKPOINT", "--port", "PORT"],
            r"host, port: cannot listen on 127.0.0.1:PORT \(Address already in use\)",
        ),
        (["CHECKPOINT", "--host", "192.0.2.1"], "host, port: cannot listen on 192.0.2.1:8000"),
        (["CHECKPOINT", "--port", "70000"], "port: got 70000, expected"),
        (["CHECKPOINT", "--window", "7"], "window: got 7, expected a multiple of the patch size 8"),
        (["CHECKPOINT", "--backend", "abacus"], "backend: got 'abacus'"),
        (
            ["CHECKPOINT", "--short-side", "64", "--max-pixels", "4000"],
            "short_side: got 64, whose pictures have 4096 pixels at least; --max-pixels 4000",
        ),
        ([], "missing: CHECKPOINT"),
    ],
)
def test_mistakes_are_one_line(checkpoint, capsys, words, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        known = {"CHECKPOINT": str(checkpoint), "PORT": port}
        given = [known.get(word, word) for word in words]
        free = [] if "--port" in given or "--host" in given else ["--port", "0"]
        assert main(["serve", *given, *free, "--accelerator", "cpu"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and re.match(f"segvit serve: error: .*{message.replace('PORT', port)}", line), (
        line
    )


@pytest.mark.parametrize(
    ("host", "line"),
    [
        (
            "127.0.0.1",
            r"http://127\.0\.0\.1:\d+ \(from this machine only; --host 0\.0\.0\.0 lets others in\)",
        ),
        ("localhost", r"http://.*:\d+ \(from this machine only; "),
        ("0.0.0.0", r"http://0\.0\.0\.0:\d+ \(whoever reaches this machine can use it: there is no password"),
    ],
)
def test_who_can_reach_it_is_said(checkpoint, capsys, monkeypatch, host, line):
    def serve(service, listening, config, ready):
        assert listening.getsockname()[0] in (host, "127.0.0.1", "::1")
        ready()
        service.close()

    monkeypatch.setattr("segvit.serve.server.serve", serve)
    assert main(["serve", str(checkpoint), "--host", host, "--port", "0", "--accelerator", "cpu"]) == 0
    assert re.match(line, capsys.readouterr().out)


@pytest.mark.parametrize("module", ["starlette", "uvicorn", "python_multipart"])
def test_the_extra_is_named(monkeypatch, capsys, checkpoint, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["serve", str(checkpoint), "--port", "0"]) == 2
    line = f"{module} is not installed; it comes with: pip install 'segvit-kernels[serve]'"
    assert capsys.readouterr().err == f"segvit serve: error: {line}\n"
