"""The command line of multitask_classifier.py, held against its help texts: each flag changes a run as it
promises, contradictions end in one line, and a run that exists takes only the flags that their marks allow.

Whole trainings of three steps, of a tiny encoder on a few rows, are compared bit by bit.
"""

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import multitask_classifier
from config import TASKS
from kernels.fused import find_compiler
from support.errors import UserError
from support.files import ROOT
from tests.tiny import make_data, make_encoder
from training import token_cache
from training.flags import READING_MAY_CHANGE, RESUME_MAY_CHANGE, get_args, given_flags, make_parser, read_run
from training.run_parser import MARKS

BASE = "--max_steps 3 --batch_size 4 --eval_every 3 --log_every 1 --precision fp32 --device cpu"
BASE += " --head_lr 0.01 --lr 0.01"
ALL_TASKS = f"--tasks {','.join(TASKS)}"
FLAGS = make_parser().flags
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two encoders and two sets of data, and no plots to wait for."""
    folder = tmp_path_factory.mktemp("flags")
    make_encoder(folder / "encoder")
    make_encoder(folder / "other_encoder", seed=1)
    make_data(folder / "data")
    make_data(folder / "other_data", start=50)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitask_classifier, "plot_run", lambda folder: None)
        yield folder


@pytest.fixture(scope="module")
def command(place):
    """The words of a command line, with extra flags in which {place} stands for the folder."""

    def command(flags, output_dir):
        shared = f"{BASE} --pretrained {place}/encoder --data_dir {place}/data --output_dir {output_dir} "
        return shlex.split(shared + flags.format(place=place))

    return command


@pytest.fixture(scope="module")
def run(place, command):
    """Run the command line with extra flags; returns the run's folder. The same flags run once."""
    done = {}

    def run(flags=""):
        if flags not in done:
            done[flags] = place / f"run{len(done)}"
            assert multitask_classifier.main(command(flags, done[flags])) == 0
        return done[flags]

    return run


def again(folder, flags):
    """The exit code of a command on a run that exists."""
    return multitask_classifier.main(["--output_dir", str(folder), *shlex.split(flags)])


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stored_args(folder):
    return json.loads((folder / "args.json").read_text())["args"]


def lines(folder, key):
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if key in line]


def prediction_files(folder):
    return {path.name: path.read_text() for path in (folder / "predictions").iterdir()}


# --- flags that change the weights --------------------------------------------------------------------------

CHANGES = (
    "--data_dir {place}/other_data; --tasks sst,sts; --max_length 8; --pretrained {place}/other_encoder; "
    "--pooling cls; --para_head cross; --sts_head cosine; --head_layers 2; --hidden_dropout_prob 0.5; "
    "--freeze_encoder; --option pretrain; --fine-tune-mode last-linear-layer; --max_steps 4; --batch_size 5; "
    "--grad_accum 2; --seed 1; --precision bf16; --lr 0.02; --head_lr 0.02; --weight_decay 0.5; "
    "--schedule constant; --warmup_steps 2; --warmup_ratio 0.7; --rectify; --clip_norm 0.001; "
    "--grad_method mean; --surgery_tasks sts; --grad_reduction mean; --extra_data sick; "
    "--task_weights sts=0.1"
)
# flag -> (what to compare with, the change)
TRAINING = {change.split()[0][2:].replace("-", "_"): ("", change) for change in CHANGES.split("; ")}
TRAINING["sampler"] = ("--seed 3", "--sampler proportional --seed 3")
for task, spec in TASKS.items():
    alone, file = f"--tasks {task}", f"{{place}}/other_data/{spec.files['train']}"
    TRAINING[f"{task}_batch_size"] = (alone, f"{alone} --{task}_batch_size 5")
    TRAINING[f"{task}_train"] = (alone, f"{alone} --{task}_train {file}")


@slow
@pytest.mark.parametrize("flag", TRAINING)
def test_training_flag_changes_the_weights(run, flag):
    reference, change = TRAINING[flag]
    assert not same_weights(run(reference), run(change))


@slow
@pytest.mark.parametrize(
    "flags",
    [
        "--select_by mean",  # the default, said aloud, so that it runs again
        "--option finetune",
        "--fine-tune-mode full-model",
        "--eval_every 1",  # looking does not change the run
    ],
)
def test_flags_without_an_effect_on_the_weights_give_the_same_bits(run, flags):
    assert same_weights(run(), run(flags))


