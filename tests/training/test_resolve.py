"""Defaults that depend on other flags, the encoder or the machine, held against values worked out by hand;
flags that have no effect; outputs that cannot be written.
"""

import pytest
import torch

import multitask_classifier
from config import BertConfig
from support.errors import UserError
from tests.tiny import make_data, make_encoder
from training import resolve
from training.flags import get_args
from training.resolve import (
    data_settings,
    default_output_dir,
    flags_without_effect,
    make_settings,
    resolve_args,
    resolve_machine,
    token_settings,
)

NO_FP16 = "off (--precision fp16 trains with plain operations only, which its loss scale needs)"
TOO_OLD = "off (cuda has a compute capability below 8.0, which captured steps need)"
SIZES = {"sst": 9, "para": 9, "sts": 9}


def resolved(flags, sizes=SIZES):
    args = get_args(flags.split())
    resolve_machine(args)
    resolve_args(args, BertConfig(), sizes)
    return args


def test_the_courses_defaults_stay_valid():
    args = get_args([])
    assert (args.seed, args.epochs, args.batch_size) == (11711, 10, 8)
    args = resolved("")
    assert args.lr == 1e-5  # at bert-base size
    # With no method flags a run is the poster's best row.
    assert (args.grad_method, args.sampler, args.sts_head) == ("pcgrad", "round_robin", "diff")
    assert args.schedule == "linear" and args.warmup_steps > 0 and not args.freeze_encoder


def test_epochs():
    # 3 tasks x 24 rows = 72 examples an epoch, 12 a step: 6 steps.
    flags, sizes = "--epochs 1 --batch_size 4 --device cpu", dict.fromkeys(SIZES, 24)
    assert resolved(flags, sizes).max_steps == 6
    assert resolved(f"{flags} --max_steps 3", sizes).max_steps == 3


def test_compile_auto_asks_for_a_long_run_and_a_compiler(monkeypatch):
    def chosen(flags, compiler="/usr/bin/g++"):
        monkeypatch.setattr(resolve, "find_compiler", lambda: compiler)
        return resolved(f"--device cpu {flags}").compile

    assert chosen("--max_steps 5000") == "on"
    assert chosen("--max_steps 5000 --compile off") == "off"
    assert chosen("--max_steps 5000", compiler=None) == "off"
    assert chosen("--max_steps 5000 --freeze_encoder") == "off"
    assert chosen("--max_steps 5") == "off"
    with pytest.raises(UserError, match="^--compile on: no C"):
        chosen("--compile on", compiler=None)


@pytest.mark.parametrize(
    ("device", "capability", "flags", "precision", "compiled"),
    [
        ("cuda", (7, 5), "", "fp16", NO_FP16),
        ("cuda", (7, 5), "--precision fp32", "fp32", TOO_OLD),
        ("cuda", (8, 0), "--precision fp16", "fp16", NO_FP16),
        ("cuda", (8, 0), "--precision tf32", "tf32", "on (steps are captured as CUDA graphs)"),
        ("cuda", (9, 0), "", "bf16", "on (steps are captured as CUDA graphs)"),
        ("mps", (0, 0), "--max_steps 5000", "fp32", "off (--device mps trains with plain operations only)"),
        ("cpu", (0, 0), "--max_steps 5000 --precision fp16", "fp16", NO_FP16),
    ],
)
def test_precision_and_compile_of_devices(
    monkeypatch, capsys, device, capability, flags, precision, compiled
):
    monkeypatch.setattr(resolve, "resolve_device", torch.device)
    monkeypatch.setattr(resolve, "find_spec", lambda name: "found")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    before = torch.get_float32_matmul_precision()
    try:
        args = get_args(f"--device {device} {flags}".split())
        lines = [*resolve_machine(args), *resolve_args(args, BertConfig(), SIZES)]
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert args.precision == precision and f"compile {compiled}" in lines
    assert any(line.startswith(f"precision {precision} (") for line in lines) == ("--precision" not in flags)
    assert ("untested" in capsys.readouterr().out) == (device == "mps")
    settings = make_settings(args)
    assert settings.captured == compiled.startswith("on") and not settings.optimizer.compiled
    if not settings.captured:
        args = get_args(f"--device {device} {flags} --compile on".split())
        resolve_machine(args)
        with pytest.raises(UserError, match="^--compile on: ") as error:
            resolve_args(args, BertConfig(), SIZES)
        assert str(error.value).removeprefix("--compile on: ") in compiled


def test_cache_dir_empty_is_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert token_settings(get_args(["--cache_dir", ""])).cache_dir is None
    assert token_settings(get_args([])).cache_dir == tmp_path / "minbert-multitask"


def test_output_dir_default_names_the_settings():
    args = resolved("--device cpu --seed 7 --tasks sst,sts --sts_head cosine", {"sst": 9, "sts": 9})
    assert args.output_dir == "runs/minilm-sst-sts-pcgrad-cosine-seed7"
    flags = "--device cpu --grad_method cagrad --surgery_scope layer --tasks sst,sts"
    folder = resolved(flags, {"sst": 9, "sts": 9}).output_dir
    assert folder == "runs/minilm-sst-sts-cagrad-c=0.4-by-layer-diff-seed11711"


