"""Every flag changes what it says it changes, and contradictions end in one line."""

import json
import shlex

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import multitask_classifier
from config import TASKS, BertConfig
from kernels.fused import PLAIN, find_compiler
from support.command_line import run_script
from support.errors import UserError
from tests.tiny import make_data, make_encoder
from training import flags as flags_module
from training import run_folder, token_cache
from training.flags import get_args, make_parser
from training.resolve import cache_dir, idle_flags, resolve_args

BASE = "--max_steps 3 --batch_size 4 --eval_every 3 --log_every 1 --precision fp32 --device cpu --head_lr 0.01 --lr 0.01"
FLAGS = {action.dest for action in make_parser()._actions} - {"help"}


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
def run(place):
    """Run the command line with extra flags; returns the run's folder. The same flags run once."""
    done = {}

    def run(flags=""):
        if flags not in done:
            folder = place / f"run{len(done)}"
            command = f"{BASE} --pretrained {place}/encoder --data_dir {place}/data --output_dir {folder} "
            assert multitask_classifier.main(shlex.split(command + flags.format(place=place))) == 0
            done[flags] = folder
        return done[flags]

    return run


def weights(folder, which="last"):
    return load_file(folder / which / "model.safetensors")


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def stored_args(folder):
    return json.loads((folder / "args.json").read_text())["args"]


def lines(folder, key):
    return [
        line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if key in line
    ]


# Flags that change the trained weights: flag -> (what to compare with, the change).
TRAINING = {
    "data_dir": ("", "--data_dir {place}/other_data"),
    "tasks": ("", "--tasks sst,sts"),
    "max_length": ("", "--max_length 8"),
    "pretrained": ("", "--pretrained {place}/other_encoder"),
    "pooling": ("", "--pooling cls"),
    "para_head": ("", "--para_head cross"),
    "sts_head": ("", "--sts_head cosine"),
    "head_layers": ("", "--head_layers 2"),
    "hidden_dropout_prob": ("", "--hidden_dropout_prob 0.5"),
    "freeze_encoder": ("", "--freeze_encoder"),
    "option": ("", "--option pretrain"),
    "fine_tune_mode": ("", "--fine-tune-mode last-linear-layer"),
    "max_steps": ("", "--max_steps 4"),
    "batch_size": ("", "--batch_size 5"),
    **{f"{task}_batch_size": (f"--tasks {task}", f"--tasks {task} --{task}_batch_size 5") for task in TASKS},
    "grad_accum": ("", "--grad_accum 2"),
    "seed": ("", "--seed 1"),
    "precision": ("", "--precision bf16"),
    "lr": ("", "--lr 0.02"),
    "head_lr": ("", "--head_lr 0.02"),
    "weight_decay": ("", "--weight_decay 0.5"),
    "schedule": ("", "--schedule constant"),
    "warmup_steps": ("", "--warmup_steps 2"),
    "warmup_ratio": ("", "--warmup_ratio 0.7"),
    "rectify": ("", "--rectify"),
    "clip_norm": ("", "--clip_norm 0.001"),
    "grad_method": ("", "--grad_method mean"),
    "surgery_tasks": ("", "--surgery_tasks sts"),
    "grad_reduction": ("", "--grad_reduction mean"),
    "extra_data": ("", "--extra_data sick"),
    "sampler": ("--seed 3", "--sampler proportional --seed 3"),
    "task_weights": ("", "--task_weights sts=0.1"),
    **{
        f"{task}_train": (
            f"--tasks {task}",
            f"--tasks {task} --{task}_train {{place}}/other_data/{spec.files['train']}",
        )
        for task, spec in TASKS.items()
    },
}


@pytest.mark.parametrize("flag", TRAINING)
def test_training_flag_changes_the_weights(run, flag):
    reference, change = TRAINING[flag]
    assert not same_weights(run(reference), run(change))


def test_same_flags_give_the_same_bits(run):
    assert same_weights(run(""), run("--select_by mean"))  # the default, said aloud, so that it runs again