@slow
@pytest.mark.parametrize("flag", ["option", "fine_tune_mode", "freeze_encoder"])
def test_freezing_flags_leave_the_encoder_as_it_was(run, place, flag):
    before, after = load_file(place / "encoder" / "model.safetensors"), weights(run(TRAINING[flag][1]))
    assert all(torch.equal(tensor, after[f"bert.{name}"]) for name, tensor in before.items())


# --- other flags --------------------------------------------------------------------------------------------

SPLIT_FLAGS = [f"{task}_{split}" for task in TASKS for split in ("dev", "test")]
# Flags whose test is not a row of TRAINING.
OTHERS = {*SPLIT_FLAGS, *(f"{name}_out" for name in SPLIT_FLAGS)}
OTHERS |= {"epochs", "compile", "device", "use_gpu", "cache_dir", "output_dir"}
OTHERS |= {"eval_every", "eval_max_examples", "select_by", "patience", "log_every", "keep_last"}
OTHERS |= {"max_bad_steps", "final_eval", "predict_splits", "predict_tasks", "prediction_style"}
OTHERS |= {"resume", "overwrite", "eval_only", "predict_only"}


def test_every_flag_has_a_test():
    assert set(TRAINING) | OTHERS == set(FLAGS)


@slow
def test_data_file_flags(run):
    files = {f"{task}_{split}": TASKS[task].files[split] for task in TASKS for split in ("dev", "test")}
    change = " ".join(f"--{flag} {{place}}/other_data/{name}" for flag, name in files.items())
    found, wanted, unlike = (
        {
            name: [line.split()[0] for line in text.splitlines()]  # the ids
            for name, text in prediction_files(run(f"{ALL_TASKS} {flags}")).items()
        }
        for flags in (change, "--data_dir {place}/other_data", "")
    )
    assert found == wanted and len(found) == len(files)
    assert all(found[name] != unlike[name] for name in found)


@slow
def test_prediction_file_flags(run, place):
    paths = {name: place / f"{name}.csv" for name in SPLIT_FLAGS}
    folder = run(" ".join([ALL_TASKS, *(f"--{name}_out {path}" for name, path in paths.items())]))
    written = {f"{name.replace('_', '-')}-output.csv": path.read_text() for name, path in paths.items()}
    assert written == prediction_files(run(ALL_TASKS + " "))
    assert not (folder / "predictions").exists()


@slow
def test_prediction_flags(run):
    handout = prediction_files(run("--prediction_style handout --predict_splits test"))
    assert handout["sst-test-out.csv"].startswith("id,Predicted_Sentiment\n") and len(handout) == 3
    starter = prediction_files(run())
    assert starter["sst-test-output.csv"].startswith("id \t Predicted_Sentiment \n") and len(starter) == 6


@slow
def test_eval_every_and_log_every(run):
    assert [line["step"] for line in lines(run(), "dev")] == [3]
    assert [line["step"] for line in lines(run("--eval_every 1"), "dev")] == [1, 2, 3]
    assert [line["step"] for line in lines(run(), "loss")] == [1, 2, 3]
    assert [line["step"] for line in lines(run("--log_every 2"), "loss")] == [2, 3]


