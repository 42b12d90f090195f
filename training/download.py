"""Download the course's data, or the sources of --extra_data, into data/, and check every file.

    python -m training.download
    python -m training.download --files ids-sst-train ids-sst-dev --base_url file:///mnt/data
    python -m training.download --extra_data sick,mrpc
    python -m training.download --check

The course's files come from the public repository https://github.com/gpoesia/minbert-default-final-project
(commit 7ac8260, folder `data`), the others from where `training.source_table` says. Each one is compared with
the blob id that git gave it there, so it does not matter which mirror it came from. Running the command again
fetches only what is missing or wrong; a wrong file, which may be somebody's own, is kept as NAME.old.
"""

if __name__ == "__main__":
    from support.interrupts import end_quietly

    end_quietly()

import argparse
import hashlib
import http.client
import os
import socket
import sys
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch.hub

from support.command_line import OneLineParser, run_script
from support.errors import UserError, one_line
from support.files import ROOT, is_regular, sync, whole_file
from training.run_parser import name_list
from training.source_table import EXTRA_SOURCES

BASE_URL = "https://github.com/gpoesia/minbert-default-final-project/raw/7ac8260/data"
TIMEOUT_SECONDS = 30  # of silence, not for the whole file
GONE = (404, 410, 451)  # what a host answers where a file is no longer published
ALL = "all"  # of the sources
# Git blob id of each NAME.csv of the course. Paths on disk are made from these names only.
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


@dataclass(frozen=True)
class Remote:
    """Where a file is published, and the git blob id of its content."""

    url: str
    blob_id: str


class AbsentError(UserError):
    """A host answers that it has no such file, or another one: others may be there."""


def course_files(names: Iterable[str]) -> dict[str, Remote]:
    """Files of the course, by their place under --output_dir."""
    return {f"{name}.csv": Remote(f"{BASE_URL}/{name}.csv", BLOB_IDS[name]) for name in names}


def source_files(name: str) -> dict[str, Remote]:
    """The files of a source of additional data, by their place under --output_dir.

    Raises:
        UserError: if it is not published.
    """
    source = EXTRA_SOURCES[name]
    published = source.published
    if published is None:
        raise UserError(f"--extra_data {name}: cannot be downloaded, since nobody publishes it as it is")
    base_url = f"https://github.com/{published.repository}/raw/{published.commit}"
    return {
        file_name: Remote(f"{base_url}/{urllib.parse.quote(path)}", blob_id)
        for file_name, (path, blob_id) in zip(source.files, published.files.items(), strict=True)
    }


def find_files(args: argparse.Namespace) -> dict[str, Remote]:
    """The files that a command line asks for; says under which licence those of additional data are."""
    wants_all = ALL in args.extra_data
    names = tuple(EXTRA_SOURCES) if wants_all else args.extra_data
    files = course_files(args.files if args.files or names else BLOB_IDS)
    for name in names:
        published = EXTRA_SOURCES[name].published
        if wants_all and published is None:
            print(f"{name}: not downloaded, since nobody publishes it as it is")
            continue
        files |= source_files(name)
        print(f"{name}: from {published.repository}; licence of the data: {published.licence}")
    return files


def git_blob_id(path: Path) -> str:
    """The id that git gives to the content of a file: SHA-1 of `blob SIZE`, a zero byte, the content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def find_problem(path: Path, blob_id: str) -> str | None:
    """What is wrong with a file on disk, in one line; None if it is right."""
    try:
        if not is_regular(path):
            return "not a regular file"
        actual = git_blob_id(path)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return None if actual == blob_id else f"wrong (blob id {actual}, expected {blob_id})"


def fetch(url: str, name: str, path: Path, blob_id: str) -> None:
    """Put the checked content of `url` at `path`, or leave `path` as it was.

    Args:
        name: of the file, for messages.

    Raises:
        AbsentError: if the host has no such file, or it is not what `blob_id` names.
        UserError: if the content cannot be fetched for another reason.
        OSError: if the folder of `path` cannot be written to.
    """
    with whole_file(path) as temporary:
        temporary.touch()  # so that an error in what follows is the network's, not the folder's
        try:
            torch.hub.download_url_to_file(url, str(temporary), progress=sys.stderr.isatty())
        except (OSError, http.client.HTTPException, ValueError) as error:
            kind = AbsentError if getattr(error, "code", None) in GONE else UserError
            error = getattr(error, "reason", None) or error  # of an HTTPError or URLError
            reason = (
                "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or error
            )
            raise kind(
                f"{name}: {url} cannot be fetched ({one_line(reason)}); try again later, or name another"
                " source by --base_url"
            ) from None
        problem = find_problem(temporary, blob_id)
        if problem:
            raise AbsentError(f"{name}: what came from {url} is {problem}; name another source by --base_url")
        sync(temporary)  # once more by whole_file, but here nothing has been moved yet if it fails
        keep_aside(path)


def keep_aside(path: Path) -> None:
    """Give a file that is in the way, perhaps somebody's own version of the data, another name."""
    if not os.path.lexists(path) or path.is_symlink() or not is_regular(path) or not path.stat().st_size:
        return
    names = (path.with_name(f"{path.name}.old{number or ''}") for number in count())
    kept = next(name for name in names if not os.path.lexists(name))
    path.rename(kept)
    print(f"{path.name}: what was there is now {kept.name}")