@pytest.mark.parametrize(
    "change", ["--option pretrain", "--fine-tune-mode last-linear-layer", "--freeze_encoder"]
)
def test_freezing_flags_leave_the_encoder_as_it_was(run, place, change):
    before, after = load_file(place / "encoder" / "model.safetensors"), weights(run(change))
    assert all(torch.equal(tensor, after[f"bert.{name}"]) for name, tensor in before.items())


def test_option_finetune_and_full_model_are_the_default(run):
    assert same_weights(run(""), run("--option finetune"))
    assert same_weights(run(""), run("--fine-tune-mode full-model"))


def test_epochs(run):
    # 3 tasks x 24 rows = 72 examples an epoch, 12 a step, minus rows without a label: 6 steps.
    folder = run("--epochs 1 --eval_every 6")
    assert stored_args(folder)["max_steps"] == 3  # --max_steps goes first
    args = get_args(["--epochs", "1", "--batch_size", "4", "--device", "cpu"])
    resolve_args(args, BertConfig(), {"sst": 24, "para": 24, "sts": 24})
    assert args.max_steps == 6


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_data_file_flags(run, task, split):
    change = f"--{task}_{split} {{place}}/other_data/{TASKS[task].files[split]}"
    name = f"predictions/{task}-{split}-output.csv"
    a, b = run(f"--tasks {task}") / name, run(f"--tasks {task} {change}") / name
    assert (
        a.read_text().split("\n")[1:-1] and a.read_text().split()[2] != b.read_text().split()[2]
    )  # other ids


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["dev", "test"])
def test_prediction_file_flags(run, place, task, split):
    out = place / f"{task}-{split}.csv"
    folder = run(f"--tasks {task} --{task}_{split}_out {out}")
    assert out.read_text() == (run(f"--tasks {task}") / f"predictions/{task}-{split}-output.csv").read_text()
    assert not (folder / f"predictions/{task}-{split}-output.csv").exists()


def test_prediction_style(run):
    folder = run("--prediction_style handout")
    assert (folder / "predictions" / "sst-dev-out.csv").read_text().startswith("id,Predicted_Sentiment\n")
    assert (
        (run() / "predictions" / "sst-dev-output.csv").read_text().startswith("id \t Predicted_Sentiment \n")
    )


def test_eval_every(run):
    assert [line["step"] for line in lines(run(), "dev")] == [3]
    assert [line["step"] for line in lines(run("--eval_every 1"), "dev")] == [1, 2, 3]
    assert same_weights(run(), run("--eval_every 1"))  # looking does not change the run


def test_log_every(run):
    assert [line["step"] for line in lines(run(), "loss")] == [1, 2, 3]
    assert [line["step"] for line in lines(run("--log_every 2"), "loss")] == [2, 3]


def test_eval_max_examples(run):
    part, whole = lines(run("--eval_max_examples 3"), "dev")[0]["dev"], lines(run(), "dev")[0]["dev"]
    assert part["tasks"]["sst"]["accuracy"] in (0, 1 / 3, 2 / 3, 1)
    assert part != whole
    final = json.loads((run("--eval_max_examples 3") / "scores.json").read_text())["dev"]
    assert final == json.loads((run() / "scores.json").read_text())["dev"]  # the last one takes all


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


def test_patience(run):
    folder = run("--eval_every 1 --patience 1 --select_by sst --lr 1e-9 --head_lr 1e-9 --max_steps 9")
    assert [line["step"] for line in lines(folder, "dev")] == [
        1,
        2,
    ]  # nothing changes, so 2 is no better than 1


def test_keep_last(run):
    for number in (1, 3):
        folder = run(f"--eval_every 1 --keep_last {number}")
        steps = {
            path.name: json.loads((path / "state.json").read_text())["step"] for path in folder.glob("last*")
        }
        assert steps == dict(list({"last": 3, "last.1": 2, "last.2": 1}.items())[:number])


@pytest.mark.parametrize("number", [1, 2])
def test_max_bad_steps(place, capsys, number):
    flags = f"{BASE} --lr 1e30 --clip_norm 0 --max_bad_steps {number} --eval_every 9 --max_steps 9"
    command = f"{flags} --pretrained {place}/encoder --data_dir {place}/data --output_dir {place}/bad{number}"
    assert multitask_classifier.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and f"{number} steps in a row" in captured.err
    assert captured.out.count("skipped for all tasks") == number


