"""tools/page.py: what the page shows of an upload, and that it keeps none."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

import drawing
import page
import predict
from cli import parse_args
from conftest import script_path
from test_faces import PLACES, photograph

pytest.importorskip("gradio_client", exc_type=ModuleNotFoundError)
from gradio_client import Client, handle_file


@pytest.fixture(scope="module")
def files(model, detector):
    return model, detector


@pytest.fixture(scope="module")
def client(files, tmp_path_factory):
    """A client of the page, in a process of its own, and the folder where uploads lie."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", script_path("page"), "--port", port, "--checkpoint", files[0]]
    command += ["--detector", files[1]]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
    (folder / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "temporary"), "TORCH_HOME": str(folder)}
    environment |= {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}  # an office's
    process = subprocess.Popen(list(map(str, command)), env=environment, **options)
    try:
        lines = iter(process.stdout.readline, "")
        assert any("Running on local URL" in line for line in lines)
        yield Client(f"http://127.0.0.1:{port}", verbose=False), folder / "temporary"
    finally:
        process.terminate()
        said = process.communicate()[0]
    assert said.count("Traceback") == said.count("requests.ClientDisconnect")  # uvicorn reports these
    assert uploads(folder / "temporary") == []  # the last are deleted with the page


def uploads(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".png", ".gif", "")]


def test_a_card_a_face_and_no_copies(client, files, tmp_path):
    client, folder = client
    picture, _ = photograph(PLACES)
    faces = predict.predict(predict.load(*files, device="cpu"), picture)
    forms = {"p.png": picture, "a.png": np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])}
    for name, pixels in forms.items():
        Image.fromarray(pixels).save(tmp_path / name)
        shown, again = client.predict(handle_file(str(tmp_path / name)), api_name="/predict")
        assert again is None  # the field is free
        code = re.search('src="data:image/jpeg;base64,([^"]*)"', shown)[1]
        assert Image.open(io.BytesIO(base64.b64decode(code))).size == (800, 608)
        cards = re.findall("<p.*?</p>", shown)
        assert len(cards) == 2
        for i, (card, face) in enumerate(zip(cards, faces), 1):
            assert f"<b>{i}.</b> {face.group} {100 * face.probabilities.max():.0f} %" in card
            assert f"about {face.predicted_age:.0f}, {face.age_low:.0f} to {face.age_high:.0f}<" in card
            assert f"rgb{drawing.COLORS[face.group]}" in card
    assert {path.read_bytes() for path in uploads(folder)} <= {(tmp_path / n).read_bytes() for n in forms}


def test_it_says_why_it_refuses(client, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    Image.new("RGB", (80, 80), (90, 90, 90)).save(tmp_path / "grey.png")
    for name, reason in (
        ("huge.png", "above 100 million"),
        ("empty.jpg", "unreadable image"),
        ("photo.heic", "unreadable image"),
        ("grey.png", "no face found"),
    ):
        shown, _ = client[0].predict(handle_file(str(tmp_path / name)), api_name="/predict")
        assert "This picture cannot be used" in shown and reason in shown and "<img" not in shown


def test_it_refuses_large_files(client):
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + bytes(21 * 2**20) + f"\r\n--{boundary}--\r\n".encode()
    content = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{client[0].src}gradio_api/upload", body, content)
    with pytest.raises(OSError) as refused:  # HTTP status 413, or the connection is closed on us
        urllib.request.urlopen(request)
    assert getattr(refused.value, "code", 413) == 413


def test_an_upload_that_broke_off_is_deleted_as_well(client, tmp_path):
    client, folder = client
    before = uploads(folder)
    host, port = client.src.removeprefix("http://").strip("/").split(":")
    head = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    request = "POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n"
    request += f"Content-Type: multipart/form-data; boundary=x\r\n\r\n{head}"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(request.encode() + bytes(3_000_000))
        left, deadline = set(), time.monotonic() + 60
        while not left and time.monotonic() < deadline:
            left = set(uploads(folder)) - set(before)
    (tmp_path / "empty.jpg").touch()
    while left & set(uploads(folder)) and time.monotonic() < deadline:  # once the server has noticed
        for path in left:
            os.utime(path, (0, 0))  # an hour later
        client.predict(handle_file(str(tmp_path / "empty.jpg")), api_name="/predict")
    assert left and not left & set(uploads(folder))


def test_the_page_itself(client):
    """Phones offer the camera, and groups, limits and examples stand there."""
    text = str(client[0].config)
    assert not client[0].config.get("run_history")  # else the browser keeps the pictures
    assert client[0].config["analytics_enabled"] is False
    events = client[0].config["dependencies"]
    answering = {event["id"] for event in events if event["backend_fn"]}
    shows = {event["trigger_after"] for event in events if "show('')" in str(event["js"])}
    assert len(answering) == 3 and shows == answering  # what the script hides is shown again
    for name in ("answer", "picture"):  # which the script looks for
        assert f"'elem_id': '{name}'" in text
    assert "'file_types': ['image']" in text and text.count("'Example'") == 2
    for words in ("Infant 0–4", "Older Adult 65 and above", "wrong group for"):
        assert words in text


def test_it_listens_here_alone_and_keeps_nothing(tmp_path, monkeypatch):
    import gradio  # here, since it takes seconds

    launched = []
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.append((self, options)))
    monkeypatch.setattr(gradio.Blocks, "close", lambda _: None)
    monkeypatch.setattr(predict, "load", lambda *_: None)
    monkeypatch.setattr(page, "answer", lambda data, _: data)
    page.serve(parse_args(page.get_parser(), []), tmp_path)
    [(blocks, options)] = launched
    assert (options["server_name"], options["server_port"], options["share"]) == ("127.0.0.1", 7860, False)
    assert max(blocks.delete_cache) <= 300  # seconds
    for block in blocks.blocks.values():  # else the examples' pictures go with the uploads
        if getattr(block, "icon", None):
            assert block.icon["path"] in block.keep_in_cache
    _, *examples = [event.fn for event in blocks.fns.values() if event.fn]
    assert [press()[0] for press in examples] == [path.read_bytes() for path in page.EXAMPLES]


def test_flags(files, refuse, monkeypatch):
    refuse("page", "--aligned", "--detector", "y.onnx", words=["--aligned", "--detector"])
    monkeypatch.setattr("gradio.Blocks.launch", lambda *_, **__: None)
    aligned = ["--checkpoint", files[0], "--aligned"]
    refuse("page", *aligned, "--device", "toaster", words=["--device toaster"])
    refuse("page", *aligned, "--device", "cpu", "--precision", "fp16", words=["--precision fp16"])
    refuse("page", "--port", 70000, words=["--port"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    refuse("page", *aligned, words=["pip install -U gradio"])
