"""The command line of multitask_classifier.py, held against its help texts: each flag changes a run as it
promises, contradictions end in one line, and a run that exists takes only the flags that their marks allow.

Trainings of a few steps, of a tiny encoder on a few rows, are compared bit by bit.
"""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file

import multitask_classifier
from config import RECIPES, TASKS
from evaluation import TASK_KINDS, summarise
from kernels.fused import find_compiler
from support.errors import UserError
from tests.tiny import make_data, make_encoder
from training import token_cache
from training.flags import get_args, given_flags, make_parser, may_change, read_run
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
    for name, seed in (("encoder", 0), ("other_encoder", 1)):
        make_encoder(folder / name, seed)
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


@pytest.fixture(scope="module")
def train(place, command):
    """As `run`, but without evaluations, which change no weight; returns the weights at the end."""
    done = {}

    def evaluate(model, *args):
        scores = {task: {TASK_KINDS[spec.kind].main_score: 0.0} for task, spec in model.tasks.items()}
        return summarise(scores, model.tasks), dict.fromkeys(scores)

    def train(flags=""):
        if flags not in done:
            folder = place / f"training{len(done)}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(multitask_classifier, "evaluate", evaluate)
                patch.setattr(multitask_classifier, "find_warnings", lambda *args: [])
                patch.setattr(multitask_classifier, "evaluate_best", lambda *args, **options: None)
                assert multitask_classifier.main(command(flags, folder)) == 0
            done[flags] = weights(folder)
        return done[flags]

    return train


def again(folder, flags):
    """The exit code of a command on a run that exists."""
    return multitask_classifier.main(["--output_dir", str(folder), *shlex.split(flags)])


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def are_same(first, second):
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
    "--freeze_encoder; --option pretrain; --fine-tune-mode last-linear-layer; --redraw_layers 1; "
    "--max_steps 4; --batch_size 5; --grad_accum 2; --seed 1; --precision bf16; --lr 0.02; --head_lr 0.02; "
    "--weight_decay 0.5; --schedule constant; --warmup_steps 2; --warmup_ratio 0.7; --rectify; "
    "--clip_norm 0.001; --grad_method mean; --surgery_tasks sts; --surgery_scope layer; --gram ema; "
    "--loss_weighting uw; --grad_reduction mean; --extra_data sick; --task_weights sts=0.1; "
    "--loss_schedule sts=0:0.1; --draw_schedule sts=0:0; --label_smoothing 0.2; --rdrop sst=1; --fgm 1; "
    "--head_dropout_samples 3; --layer_lr_decay 0.5; "
    "--phrase_weight 1; --sst_loss oll"
)
# flag -> (what to compare with, the change)
TRAINING = {change.split()[0][2:].replace("-", "_"): ("", change) for change in CHANGES.split("; ")}
TRAINING["sampler"] = ("--seed 3", "--sampler proportional --seed 3")
TRAINING["teacher"] = ("", "--teacher RUN")
TAUGHT = "--teacher RUN --sts_unlabelled {place}/data/quora-train.csv"
TRAINING |= {
    change.split()[0][2:]: (TAUGHT, f"{TAUGHT} {change}")
    for change in ("--teacher_weight 1", "--unlabelled_ratio 0.5", "--transductive sts")
}
TRAINING["symmetric"] = ("--para_head cross", "--para_head cross --symmetric")
for change in ("--phrase_min_words 1", "--phrase_limit 1", "--phrase_weighting length"):
    TRAINING[change.split()[0][2:]] = ("--phrase_weight 1", f"--phrase_weight 1 {change}")


@slow
@pytest.mark.parametrize("flag", TRAINING)
def test_training_flag_changes_the_weights(train, run, place, flag):
    reference, change = (
        flags.replace("RUN", str(run())) if "RUN" in flags else flags for flags in TRAINING[flag]
    )
    after = train(change)
    assert not are_same(train(reference), after)
    if flag in ("option", "fine_tune_mode", "freeze_encoder"):
        before = load_file(place / "encoder" / "model.safetensors")
        assert all(torch.equal(tensor, after[f"bert.{name}"]) for name, tensor in before.items())


@slow
def test_flags_without_an_effect_on_the_weights_give_the_same_bits(run, train):
    """Defaults said aloud; and neither evaluations nor what is written changes a run."""
    for flags in ("--option finetune --fine-tune-mode full-model --select_by mean", OUTPUT_FLAGS):
        assert are_same(train(), weights(run(flags)))


