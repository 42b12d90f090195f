"""Train an encoder further by masked language modelling on the tasks' own training sentences.

    python -m training.pretrain_mlm --data_dir data --output_dir runs/mlm --max_steps 300
    python multitask_classifier.py --pretrained runs/mlm

Masking as in BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805), drawn anew for every batch; further training
on the text of the task as in "Don't stop pretraining" (Gururangan et al. 2020, https://arxiv.org/abs/2004.10964).
No sentence of a dev or test file is trained on, not even one that a train file has too.

Shapes: B sentences, T padded length in word pieces, H hidden_size, V vocab_size, M masked positions of a batch.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from base_bert import (
    check_shape,
    check_vocab_size,
    copy_weight,
    encoder_tensors,
    read_tensors,
    resolve_pretrained,
)
from bert import ACTIVATIONS, BertModel
from config import DEFAULT_TASKS, OFFLINE_ENCODER, TASKS, BertConfig
from datasets import BatchOrder, TokenArrays, read_rows, warning_lines
from optimizer import SCHEDULES, AdamW, has_weight_decay, lr_factor
from support.command_line import Signals, Stopped, catch_signals, number, run_script
from support.device import explain_memory, is_bf16_fast, make_autocast, resolve_device
from support.errors import UserError
from support.files import lock_folder, read_json, sync, write_text
from support.seeds import make_seed
from tokenizer import SPECIAL_TOKENS, BertTokenizer
from training.checkpoint import (
    STATE_FILE,
    copy_tensors,
    find_checkpoint,
    load_state,
    load_tensors,
    remove_checkpoints,
    save_tensors,
    versions,
    write_checkpoint,
)
from training.run_folder import write_args
from training.run_parser import (
    COUNT,
    DEVICE,
    DIR,
    ENCODER,
    NOT_NEGATIVE,
    OUTPUT_DIR,
    POSITIVE,
    PRECISIONS,
    PROBABILITY,
    RESUME_MARKS,
    SEED,
    RunParser,
    check_sources,
    source_list,
    task_list,
)
from training.sources import EXTRA_SOURCES, add_sources, text_key

HEAD_PREFIX = "cls.predictions."  # of the head's weights in Hugging Face's checkpoints
LAST = "last"  # the checkpoint that an unfinished run goes on from
TENSORS_FILE = "training.safetensors"  # in it
ENCODER_FILES = ("config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json")
# In the order in which --overwrite removes them: a folder with config.json is finished, one with args.json is ours.
OUTPUT_FILES = (*ENCODER_FILES, "metrics.jsonl", "args.json")
SHRINK = "try a smaller --batch_size or --max_length"


# --- masking and the model ---------------------------------------------------------------------------------------


def mask_tokens(
    input_ids: torch.Tensor,
    is_word: torch.Tensor,
    mask_token_id: int,
    mlm_prob: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose positions to predict; 80 % of them become [MASK], 10 % a random word piece, 10 % stay as they are.

    Args:
        input_ids: (B, T) int64, on the CPU.
        is_word: (V,) bool, False for special tokens, which are neither chosen nor put in.
        mlm_prob: probability of each word piece to be chosen, in (0, 1). At least one is, whatever the draw.

    Returns:
        the masked copy of `input_ids` and which positions are to be predicted, bool, both (B, T).

    Raises:
        ValueError: if there are special tokens only.
    """
    candidates = is_word[input_ids]
    if not candidates.any():
        raise ValueError("input_ids holds special tokens only; expected at least one other word piece")
    draws = torch.rand(input_ids.shape, generator=generator)
    chosen = candidates & ((draws < mlm_prob) | (draws == draws[candidates].min()))
    action = torch.rand(input_ids.shape, generator=generator)
    words = is_word.nonzero().squeeze(1)
    random_words = words[torch.randint(len(words), input_ids.shape, generator=generator)]
    masked = torch.where(chosen & (action < 0.8), mask_token_id, input_ids)
    return torch.where(chosen & (action >= 0.8) & (action < 0.9), random_words, masked), chosen


