"""The downloader against a web server on this machine and a file:// folder: right files, or the old ones."""

import errno
import hashlib
import http.server
import os
import re
import socket
import threading
from dataclasses import astuple, replace

import pytest

from training import download
from training.run_parser import name_list
from training.source_table import EXTRA_SOURCES, Published

CONTENTS = {"first": b"id\tsentence\n" * 9000, "second": b"hello\n"}  # several chunks, and one
# Worked out by git's own rule: printf 'blob 6\0hello\n' | sha1sum
HELLO_BLOB_ID = "ce013625030ba8dba906f756967f9e9ca394464a"
FIRST_BLOB_ID = hashlib.sha1(b"blob %d\0" % len(CONTENTS["first"]) + CONTENTS["first"]).hexdigest()
ALL_RIGHT = {f"{name}.csv": body for name, body in CONTENTS.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the (status, headers, body) in `server.replies`; None closes the connection at once."""

    def do_GET(self):
        self.server.requests.append(self.path)
        reply = self.server.replies.get(self.path, (404, {}, b""))
        if reply is None:
            return
        status, headers, body = reply
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server that has the two files, which are the only ones to download."""
    monkeypatch.setattr(download, "BLOB_IDS", {"first": FIRST_BLOB_ID, "second": HELLO_BLOB_ID})
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.url = f"http://127.0.0.1:{web.server_port}"
        web.replies = {f"/{name}": (200, {}, body) for name, body in ALL_RIGHT.items()}
        web.requests = []
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        yield web
        web.shutdown()
        thread.join()


def run(folder, *flags):
    return download.main(["--output_dir", str(folder), *flags])


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_table_has_the_twelve_files():
    splits = ("train", "dev", "test-student")
    sets = ("ids-sst", "quora", "sts", "ids-cfimdb")
    assert list(download.BLOB_IDS) == [f"{prefix}-{split}" for prefix in sets for split in splits]
    assert len(set(download.BLOB_IDS.values())) == 12
    assert all(re.fullmatch("[0-9a-f]{40}", blob_id) for blob_id in download.BLOB_IDS.values())


def test_every_source_says_where_each_of_its_files_is():
    for source in EXTRA_SOURCES.values():
        if source.published:
            assert len(source.files) == len(source.published.files) and source.published.licence
            assert re.fullmatch("[0-9a-f]{40}", source.published.commit)
            assert all(re.fullmatch("[0-9a-f]{40}", blob_id) for blob_id in source.published.files.values())
    places = [place for source in EXTRA_SOURCES.values() for place in (*source.files, *source.other_files)]
    assert len(set(places)) == len(places)
    url, blob_id = astuple(download.source_files("cfimdb")["ids-cfimdb-train.csv"])
    assert blob_id == download.BLOB_IDS["ids-cfimdb-train"]
    assert url == download.BASE_URL.replace("7ac8260", "7ac8260577fc12a86c7aaf38918056c30054ef39") + (
        "/ids-cfimdb-train.csv"
    )


@pytest.fixture
def source(server, monkeypatch):
    """A source of two files, one of which the web server lacks."""
    published = Published(
        "who/what", "0" * 40, "free of charge", {"a b/x": HELLO_BLOB_ID, "y": FIRST_BLOB_ID}
    )
    spec = replace(EXTRA_SOURCES["mrpc"], files=("extra/x y.txt", "extra/y.txt"), published=published)
    monkeypatch.setattr(download, "EXTRA_SOURCES", {"ours": spec, "nobody's": replace(spec, published=None)})
    monkeypatch.setattr(download, "name_list", lambda names, *_: name_list(("ours", "nobody's", "all"), *_))
    server.replies["/extra/x%20y.txt"] = (200, {}, b"hello\n")


def test_sources_from_a_mirror_go_on_where_they_stopped(source, server, tmp_path, capsys):
    flags = ["--base_url", server.url, "--extra_data"]
    assert run(tmp_path, *flags, "ours") == 2
    said = capsys.readouterr()
    assert said.out.startswith(
        "ours: from who/what; licence of the data: free of charge\nextra/x y.txt: missing"
    )
    assert f"error: extra/y.txt: {server.url}/extra/y.txt cannot be fetched (Not Found)" in said.err
    assert files_in(tmp_path / "extra") == {"x y.txt": b"hello\n"}
    for reply, error in (
        ((404, {}, b""), "2 of 2 files cannot be fetched, listed above"),
        (None, "x%20y.txt cannot be"),
    ):
        server.replies |= {"/extra/x%20y.txt": reply, "/extra/y.txt": reply}
        assert run(tmp_path / "again", *flags, "ours") == 2  # a host that does not answer is asked once
        assert error in capsys.readouterr().err and len(server.requests) == 4 + (reply is None)
    server.requests, server.replies["/extra/x%20y.txt"] = server.requests[:2], (200, {}, b"hello\n")
    server.replies["/extra/y.txt"] = (200, {}, CONTENTS["first"])
    assert run(tmp_path, *flags, "all") == 0
    said = capsys.readouterr().out
    assert "nobody's: not downloaded" in said and "x y.txt: already right\nextra/y.txt: missing" in said
    assert server.requests == ["/extra/x%20y.txt", "/extra/y.txt", "/extra/y.txt"]
    assert run(tmp_path, "--check", "--extra_data", "ours") == 0
    assert run(tmp_path, *flags, "nobody's") == 2
    assert "--extra_data nobody's: cannot be downloaded" in capsys.readouterr().err


def test_sources_come_from_where_they_are_published(source):
    assert [remote.url for remote in download.source_files("ours").values()] == [
        f"https://github.com/who/what/raw/{'0' * 40}/{path}" for path in ("a%20b/x", "y")
    ]


def test_downloads_then_skips(server, tmp_path, capsys):
    folder = tmp_path / "made for it"
    assert run(folder, "--base_url", server.url + "/") == 0
    assert files_in(folder) == ALL_RIGHT
    said = capsys.readouterr()
    assert said.out == "first.csv: missing; downloading\nsecond.csv: missing; downloading\n"
    assert said.err == ""  # no progress bar when piped
    assert run(folder, "--base_url", server.url) == 0
    assert capsys.readouterr().out.count("already right") == 2
    assert server.requests == ["/first.csv", "/second.csv"]


@pytest.mark.parametrize("as_url", [True, False])
def test_downloads_from_a_folder_through_a_link(server, tmp_path, as_url):
    """Researchers replace data/ by a link to a disk."""
    source, disk = tmp_path / "my mirror", tmp_path / "disk"
    source.mkdir()
    disk.mkdir()
    for name, body in ALL_RIGHT.items():
        (source / name).write_bytes(body)
    (tmp_path / "data").symlink_to(disk)
    assert run(tmp_path / "data", "--base_url", source.as_uri() if as_url else str(source)) == 0
    assert files_in(disk) == ALL_RIGHT and (tmp_path / "data").is_symlink()


# What the server answers for second.csv, and the reason given.
FAILS, BAD_HASH = "cannot be fetched (", "is wrong (blob id"
BAD_REPLIES = {
    "wrong content": ((200, {}, b"hullo\n"), BAD_HASH),
    "cut short": ((200, {"Content-Length": "6"}, b"hel"), BAD_HASH),
    "not found": ((404, {}, b"gone"), f"{FAILS}Not Found); try again later, or name another source"),
    "no reply": (None, f"{FAILS}Remote end closed connection without response)"),
    "length not a number": ((200, {"Content-Length": "many"}, b"x"), f"{FAILS}invalid literal"),
    "redirect to a file": ((302, {"Location": "file:///etc/passwd"}, b""), FAILS),
    "redirects in a circle": ((302, {"Location": "/second.csv"}, b""), FAILS),
}


@pytest.mark.parametrize("case", BAD_REPLIES)
def test_bad_reply_changes_nothing(server, tmp_path, capsys, case):
    server.replies["/second.csv"], reason = BAD_REPLIES[case]
    (tmp_path / "second.csv").write_bytes(b"old")
    assert run(tmp_path, "--base_url", server.url) == 2
    assert files_in(tmp_path) == ALL_RIGHT | {"second.csv": b"old"}  # and no temporary file is left
    error = capsys.readouterr().err
    assert error.startswith("training.download: error: second.csv: ") and error.count("\n") == 1
    assert f"{server.url}/second.csv {reason}" in error and "--base_url" in error


def test_files_with_other_content_are_kept(server, tmp_path, capsys):
    for number, content in (("", b"my own rows"), ("1", b"my newer rows")):
        (tmp_path / "first.csv").write_bytes(content)
        assert run(tmp_path, "--base_url", server.url) == 0
        assert (tmp_path / f"first.csv.old{number}").read_bytes() == content
        assert f"first.csv: what was there is now first.csv.old{number}\n" in capsys.readouterr().out
    (tmp_path / "first.csv").write_bytes(b"")  # nothing to lose
    assert run(tmp_path, "--base_url", server.url) == 0
    old = {"first.csv.old": b"my own rows", "first.csv.old1": b"my newer rows"}
    assert files_in(tmp_path) == ALL_RIGHT | old


def test_host_that_does_not_answer(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.1)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never accepts
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert run(tmp_path, "--base_url", url) == 2
    error = capsys.readouterr().err
    assert f"first.csv: {url}/first.csv cannot be fetched (no answer); try again later" in error
    assert error.count("\n") == 1 and socket.getdefaulttimeout() == before
    with socket.socket() as free:  # bound but not listening: nobody else gets the port
        free.bind(("127.0.0.1", 0))
        assert run(tmp_path, "--base_url", f"http://127.0.0.1:{free.getsockname()[1]}") == 2
    assert os.strerror(errno.ECONNREFUSED) in capsys.readouterr().err
    assert files_in(tmp_path) == {}


def test_interrupt_or_full_disk_leaves_no_temporary_file(server, tmp_path, capsys, monkeypatch):
    def interrupted(url, path, progress):
        (tmp_path / path).write_bytes(b"hel")
        raise KeyboardInterrupt

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "second.csv").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(download.torch.hub, "download_url_to_file", interrupted)
        assert run(tmp_path, "--files", "second") == 130
    assert files_in(tmp_path) == {"second.csv": b"old"}
    capsys.readouterr()
    monkeypatch.setattr(os, "fsync", fail)
    assert run(tmp_path, "--base_url", server.url, "--files", "second") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1
    assert files_in(tmp_path) == {"second.csv": b"old"}