def test_compile(run, monkeypatch):
    if find_compiler() is None:
        pytest.skip("no C++ compiler here")
    seen = []
    monkeypatch.setattr(run_folder, "compile_kernels", lambda: seen.append("compiled") or PLAIN)
    assert stored_args(run())["compile"] == "off" and not seen  # auto: three steps are too few
    assert stored_args(run("--compile on"))["compile"] == "on" and seen == ["compiled"]


def test_compile_auto_asks_for_a_long_run_and_a_compiler(monkeypatch):
    def chosen(flags, compiler="/usr/bin/g++"):
        monkeypatch.setattr(flags_module, "find_compiler", lambda: compiler)
        args = get_args(["--device", "cpu", *flags.split()])
        resolve_args(args, BertConfig(), {"sst": 9, "para": 9, "sts": 9})
        return args.compile

    assert chosen("--max_steps 5000") == "on"
    assert chosen("--max_steps 5000 --compile off") == "off"
    assert chosen("--max_steps 5000", compiler=None) == "off"
    assert chosen("--max_steps 5000 --freeze_encoder") == "off"
    assert chosen("--max_steps 5") == "off"
    with pytest.raises(UserError, match="^--compile on: no C"):
        chosen("--compile on", compiler=None)


def test_cache_dir(run, place, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    cached = run("--cache_dir {place}/cache")
    names = {path.name for path in (place / "cache").iterdir()}
    assert len(names) == 9  # three splits of three tasks
    assert same_weights(run(), cached)
    monkeypatch.setattr(token_cache, "tokenize", None)  # would be called if anything were not in the cache
    assert same_weights(cached, run("--cache_dir {place}/cache --log_every 1"))
    assert {path.name for path in (place / "cache").iterdir()} == names


def test_cache_dir_empty_is_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir(get_args(["--cache_dir", ""])) is None
    assert cache_dir(get_args([])) == tmp_path / "minbert-multitask"


def test_output_dir_default_names_the_settings():
    args = get_args(["--device", "cpu", "--seed", "7", "--tasks", "sst,sts", "--sts_head", "cosine"])
    resolve_args(args, BertConfig(), {"sst": 9, "sts": 9})
    assert args.output_dir == "runs/minilm-sst-sts-pcgrad-cosine-seed7"


def test_resume_overwrite_and_refusal(run, place, capsys):
    folder = run("--max_steps 4")
    command = (
        f"{BASE} --pretrained {place}/encoder --data_dir {place}/data --output_dir {folder} --max_steps 4"
    )
    assert multitask_classifier.main(command.split()) == 2
    assert "holds a run already" in capsys.readouterr().err
    before = weights(folder)
    assert multitask_classifier.main(["--output_dir", str(folder), "--resume"]) == 0
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(folder).items())
    assert multitask_classifier.main([*command.split(), "--overwrite", "--seed", "5"]) == 0
    assert not torch.equal(before["heads.sst.dense.0.weight"], weights(folder)["heads.sst.dense.0.weight"])


def test_eval_only_and_predict_only(run, capsys):
    folder = run(
        "--seed 9 --sts_head cross --head_layers 2"
    )  # their shapes come from the run, not from flags
    scores = (folder / "scores.json").read_text()
    written = {path: path.read_text() for path in (folder / "predictions").iterdir()}
    for path in written:
        path.unlink()
    (folder / "scores.json").unlink()
    assert multitask_classifier.main(["--output_dir", str(folder), "--eval_only"]) == 0
    assert (folder / "scores.json").read_text() == scores and not list((folder / "predictions").iterdir())
    assert multitask_classifier.main(["--output_dir", str(folder), "--predict_only"]) == 0
    assert {path: path.read_text() for path in (folder / "predictions").iterdir()} == written
    assert len(written) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("flags", ["--use_gpu", "--device cuda", "--device nonsense"])
def test_device_that_is_not_there(flags):
    args = get_args(flags.split())
    with pytest.raises(UserError, match="--device"):
        resolve_args(args, BertConfig(), {"sst": 9, "para": 9, "sts": 9})