class MaskedText:
    """Tokenized sentences, each with at least one word piece to mask; `batch` masks them.

    Raises:
        UserError: if no sentence is left.
    """

    def __init__(self, sentences: list[str], tokenizer: BertTokenizer, max_length: int, mlm_prob: float):
        special = tokenizer.encode(" ".join(SPECIAL_TOKENS))["input_ids"]
        self.is_word = torch.ones(len(tokenizer), dtype=torch.bool)
        self.is_word[special] = False
        self.tokenizer, self.mlm_prob = tokenizer, mlm_prob
        encodings = tokenizer.encode_batch(sentences, max_length)
        encodings = [encoding for encoding in encodings if set(encoding["input_ids"]).difference(special)]
        if not encodings:
            raise UserError(f"--data_dir: {len(sentences)} sentences, none with a word piece to mask")
        self.sequences = TokenArrays.from_encodings(encodings)
        self.lengths = self.sequences.lengths

    def batch(self, rows: np.ndarray, seed: int) -> dict[str, torch.Tensor]:
        """`input_ids` (masked), `attention_mask`, `chosen`, all (B, T), and `labels` (M,); the same for the same seed."""
        padded = self.sequences.pad(rows, self.tokenizer.pad_token_id)
        mask_token_id, generator = self.tokenizer.mask_token_id, torch.Generator().manual_seed(seed)
        masked, chosen = mask_tokens(
            padded["input_ids"], self.is_word, mask_token_id, self.mlm_prob, generator
        )
        batch = {"input_ids": masked, "attention_mask": padded["attention_mask"], "chosen": chosen}
        return batch | {"labels": padded["input_ids"][chosen]}


class BertForMaskedLM(nn.Module):
    """The encoder and BERT's prediction head, whose last matrix is the word embedding itself.

    `predictions` has Hugging Face's parameter names. The pooler has no part in this and is frozen.
    """

    def __init__(self, bert: BertModel):
        super().__init__()
        config = bert.config
        self.bert = bert
        bert.pooler.requires_grad_(False)
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.normal_(dense.weight, std=config.initializer_range)
        nn.init.zeros_(dense.bias)
        layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.predictions = nn.Module()
        self.predictions.transform = nn.ModuleDict({"dense": dense, "LayerNorm": layer_norm})
        self.predictions.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits (M, V) at the M chosen positions only; all arguments are (B, T)."""
        hidden_states = self.bert(input_ids, attention_mask)["last_hidden_state"][chosen]  # (M, H)
        transform = self.predictions.transform
        hidden_states = transform["LayerNorm"](self.activation(transform["dense"](hidden_states)))
        word_embeddings = self.bert.embeddings.word_embeddings.weight  # (V, H)
        return F.linear(hidden_states, word_embeddings, self.predictions.bias).float()

    def loss(self, batch: dict[str, torch.Tensor], reduction: str = "mean") -> torch.Tensor:
        """Cross-entropy over the chosen positions of a `MaskedText.batch`, in nats."""
        logits = self(batch["input_ids"], batch["attention_mask"], batch["chosen"])
        return F.cross_entropy(logits, batch["labels"], reduction=reduction)


def load_head(model: BertForMaskedLM, name: str) -> str:
    """Take the head's weights from the checkpoint `name` as far as it has them; the line says which.

    Raises:
        UserError: if one has another shape than the encoder asks for, or is not finite.
    """
    folder = resolve_pretrained(name)
    stored = encoder_tensors(read_tensors(folder), folder)
    expected = model.predictions.state_dict()
    found = {key: stored[HEAD_PREFIX + key] for key in expected if HEAD_PREFIX + key in stored}
    for key, tensor in found.items():
        check_shape(name, HEAD_PREFIX + key, tensor, tuple(expected[key].shape))
        copy_weight(name, HEAD_PREFIX + key, tensor, expected[key])
    new = [key for key in expected if key not in found]
    return f"{len(found)} of {len(expected)} weights loaded" + (f"; new: {', '.join(new)}" if new else "")


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """AdamW over what is trainable; only matrices decay."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {
            "params": [param for param in trainable if has_weight_decay(param) == decays],
            "initial_lr": lr,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    return AdamW(groups, lr=lr)


