"""Downloads the course data: nine main files and three CFIMDB files, checked.

The files come from the public repository gpoesia/minbert-default-final-project
(https://github.com/gpoesia/minbert-default-final-project, commit 7ac8260, folder
`data`). Every file is compared with the blob id that git gave it in that commit, so
it does not matter which mirror it came from. A file is written under a temporary
name (`.NAME.csv.*.part`) and renamed only once it is complete and right; a run that
was killed, not interrupted, may leave such a file, which can be deleted. Running the
script again fetches only what is missing or wrong.

    python data/download.py
    python data/download.py --files ids-sst-train ids-sst-dev --base_url file:///mnt/data
    python data/download.py --check
"""

import argparse
import hashlib
import http.client
import os
import secrets
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

BASE_URL = "https://github.com/gpoesia/minbert-default-final-project/raw/7ac8260/data"

# Git blob id of each NAME.csv. Paths on disk are made from these names only.
BLOB_IDS = {
    "ids-sst-train": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "ids-sst-dev": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "quora-train": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
    "quora-dev": "de7cfa32428fd470b93f778fccc45a619e01336f",
    "quora-test-student": "f257ef00558555afb50819578a58205732b16354",
    "sts-train": "12b17760e7795fee35aeeabc290d5651de02622a",
    "sts-dev": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
    "ids-cfimdb-train": "cd57bcbd2f7214ea6dd1783d3e885d324b1f478d",
    "ids-cfimdb-dev": "8a0f5dcf3d40189b96c801a12cd79bf8003e61de",
    "ids-cfimdb-test-student": "1e789c709b3ca0511f027a309b6d8bd21cde41b2",
}

MAX_BYTES = 100_000_000  # per file; a wrong mirror must not fill the disk
CHUNK_BYTES = 65_536
TIMEOUT_SECONDS = 30  # of silence, not for the whole file
NUM_TRIES = 3
BACKOFF_SECONDS = 1  # before the second try, doubled before the third
# Without timeouts: a server that does not answer costs TIMEOUT_SECONDS each time.
TRANSIENT_ERRORS = (
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
    http.client.IncompleteRead,
)


class FetchError(Exception):
    """A file could not be fetched; the text is the reason, in one line."""


class TransientError(FetchError):
    """The same request may well succeed in a moment: worth another try."""