# Flags whose test is not a row of TRAINING.
OTHERS = {
    *(
        "epochs",
        "prediction_style",
        "predict_splits",
        "eval_every",
        "log_every",
        "eval_max_examples",
        "select_by",
        "patience",
    ),
    *(
        "compile",
        "cache_dir",
        "output_dir",
        "resume",
        "overwrite",
        "eval_only",
        "predict_only",
        "device",
        "use_gpu",
        "keep_last",
        "max_bad_steps",
    ),
    *(f"{task}_{split}" for task in TASKS for split in ("dev", "test")),
    *(f"{task}_{split}_out" for task in TASKS for split in ("dev", "test")),
}


def test_every_flag_has_a_test():
    assert set(TRAINING) | OTHERS == FLAGS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 0", "--lr: value is '0'"),
        ("--lr nan", "--lr: value is 'nan'"),
        ("--batch_size 2.5", "--batch_size: value is '2.5'"),
        ("--hidden_dropout_prob 1", "--hidden_dropout_prob: value is '1'"),
        ("--tasks sst,nli", "--tasks: value is 'sst,nli'"),
        ("--tasks sst,sst", "each once"),
        ("--task_weights sts", "--task_weights: value is 'sts'"),
        ("--task_weights sts=-1", "--task_weights"),
        ("--tasks sst --task_weights sts=2", "--task_weights names sts"),
        ("--tasks sst --task_weights sst=0", "nothing would be trained"),
        ("--tasks sst --select_by sts", "--select_by sts"),
        ("--tasks sst,sts --surgery_tasks para", "--surgery_tasks names para"),
        ("--extra_data yelp", "--extra_data: value is 'yelp'; expected NAME or NAME=COUNT"),
        ("--extra_data sick,sick", "each once"),
        ("--extra_data sick=0", "--extra_data: value is 'sick=0'"),
        ("--extra_data sick=many", "--extra_data: value is 'sick=many'"),
        ("--tasks sst --extra_data sick", "--extra_data sick feeds sts"),
        ("--predict_splits train", "--predict_splits: value is 'train'; expected dev, test or dev,test"),
        ("--predict_splits dev,dev", "--predict_splits"),
        ("--option pretrain --fine-tune-mode full-model", "contradict"),
        ("--option finetune --freeze_encoder", "contradict"),
        ("--use_gpu --device cpu", "contradict"),
        ("--grad_method mean --grad_reduction sum", "contradict"),
        ("--resume --overwrite --output_dir x", "contradict"),
        ("--eval_only --overwrite --output_dir x", "contradict"),
        ("--eval_only", "--output_dir"),
        ("--output_dir=", "--output_dir is empty"),
        ("--batch 3", "unrecognized arguments: --batch 3"),
        ("--max_length 2", "--max_length"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(flags.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output_dir nowhere --resume", "no run there"),
        ("--output_dir broken --eval_only", "not a JSON file"),
        ("--output_dir old --predict_only", "damaged (it holds no commands)"),
        ("--output_dir file --resume", "no run there"),
    ],
)
def test_runs_that_cannot_be_read(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", "{"), ("old", '{"args": {"seed": 1}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(text)
    (tmp_path / "file").write_text("")
    assert multitask_classifier.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("mode", ["--resume", "--eval_only"])
def test_a_run_read_again_may_not_become_another_run(run, mode, capsys):
    with pytest.raises(SystemExit) as end:
        get_args(["--output_dir", str(run()), mode, "--sts_head", "concat", "--seed", "5"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert f"{mode} goes on with the run's own settings" in error
    assert error.endswith("other than --seed 5 (the run has 11711), --sts_head concat (the run has diff)\n")


@pytest.mark.parametrize(
    "flags", ["", "--task_weights sts=2 --max_length 500 --device auto --precision auto --option finetune"]
)
def test_command_of_a_run_may_be_repeated_with_resume(place, run, flags):
    folder = run(flags)
    command = (
        f"{BASE} --pretrained {place}/encoder --data_dir {place}/data --output_dir {folder} {flags} --resume"
    )
    before = stored_args(folder)
    assert multitask_classifier.main(shlex.split(command)) == 0
    assert stored_args(folder) == before | {"resume": True}


def test_resume_with_other_data_is_refused(place, run, capsys):
    folder = run("--seed 21")
    assert (
        multitask_classifier.main(
            ["--output_dir", str(folder), "--resume", "--data_dir", f"{place}/other_data"]
        )
        == 2
    )
    assert "not those" in capsys.readouterr().err


def test_resume_with_more_steps_is_remembered(place, run):
    folder = run("--seed 22")
    assert multitask_classifier.main(["--output_dir", str(folder), "--resume", "--max_steps", "5"]) == 0
    assert stored_args(folder)["max_steps"] == 5
    assert len(json.loads((folder / "args.json").read_text())["commands"]) == 2


def test_run_from_another_machine_can_be_evaluated(run):
    folder = run("--seed 23")
    path = folder / "args.json"
    stored = json.loads(path.read_text())
    stored["args"]["device"] = "cuda:7"
    path.write_text(json.dumps(stored))
    assert multitask_classifier.main(["--output_dir", str(folder), "--eval_only", "--device", "cpu"]) == 0


def test_evaluation_on_other_data_leaves_the_runs_scores(place, run):
    folder = run("--seed 24")
    before = (folder / "scores.json").read_text()
    command = ["--output_dir", str(folder), "--eval_only", "--data_dir", f"{place}/other_data"]
    assert multitask_classifier.main(command) == 0
    assert (folder / "scores.json").read_text() == before


def test_the_courses_defaults_stay_valid():
    args = get_args([])
    assert (args.seed, args.epochs, args.batch_size) == (11711, 10, 8)
    resolve_args(args, BertConfig(), {"sst": 9, "para": 9, "sts": 9})
    assert args.lr == 1e-5  # at bert-base size
    # With no method flags a run is the poster's best row.
    assert (args.grad_method, args.sampler, args.sts_head, args.schedule) == (
        "pcgrad",
        "round_robin",
        "diff",
        "linear",
    )
    assert not args.freeze_encoder and args.warmup_steps > 0


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("", []),
        ("--epochs 3", []),
        ("--epochs 3 --max_steps 9", ["epochs"]),
        ("--warmup_ratio 0.2 --warmup_steps 9", ["warmup_ratio"]),
        ("--tasks sst --grad_method pcgrad --sampler sqrt", ["grad_method", "sampler"]),
        ("--tasks sst --sts_head cosine --sts_train x", ["sts_head", "sts_train"]),
        ("--freeze_encoder --grad_method sum --lr 1", ["grad_method", "lr"]),
        ("--head_layers 2 --tasks sts --sts_head cosine", ["head_layers"]),
        ("--head_layers 2 --sts_head cosine", []),  # the other heads have two
    ],
)
def test_flags_without_effect_are_named(flags, idle):
    assert sorted(line.split()[0] for line in idle_flags(get_args(flags.split()))) == [
        f"--{name}" for name in idle
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output_dir {place}/file", "is a file"),
        ("--output_dir {place}/new --sst_dev_out {place}", "--sst_dev_out {place}: is a folder"),
        (
            "--output_dir {place}/new --sst_dev_out {place}/a --sts_dev_out {place}/a",
            "already taken by --sst_dev_out",
        ),
        ("--output_dir {place}/file/below", "Not a directory"),
    ],
)
def test_outputs_without_a_place_are_refused_before_training(place, flags, message, capsys):
    (place / "file").write_text("")
    command = f"{BASE} --pretrained {place}/encoder --data_dir {place}/data " + flags.format(place=place)
    assert multitask_classifier.main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message.format(place=place) in captured.err
    assert "step 1/" not in captured.out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("mend it"), 2, "x: error: mend it\n"),
        (OSError(28, "No space left on device", "a/b"), 2, "x: error: a/b: No space left on device\n"),
        (SafetensorError("I/O error"), 2, "x: error: a checkpoint could not be written (I/O error)\n"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "--batch_size"),
        (KeyboardInterrupt(), 130, "x: interrupted\n"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(error, code, message, capsys):
    def work():
        raise error

    assert run_script("x", work) == code
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script("x", lambda: 1 / 0)


def test_help_names_every_flag_and_its_default():
    text = make_parser().format_help()
    assert all(f"--{flag.replace('fine_tune_mode', 'fine-tune-mode')}" in text for flag in FLAGS)