def test_default_output_dirs_of_different_runs_differ():
    def name(flags):
        return default_output_dir(get_args(flags.split()))

    assert name("") == "runs/minilm-sst-para-sts-pcgrad-diff-diff-seed11711"
    assert name("--option finetune --seed 11711 --tasks sst,para,sts --device cpu") == name("")
    course = [name("--option pretrain --lr 1e-3"), name("--option finetune --lr 1e-5")]
    assert course[0] == "runs/minilm-sst-para-sts-pcgrad-diff-diff-frozen-lr0.001-seed11711"
    assert course[1] == "runs/minilm-sst-para-sts-pcgrad-diff-diff-lr1e-05-seed11711"
    flags = "--batch_size 4 --epochs 2 --max_steps 9 --sampler sqrt"
    assert name(flags).endswith("-batch4-epochs2-steps9-sqrt-seed11711")
    others = ["", "--head_lr 1", "--rectify", "--pooling cls", "--max_length 9", "--precision fp32", *course]
    others += ["--pretrained a/best", "--pretrained b/best", "--grad_accum 2", "--task_weights sst=2", flags]
    others += ["--para_head cross", "--sts_head cross", "--extra_data sick", "--task sst", "--task qqp"]
    assert len({name(flags) if flags[:2] in ("", "--") else flags for flags in others}) == len(others)


def test_lr_is_the_heads_where_the_encoder_is_frozen():
    assert resolved("--device cpu --option pretrain --lr 0.5").head_lr == 0.5
    assert resolved("--device cpu --option pretrain --lr 0.5 --head_lr 2").head_lr == 2
    assert resolved("--device cpu --option finetune --lr 0.5").head_lr == 1e-3
    assert resolved("--device cpu --option pretrain").head_lr == 1e-3


def test_files_are_found_under_either_courses_names(tmp_path):
    args = get_args(["--data_dir", str(tmp_path)])
    assert data_settings(args).files["para", "dev"] == tmp_path / "quora-dev.csv"
    names = {"sst": "sst-sentiment-train", "para": "quora-paraphrase-train", "sts": "sts-similarity-train"}
    for task, name in names.items():
        (tmp_path / f"{name}.csv").touch()
        assert data_settings(args).files[task, "train"] == tmp_path / f"{name}.csv"
    (tmp_path / "sst-sentiment-test-student.csv").touch()
    assert data_settings(args).files["sst", "test"] == tmp_path / "sst-sentiment-test-student.csv"
    (tmp_path / "quora-train.csv").touch()  # where both are there, it is Stanford's
    assert data_settings(args).files["para", "train"] == tmp_path / "quora-train.csv"


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
@pytest.mark.parametrize("flags", ["--use_gpu", "--device cuda", "--device nonsense"])
def test_device_that_is_not_there(flags):
    with pytest.raises(UserError, match="--device"):
        resolved(flags)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("", []),
        ("--epochs 3", []),
        ("--epochs 3 --max_steps 9", ["epochs"]),
        ("--warmup_ratio 0.2 --warmup_steps 9", ["warmup_ratio"]),
        ("--tasks sst --grad_method pcgrad --sampler sqrt", ["grad_method", "sampler"]),
        ("--tasks sst --sts_head cosine --sts_train x", ["sts_head", "sts_train"]),
        ("--freeze_encoder --grad_method sum --lr 1", ["grad_method"]),
        ("--freeze_encoder --lr 1 --head_lr 1 --noise_batches 4", ["lr", "noise_batches"]),
        ("--head_layers 2 --tasks sts --sts_head cosine", ["head_layers"]),
        ("--head_layers 2 --sts_head cosine", []),  # the other heads have two
        ("--head_dropout_samples 2 --hidden_dropout_prob 0", ["head_dropout_samples"]),
        ("--symmetric --phrase_limit 2", ["phrase_limit", "symmetric"]),
        ("--symmetric --sts_head diff+cross --tasks sts --sst_loss oll", ["sst_loss"]),
        ("--tasks sts --label_smoothing 0.1", ["label_smoothing"]),
    ],
)
def test_flags_without_effect_are_named(flags, idle):
    lines = flags_without_effect(get_args(flags.split()))
    assert sorted(line.split()[0] for line in lines) == [f"--{name}" for name in idle]


# Flags, where {0} stands for a folder, and what is said.
BAD_OUTPUTS = [
    ("--output_dir {0}/file", "is a file"),
    ("--output_dir {0}/new --sst_dev_out {0}", "--sst_dev_out {0}: is a folder"),
    ("--output_dir {0}/new --sst_dev_out {0}/a --sts_dev_out {0}/a", "already taken by --sst_dev_out"),
    ("--output_dir {0}/new --sst_dev_out {0}/new/../new/metrics.jsonl", "the run itself writes a file there"),
    ("--output_dir {0}/new --sts_test_out {0}/new/last/vocab.txt", "the run itself writes a file there"),
    ("--output_dir {0}/file/below", "Not a directory"),
]


def test_outputs_without_a_place_are_refused_before_training(tmp_path, capsys):
    make_encoder(tmp_path / "encoder")
    make_data(tmp_path / "data")
    (tmp_path / "file").write_text("")
    command = f"--max_steps 3 --device cpu --pretrained {tmp_path}/encoder --data_dir {tmp_path}/data "
    for flags, message in BAD_OUTPUTS:
        assert multitask_classifier.main((command + flags.format(tmp_path)).split()) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1 and message.format(tmp_path) in said.err
        assert "step 1/" not in said.out