@pytest.mark.parametrize("base_url", ["ftp://x/data", "https://", "nowhere", "", "http://["])
def test_bad_base_url(tmp_path, capsys, base_url):
    assert run(tmp_path, "--base_url", base_url) == 2
    said = f"--base_url {base_url}: expected an http://, https:// or file:// URL, or a folder"
    assert capsys.readouterr().err == f"training.download: error: {said}\n"


def test_check_only_looks(server, tmp_path, capsys):
    (tmp_path / "second.csv").write_bytes(b"hello\n")
    (tmp_path / "first.csv").write_bytes(b"")
    assert run(tmp_path, "--check", "--files", "second.csv") == 0
    assert capsys.readouterr().out == "second.csv: right\n"
    assert run(tmp_path, "--check") == 2
    said = capsys.readouterr()
    assert "first.csv: wrong (blob id e69de29b" in said.out and "1 of 2 files missing or wrong" in said.err
    assert files_in(tmp_path) == {"first.csv": b"", "second.csv": b"hello\n"} and server.requests == []


def test_links_and_pipes_are_replaced_not_followed(server, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"as it was")
    (tmp_path / "out" / "first.csv").symlink_to("../elsewhere")
    os.mkfifo(tmp_path / "out" / "second.csv")
    assert run(tmp_path / "out", "--base_url", server.url) == 0
    assert "second.csv: not a regular file; downloading" in capsys.readouterr().out
    assert (tmp_path / "elsewhere").read_bytes() == b"as it was"
    assert files_in(tmp_path / "out") == ALL_RIGHT
    assert not (tmp_path / "out" / "first.csv").is_symlink()


def test_unknown_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, "--files", "../second")
    assert ended.value.code == 2 and "--files" in capsys.readouterr().err