@slow
def test_data_file_flags(run):
    """All of them together are as good as --data_dir."""
    files = {f"{task}_{split}": name for task in TASKS for split, name in TASKS[task].files.items()}
    given, wanted = (
        run(f"{ALL_TASKS} {flags}")
        for flags in (
            " ".join(f"--{flag} {{place}}/other_data/{name}" for flag, name in files.items()),
            "--data_dir {place}/other_data",
        )
    )
    assert are_same(weights(given), weights(wanted)) and not are_same(weights(given), weights(run(ALL_TASKS)))
    found = prediction_files(given)
    assert found == prediction_files(wanted) and len(found) == 2 * len(TASKS)


@slow
def test_batch_sizes_of_tasks(train, monkeypatch):
    sizes, real, found = dict(zip(TASKS, (5, 6, 7, 3), strict=True)), multitask_classifier.train_step, {}

    def watched(model, memory, optimizer, task_batches, *args, **options):
        found.update({batch.task: len(batch.micro_batches[0]["labels"]) for batch in task_batches})
        return real(model, memory, optimizer, task_batches, *args, **options)

    monkeypatch.setattr(multitask_classifier, "train_step", watched)
    train(" ".join([ALL_TASKS, *(f"--{task}_batch_size {size}" for task, size in sizes.items())]))
    assert found == sizes


# --- other flags --------------------------------------------------------------------------------------------

OUTPUT_FLAGS = "--eval_every 1 --log_every 2 --eval_max_examples 3 --keep_last 3 --select_by sts"
OUTPUT_FLAGS += " --prediction_style handout --predict_splits test"
FILE_FLAGS = [f"{task}_{split}" for task in TASKS for split in ("dev", "test")]
# Flags whose test is not a row of TRAINING; that of --max_bad_steps is among those of whole runs.
OTHERS = {*FILE_FLAGS, *(f"{name}_out" for name in FILE_FLAGS)}
OTHERS |= {f"{task}_{name}" for task in TASKS for name in ("batch_size", "train", "unlabelled")}
OTHERS |= {"epochs", "compile", "device", "use_gpu", "cache_dir", "output_dir"}
OTHERS |= {"noise_batches"}  # its test is among those of whole runs, too
OTHERS |= {"eval_every", "eval_max_examples", "select_by", "patience", "log_every", "keep_last", "report_to"}
OTHERS |= {"max_bad_steps", "final_eval", "predict_splits", "predict_tasks", "prediction_style"}
OTHERS |= {"ema", "recipe", "task", "task_file", "resume", "overwrite", "eval_only", "predict_only"}


def test_every_flag_has_a_test():
    assert set(TRAINING) | OTHERS == set(FLAGS)


@slow
def test_flags_of_what_is_measured_and_written(run):
    default, changed = run(), run(OUTPUT_FLAGS)
    steps = [
        [line["step"] for line in lines(folder, key)]
        for key in ("dev", "loss")
        for folder in (default, changed)
    ]
    assert steps == [[3], [1, 2, 3], [1, 2, 3], [2, 3]]
    evaluated, (first,) = lines(changed, "dev"), lines(default, "dev")
    assert all(line["dev"]["tasks"]["sst"]["accuracy"] in (0, 1 / 3, 2 / 3, 1) for line in evaluated)
    assert evaluated[-1]["dev"] != first["dev"] and first["score"] == first["dev"]["mean"]
    assert [line["score"] for line in evaluated] == [
        line["dev"]["tasks"]["sts"]["pearson"] for line in evaluated
    ]
    best = max(evaluated, key=lambda line: line["score"])  # the first of equals
    scores = (changed / "scores.json").read_text()
    assert json.loads(scores)["step"] == best["step"]
    assert again(changed, "--eval_only") == 0
    assert (changed / "scores.json").read_text() == scores  # the last evaluation takes all
    for folder, kept in ((default, {"last": 3}), (changed, {"last": 3, "last.1": 2, "last.2": 1})):
        states = folder.glob("last*/state.json")
        assert {path.parent.name: json.loads(path.read_text())["step"] for path in states} == kept
    starter, handout = prediction_files(default), prediction_files(changed)
    assert starter["sst-test-output.csv"].startswith("id \t Predicted_Sentiment \n") and len(starter) == 6
    assert handout["sst-test-out.csv"].startswith("id,Predicted_Sentiment\n") and len(handout) == 3