@slow
def test_eval_max_examples(run):
    few, all_of_dev = lines(run("--eval_max_examples 3"), "dev")[0]["dev"], lines(run(), "dev")[0]["dev"]
    assert few["tasks"]["sst"]["accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert few != all_of_dev
    final = json.loads((run("--eval_max_examples 3") / "scores.json").read_text())["dev"]
    assert final == json.loads((run() / "scores.json").read_text())["dev"]  # the last one takes all


def final_scores(folder):
    return json.loads((folder / "scores.json").read_text())


@slow
def test_final_eval_part(run, capsys):
    folder = run("--eval_max_examples 3 --final_eval part")
    scores = final_scores(folder)
    assert scores == {"step": 3, "final_eval": "part", "dev": lines(folder, "dev")[0]["dev"]}
    assert prediction_files(folder) == prediction_files(run())  # of whole splits all the same
    assert again(folder, "--eval_only") == 0 and final_scores(folder) == scores
    assert again(folder, "--eval_only --final_eval full") == 0 and final_scores(folder) == final_scores(run())
    full = run("--eval_max_examples 3")
    assert again(full, "--eval_only --final_eval part") == 0  # never in the place of a whole evaluation
    assert final_scores(full) == final_scores(run()) and "stays as it is" in capsys.readouterr().out


@slow
def test_final_eval_none_and_only_what_is_asked_for(run, place, capsys):
    folder = run("--final_eval none --predict_splits none")
    assert not (folder / "scores.json").exists() and not (folder / "predictions").exists()
    for mode, message in (
        ("--eval_only", "give --final_eval full or part"),
        ("--predict_only", "give --predict_splits dev,test"),
    ):
        with pytest.raises(SystemExit) as end:
            again(folder, mode)
        assert end.value.code == 2 and message in capsys.readouterr().err
    capsys.readouterr()
    assert again(folder, "--predict_only --predict_splits dev --predict_tasks sst") == 0
    assert "sts" not in capsys.readouterr().out and not (folder / "scores.json").exists()  # not even read
    assert prediction_files(folder) == {"sst-dev-output.csv": prediction_files(run())["sst-dev-output.csv"]}
    assert again(folder, "--eval_only --final_eval full") == 0
    assert final_scores(folder) == final_scores(run())


@slow
def test_predict_tasks(run):
    some = prediction_files(run("--predict_tasks sts,sst"))
    assert len(some) == 4 and some.items() < prediction_files(run()).items()


@slow
@pytest.mark.parametrize("select_by", ["mean", "mean_2024", "sst", "para", "sts"])
def test_select_by(run, select_by):
    folder = run(f"--eval_every 1 --select_by {select_by}")
    evaluated = lines(folder, "dev")
    main = {"sst": "accuracy", "para": "accuracy", "sts": "pearson"}

    def score(summary):
        return summary["tasks"][select_by][main[select_by]] if select_by in main else summary[select_by]

    best = max(evaluated, key=lambda line: score(line["dev"]))  # the first of equals
    assert json.loads((folder / "best" / "state.json").read_text())["step"] == best["step"]
    assert [line["score"] for line in evaluated] == [score(line["dev"]) for line in evaluated]


@slow
def test_patience(run):
    # With steps as small as these no score changes, so that the second is no better than the first.
    folder = run("--eval_every 1 --patience 1 --select_by sst --lr 1e-9 --head_lr 1e-9 --max_steps 9")
    assert [line["step"] for line in lines(folder, "dev")] == [1, 2]


@slow
@pytest.mark.parametrize(("number", "steps"), [(1, {"last": 3}), (3, {"last": 3, "last.1": 2, "last.2": 1})])
def test_keep_last(run, number, steps):
    states = run(f"--eval_every 1 --keep_last {number}").glob("last*/state.json")
    assert {path.parent.name: json.loads(path.read_text())["step"] for path in states} == steps


@slow
@pytest.mark.parametrize("number", [1, 2])
def test_max_bad_steps(place, command, capsys, number):
    flags = f"--lr 1e30 --clip_norm 0 --max_bad_steps {number} --eval_every 9 --max_steps 9"
    assert multitask_classifier.main(command(flags, place / f"bad{number}")) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and f"{number} steps in a row" in captured.err
    assert captured.out.count("skipped for all tasks") == number


@slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
def test_compile(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    assert stored_args(run("--seed 2"))["compile"] == "off" and not compiled  # auto: three steps are too few
    assert stored_args(run("--seed 2 --compile on"))["compile"] == "on" and compiled


@slow
def test_cache_dir(run, place, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    cached = run("--cache_dir {place}/cache")
    names = {path.name for path in (place / "cache").iterdir()}
    assert len(names) == 9  # three splits of three tasks
    assert same_weights(run(), cached)
    monkeypatch.setattr(token_cache, "tokenize", None)  # would be called if anything were not in the cache
    assert same_weights(cached, run("--cache_dir {place}/cache --log_every 1"))
    assert {path.name for path in (place / "cache").iterdir()} == names


# --- modes: what is done with a run that exists -------------------------------------------------------------


@slow
def test_resume_overwrite_and_refusal(run, command, capsys):
    folder = run("--max_steps 4")
    assert multitask_classifier.main(command("--max_steps 4", folder)) == 2
    assert "holds a run already" in capsys.readouterr().err
    before = weights(folder)
    assert again(folder, "--resume") == 0
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(folder).items())
    assert multitask_classifier.main(command("--max_steps 4 --overwrite --seed 5", folder)) == 0
    assert not torch.equal(before["heads.sst.dense.0.weight"], weights(folder)["heads.sst.dense.0.weight"])


@slow
def test_eval_only_and_predict_only(run):
    folder = run("--seed 9 --sts_head cross --head_layers 2")  # shapes that come from the run, not from flags
    scores, written = (folder / "scores.json").read_text(), prediction_files(folder)
    for path in [folder / "scores.json", *(folder / "predictions").iterdir()]:
        path.unlink()
    assert again(folder, "--eval_only") == 0
    assert (folder / "scores.json").read_text() == scores and not prediction_files(folder)
    assert again(folder, "--predict_only") == 0
    assert prediction_files(folder) == written and len(written) == 6


@slow
@pytest.mark.parametrize("mode", ["--resume", "--eval_only"])
def test_a_run_read_again_may_not_become_another_run(run, mode, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(["--output_dir", str(run()), mode, "--sts_head", "concat", "--seed", "5"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.endswith("--seed 5 (the run has 11711), --sts_head concat (the run has diff)\n")


@slow
@pytest.mark.parametrize(
    "flags", ["", "--task_weights sts=2 --max_length 500 --device auto --precision auto --option finetune"]
)
def test_command_of_a_run_may_be_repeated_with_resume(command, run, flags):
    folder = run(flags)
    before = stored_args(folder)
    assert multitask_classifier.main(command(f"{flags} --resume", folder)) == 0
    assert stored_args(folder) == before | {"resume": True}


@slow
def test_resume_with_other_flags(place, run, capsys):
    folder = run("--seed 21")
    assert again(folder, f"--resume --data_dir {place}/other_data") == 2
    assert "not those" in capsys.readouterr().err
    assert again(folder, "--resume --max_steps 5") == 0
    assert stored_args(folder)["max_steps"] == 5
    assert len(json.loads((folder / "args.json").read_text())["commands"]) == 2


@slow
def test_evaluation_elsewhere(place, run):
    folder = run("--seed 23")
    scores, stored = (folder / "scores.json").read_text(), json.loads((folder / "args.json").read_text())
    stored["args"]["device"] = "cuda:7"
    (folder / "args.json").write_text(json.dumps(stored))
    assert again(folder, f"--eval_only --device cpu --data_dir {place}/other_data") == 0
    assert (folder / "scores.json").read_text() == scores  # those on other data are only printed


@pytest.mark.parametrize("mode", ["--resume", "--eval_only", "--predict_only"])
def test_a_run_that_is_not_there_ends_in_one_line(tmp_path, mode, capsys):
    for content, message in ((None, "no run there"), ("{", "not a JSON file")):
        if content:
            (tmp_path / "args.json").write_text(content)
        assert again(tmp_path, mode) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


# --- values from args.json ----------------------------------------------------------------------------------

MANY = "--tasks sst,sts --extra_data sick=3,sst_trees --task_weights sts=2.5 --surgery_tasks sts --epochs 2.5"
MANY += " --warmup_steps 0 --option finetune --predict_splits test --rectify --device cuda:1 --sst_dev x"


def write_args_file(folder, args):
    folder.mkdir(exist_ok=True)
    content = {"args": args, "commands": [], "data": {}}
    (folder / "args.json").write_text(json.dumps(content))


def test_settings_come_back_from_args_json_as_they_were(tmp_path):
    args = vars(get_args(MANY.split()))
    write_args_file(tmp_path / "run", args | {"flag_of_another_version": 1})
    settings, given = read_run(tmp_path / "run")
    assert given == args["given"] == given_flags(MANY.split())
    assert settings == {name: value for name, value in args.items() if name != "given"}
    del args["seed"], args["given"]["tasks"]  # a flag that came later is at its default
    write_args_file(tmp_path / "run", args)
    assert read_run(tmp_path / "run")[0]["seed"] == 11711


@pytest.mark.parametrize("change", [{"lr": "1"}, {"tasks": [["sst"]]}, {"given": {"lr": "1"}}, {"given": 1}])
def test_damaged_settings_are_refused(tmp_path, change):
    write_args_file(tmp_path / "run", vars(get_args([])) | change)
    with pytest.raises(UserError, match=r"args\.json: damaged"):
        read_run(tmp_path / "run")


# --- marks, errors, help ------------------------------------------------------------------------------------

# mark -> its flags, and whether --resume and --eval_only let them change; all other flags are marked "result"
MARKED = {
    "mode": ({"output_dir", "resume", "overwrite", "eval_only", "predict_only"}, True, True),
    "place": ({"data_dir", "cache_dir", *(f"{task}_train" for task in TASKS)}, True, True),
    "predictions": ({"final_eval", "predict_splits", "predict_tasks", "prediction_style"}, True, True),
    "length": ({"max_steps", "patience"}, True, False),
    "upkeep": ({"log_every", "keep_last", "max_bad_steps"}, True, False),
    "machine": ({"device", "use_gpu", "precision"}, False, True),
    "text": ({"max_length"}, False, True),
}
MARKED["place"][0].update(SPLIT_FLAGS, (f"{name}_out" for name in SPLIT_FLAGS))


def test_marks_say_what_may_change():
    parser = make_parser()
    assert parser.marks.keys() == parser.flags.keys() and set(MARKS) == {*MARKED, "result"}
    for mark, (flags, resume, reading) in MARKED.items():
        assert parser.marked(mark) == flags, mark
        for may_change, expected in ((RESUME_MAY_CHANGE, resume), (READING_MAY_CHANGE, reading)):
            assert flags <= may_change if expected else not flags & may_change, mark
    assert not parser.marked("result") & (RESUME_MAY_CHANGE | READING_MAY_CHANGE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0", "--lr: value is '0'"),
        ("--max_steps 1" + 400 * "0", "--max_steps: value is '1000"),
        ("--batch_size 2.5", "--batch_size: value is '2.5'"),
        ("--hidden_dropout_prob 1", "--hidden_dropout_prob: value is '1'"),
        ("--tasks sst,nli", "--tasks: value is 'sst,nli'"),
        ("--tasks sst,sst", "each once"),
        ("--task_weights sts", "--task_weights: value is 'sts'"),
        ("--tasks sst --task_weights sts=2", "--task_weights names sts"),
        ("--tasks sst --task_weights sst=0", "nothing would be trained"),
        ("--tasks sst --select_by sts", "--select_by names sts"),
        ("--tasks sst,sts --surgery_tasks para", "--surgery_tasks names para"),
        ("--extra_data yelp", "--extra_data: value is 'yelp'; expected NAME or NAME=COUNT"),
        ("--extra_data sick,sick", "each once"),
        ("--extra_data sick=0", "--extra_data: value is 'sick=0'"),
        ("--tasks sst --extra_data sick", "--extra_data sick feeds sts"),
        ("--predict_splits train", "--predict_splits: value is 'train'; expected dev, test, dev,test"),
        ("--predict_splits none,dev", "--predict_splits: value is 'none,dev'"),
        ("--tasks sst --predict_tasks sts", "--predict_tasks names sts"),
        ("--final_eval part", "--final_eval part needs --eval_max_examples"),
        ("--predict_splits dev,dev", "--predict_splits"),
        ("--option pretrain --fine-tune-mode full-model", "contradict"),
        ("--option finetune --freeze_encoder", "contradict"),
        ("--use_gpu --device cpu", "contradict"),
        ("--grad_method mean --grad_reduction sum", "contradict"),
        ("--resume --overwrite --output_dir x", "contradict"),
        ("--eval_only", "--output_dir"),
        ("--output_dir=", "--output_dir: value is ''; expected a folder"),
        ("--batch 3", "unrecognized arguments: --batch 3"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(flags.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_help_names_every_flag_with_its_default():
    entries = {}  # flag -> its help text in one line
    for entry in re.split(r"\n  (?=--)", make_parser().format_help())[1:]:
        entry = " ".join(entry.split("\n\n")[0].split())
        entries[entry.split()[0]] = entry
    assert set(entries) == {flag.option_strings[0] for flag in FLAGS.values()}
    for flag in FLAGS.values():
        entry = entries[flag.option_strings[0]]
        if flag.default is None or isinstance(
            flag.default, bool | dict
        ):  # in the text's own words, if at all
            assert not any(f"default: {word}" in entry for word in ("None", "False", "{}"))
        else:
            assert f"(default: {flag.default})" in entry


@slow
def test_flags_import_no_model():
    heavy = "bert base_bert training.run_folder training.checkpoint transformers huggingface_hub"
    code = f"import sys, training.flags; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
