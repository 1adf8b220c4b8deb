"""Checkpoints from a real HTTP server on this machine: every way it can go well or wrong."""

import hashlib
import io
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from alimm.zoo import download as zoo
from alimm.zoo.index import ModelEntry


def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.arange(50_000)}, "meta": {"epoch": 3}}, buffer)
    return buffer.getvalue()


BODY = _checkpoint()
DIGEST = hashlib.sha256(BODY).hexdigest()
NAME = f"toy_r18_20260101-{DIGEST[:8]}.pth"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        kind = urlsplit(self.path).path.split("/")[1]
        if kind == "missing":
            self.send_error(404)
        elif kind in ("redirect", "loop"):
            self.send_response(302)
            self.send_header("Location", f"/{'good' if kind == 'redirect' else 'loop'}/{NAME}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif kind == "silent":
            self.server.released.wait(10)
        else:
            body = {"wrong": BODY[:-1] + b"?", "truncated": BODY[: len(BODY) // 2]}.get(kind, BODY)
            self.send_response(200)
            if kind != "unsized":
                self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.released = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("ALIMM_ZOO_DIR", "ALIMM_OFFLINE", "HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def entry_for(root: Path, *weights: str) -> ModelEntry:
    return ModelEntry(
        name="toy_r18", collection="Toy", config="configs/toy_r18.py", readme="", weights=weights, sha256=DIGEST,
        size=len(BODY), license="", training_data="", command="", results=(), metafile="metafile.yml", root=root,
    )  # fmt: skip


def leftovers(folder: Path) -> list[str]:
    """What lies in the cache but the lock."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.parametrize("kind", ["good", "redirect", "unsized"])
def test_downloads_once_into_mmengine_home(tmp_path, home, server, kind):
    entry = entry_for(tmp_path, f"{server.url}/{kind}/{NAME}")
    path = zoo.fetch(entry)
    assert path == home / "alimm" / "checkpoints" / NAME
    assert path.read_bytes() == BODY
    assert leftovers(home) == [NAME]
    count = len(server.requests)
    assert count == (2 if kind == "redirect" else 1)
    assert zoo.fetch(entry) == path
    assert len(server.requests) == count


def test_without_mmengine_home_the_users_cache_is_taken(tmp_path, server, monkeypatch):
    monkeypatch.delenv("MMENGINE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path = zoo.fetch(entry_for(tmp_path, f"{server.url}/good/{NAME}"))
    assert path == tmp_path / "xdg" / "alimm" / "checkpoints" / NAME


def test_a_wrong_file_is_removed_and_both_digests_are_shown(tmp_path, home, server):
    with pytest.raises(zoo.DownloadError) as caught:
        zoo.fetch(entry_for(tmp_path, f"{server.url}/wrong/{NAME}"))
    wrong = hashlib.sha256(BODY[:-1] + b"?").hexdigest()
    assert f"expected sha256 {DIGEST}, got {wrong}" in str(caught.value)
    assert "truncated" not in str(caught.value)
    assert leftovers(home) == []


def test_a_truncated_file_is_removed_and_said_to_be_truncated(tmp_path, home, server):
    with pytest.raises(zoo.DownloadError) as caught:
        zoo.fetch(entry_for(tmp_path, f"{server.url}/truncated/{NAME}"))
    half = BODY[: len(BODY) // 2]
    assert f"truncated after {len(half)} of {len(BODY)} bytes" in str(caught.value)
    assert DIGEST in str(caught.value)
    assert hashlib.sha256(half).hexdigest() in str(caught.value)
    assert leftovers(home) == []


@pytest.mark.parametrize("first", ["missing", "wrong", "truncated", "loop"])
def test_the_next_mirror_is_tried(tmp_path, server, first):
    path = zoo.fetch(entry_for(tmp_path, f"{server.url}/{first}/{NAME}", f"{server.url}/good/{NAME}"))
    assert path.read_bytes() == BODY
    assert server.requests[0].startswith(f"/{first}/")
    assert server.requests[-1].startswith("/good/")


def test_every_mirror_is_in_the_error(tmp_path, server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
    mirrors = [f"{server.url}/missing/{NAME}", f"{closed}/{NAME}", f"ftp://127.0.0.1/{NAME}", f"file:///gone/{NAME}"]
    with pytest.raises(zoo.DownloadError) as caught:
        zoo.fetch(entry_for(tmp_path, *mirrors))
    lines = str(caught.value).splitlines()
    assert all(any(mirror in line for line in lines) for mirror in mirrors)
    assert "HTTP 404" in lines[1]
    assert "cannot be reached" in lines[2]
    assert "scheme 'ftp'" in lines[3]
    assert "No such file" in lines[4]
    assert "$ALIMM_ZOO_DIR" in lines[5]


def test_a_silent_server_is_given_up(tmp_path, server):
    start = time.monotonic()
    with pytest.raises(zoo.DownloadError, match="timed out"):
        zoo.fetch(entry_for(tmp_path, f"{server.url}/silent/{NAME}"), timeout=0.2)
    assert time.monotonic() - start < 5


def test_file_urls(tmp_path, home):
    source = tmp_path / "with space" / NAME
    source.parent.mkdir()
    source.write_bytes(BODY)
    assert zoo.fetch(entry_for(tmp_path, source.as_uri())).parent == home / "alimm" / "checkpoints"
    with pytest.raises(zoo.DownloadError, match="of this machine"):
        zoo.fetch(replace(entry_for(tmp_path, f"file://elsewhere/x-{DIGEST[:8]}.pth")))


def test_a_file_of_the_project_is_used_where_it_lies(tmp_path, home, monkeypatch):
    monkeypatch.setenv("ALIMM_OFFLINE", "1")
    (tmp_path / NAME).write_bytes(BODY)
    assert zoo.fetch(entry_for(tmp_path, NAME)) == tmp_path / NAME
    assert not home.exists()


def test_order_explicit_then_zoo_dir_then_cache(tmp_path, home, server, monkeypatch):
    entry = entry_for(tmp_path, f"{server.url}/good/{NAME}")
    cached = zoo.fetch(entry)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    monkeypatch.setenv("ALIMM_ZOO_DIR", str(mirror))
    assert zoo.fetch(entry) == cached
    (mirror / NAME).write_bytes(BODY)
    assert zoo.fetch(entry) == mirror / NAME
    explicit = tmp_path / "mine.pth"
    explicit.write_bytes(BODY)
    assert zoo.fetch(entry, explicit=explicit) == explicit
    explicit.write_bytes(b"other")
    with pytest.raises(ValueError, match=f"mine.pth is not the checkpoint of toy_r18: expected sha256 {DIGEST}"):
        zoo.fetch(entry, explicit=explicit)
    assert len(server.requests) == 1


def test_a_wrong_file_in_the_zoo_dir_is_passed_over_aloud_and_kept(tmp_path, server, monkeypatch):
    monkeypatch.setenv("ALIMM_ZOO_DIR", str(tmp_path))
    (tmp_path / NAME).write_bytes(b"other")
    with pytest.warns(UserWarning, match="passed over: expected sha256"):
        path = zoo.fetch(entry_for(tmp_path, f"{server.url}/good/{NAME}"))
    assert path.read_bytes() == BODY
    assert (tmp_path / NAME).read_bytes() == b"other"


def test_a_damaged_file_in_the_cache_is_replaced(tmp_path, home, server):
    cached = home / "alimm" / "checkpoints" / NAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(BODY[:100])
    assert zoo.fetch(entry_for(tmp_path, f"{server.url}/good/{NAME}")).read_bytes() == BODY


def test_offline_makes_no_request_and_says_where_the_file_goes(tmp_path, home, server, monkeypatch):
    monkeypatch.setenv("ALIMM_OFFLINE", "1")
    entry = entry_for(tmp_path, f"{server.url}/good/{NAME}")
    with pytest.raises(zoo.DownloadError) as caught:
        zoo.fetch(entry)
    place = home / "alimm" / "checkpoints" / NAME
    assert "ALIMM_OFFLINE=1 forbids the network" in str(caught.value)
    assert f"Put the file (sha256 {DIGEST}) at {place}" in str(caught.value)
    assert server.requests == []
    place.parent.mkdir(parents=True)
    place.write_bytes(BODY)
    assert zoo.fetch(entry) == place


def test_a_cache_that_cannot_be_written(tmp_path, server, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMENGINE_HOME", str(tmp_path / "file"))
    with pytest.raises(zoo.DownloadError, match=r"cannot write to .*MMENGINE_HOME"):
        zoo.fetch(entry_for(tmp_path, f"{server.url}/good/{NAME}"))


def test_a_good_file_in_a_read_only_cache_is_used_and_nothing_is_written(tmp_path, home, server):
    cached = home / "alimm" / "checkpoints" / NAME
    cached.parent.mkdir(parents=True)
    cached.write_bytes(BODY)
    cached.parent.chmod(0o500)
    try:
        assert zoo.fetch(entry_for(tmp_path, f"{server.url}/good/{NAME}")) == cached
        # Holds for root too, whom the mode does not stop: not even a lock was made.
        assert [path.name for path in cached.parent.iterdir()] == [NAME]
    finally:
        cached.parent.chmod(0o700)


def test_a_proxy_does_not_capture_this_machine(tmp_path, server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert zoo.fetch(entry_for(tmp_path, f"{server.url}/redirect/{NAME}")).read_bytes() == BODY


def test_a_proxy_serves_other_hosts(tmp_path, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(zoo.DownloadError, match="expected sha256"):
        zoo.fetch(entry_for(tmp_path, f"http://zoo.invalid/wrong/{NAME}"))
    assert server.requests == [f"http://zoo.invalid/wrong/{NAME}"]


def _race(root, url, barrier, results):
    barrier.wait()
    results.put(str(zoo.fetch(entry_for(Path(root), url))))


def test_two_processes_download_once(tmp_path, home, server):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path, f"{server.url}/good/{NAME}", barrier, results)
    workers = [context.Process(target=_race, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    paths = {results.get(timeout=20) for _ in workers}
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 0
    assert paths == {str(home / "alimm" / "checkpoints" / NAME)}
    assert len(server.requests) == 1
    assert leftovers(home) == [NAME]


def test_download_by_name_and_to_a_folder(tmp_path, server, monkeypatch):
    entry = entry_for(tmp_path, f"{server.url}/good/{NAME}")
    monkeypatch.setattr(zoo, "get_entry", {"toy_r18": entry}.__getitem__)
    target = zoo.download("alimm://toy_r18", dest=tmp_path / "to here")
    assert target == tmp_path / "to here" / NAME
    assert target.read_bytes() == BODY
    assert zoo.download("toy_r18", dest=tmp_path / "to here") == target
    assert len(server.requests) == 1
    assert os.listdir(target.parent) == [NAME], "nothing else is left in the user's folder"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, server, monkeypatch):
    entry = entry_for(tmp_path, f"{server.url}/good/{NAME}")
    monkeypatch.setattr(zoo, "get_entry", {"toy_r18": entry}.__getitem__)
    (tmp_path / "file").touch()
    with pytest.raises(zoo.DownloadError, match=r"cannot write to .*file/x"):
        zoo.download("toy_r18", dest=tmp_path / "file" / "x")


def test_load_from_through_mmengine(tmp_path, server, monkeypatch):
    from mmengine.runner.checkpoint import CheckpointLoader

    entry = entry_for(tmp_path, f"{server.url}/good/{NAME}")
    monkeypatch.setattr(zoo, "get_entry", {"toy_r18": entry}.__getitem__)
    zoo.register()
    zoo.register()
    content = CheckpointLoader.load_checkpoint("alimm://toy_r18", map_location="cpu")
    assert torch.equal(content["state_dict"]["weight"], torch.arange(50_000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ()}, "no checkpoint of toy_r18"),
        ({"sha256": ""}, "64 hex digits"),
        ({"sha256": "0" * 64}, "first eight"),
        ({"weights": ("http://127.0.0.1/toy.pth",)}, "first eight"),
    ],
)
def test_an_entry_that_cannot_be_verified_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        zoo.fetch(replace(entry_for(tmp_path, f"http://127.0.0.1/{NAME}"), **change))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_loading_runs_no_code_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hub": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth holds .*--trust"):
        zoo.load_weights("bomb.pth")
    assert not Path("exploded").exists()
    zoo.load_weights("bomb.pth", trust=True)
    assert Path("exploded").exists()


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "half.pth").write_bytes(BODY[: len(BODY) // 2])
    with pytest.raises(ValueError, match=r"half\.pth"):
        zoo.load_weights(tmp_path / "half.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a dict"):
        zoo.load_weights(tmp_path / "list.pth")