def git_blob_id(path: Path) -> str:
    """The id git gives the content of a file: SHA-1 of `blob SIZE`, a zero byte, content.

    Raises:
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def find_problem(path: Path, blob_id: str) -> str | None:
    """What is wrong with the file on disk, in one line, or None if it is right."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to read a pipe is to wait
            return "not a regular file"
        actual = git_blob_id(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return None if actual == blob_id else f"wrong: blob id {actual}, expected {blob_id}"


def as_fetch_error(error: Exception) -> FetchError:
    """Turns what urllib raised into a one-line reason, transient or not."""
    if type(error) is urllib.error.URLError:
        error = error.reason  # the OSError underneath, or a text
    status = getattr(error, "code", 0)  # of an HTTPError
    is_transient = status >= 500 or isinstance(error, TRANSIENT_ERRORS)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        reason = f"no answer for {TIMEOUT_SECONDS} s"
    # Part of the reason may be the server's own words: keep them to one short line.
    reason = "".join(c if c.isprintable() else " " for c in reason)[:200].strip()
    return TransientError(reason) if is_transient else FetchError(reason)


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the web only; urllib refuses those to files of this machine, but follows those to ftp."""

    def redirect_request(self, request, response, code, message, headers, url):
        scheme = urllib.parse.urlsplit(url).scheme
        if scheme not in ("http", "https"):
            raise FetchError(f"redirected to {scheme}://, expected http:// or https://")
        return super().redirect_request(request, response, code, message, headers, url)


def read_chunks(url: str, file_name: str) -> Iterator[bytes]:
    """Yields the body of `url` piece by piece, with a progress bar on a terminal.

    Args:
        file_name: what the progress bar calls it.
    Raises:
        FetchError: if the body cannot be had, is cut short or exceeds MAX_BYTES.
    """
    try:
        opener = urllib.request.build_opener(WebRedirects)
        with opener.open(url, timeout=TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            num_expected = int(length) if length else None  # in bytes
            if (num_expected or 0) > MAX_BYTES:
                raise FetchError(f"{length} bytes, expected at most {MAX_BYTES}")
            num_received = 0
            with tqdm(
                total=num_expected,
                desc=file_name,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=not sys.stderr.isatty(),
            ) as progress_bar:
                while chunk := response.read(CHUNK_BYTES):
                    num_received += len(chunk)
                    if num_received > MAX_BYTES:
                        raise FetchError(f"more than {MAX_BYTES} bytes, stopped")
                    progress_bar.update(len(chunk))
                    yield chunk
            # response.read(size) ends quietly when the connection closes too early.
            if num_expected is not None and num_received != num_expected:
                raise TransientError(f"{num_received} of {num_expected} bytes came")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise as_fetch_error(error) from error


def fetch(url: str, path: Path, blob_id: str) -> None:
    """Puts the checked content of `url` at `path`, or leaves `path` as it was.

    Raises:
        FetchError: if the content cannot be had, or is not what `blob_id` names.
        OSError: if the folder of `path` cannot be written.
    """
    # In the same folder, because os.replace is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with (
            closing(read_chunks(url, path.name)) as body,
            open(temporary, "xb") as file,
        ):
            file.writelines(body)
            file.flush()
            os.fsync(file.fileno())
        actual = git_blob_id(temporary)  # of what reached the disk
        if actual != blob_id:
            raise FetchError(f"blob id {actual}, expected {blob_id}")
        os.replace(temporary, path)
    finally:  # also on Ctrl-C; after the rename there is nothing left to remove
        temporary.unlink(missing_ok=True)


def fetch_with_retries(url: str, path: Path, blob_id: str) -> None:
    """Calls `fetch` up to NUM_TRIES times, as long as its error is transient."""
    for num_tries in range(1, NUM_TRIES + 1):
        try:
            return fetch(url, path, blob_id)
        except TransientError as error:
            if num_tries == NUM_TRIES:
                raise
            seconds = BACKOFF_SECONDS * 2 ** (num_tries - 1)
            print(f"{path.name}: {error}; trying again in {seconds} s", flush=True)
            time.sleep(seconds)


def download(names: list[str], base_url: str, output_dir: Path) -> int:
    """Fetches what is missing or wrong, and lists every failure at the end.

    Returns:
        The exit code: 0 if all files are right now, else 2.
    Raises:
        ValueError: if something must be fetched and `output_dir` cannot be written.
    """
    failures = []
    for name in names:
        path = output_dir / f"{name}.csv"
        problem = find_problem(path, BLOB_IDS[name])
        if problem is None:
            print(f"{path.name}: already right, skipped", flush=True)
            continue
        if not os.access(output_dir, os.W_OK | os.X_OK):
            raise ValueError(f"--output_dir {str(output_dir)!r}: cannot be written")
        action = "downloading" if problem == "missing" else "replacing it"
        print(f"{path.name}: {problem}; {action}", flush=True)
        url = f"{base_url}/{path.name}"
        try:
            fetch_with_retries(url, path, BLOB_IDS[name])
        except FetchError as error:
            failure = f"{path.name}: {url}: {error} (other source: --base_url)"
        except OSError as error:
            failure = f"{path.name}: cannot write to {str(output_dir)!r}: {error}"
        else:
            print(f"{path.name}: done, blob id right", flush=True)
            continue
        failures.append(failure)
        print(f"{path.name}: failed, nothing changed on disk", flush=True)
    for failure in failures:
        print(f"download.py: error: {failure}", file=sys.stderr)
    return 2 if failures else 0


def check(names: list[str], output_dir: Path) -> int:
    """Says which files on disk are right; the exit code is 0 if all are, else 1."""
    problems = {name: find_problem(output_dir / f"{name}.csv", BLOB_IDS[name]) for name in names}
    for name, problem in problems.items():
        print(f"{name}.csv: {problem or 'right'}")
    return 1 if any(problems.values()) else 0


def resolve_base_url(base_url: str) -> str:
    """Checks --base_url, turns a folder into a file:// URL and drops a final slash.

    Raises:
        ValueError: if it is neither an http, https or file URL nor a folder.
    """
    if os.path.isdir(base_url):
        return Path(base_url).resolve().as_uri()
    parts = urllib.parse.urlsplit(base_url)
    is_web = parts.scheme in ("http", "https") and parts.netloc
    if not is_web and not base_url.lower().startswith("file://"):
        raise ValueError("expected an http://, https:// or file:// URL, or a folder")
    return base_url.rstrip("/")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Download the course data and check it against its git blob ids.",
        epilog="Exit code: 0 all files right, 1 --check found a missing or wrong file, "
        "2 an error, 130 interrupted.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--files",
        nargs="+",
        type=lambda text: text.removesuffix(".csv"),
        choices=list(BLOB_IDS),
        default=list(BLOB_IDS),
        metavar="NAME",
        help=f"which files, with or without .csv: {', '.join(BLOB_IDS)} (default: all)",
    )
    data.add_argument(
        "--base_url",
        default=BASE_URL,
        metavar="URL",
        help="http://, https:// or file:// URL of a folder that holds the files, or a "
        f"folder; at most {MAX_BYTES // 10**6} MB per file (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir",
        type=Path,
        default=Path(__file__).resolve().parent,
        metavar="DIR",
        help="existing folder to write to (default: the folder of this script)",
    )
    output.add_argument(
        "--check",
        action="store_true",
        help="download nothing, only compare the files in --output_dir with their blob ids",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = get_args(argv)
    names = list(dict.fromkeys(args.files))  # each file once
    try:
        if not os.path.isdir(args.output_dir):
            text = f"--output_dir {str(args.output_dir)!r}: expected an existing folder"
            raise ValueError(text)
        if args.check:
            if args.base_url != BASE_URL:
                print("warning: --base_url has no effect with --check", file=sys.stderr)
            return check(names, args.output_dir)
        try:
            base_url = resolve_base_url(args.base_url)
        except ValueError as error:  # urlsplit raises it too
            raise ValueError(f"--base_url {args.base_url!r}: {error}") from error
        return download(names, base_url, args.output_dir)
    except ValueError as error:
        print(f"download.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        text = "interrupted; run it again to fetch the rest, finished files are kept"
        print(f"download.py: {text}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