@slow
def test_prediction_file_flags(run, place):
    paths = {name: place / f"{name}.csv" for name in FILE_FLAGS}
    folder = run(" ".join([ALL_TASKS, *(f"--{name}_out {path}" for name, path in paths.items())]))
    written = {f"{name.replace('_', '-')}-output.csv": path.read_text() for name, path in paths.items()}
    assert written == prediction_files(run(ALL_TASKS)) and not (folder / "predictions").exists()


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
def test_patience(run):
    # With steps as small as these no score changes, so that the second is no better than the first.
    folder = run("--eval_every 1 --patience 1 --select_by sst --lr 1e-9 --head_lr 1e-9 --max_steps 9")
    assert [line["step"] for line in lines(folder, "dev")] == [1, 2]


@slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")
def test_compile(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    assert stored_args(run("--seed 2"))["compile"] == "off" and not compiled  # auto: three steps are too few
    assert stored_args(run("--seed 2 --compile on"))["compile"] == "on" and compiled


@slow
def test_cache_dir(train, place, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    cached = train("--cache_dir {place}/cache")
    names = {path.name for path in (place / "cache").iterdir()}
    assert len(names) == 6 and are_same(train(), cached)  # two splits of three tasks
    monkeypatch.setattr(token_cache, "tokenize", None)  # would be called if anything were not in the cache
    assert are_same(cached, train("--cache_dir {place}/cache --log_every 2"))
    assert {path.name for path in (place / "cache").iterdir()} == names


# --- modes: what is done with a run that exists -------------------------------------------------------------


@slow
def test_command_of_a_run_may_be_repeated_with_resume_or_to_overwrite_it(run, command, capsys):
    flags = "--task_weights sts=2 --max_length 500 --device auto --precision auto --option finetune"
    folder = run(flags)
    stored, before = stored_args(folder), weights(folder)
    assert multitask_classifier.main(command(flags, folder)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert multitask_classifier.main(command(f"{flags} --resume", folder)) == 0
    assert stored_args(folder) == stored | {"resume": True} and are_same(weights(folder), before)
    assert multitask_classifier.main(command("--overwrite --seed 5", folder)) == 0
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


@pytest.mark.parametrize("mode", ["--resume", "--eval_only", "--predict_only"])
def test_a_run_that_is_not_there_ends_in_one_line(tmp_path, mode, capsys):
    for content, message in ((None, "no run there"), ("{", "not a JSON file")):
        if content:
            (tmp_path / "args.json").write_text(content)
        assert again(tmp_path, mode) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("mode", ["--resume", "--eval_only"])
def test_a_run_read_again_may_not_become_another_run(tmp_path, mode, capsys):
    write_args_file(tmp_path, vars(get_args([])))
    with pytest.raises(SystemExit) as end:
        get_args(["--output_dir", str(tmp_path), mode, "--sts_head", "concat", "--seed", "5"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.endswith("--seed 5 (the run has 11711), --sts_head concat (the run has diff)\n")


# --- recipes ------------------------------------------------------------------------------------------------


def test_a_recipe_gives_defaults_that_flags_override(tmp_path):
    """Every recipe can be read for all tasks and for one; a run that is taken up again keeps its own."""
    for recipe in RECIPES:
        for tasks in ("sst,para,sts", "sst"):
            args = vars(get_args(["--recipe", recipe, "--tasks", tasks]))
            assert args["given"].keys() == {"recipe", "tasks"} and args["from_recipe"].items() <= args.items()
    plain, poster, best = (
        vars(get_args(flags.split())) for flags in ("", "--recipe poster", "--recipe best")
    )
    assert poster == plain | {"given": {"recipe": "poster"}}
    assert best["extra_data"] == {"sick": None, "sst_trees": 60000} and best["para_head"] == "cross"
    assert get_args(["--recipe", "best", "--tasks", "sst"]).extra_data == {"sst_trees": 60000}
    words = "--recipe best --para_head diff --extra_data none --epochs 2"
    args = get_args(words.split())
    assert (args.para_head, args.extra_data, args.max_steps) == ("diff", {}, None)
    assert args.from_recipe.keys() == best["from_recipe"].keys() - {"para_head", "extra_data", "max_steps"}
    write_args_file(tmp_path, json.loads(json.dumps(vars(args))))
    again = vars(get_args(["--output_dir", str(tmp_path), "--resume"]))
    differ = {"given", "output_dir", "resume"}
    assert {name: value for name, value in vars(args).items() if name not in differ}.items() <= again.items()


# --- values from args.json ----------------------------------------------------------------------------------

MANY = "--tasks sst,sts --extra_data sick=3,sst_trees --task_weights sts=2.5 --surgery_tasks sts --epochs 2.5"
MANY += " --grad_method krum:n=2"
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
    assert settings == {name: value for name, value in args.items() if name in FLAGS}
    assert settings["grad_method"] == "krum:f=0,n=2"  # with every parameter
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
    "place": ({"data_dir", "cache_dir"}, True, True),
    "predictions": ({"final_eval", "predict_splits", "predict_tasks", "prediction_style"}, True, True),
    "length": ({"max_steps", "patience"}, True, False),
    "upkeep": ({"log_every", "report_to", "keep_last", "max_bad_steps"}, True, False),
    "machine": ({"device", "use_gpu", "precision"}, False, True),
    "text": ({"max_length"}, False, True),
}
MARKED["place"][0].update(FILE_FLAGS, (f"{name}_out" for name in FILE_FLAGS))
MARKED["place"][0].update(f"{task}_{name}" for task in TASKS for name in ("train", "unlabelled"))


def test_marks_say_what_may_change():
    parser, resuming, evaluating = make_parser(), may_change(), may_change(reading=True)
    assert parser.marks.keys() == parser.flags.keys() and set(MARKS) == {*MARKED, "result"}
    for mark, (flags, resume, reading) in MARKED.items():
        assert parser.marked(mark) == flags, mark
        for changeable, expected in ((resuming, resume), (evaluating, reading)):
            assert flags <= changeable if expected else not flags & changeable, mark
    assert not parser.marked("result") & (resuming | evaluating)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0", "--lr: value is '0'"),
        ("--max_steps 1" + 400 * "0", "--max_steps: value is '1000"),
        ("--batch_size 2.5", "--batch_size: value is '2.5'"),
        ("--hidden_dropout_prob 1", "--hidden_dropout_prob: value is '1'"),
        ("--tasks sst,nli", "--tasks: value is 'sst,nli'"),
        ("--task_weights sts", "--task_weights: value is 'sts'"),
        ("--task_weights sts=1,sts=2", "--task_weights: value is 'sts=1,sts=2'"),
        ("--tasks sst --task_weights sts=2", "--task_weights names sts"),
        ("--tasks sst --task_weights sst=0", "nothing would be trained"),
        ("--rdrop 1,1", "--rdrop: value is '1,1'"),
        ("--tasks sst --rdrop 1,sts=2", "--rdrop names sts"),
        ("--label_smoothing sts=0.1", "--label_smoothing names sts, whose labels are no classes"),
        ("--freeze_encoder --fgm 1", "--fgm changes the embeddings, which --freeze_encoder"),
        ("--recipe bets", "choose from 'poster', 'fast', 'best'); did you mean best?"),
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
        ("--task sst --tasks para", "--task contradicts"),
        ("--task etpc", "--task"),
        ("--use_gpu --device cpu", "contradict"),
        ("--grad_method mean --grad_reduction sum", "contradict"),
        ("--phrase_weight 1 --pooling cls", "--pooling mean or attention"),
        ("--phrase_weight 1 --tasks para,sts", "needs sst, which is not among --tasks para,sts"),
        ("--sst_loss oll:alpha=-1", "alpha of oll"),
        ("--grad_method mgad", "--grad_method: value is 'mgad'; expected one of sum, mean, pcgrad"),
        ("--grad_method mgad", "did you mean mgda?"),
        ("--grad_method cagrad:d=1", "--grad_method: cagrad has no parameter 'd'; expected c"),
        ("--grad_method mgda:c=1", "--grad_method: mgda has no parameter 'c'"),
        (
            "--grad_method cagrad:c=1",
            "--grad_method: c of cagrad: value is '1'; expected a number of at least 0",
        ),
        ("--grad_method krum:n=1,n=2", "expected each parameter once"),
        ("--grad_method imtl_g --loss_weighting uw", "--loss_weighting uw:lr=0.025 is lost on"),
        ("--freeze_encoder --loss_weighting gradnorm", "which --freeze_encoder leaves without any"),
        ("--freeze_encoder --sampler pike", "which --freeze_encoder leaves without any"),
        ("--noise_batches 0 --gram ema", "--gram ema:b=0.99 goes by the noise"),
        ("--noise_batches 3", "--noise_batches is 3; expected 0, or at least 4"),
        ("--loss_weighting dwa:every=0", "every of dwa: value is '0'"),
        ("--sampler temperature:t=0", "t of temperature: value is '0'"),
        ("--grad_method krum:n=1.5", "n of krum: value is '1.5'"),
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
        if flag.default is None or isinstance(flag.default, bool | dict):  # in its own words, if at all
            assert not any(f"default: {word}" in entry for word in ("None", "False", "{}"))
        else:
            assert f"(default: {flag.default})" in entry
