"""Checkpoints are whole or not there, damage is found, and a replacement never loses the last good one."""

import hashlib
import os
import shutil
import socket

import pytest
import torch

from bert import BertModel
from support.errors import UserError
from support.files import whole_file, write_text
from tests.tiny import make_sst_model
from training import checkpoint
from training.checkpoint import (
    copy_tensors,
    find_checkpoint,
    find_damage,
    load_model,
    load_state,
    load_tensors,
    need_checkpoint,
    remove_checkpoints,
    versions,
    write_checkpoint,
    write_model,
)


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def save(folder, model, tokenizer, state, keep=1):
    write_checkpoint(folder, lambda new: write_model(new, model, tokenizer, state), keep)


def write_number(folder, number, keep=1):
    """A checkpoint that holds nothing but a number."""
    write_checkpoint(folder, lambda new: (new / "state.json").write_text(f'{{"step": {number}}}'), keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_kill_or_somebody_else_left_at_the_temporary_name_does_no_harm(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for process in (os.getpid(), "12345678901234567890", "theirs"):
        (tmp_path / f".file.{socket.gethostname()}.{process}.unfinished").symlink_to(victim)
    (tmp_path / "file.tmp").write_text("an ordinary name: somebody's own")
    write_text(tmp_path / "file", "new")
    assert victim.read_text() == "precious" and (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink() and names(tmp_path) == ["file", "file.tmp", "victim"]


def test_two_processes_may_write_the_same_file(tmp_path):
    with whole_file(tmp_path / "file") as own:
        own.write_text("half of")
        if os.fork() == 0:
            try:
                write_text(tmp_path / "file", "all")
            finally:
                os._exit(0)
        os.wait()
        assert (tmp_path / "file").read_text() == "all" and own.read_text() == "half of"
    assert names(tmp_path) == ["file"]


# --- checkpoint folders ---------------------------------------------------------------------------


def test_round_trip(tokenizer, tmp_path):
    """Also as an encoder's folder, with checksums as `sha256sum` makes them."""
    model, other, folder = make_sst_model(tokenizer), make_sst_model(tokenizer, seed=1), tmp_path / "last"
    state = {"step": 3, "cosine_ema": [[0.1, -1 / 3]], "best_score": None}
    save(folder, model, tokenizer, state)
    assert load_state(folder) == state and names(tmp_path) == ["last"]  # JSON keeps every bit of a float
    assert not same(model, other)
    load_model(folder, other)
    assert same(model, other)
    encoder = BertModel.from_pretrained(folder)
    assert same(model.bert, encoder) and "heads.sst" in encoder.load_report  # named as not used
    sums = (folder / "SHA256SUMS").read_text()
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    del expected["SHA256SUMS"]
    assert sums == "".join(f"{digest}  {name}\n" for name, digest in expected.items())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_are_kept_newest_first(tmp_path, keep):
    for number in range(5):
        write_number(tmp_path / "last", number, keep)
    steps = [load_state(path)["step"] for path in versions(tmp_path / "last")]
    assert steps == [4, 3, 2][:keep]
    assert names(tmp_path) == ["last", "last.1", "last.2"][:keep]
    write_number(tmp_path / "last", 5, 1)  # fewer from now on
    assert names(tmp_path) == ["last"]
    remove_checkpoints(tmp_path / "last")
    assert not names(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("failing_call", range(12))
def test_failure_at_any_moment_leaves_a_good_checkpoint(tmp_path, monkeypatch, failing_call, keep):
    """Let the n-th file operation of a third save fail, and find the second or the third checkpoint."""
    folder = tmp_path / "last"
    for number in (1, 2):
        write_number(folder, number, keep)
    calls = iter(range(100))

    def failing(real):
        def call(*args, **options):
            if next(calls) == failing_call:
                raise KeyboardInterrupt
            return real(*args, **options)

        return call

    for owner, name in [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (checkpoint, "file_digest")]:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    failed = False
    try:
        write_number(folder, 3, keep)
    except KeyboardInterrupt:
        failed = True
    monkeypatch.undo()
    assert failed or next(calls) <= failing_call  # or else the save went on after a failure
    assert load_state(find_checkpoint(folder))["step"] in ((2, 3) if failed else (3,))
    write_number(folder, 4, keep)
    assert load_state(folder)["step"] == 4
    assert names(tmp_path) == ["last", "last.1"][:keep]  # nothing is left over


def test_half_removed_checkpoint_has_no_name(tmp_path, monkeypatch):
    """A kill while old ones are removed leaves nothing like a checkpoint, and the next save clears up."""
    for number in (1, 2):
        write_number(tmp_path / "last", number, 2)
    monkeypatch.setattr(shutil, "rmtree", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_number(tmp_path / "last", 3, 2)
    monkeypatch.undo()
    assert names(tmp_path) == [".last.old", "last", "last.1"]
    checkpoint.remove_leftovers(tmp_path / "last")
    assert names(tmp_path) == ["last", "last.1"]


def fail_with(error):
    def fail(*args, **options):
        raise error

    return fail


def test_what_cannot_be_removed_is_a_warning_and_links_are_not_followed(tmp_path, monkeypatch, capsys):
    write_number(tmp_path / "elsewhere", 1)
    (tmp_path / "last").symlink_to("elsewhere")
    (tmp_path / ".last.new").write_text("a stray file")
    (tmp_path / ".last.old").mkdir()
    write_number(tmp_path / "last", 2)
    assert load_state(tmp_path / "elsewhere")["step"] == 1 and load_state(tmp_path / "last")["step"] == 2
    assert names(tmp_path) == ["elsewhere", "last"]
    monkeypatch.setattr(shutil, "rmtree", fail_with(PermissionError(13, "Permission denied")))
    for number in (3, 4):
        write_number(tmp_path / "last", number)
        assert load_state(tmp_path / "last")["step"] == number
    assert "cannot be removed (Permission denied)" in capsys.readouterr().out


def test_damaged_checkpoints_do_not_count_among_those_that_are_kept(tmp_path):
    for number in (1, 2, 3):
        write_number(tmp_path / "last", number, 3)
    checkpoint.remove_newer(tmp_path / "last", tmp_path / "last.2")
    assert names(tmp_path) == ["last.2"]
    write_number(tmp_path / "last", 4, 2)
    assert [load_state(path)["step"] for path in versions(tmp_path / "last")] == [4, 1]


def test_failed_save_gives_its_space_back(tmp_path):
    def write(new):
        (new / "model.safetensors").write_bytes(b"0" * 1000)
        raise OSError(28, "No space left on device")

    write_number(tmp_path / "last", 1)
    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path / "last", write)
    assert names(tmp_path) == ["last"] and load_state(find_checkpoint(tmp_path / "last"))["step"] == 1


# --- damage ---------------------------------------------------------------------------------------


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda path: flip(path, 0.5),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


FILES = ["model.safetensors", "state.json", "config.json", "vocab.txt", "tokenizer_config.json", "SHA256SUMS"]


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Two checkpoints of step 2 and, before it, 1; to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        save(folder / "last", make_sst_model(tokenizer, seed=step), tokenizer, {"step": step}, keep=2)
    assert set(names(folder / "last")) == set(FILES)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_the_one_before_takes_its_place(saved, tmp_path, capsys, damage):
    for name in FILES:
        folder = shutil.copytree(saved, tmp_path / name) / "last"
        assert find_damage(folder) is None and find_checkpoint(folder) == folder
        assert not capsys.readouterr().out
        DAMAGES[damage](folder / name)
        before = folder.with_name("last.1")
        assert find_checkpoint(folder) == before and load_state(before)["step"] == 1
        printed = capsys.readouterr().out
        assert printed.startswith("warning: ") and str(folder) in printed and printed.count("\n") == 1
        DAMAGES[damage](before / name)
        with pytest.raises(UserError, match="no undamaged checkpoint is left"):
            find_checkpoint(folder)


def test_checksums_that_lost_a_line_or_point_elsewhere(saved, tmp_path):
    folder = shutil.copytree(saved / "last", tmp_path / "last")
    path, outside = folder / "SHA256SUMS", tmp_path / "outside"
    lines = path.read_text().splitlines(keepends=True)
    for line in lines:
        path.write_text("".join(other for other in lines if other != line))
        assert "SHA256SUMS" in find_damage(folder)
    outside.write_text("")
    path.write_text("".join([*lines, f"{checkpoint.file_digest(outside)}  ../outside\n"]))
    assert "'../outside' is not of this checkpoint" in find_damage(folder)


def test_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path / "last") is None
    with pytest.raises(UserError, match="no checkpoint there"):
        need_checkpoint(tmp_path / "last")
    (tmp_path / ".last.new").mkdir()  # was never finished
    (tmp_path / "last.backup").mkdir()  # the user's
    assert find_checkpoint(tmp_path / "last") is None


def test_gap_between_two_renames(tmp_path, capsys):
    write_number(tmp_path / "last", 7)
    (tmp_path / "last").rename(tmp_path / "last.1")
    assert find_checkpoint(tmp_path / "last") == tmp_path / "last.1" and not capsys.readouterr().out
    write_number(tmp_path / "last", 8, keep=2)
    assert [load_state(path)["step"] for path in versions(tmp_path / "last")] == [8, 7]


# --- what is in them ------------------------------------------------------------------------------


def test_tensors_that_are_damaged_or_do_not_fit(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors")
    for bad, message in ((path, r"model\.safetensors"), (tmp_path / "nowhere", "missing")):
        with pytest.raises(UserError, match=message):
            load_tensors(bad)
    for source in ({}, {"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}):
        with pytest.raises(UserError, match="does not fit"):
            copy_tensors(source, {"a": torch.zeros(2)}, path)
    memory = torch.zeros(4)
    copy_tensors({"a": torch.ones(2)}, {"a": memory[1:3]}, path)  # views stay views
    assert memory.tolist() == [0, 1, 1, 0]