def download(files: Mapping[str, Remote], base_url: str | None, folder: Path) -> None:
    """Fetch what is missing or wrong, also after a file that is not there; stop where no host answers.

    Args:
        files: by their place under `folder`.
        base_url: of a mirror, which has the same names as `folder`; None: from where they are published.

    Raises:
        UserError: if a file could not be fetched.
    """
    absent = []
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)  # torch's downloader sets none
    try:
        for name, remote in files.items():
            path = folder / name
            problem = find_problem(path, remote.blob_id)
            print(f"{name}: {f'{problem}; downloading' if problem else 'already right'}", flush=True)
            if problem:
                url = remote.url if base_url is None else f"{base_url}/{urllib.parse.quote(name)}"
                try:
                    fetch(url, name, path, remote.blob_id)
                except AbsentError as error:
                    absent.append(error)
                    print(error, flush=True)
    finally:
        socket.setdefaulttimeout(before)
    if len(absent) == 1:
        raise absent[0]
    if absent:
        raise UserError(f"{len(absent)} of {len(files)} files cannot be fetched, listed above")


def check(files: Mapping[str, Remote], folder: Path) -> None:
    """Print which files on disk are right.

    Raises:
        UserError: if any is not.
    """
    problems = {name: find_problem(folder / name, remote.blob_id) for name, remote in files.items()}
    for name, problem in problems.items():
        print(f"{name}: {problem or 'right'}")
    num_wrong = len(problems) - list(problems.values()).count(None)
    if num_wrong:
        raise UserError(f"{folder}: {num_wrong} of {len(problems)} files missing or wrong, listed above")


def resolve_base_url(base_url: str) -> str:
    """Check --base_url, turn a folder into a file:// URL, and drop a final slash.

    Raises:
        UserError: if it is neither an http, https or file URL nor a folder.
    """
    if os.path.isdir(base_url):
        return Path(base_url).resolve().as_uri()
    try:
        parts = urllib.parse.urlsplit(base_url)
    except ValueError:  # brackets without an address in them
        parts = urllib.parse.urlsplit("")
    if parts.scheme == "file" or (parts.scheme in ("http", "https") and parts.netloc):
        return base_url.rstrip("/")
    raise UserError(f"--base_url {base_url}: expected an http://, https:// or file:// URL, or a folder")


def get_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="training.download",
        description="Download the course's data, or additional data, and check every file; exit code 2 for an"
        " error.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--files",
        nargs="+",
        type=lambda text: text.removesuffix(".csv"),
        choices=list(BLOB_IDS),
        default=[],
        metavar="NAME",
        help=f"files of the course, with or without .csv: {', '.join(BLOB_IDS)} (default: all, or none"
        " with --extra_data)",
    )
    some_sources = name_list(
        (*EXTRA_SOURCES, ALL), f"some of {','.join(EXTRA_SOURCES)}, or {ALL}", "NAME,..."
    )
    parser.add_argument(
        "--extra_data",
        type=some_sources,
        default=(),
        metavar=some_sources.metavar,
        help=f"sources of additional data: {', '.join(EXTRA_SOURCES)}, or {ALL}",
    )
    parser.add_argument(
        "--base_url",
        metavar="URL",
        help="folder that holds the files as --output_dir does, or its http://, https:// or file:// URL"
        " (default: where each file is published)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=ROOT / "data",
        metavar="DIR",
        help="folder to write to (default: the project's data/)",
    )
    parser.add_argument("--check", action="store_true", help="download nothing, only check what is there")
    return parser.parse_args(argv)


def work(argv: list[str] | None) -> None:
    args = get_args(argv)
    base_url = None if args.base_url is None else resolve_base_url(args.base_url)
    files = find_files(args)
    if args.check:
        check(files, args.output_dir)
    else:
        download(files, base_url, args.output_dir)


def main(argv: list[str] | None = None) -> int:
    return run_script("training.download", partial(work, argv))


if __name__ == "__main__":
    sys.exit(main())
