"""Checkpoints are whole or not there, damage is found, and a replacement never loses the last good one."""

import os
import shutil

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


# --- whole files ----------------------------------------------------------------------------------


def test_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "folder" / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(path.parent) == ["file"]


def test_what_a_kill_or_somebody_else_left_at_the_temporary_name_does_no_harm(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "file.tmp").symlink_to(victim)
    write_text(tmp_path / "file", "new")
    assert victim.read_text() == "precious" and (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink() and names(tmp_path) == ["file", "victim"]


# --- checkpoint folders ---------------------------------------------------------------------------


def test_round_trip(tokenizer, tmp_path):
    model, other = make_sst_model(tokenizer), make_sst_model(tokenizer, seed=1)
    state = {"step": 3, "cosine_ema": [[0.1, -1 / 3]], "best_score": None}
    save(tmp_path / "last", model, tokenizer, state)
    assert load_state(tmp_path / "last") == state  # JSON keeps every bit of a float
    assert not same(model, other)
    load_model(tmp_path / "last", other)
    assert same(model, other)
    assert names(tmp_path) == ["last"]


def test_checkpoint_is_an_encoder_folder(tokenizer, tmp_path):
    model = make_sst_model(tokenizer)
    save(tmp_path / "best", model, tokenizer, {})
    encoder = BertModel.from_pretrained(tmp_path / "best")
    assert same(model.bert, encoder)
    assert "heads.sst" in encoder.load_report  # named as not used


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_checksums_are_those_of_sha256sum(tokenizer, tmp_path):
    save(tmp_path / "last", make_sst_model(tokenizer), tokenizer, {})
    assert os.system(f"cd {tmp_path}/last && sha256sum --check --strict --quiet SHA256SUMS") == 0
    listed = {line.split()[1] for line in (tmp_path / "last" / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(names(tmp_path / "last")) - {"SHA256SUMS"}


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

    def die(*args, **options):
        raise KeyboardInterrupt

    real, calls = shutil.rmtree, iter(range(9))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **o: die() if next(calls) == 0 else real(*args, **o))
    with pytest.raises(KeyboardInterrupt):
        write_number(tmp_path / "last", 3, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["last", "last.1", "last.old"]
    checkpoint.remove_leftovers(tmp_path / "last")
    assert names(tmp_path) == ["last", "last.1"]


def test_what_cannot_be_removed_is_a_warning_and_links_are_not_followed(tmp_path, monkeypatch, capsys):
    write_number(tmp_path / "elsewhere", 1)
    (tmp_path / "last").symlink_to("elsewhere")
    (tmp_path / "last.new").write_text("a stray file")
    (tmp_path / "last.old").mkdir()
    write_number(tmp_path / "last", 2)
    assert load_state(tmp_path / "elsewhere")["step"] == 1 and load_state(tmp_path / "last")["step"] == 2
    assert names(tmp_path) == ["elsewhere", "last"]

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
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


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "state.json", "config.json", "vocab.txt", "tokenizer_config.json", "SHA256SUMS"],
)
def test_every_damage_is_found_and_the_one_before_takes_its_place(tokenizer, tmp_path, capsys, name, damage):
    folder = tmp_path / "last"
    for step in (1, 2):
        save(folder, make_sst_model(tokenizer, seed=step), tokenizer, {"step": step}, keep=2)
    assert find_damage(folder) is None and find_checkpoint(folder) == folder
    assert not capsys.readouterr().out
    DAMAGES[damage](folder / name)
    assert find_checkpoint(folder) == tmp_path / "last.1"
    printed = capsys.readouterr().out
    assert printed.startswith("warning: ") and str(folder) in printed and printed.count("\n") == 1
    assert load_state(tmp_path / "last.1")["step"] == 1
    DAMAGES[damage](tmp_path / "last.1" / name)
    with pytest.raises(UserError, match="no undamaged checkpoint is left"):
        find_checkpoint(folder)


@pytest.mark.parametrize("number", range(3))
def test_checksums_that_lost_a_line(tmp_path, number):
    def write(new):
        for name in ("a.json", "state.json", "z.txt"):
            (new / name).write_text("{}")

    write_checkpoint(tmp_path / "last", write)
    path = tmp_path / "last" / "SHA256SUMS"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:number] + lines[number + 1 :]))
    assert "SHA256SUMS" in find_damage(tmp_path / "last")


def test_checksums_cannot_point_elsewhere(tmp_path):
    write_number(tmp_path / "last", 1)
    outside = tmp_path / "outside"
    outside.write_text("")
    with open(tmp_path / "last" / "SHA256SUMS", "a") as file:
        file.write(f"{checkpoint.file_digest(outside)}  ../outside\n")
    assert "'../outside' is not of this checkpoint" in find_damage(tmp_path / "last")


def test_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path / "last") is None
    with pytest.raises(UserError, match="no checkpoint there"):
        need_checkpoint(tmp_path / "last")
    (tmp_path / "last.new").mkdir()  # was never finished
    (tmp_path / "last.backup").mkdir()  # the user's
    assert find_checkpoint(tmp_path / "last") is None


def test_gap_between_two_renames(tmp_path, capsys):
    write_number(tmp_path / "last", 7)
    (tmp_path / "last").rename(tmp_path / "last.1")
    assert find_checkpoint(tmp_path / "last") == tmp_path / "last.1" and not capsys.readouterr().out
    write_number(tmp_path / "last", 8, keep=2)
    assert [load_state(path)["step"] for path in versions(tmp_path / "last")] == [8, 7]


# --- what is in them ------------------------------------------------------------------------------


def test_damaged_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_tensors(path)
    with pytest.raises(UserError, match="missing"):
        load_tensors(tmp_path / "nowhere")


@pytest.mark.parametrize("source", [{}, {"a": torch.zeros(3)}, {"a": torch.zeros(2), "b": torch.zeros(1)}])
def test_copy_tensors_refuses_what_does_not_fit(tmp_path, source):
    with pytest.raises(UserError, match="does not fit"):
        copy_tensors(source, {"a": torch.zeros(2)}, tmp_path)


def test_copy_tensors_keeps_views(tmp_path):
    memory = torch.zeros(4)
    copy_tensors({"a": torch.ones(2)}, {"a": memory[1:3]}, tmp_path)
    assert memory.tolist() == [0, 1, 1, 0]
