"""Tests of data/download.py against a local web server and a file:// folder."""

import errno
import gzip
import hashlib
import http.server
import importlib.util
import os
import re
import socket
import threading
from pathlib import Path

import pytest

SCRIPT_PATH = Path(__file__).resolve().parent.parent / "data" / "download.py"
CONTENTS = {"first": b"id\tsentence\n" * 9000, "second": b"hello\n"}  # several chunks
# Worked by hand for `second`: printf 'blob 6\0hello\n' | sha1sum
HELLO_BLOB_ID = "ce013625030ba8dba906f756967f9e9ca394464a"


def load_script():
    spec = importlib.util.spec_from_file_location("download", SCRIPT_PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def download(monkeypatch):
    """The script with a table of two small files, no waiting and no proxy."""
    module = load_script()
    first = CONTENTS["first"]
    first_blob_id = hashlib.sha1(b"blob %d\0" % len(first) + first).hexdigest()
    table = {"first": first_blob_id, "second": HELLO_BLOB_ID}
    monkeypatch.setattr(module, "BLOB_IDS", table)
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0)
    monkeypatch.setenv("no_proxy", "*")
    return module


class Handler(http.server.BaseHTTPRequestHandler):
    """Sends the next (status, headers, body) of `server.replies[path]`; the last repeats.

    A reply of None closes the connection without a word.
    """

    def do_GET(self):
        self.server.requests.append(self.path)
        replies = self.server.replies.get(self.path, [(404, {}, b"")])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
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
def server():
    """A web server that has the files of CONTENTS, until a test changes `replies`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        web.url = f"http://127.0.0.1:{web.server_port}"
        web.replies = {f"/{n}.csv": [(200, {}, body)] for n, body in CONTENTS.items()}
        web.requests = []
        thread = threading.Thread(target=web.serve_forever, args=(0.01,))
        thread.start()
        yield web
        web.shutdown()
        thread.join()


def run(download, output_dir, *flags):
    return download.main(["--output_dir", str(output_dir), *flags])


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


ALL_RIGHT = {f"{name}.csv": body for name, body in CONTENTS.items()}


def test_table_has_the_twelve_files():
    table = load_script().BLOB_IDS
    assert len(table) == 12 == len(set(table.values()))
    assert all(re.fullmatch("[0-9a-f]{40}", blob_id) for blob_id in table.values())
    splits = ("train", "dev", "test-student")
    sets = ("ids-sst", "quora", "sts", "ids-cfimdb")
    assert list(table) == [f"{prefix}-{split}" for prefix in sets for split in splits]


def test_git_blob_id_is_the_one_of_git(download, tmp_path):
    path = tmp_path / "hello"
    path.write_bytes(b"hello\n")
    assert download.git_blob_id(path) == HELLO_BLOB_ID
    path.write_bytes(b"")  # git's well-known id of the empty blob
    assert download.git_blob_id(path) == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_downloads_then_skips(download, server, tmp_path, capsys):
    assert run(download, tmp_path, "--base_url", server.url + "/") == 0
    assert files_in(tmp_path) == ALL_RIGHT
    captured = capsys.readouterr()
    assert "first.csv: missing; downloading\nfirst.csv: done" in captured.out
    assert captured.err == ""  # no progress bar when piped
    assert run(download, tmp_path, "--base_url", server.url) == 0
    assert capsys.readouterr().out.count("already right, skipped") == 2
    assert server.requests == ["/first.csv", "/second.csv"]


def test_progress_bar_on_a_terminal(download, server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download.sys.stderr, "isatty", lambda: True)
    assert run(download, tmp_path, "--base_url", server.url) == 0
    assert "first.csv:   0%" in capsys.readouterr().err


def test_follows_a_redirect(download, server, tmp_path):
    server.replies["/raw/second.csv"] = [(302, {"Location": "/second.csv"}, b"")]
    flags = ("--base_url", f"{server.url}/raw", "--files", "second.csv", "second")
    assert run(download, tmp_path, *flags) == 0
    assert files_in(tmp_path) == {"second.csv": b"hello\n"}
    assert server.requests == ["/raw/second.csv", "/second.csv"]


@pytest.mark.parametrize("as_url", [True, False])
def test_downloads_from_a_folder(download, tmp_path, as_url):
    source, output_dir = tmp_path / "my mirror", tmp_path / "out"
    source.mkdir()
    output_dir.mkdir()
    for name, body in ALL_RIGHT.items():
        (source / name).write_bytes(body)
    base_url = source.as_uri() if as_url else str(source)
    assert run(download, output_dir, "--base_url", base_url) == 0
    assert files_in(output_dir) == ALL_RIGHT


def test_replaces_a_wrong_file(download, server, tmp_path, capsys):
    (tmp_path / "second.csv").write_bytes(b"old")
    assert run(download, tmp_path, "--base_url", server.url) == 0
    assert files_in(tmp_path) == ALL_RIGHT
    assert re.search("second.csv: wrong: .*; replacing it", capsys.readouterr().out)


# What the server answers for second.csv, how often it is asked, and the reason given.
BAD_REPLIES = {
    "wrong content": ((200, {}, b"hullo\n"), 1, f"expected {HELLO_BLOB_ID}"),
    "cut short": ((200, {"Content-Length": "6"}, b"hel"), 3, "3 of 6 bytes came"),
    "not found": ((404, {}, b"gone"), 1, "HTTP Error 404: Not Found"),
    "server error": ((503, {}, b""), 3, "HTTP Error 503: Service Unavailable"),
    "no reply": (None, 3, "Remote end closed connection without response"),
    "length over the limit": ((200, {"Content-Length": "200001"}, b"x"), 1, "200001"),
    "length is no number": ((200, {"Content-Length": "many"}, b"x"), 1, "'many'"),
}


@pytest.mark.parametrize("case", BAD_REPLIES)
def test_bad_reply_changes_nothing(download, server, tmp_path, capsys, monkeypatch, case):
    reply, num_requests, reason = BAD_REPLIES[case]
    monkeypatch.setattr(download, "MAX_BYTES", 200_000)
    server.replies["/second.csv"] = [reply]
    (tmp_path / "second.csv").write_bytes(b"old")
    flags = ("--base_url", server.url, "--files", "second", "first")
    assert run(download, tmp_path, *flags) == 2
    # The old file stays, the other file is fetched, and no temporary file is left.
    assert files_in(tmp_path) == ALL_RIGHT | {"second.csv": b"old"}
    assert server.requests == ["/second.csv"] * num_requests + ["/first.csv"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--base_url" in error
    assert f"second.csv: {server.url}/second.csv: " in error and reason in error


def test_mismatch_names_both_blob_ids(download, server, tmp_path, capsys):
    server.replies["/second.csv"] = [(200, {}, b"")]
    flags = ("--base_url", server.url, "--files", "second")
    assert run(download, tmp_path, *flags) == 2
    ids = f"blob id e69de29bb2d1d6434b8b29ae775ad8c2e48c5391, expected {HELLO_BLOB_ID}"
    assert ids in capsys.readouterr().err
    assert files_in(tmp_path) == {}


def test_body_over_the_limit_without_a_length(download, server, tmp_path, capsys, monkeypatch):
    body = (200, {"Content-Length": ""}, CONTENTS["first"])  # ends with the connection
    server.replies["/first.csv"] = [body]
    monkeypatch.setattr(download, "MAX_BYTES", 70_000)
    flags = ("--base_url", server.url, "--files", "first")
    assert run(download, tmp_path, *flags) == 2
    assert "more than 70000 bytes" in capsys.readouterr().err
    assert files_in(tmp_path) == {}
    monkeypatch.setattr(download, "MAX_BYTES", len(CONTENTS["first"]))
    assert run(download, tmp_path, *flags) == 0


def test_transient_errors_are_tried_again(download, server, tmp_path, capsys):
    good = (200, {}, b"hello\n")
    server.replies["/second.csv"] = [(500, {}, b""), None, good]
    assert run(download, tmp_path, "--base_url", server.url) == 0
    assert files_in(tmp_path) == ALL_RIGHT
    assert capsys.readouterr().out.count("trying again in 0 s") == 2
    assert server.requests.count("/second.csv") == 3


def test_every_failure_is_listed(download, server, tmp_path, capsys):
    server.replies.clear()
    assert run(download, tmp_path, "--base_url", server.url) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["first.csv", "second.csv"]


def test_connection_refused(download, tmp_path, capsys):
    with socket.socket() as free:  # bound but not listening: nobody else gets the port
        free.bind(("127.0.0.1", 0))
        base_url = f"http://127.0.0.1:{free.getsockname()[1]}"
        flags = ("--base_url", base_url, "--files", "first")
        assert run(download, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert f"{base_url}/first.csv: {os.strerror(errno.ECONNREFUSED)}" in error
    assert error.count("\n") == 1 and "--base_url" in error
    assert files_in(tmp_path) == {}


def test_silent_server_times_out(download, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # never accepts
        base_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        flags = ("--base_url", base_url, "--files", "first")
        assert run(download, tmp_path, *flags) == 2
    assert f"{base_url}/first.csv: no answer for 0.1 s" in capsys.readouterr().err


def test_unknown_host(download, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    flags = ("--base_url", "https://mirror.invalid", "--files", "first")
    assert run(download, tmp_path, *flags) == 2
    expected = "https://mirror.invalid/first.csv: Name or service not known"
    assert expected in capsys.readouterr().err


def test_interrupt_leaves_no_temporary(download, tmp_path, capsys, monkeypatch):
    def interrupted(url, file_name):
        yield b"hel"
        assert len(files_in(tmp_path)) == 2  # second.csv and its temporary
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "read_chunks", interrupted)
    (tmp_path / "second.csv").write_bytes(b"old")
    assert run(download, tmp_path, "--files", "second") == 130
    assert files_in(tmp_path) == {"second.csv": b"old"}
    assert capsys.readouterr().err.count("\n") == 1


def test_full_disk_is_one_line(download, server, tmp_path, capsys, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", fail)
    flags = ("--base_url", server.url, "--files", "second")
    assert run(download, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert "second.csv: cannot write" in error and "No space left" in error
    assert error.count("\n") == 1
    assert files_in(tmp_path) == {}


def test_bad_output_dir_is_one_line(download, server, tmp_path, capsys, monkeypatch):
    flags = ("--base_url", server.url)
    (tmp_path / "file").touch()
    for bad in ("nowhere", "file"):
        assert run(download, tmp_path / bad, *flags) == 2
        error = capsys.readouterr().err
        assert bad in error and "expected an existing folder" in error
        assert error.count("\n") == 1
    # A read-only folder; chmod would not stop the root user.
    monkeypatch.setattr(download.os, "access", lambda path, mode: False)
    assert run(download, tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert "--output_dir" in error and "cannot be written" in error
    assert error.count("\n") == 1
    assert server.requests == []


@pytest.mark.parametrize("base_url", ["ftp://x/data", "https://", "nowhere", ""])
def test_bad_base_url_is_one_line(download, tmp_path, capsys, base_url):
    assert run(download, tmp_path, "--base_url", base_url) == 2
    error = capsys.readouterr().err
    assert f"--base_url {base_url!r}: expected" in error
    assert error.count("\n") == 1


def test_check_only_looks(download, tmp_path, capsys):
    (tmp_path / "second.csv").write_bytes(b"hello\n")
    (tmp_path / "first.csv").write_bytes(b"")
    assert run(download, tmp_path, "--check", "--files", "second") == 0
    assert capsys.readouterr().out == "second.csv: right\n"
    assert run(download, tmp_path, "--check") == 1
    assert "first.csv: wrong: blob id e69de29b" in capsys.readouterr().out
    (tmp_path / "first.csv").unlink()
    assert run(download, tmp_path, "--check") == 1
    assert capsys.readouterr().out == "first.csv: missing\nsecond.csv: right\n"
    assert files_in(tmp_path) == {"second.csv": b"hello\n"}


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file://{folder}/second.csv", "is not allowed"),
        ("FILE://{folder}/second.csv", "is not allowed"),
        ("ftp://127.0.0.1/second.csv", "redirected to ftp://, expected http:// or https://"),
        ("data:text/plain,hello", "is not allowed"),
        ("http://[", "Invalid"),
    ],
)
def test_redirects_lead_to_the_web_only(download, server, tmp_path, capsys, location, reason):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "second.csv").write_bytes(b"hello\n")  # even though it would be the right one
    (tmp_path / "out").mkdir()
    location = location.format(folder=tmp_path / "secret")
    server.replies["/second.csv"] = [(302, {"Location": location}, b"")]
    assert run(download, tmp_path / "out", "--base_url", server.url, "--files", "second") == 2
    error = capsys.readouterr().err
    assert "second.csv: " in error and reason in error and error.count("\n") == 1
    assert files_in(tmp_path / "out") == {}


def test_redirects_in_a_circle(download, server, tmp_path, capsys):
    server.replies["/second.csv"] = [(302, {"Location": "/second.csv"}, b"")]
    assert run(download, tmp_path, "--base_url", server.url, "--files", "second") == 2
    assert capsys.readouterr().err.count("\n") == 1 and files_in(tmp_path) == {}


def test_compressed_body_is_not_unpacked(download, server, tmp_path, capsys):
    server.replies["/second.csv"] = [(200, {"Content-Encoding": "gzip"}, gzip.compress(b"hello\n"))]
    assert run(download, tmp_path, "--base_url", server.url, "--files", "second") == 2
    assert "blob id" in capsys.readouterr().err and files_in(tmp_path) == {}


@pytest.mark.parametrize("length", ["-1", "1e9", "9" * 5000, "\u0663"])
def test_odd_length_is_one_line(download, server, tmp_path, capsys, length):
    server.replies["/second.csv"] = [(200, {"Content-Length": length.encode().decode("latin-1")}, b"hello\n")]
    run(download, tmp_path, "--base_url", server.url, "--files", "second")
    assert capsys.readouterr().err.count("\n") <= 1 and files_in(tmp_path) in ({}, {"second.csv": b"hello\n"})


def test_links_and_pipes_are_replaced_not_followed(download, server, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").write_bytes(b"as it was")
    (tmp_path / "out" / "first.csv").symlink_to("../elsewhere")
    os.mkfifo(tmp_path / "out" / "second.csv")
    assert run(download, tmp_path / "out", "--base_url", server.url, "--check") == 1
    assert "second.csv: not a regular file" in capsys.readouterr().out
    assert run(download, tmp_path / "out", "--base_url", server.url) == 0
    assert (tmp_path / "elsewhere").read_bytes() == b"as it was"
    assert files_in(tmp_path / "out") == ALL_RIGHT
    assert not (tmp_path / "out" / "first.csv").is_symlink()


def test_unknown_file_is_refused(download, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run(download, tmp_path, "--files", "../second")
    assert exit_info.value.code == 2
    assert "--files" in capsys.readouterr().err