def train_step(
    model: BertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    *,
    seed: int,
    clip_norm: float = 0.0,
    autocast=nullcontext,
) -> tuple[float, float]:
    """One optimizer update; the learning rates are already in the optimizer's groups.

    Args:
        batch: from `MaskedText.batch`, on the model's device.
        seed: fixes dropout.
        clip_norm: longest gradient; 0 means no clipping.

    Returns:
        loss in nats and the gradient's length before clipping.

    Raises:
        UserError: if either is not finite; nothing was updated then.
    """
    torch.manual_seed(seed)
    optimizer.zero_grad()
    with autocast():
        loss = model.loss(batch)
    loss.backward()  # the word embedding's gradient is the sum of both its uses
    trainable = [param for param in model.parameters() if param.requires_grad]
    grad_norm = float(nn.utils.clip_grad_norm_(trainable, clip_norm or math.inf))
    if not math.isfinite(grad_norm + loss.item()):
        raise UserError(
            f"loss {loss.item()} with a gradient of length {grad_norm}; try a smaller --lr, with --overwrite"
        )
    optimizer.step()
    return loss.item(), grad_norm


@torch.no_grad()
def evaluate(model: BertForMaskedLM, text: MaskedText, batch_size: int, seed: int, autocast) -> float:
    """Mean cross-entropy over masked positions in nats, with masks that depend on the seed only; keeps the mode."""
    device, mode = model.predictions.bias.device, model.training
    model.eval()
    order = np.argsort(text.lengths, kind="stable")
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = text.batch(order[start : start + batch_size], make_seed(seed, start))
        batch = {key: value.to(device) for key, value in batch.items()}
        with autocast():
            total += model.loss(batch, reduction="sum").item()
        count += len(batch["labels"])
    model.train(mode)
    return total / count


# --- a run -------------------------------------------------------------------------------------------------------


def make_parser() -> RunParser:
    parser = RunParser(
        prog="training.pretrain_mlm",
        usage="python -m training.pretrain_mlm --output_dir DIR [--FLAG [VALUE]] ...",
        description="Train an encoder further by masked language modelling on the tasks' training sentences.",
        epilog="A run that was stopped continues, exactly, when its command is given again.",
    )
    add = parser.adder(parser.add_argument_group("data"))
    add("--data_dir", "place", type=DIR, default="data", help="folder with the data files")
    text = f"tasks whose sentences to train on, out of {', '.join(TASKS)}"
    add("--tasks", "result", type=task_list, default=",".join(DEFAULT_TASKS), help=text)
    text = f"more text, out of {', '.join(EXTRA_SOURCES)} (default: none)"
    add("--extra_data", "result", type=source_list, default={}, help=text)
    text = "longest sentence, in word pieces; at most what the encoder can take"
    add("--max_length", "result", type=number(int, 3), default=128, help=text)

    add = parser.adder(parser.add_argument_group("model"))
    text = f"encoder to start from: a folder, NAME@COMMIT of the hub, or {OFFLINE_ENCODER} (needs no network)"
    add("--pretrained", "result", type=ENCODER, default=OFFLINE_ENCODER, help=text)

    training = parser.add_argument_group("training")
    add, add_length = parser.adder(training), parser.adder(training.add_mutually_exclusive_group())
    text = "length of the run; an epoch takes each sentence once"
    add_length("--epochs", "result", type=POSITIVE, default=1.0, help=text)
    text = "length of the run in steps (optimizer updates), instead of --epochs"
    add_length("--max_steps", "result", type=COUNT, help=text)
    add("--batch_size", "result", type=COUNT, default=64, help="sentences per step")
    inside = number(float, 0, 1, low_open=True, high_open=True)
    add("--mlm_prob", "result", type=inside, default=0.15, help="share of the word pieces to predict")
    add("--seed", "result", type=SEED, default=11711, help="seed of all random numbers")
    text = "number format of matrix products; auto: bf16 where the processor is fast at it"
    add("--precision", "machine", choices=PRECISIONS, default="auto", help=text)
    text = "auto (a GPU if there is one), cpu, cuda, cuda:1, ..."
    add("--device", "machine", type=DEVICE, default="auto", help=text)

    add = parser.adder(parser.add_argument_group("optimizer"))
    add("--lr", "result", type=POSITIVE, default=5e-5, help="learning rate")
    text = "share that weight matrices lose in a step, times the learning rate"
    add("--weight_decay", "result", type=NOT_NEGATIVE, default=0.01, help=text)
    text = "course of the learning rate after warm-up"
    add("--schedule", "result", choices=SCHEDULES, default="linear", help=text)
    text = "share of the run spent on linear warm-up, in [0, 1)"
    add("--warmup_ratio", "result", type=PROBABILITY, default=0.1, help=text)
    text = "longer gradients are scaled down to this length; 0: never"
    add("--clip_norm", "result", type=NOT_NEGATIVE, default=1.0, help=text)

    add = parser.adder(parser.add_argument_group("output"))
    add("--output_dir", "mode", type=OUTPUT_DIR, required=True, help="folder for the encoder")
    text = "dev sentences to measure the loss on"
    add("--eval_max_examples", "result", type=COUNT, default=2000, help=text)
    add("--log_every", "upkeep", type=COUNT, default=10, help="steps between lines of the log")
    text = "steps between checkpoints, from which a run that was stopped continues"
    add("--save_every", "upkeep", type=COUNT, default=100, help=text)
    text = "remove the run in --output_dir and start anew"
    add("--overwrite", "mode", action="store_true", help=text)
    return parser


RESUME_MAY_CHANGE = make_parser().marked(*RESUME_MARKS)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 and one line if a flag is wrong."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_sources(parser, args)
    return args


def find_run(args: argparse.Namespace) -> dict | None:
    """What `args.json` says of an unfinished run in --output_dir; None if there is nothing to go on from.

    Raises:
        UserError: if the folder holds a finished run (without --overwrite) or files of something else.
    """
    folder = Path(args.output_dir)
    present = [name for name in OUTPUT_FILES if (folder / name).exists()]
    present += [path.name for path in versions(folder / LAST)]
    if not present:
        return None
    stored = read_json(folder / "args.json") if "args.json" in present else {}
    if not isinstance(stored.get("args"), dict) or "mlm_prob" not in stored["args"]:
        raise UserError(f"--output_dir {folder}: {present[0]} is not this script's; expected another folder")
    if resolve_pretrained(args.pretrained).resolve() == folder.resolve():
        raise UserError(f"--output_dir {folder}: is --pretrained itself; expected another folder")
    if "config.json" in present and not args.overwrite:
        raise UserError(f"--output_dir {folder}: holds a finished encoder; start anew with --overwrite")
    return stored if versions(folder / LAST) and not args.overwrite else None


def read_sentences(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The distinct sentences to train on, and --eval_max_examples of the dev files, drawn by --seed."""
    rows = {}
    for split in ("train", "dev"):
        paths = {task: Path(args.data_dir) / TASKS[task].files[split] for task in args.tasks}
        rows[split] = {task: read_rows(path, TASKS[task], split) for task, path in paths.items()}
        for line in (line for found in rows[split].values() for line in warning_lines(found)):
            print(f"warning: {line}")
    held_out = set()  # sentences of any dev or test file that is there, of whatever task
    for spec in TASKS.values():
        for split in ("dev", "test"):
            path = Path(args.data_dir) / spec.files[split]
            for texts in read_rows(path, spec, split).texts if path.exists() else ():
                held_out |= {text_key((sentence,)) for sentence in texts}
    for task in args.tasks:
        sources = {name: n for name, n in args.extra_data.items() if EXTRA_SOURCES[name].task == task}
        rows["train"][task], lines = add_sources(rows["train"][task], sources, args.data_dir, set())
        for line in lines:
            print(f"{task:6s} extra {line}")

    def distinct(split):  # a dict, since a set has no order
        found = (
            sentence for task_rows in rows[split].values() for texts in task_rows.texts for sentence in texts
        )
        return list(dict.fromkeys(filter(None, found)))

    sentences, dev = distinct("train"), distinct("dev")
    train = [sentence for sentence in sentences if text_key((sentence,)) not in held_out]
    chosen = np.random.default_rng(args.seed).permutation(len(dev))[: args.eval_max_examples]
    print(
        f"{len(train)} sentences to train on ({len(sentences) - len(train)} more are also dev or test sentences);"
        f" {len(chosen)} of {len(dev)} dev sentences to check with"
    )
    return train, [dev[i] for i in sorted(chosen)]


def load_model(args: argparse.Namespace) -> tuple[BertForMaskedLM, BertTokenizer, str]:
    """Model and tokenizer of --pretrained, and a line that says which weights are new; those depend on --seed only."""
    torch.manual_seed(make_seed(args.seed))
    tokenizer = BertTokenizer.from_pretrained(args.pretrained)
    model = BertForMaskedLM(BertModel.from_pretrained(args.pretrained))
    check_vocab_size(len(tokenizer), model.bert.config.vocab_size, args.pretrained)
    head_report = load_head(model, args.pretrained)
    return model, tokenizer, f"{model.bert.load_report}\nprediction head: {head_report}"


def resolve_args(args: argparse.Namespace, config: BertConfig) -> None:
    """Fit --max_length to the encoder, and --device and --precision to this machine, in place."""
    args.max_length = min(args.max_length, config.max_position_embeddings)
    device = resolve_device(args.device)
    args.device = str(device)
    if args.precision == "auto":
        args.precision = "bf16" if is_bf16_fast(device) else "fp32"
    print(f"chosen: max_length {args.max_length}, device {device}, precision {args.precision}")


def check_same(args: argparse.Namespace, stored: dict, data: str) -> None:
    """Refuse to go on with a run under other settings or with other sentences."""
    before, now = stored["args"], json.loads(json.dumps(vars(args)))
    changed = [
        f"--{name} {now[name]} (the run has {before.get(name)})"
        for name in now
        if name not in RESUME_MAY_CHANGE and now[name] != before.get(name)
    ]
    if changed:
        raise UserError(
            f"--output_dir {args.output_dir}: the unfinished run there was started with other settings than"
            f" {', '.join(changed)}; give those of the run, or start anew with --overwrite"
        )
    if stored.get("data") != data:
        raise UserError(
            f"--data_dir {args.data_dir}: not the sentences that {args.output_dir} was started with"
        )


def run_tensors(model: BertForMaskedLM, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """All that training changes: weights and both moments, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, param in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq") if param.requires_grad else ():
            tensors[f"{key}.{name}"] = optimizer.state[param][key]
    return tensors


def save_last(folder: Path, model: BertForMaskedLM, optimizer: AdamW, state: dict) -> None:
    def write(new):
        save_tensors(run_tensors(model, optimizer), new / TENSORS_FILE)
        (new / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")

    write_checkpoint(folder / LAST, write, keep=2)


def load_last(folder: Path, model: BertForMaskedLM, optimizer: AdamW) -> dict:
    """Put weights, moments and counters back from a checkpoint; returns the run's state.

    Raises:
        UserError: if its content does not fit this run.
    """
    tensors, state = load_tensors(folder / TENSORS_FILE), load_state(folder)
    if type(state.get("step")) is not int or not all(
        isinstance(state.get(k), list) for k in ("losses", "log")
    ):
        raise UserError(f"{folder / STATE_FILE}: does not fit this run")
    for group in optimizer.param_groups:
        for param in group["params"]:
            moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            optimizer.state[param] = {"step": state["step"], **moments}
    copy_tensors(tensors, run_tensors(model, optimizer), folder / TENSORS_FILE)
    return state


def save_encoder(folder: Path, model: BertForMaskedLM, tokenizer: BertTokenizer) -> None:
    """Write the finished encoder; `config.json` comes last, so that a folder with it is complete."""
    new = folder / "encoder.new"
    model.bert.save_pretrained(new)
    tokenizer.save_pretrained(new)
    for name in reversed(ENCODER_FILES):
        sync(new / name)
        os.replace(new / name, folder / name)
    sync(folder)
    remove_checkpoints(folder / LAST)
    shutil.rmtree(new)


def work(argv: list[str] | None) -> None:
    args = get_args(argv)
    with lock_folder(Path(args.output_dir)):
        start(args)


def start(args: argparse.Namespace) -> None:
    """Train, from where a stopped run left off if there is one."""
    folder = Path(args.output_dir)
    stored = find_run(args)
    sentences, dev_sentences = read_sentences(args)
    model, tokenizer, report = load_model(args)
    resolve_args(args, model.bert.config)
    text, dev_text = (
        MaskedText(found, tokenizer, args.max_length, args.mlm_prob) for found in (sentences, dev_sentences)
    )
    order = BatchOrder(text.lengths, args.batch_size, args.seed, "mlm")
    args.max_steps = args.max_steps or math.ceil(args.epochs * order.batches_per_epoch)
    data = f"{zlib.crc32(repr((sentences, dev_sentences)).encode('utf-8', 'replace')):08x}"
    if stored:
        check_same(args, stored, data)
    else:
        remove_checkpoints(folder / LAST)
        for name in OUTPUT_FILES:
            (folder / name).unlink(missing_ok=True)
    write_args(args, {"data": data, "encoder": report}, stored)
    print(f"encoder {args.pretrained}: {report}")
    with catch_signals() as signals:
        train(args, model.to(args.device), tokenizer, text, dev_text, order, signals)


def train(
    args: argparse.Namespace,
    model: BertForMaskedLM,
    tokenizer: BertTokenizer,
    text: MaskedText,
    dev_text: MaskedText,
    order: BatchOrder,
    signals: Signals,
) -> None:
    """The run: from where the checkpoint says to --max_steps, or until a signal ends it; then write the encoder."""
    folder, autocast = Path(args.output_dir), make_autocast(args.device, args.precision)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    state = {"step": 0, "losses": [], "log": []}  # losses since the last line of the log

    def log(line):
        state["log"].append(line)
        write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in state["log"]))

    def stop():
        if state["step"]:
            save_last(folder, model, optimizer, state)
        print(
            f"stopped by a signal at step {state['step']}, saved; the same command goes on from here",
            flush=True,
        )
        sys.exit(128 + signals[0])

    def check():
        try:
            with signals.stop_at_once(), explain_memory(lambda: f"checking the dev loss; {SHRINK}"):
                loss = evaluate(model, dev_text, args.batch_size, args.seed, autocast)
        except (Exception, Stopped):  # a library may make another exception of it
            if not signals:
                raise
            stop()
        print(f"step {state['step']}/{args.max_steps}  dev loss {loss:.4f}", flush=True)
        log({"step": state["step"], "dev_loss": loss})

    last = find_checkpoint(folder / LAST)
    if last:
        state = load_last(last, model, optimizer)
        print(f"continuing {folder} at step {state['step']}")
    if not state["log"]:
        check()
    warmup_steps = int(args.warmup_ratio * args.max_steps)
    model.train()
    started, first = time.perf_counter(), state["step"]
    while state["step"] < args.max_steps:
        step = state["step"]
        batch = text.batch(order[step], make_seed(args.seed, step, 1))
        factor = lr_factor(args.schedule, step, warmup_steps=warmup_steps, total_steps=args.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        shape = tuple(batch["input_ids"].shape)
        with explain_memory(lambda shape=shape: f"in a batch (sentences, word pieces) {shape}; {SHRINK}"):
            loss, grad_norm = train_step(
                model,
                optimizer,
                {key: value.to(args.device) for key, value in batch.items()},
                seed=make_seed(args.seed, step),
                clip_norm=args.clip_norm,
                autocast=autocast,
            )
        state["step"] = step = step + 1
        state["losses"].append(loss)
        last = step == args.max_steps
        if step % args.log_every == 0 or last:
            mean = sum(state["losses"]) / len(state["losses"])
            state["losses"] = []
            log({"step": step, "lr": args.lr * factor, "loss": mean, "grad_norm": grad_norm})
            seconds = (time.perf_counter() - started) / (step - first)
            print(
                f"step {step}/{args.max_steps}  loss {mean:.4f}  lr {args.lr * factor:.2e}  {seconds:.2f} s/step"
                f"  {(args.max_steps - step) * seconds:.0f} s left",
                flush=True,
            )
        if signals:
            stop()
        if not last and step % args.save_every == 0:
            save_last(folder, model, optimizer, state)
    check()
    save_encoder(folder, model, tokenizer)
    print(f"encoder: {folder}")


def main(argv: list[str] | None = None) -> int:
    return run_script("training.pretrain_mlm", partial(work, argv))


if __name__ == "__main__":
    sys.exit(main())
