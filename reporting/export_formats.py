"""How one task of a trained model is written so that other libraries give our numbers: a row a format.

Nothing here imports those libraries: a folder is JSON and safetensors in their documented forms. Only ONNX,
whose graph is traced, needs packages (requirements/export.txt). What a form cannot hold exactly is refused,
by name.

    hf                     https://huggingface.co/docs/transformers/model_doc/bert
    sentence-transformers  https://sbert.net (modules.json: a Transformer, a Pooling, Dense layers)
    onnx                   https://onnx.ai

Shapes: B examples, H hidden_size, C outputs of a task.
"""

import importlib.util
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bert import BertModel
from config import TaskSpec
from evaluation import TASK_KINDS, task_kind
from heads import CombinedHead, MultitaskBERT, TaskHead
from reporting.plain_model import PlainModel
from support.errors import UserError
from tokenizer import BertTokenizer
from training.checkpoint import encoder_config, save_tensors

REQUIREMENTS = "requirements/export.txt"
# In the card's examples; the tests put a folder of their own there.
FOLDER = "path/to/this/folder"
# The pooler of BertForSequenceClassification has a tanh, which cls pooling has not. Of numbers this small,
# tanh(x) is x to float32's last digit; and a power of two rounds nothing.
CLS_SCALE = 2.0**-16
MAX_ONNX_BYTES = 2**31 - 2**20  # of one file; beyond, weights go into a second one
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class KindOutput:
    """What a kind of task's logits mean to users of another library.

    Args:
        problem_type: Hugging Face's word for the kind.
        scores: logits (B, C) -> probabilities, or values on the scale of the labels, (B, C).
        code: the same in Python, to follow `logits`.
        activation: the same as a class of torch, where `CrossEncoder` can apply it by itself.
        has_one_logit: two classes share one logit, the log-odds of the second.
        columns: what the columns of the scores are.
    """

    problem_type: str
    scores: Callable[[Tensor], Tensor]
    code: str
    activation: str
    has_one_logit: bool
    columns: str


KIND_OUTPUTS = {
    "classification": KindOutput(
        problem_type="single_label_classification",
        scores=lambda logits: logits.softmax(-1),
        code=".softmax(-1)",
        activation=IDENTITY,
        has_one_logit=False,
        columns="a probability per class",
    ),
    "binary": KindOutput(
        problem_type="single_label_classification",
        scores=lambda logits: logits.sigmoid(),
        code=".sigmoid()",
        activation="torch.nn.modules.activation.Sigmoid",
        has_one_logit=True,
        columns="the probability of the second class",
    ),
    "regression": KindOutput(
        problem_type="regression",
        scores=lambda logits: logits * 1.0,  # a graph's outputs must be two nodes
        code="",
        activation=IDENTITY,
        has_one_logit=False,
        columns="the value itself",
    ),
}


@dataclass(frozen=True)
class TaskModel:
    """One task of a trained run, in eval mode and float32, on the CPU."""

    task: str
    model: MultitaskBERT
    head_name: str  # a key of heads.HEADS
    tokenizer: BertTokenizer
    max_length: int  # word pieces
    both_orders: bool = False  # joint pairs are read in both orders, and their logits averaged

    @property
    def spec(self) -> TaskSpec:
        return self.model.tasks[self.task]

    @property
    def head(self) -> TaskHead | CombinedHead:
        return self.model.heads[self.task]

    @property
    def num_layers(self) -> int:
        """Dense layers of the head."""
        head = self.head.parts[0] if self.head.spec.parts else self.head
        return len(head.dense)

    @property
    def bert(self) -> BertModel:
        return self.model.bert

    @property
    def output(self) -> KindOutput:
        output, kind = KIND_OUTPUTS[self.spec.kind], task_kind(self.spec)
        # Probabilities that are no softmax of the logits.
        return replace(output, scores=kind.probabilities) if kind.shares_weight else output

    @property
    def is_two_vector(self) -> bool:
        return self.head.spec.features is not None

    @property
    def beyond_libraries(self) -> str | None:
        """What no other library's model of one sequence and one dense layer can do; None: nothing."""
        if self.head.spec.parts:
            return f"head {self.head_name}, the average of two"
        if task_kind(self.spec).shares_weight:
            return f"loss {self.spec.loss}, whose probabilities are no softmax of its logits"
        return "--symmetric, which reads a pair in both orders" if self.both_orders else None

    @property
    def labels(self) -> list[str]:
        """The classes in order; for a number, what it is."""
        if not TASK_KINDS[self.spec.kind].is_discrete:
            return [self.spec.label_column]
        return list(self.spec.class_names) or [str(n) for n in range(int(self.spec.label_range[1]) + 1)]


def label_maps(labels: Sequence[str]) -> dict:
    """A config.json's names for classes."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}


def write_json(path: Path, values: dict | list) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, chosen: TaskModel) -> None:
    """The tokenizer's files, with the length at which the model was trained to cut."""
    chosen.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"model_max_length": chosen.max_length})


def example_lines(chosen: TaskModel) -> list[str]:
    if chosen.spec.is_pair:
        return ['pairs = [("A man plays a guitar.", "Someone is making music.")]']
    return ['texts = ["A gripping film from start to finish."]']


# --- hf: BertForSequenceClassification ----------------------------------------------------------------------


def own_pooler(bert: BertModel) -> tuple[Tensor, Tensor, float]:
    return bert.pooler.dense.weight, bert.pooler.dense.bias, 1.0


def pooler_that_does_nothing(bert: BertModel) -> tuple[Tensor, Tensor, float]:
    size = bert.config.hidden_size
    return torch.eye(size) * CLS_SCALE, torch.zeros(size), CLS_SCALE


# pooling -> weight (H, H) and bias (H,) of the pooler that does the same, and by how much it scales vectors.
HF_POOLERS = {"pooler": own_pooler, "cls": pooler_that_does_nothing}


def refuse_hf(chosen: TaskModel) -> str | None:
    pooling, num_layers = chosen.model.pooling, chosen.num_layers
    holds = "BertForSequenceClassification has"
    if chosen.beyond_libraries:
        return chosen.beyond_libraries
    if chosen.is_two_vector:
        return f"head {chosen.head_name} compares two vectors; {holds} one sequence and one vector"
    if pooling not in HF_POOLERS:
        return f"pooling {pooling}; {holds} a pooler on [CLS] only ({', '.join(HF_POOLERS)})"
    if num_layers > 1:
        return f"head_layers {num_layers}; {holds} one dense layer after the pooler"
    return None


def write_hf(folder: Path, chosen: TaskModel) -> None:
    pooler_weight, pooler_bias, scale = HF_POOLERS[chosen.model.pooling](chosen.bert)
    (dense,) = chosen.head.dense
    weight, bias = dense.weight / scale, dense.bias  # (C, H), (C,)
    if chosen.output.has_one_logit:  # sigmoid(z) is softmax((0, z)), which knows both classes by name
        weight = torch.cat([torch.zeros_like(weight), weight])  # (2, H)
        bias = torch.cat([torch.zeros_like(bias), bias])  # (2,)
    tensors = {f"bert.{name}": tensor for name, tensor in chosen.bert.state_dict().items()}
    tensors |= {"bert.pooler.dense.weight": pooler_weight, "bert.pooler.dense.bias": pooler_bias}
    save_tensors(
        tensors | {"classifier.weight": weight, "classifier.bias": bias}, folder / "model.safetensors"
    )
    names = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
    names |= label_maps(chosen.labels) | {"problem_type": chosen.output.problem_type}
    dropout = {"classifier_dropout": chosen.head.dropout_prob}
    write_json(folder / "config.json", names | asdict(chosen.bert.config) | dropout)
    write_tokenizer(folder, chosen)


def use_hf(chosen: TaskModel) -> list[str]:
    texts = '[{"text": a, "text_pair": b} for a, b in pairs]' if chosen.spec.is_pair else "texts"
    return [
        "from transformers import pipeline",
        "",
        *example_lines(chosen),
        f'classify = pipeline("text-classification", "{FOLDER}", top_k=None)',
        f"scores = classify({texts}, truncation=True)",
    ]


def limits_of_hf(chosen: TaskModel) -> list[str]:
    if chosen.model.pooling != "cls":
        return []
    text = (
        "The model was trained on the last hidden state of [CLS] without a pooler. The pooler here is the"
        " identity, scaled so far down that its tanh changes nothing, and the classifier is scaled up again:"
        " keep float32 or bfloat16, and do not quantize."
    )
    return [text]


# --- sentence-transformers ----------------------------------------------------------------------------------

# pooling -> the flag that Pooling's config knows it by, and whether BERT's pooler follows as a Dense layer.
ST_POOLINGS = {"mean": ("mean_tokens", False), "cls": ("cls_token", False), "pooler": ("cls_token", True)}


def refuse_st(chosen: TaskModel) -> str | None:
    if chosen.beyond_libraries:
        return chosen.beyond_libraries
    if chosen.model.pooling in ST_POOLINGS:
        return None
    return f"pooling {chosen.model.pooling}; sentence-transformers has {', '.join(ST_POOLINGS)}"


def write_dense(folder: Path, linear: nn.Linear, activation: str, **settings) -> None:
    folder.mkdir()
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": True}
    write_json(folder / "config.json", sizes | {"activation_function": activation} | settings)
    tensors = {f"linear.{name}": tensor for name, tensor in linear.state_dict().items()}
    save_tensors(tensors, folder / "model.safetensors")


def write_st(folder: Path, chosen: TaskModel) -> None:
    """A `CrossEncoder` for joint pairs, else a `SentenceTransformer`.

    The latter gives a sentence's logits or, where the head compares two vectors, those vectors; such a head
    lies beside it in `head.safetensors`, since no module of the library sees both.
    """
    flag, has_pooler = ST_POOLINGS[chosen.model.pooling]
    size, joint = chosen.bert.config.hidden_size, chosen.head.spec.joint
    write_json(folder / "config.json", encoder_config(chosen.bert.config))
    save_tensors(chosen.bert.state_dict(), folder / "model.safetensors")
    write_tokenizer(folder, chosen)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": chosen.max_length, "do_lower_case": False}
    )
    flags = {f"pooling_mode_{name}": name == flag for name in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": size} | flags)
    layers = [(chosen.bert.pooler.dense, "torch.nn.modules.activation.Tanh")] if has_pooler else []
    if chosen.is_two_vector:
        save_tensors(chosen.head.state_dict(), folder / "head.safetensors")
    else:
        layers += [(linear, "torch.nn.modules.activation.GELU") for linear in chosen.head.dense[:-1]]
        layers += [(chosen.head.dense[-1], IDENTITY)]
    paths = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for number, (linear, activation) in enumerate(layers, start=2):
        is_last = number == len(layers) + 1
        output = {"module_output_name": "scores"} if joint and is_last else {}
        write_dense(folder / f"{number}_Dense", linear, activation, **output)
        paths.append((f"{number}_Dense", "Dense"))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(paths)
    ]
    write_json(folder / "modules.json", modules)
    about = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    if joint:
        about = {"model_type": "CrossEncoder", "activation_fn": chosen.output.activation}
    write_json(folder / "config_sentence_transformers.json", about)


def use_st(chosen: TaskModel) -> list[str]:
    if chosen.head.spec.joint:
        several = chosen.output.activation == IDENTITY and len(chosen.labels) > 1
        return [
            "from sentence_transformers import CrossEncoder  # tried with 6.2",
            "",
            *example_lines(chosen),
            f'model = CrossEncoder("{FOLDER}")',
            f"scores = model.predict(pairs{', apply_softmax=True' if several else ''})",
        ]
    if not chosen.is_two_vector:
        return [
            "from sentence_transformers import SentenceTransformer",
            "",
            *example_lines(chosen),
            f'model = SentenceTransformer("{FOLDER}")',
            "logits = model.encode(texts, convert_to_tensor=True)",
            f"scores = logits{chosen.output.code}",
        ]
    last = len(chosen.head.dense) - 1
    return [
        "import torch",
        "import torch.nn.functional as F",
        "from safetensors.torch import load_file",
        "from sentence_transformers import SentenceTransformer",
        "",
        "",
        *inspect.getsource(chosen.head.spec.features).splitlines(),
        "",
        "",
        *example_lines(chosen),
        f'model, head = SentenceTransformer("{FOLDER}"), load_file("{FOLDER}/head.safetensors")',
        "u, v = (model.encode(texts, convert_to_tensor=True) for texts in zip(*pairs))",
        f"x = {chosen.head.spec.features.__name__}(u, v)",
        f"for n in range({last}):  # all dense layers but the last",
        '    x = F.gelu(F.linear(x, head[f"dense.{n}.weight"], head[f"dense.{n}.bias"]))',
        f"weight, bias = (head[f'dense.{last}.{{part}}'] for part in ('weight', 'bias'))",
        "logits = F.linear(x, weight, bias)",
        f"scores = logits{chosen.output.code}",
    ]


def limits_of_st(chosen: TaskModel) -> list[str]:
    text = (
        "Opened by transformers without sentence-transformers, this folder is an encoder and no more: a"
        " classifier put on top is new, and its labels in config.json say so."
    )
    lines = [text]
    if chosen.head.spec.joint:
        lines.append("The head is in modules, which old versions of CrossEncoder pass over; 6.2 reads them.")
    elif not chosen.is_two_vector:
        lines.append("The vector that encode returns is the logits of the classes, in their order.")
    elif chosen.head.spec.single_number:
        weight, bias = (tensor.item() for tensor in chosen.head.dense[0].parameters())
        lines.append(f"A pair's logit is {weight:.6g} * cosine {bias:+.6g}, with model.similarity's cosine.")
    else:
        lines.append(
            f"The pair's head, {chosen.head_name}, is no module of the library: model.similarity is the"
            " vectors' cosine, which was not trained. Take the lines above."
        )
    return lines


# --- onnx ---------------------------------------------------------------------------------------------------


def input_groups(chosen: TaskModel) -> dict[str, str]:
    """How the names of a sequence's inputs begin -> the sequences, in Python: a head's in their order."""
    if not chosen.spec.is_pair:
        return {"": "texts"}
    groups = {"first_": "[a for a, b in pairs]", "second_": "[b for a, b in pairs]"}
    if not chosen.head.spec.joint:
        return groups
    groups = groups if chosen.head.spec.parts else {}
    groups |= {"pair_": "pairs"} | ({"swapped_": "[(b, a) for a, b in pairs]"} if chosen.both_orders else {})
    return groups if len(groups) > 1 else {"": "pairs"}


def input_names(chosen: TaskModel) -> list[str]:
    return [group + name for group in input_groups(chosen) for name in INPUTS]


def write_onnx(folder: Path, chosen: TaskModel) -> None:
    """`model.onnx`: batch and lengths are free; outputs are logits and scores, (B, C) each."""
    names = input_names(chosen)
    batch = torch.export.Dim("batch")
    shapes, examples = [], []
    for group in range(len(names) // len(INPUTS)):
        longest = chosen.bert.config.max_position_embeddings
        positions = torch.export.Dim(f"positions_{group + 1}", max=longest)
        shapes += [{0: batch, 1: positions}] * len(INPUTS)
        length = min(longest, 7 + group)  # no two sizes of the example the same, or they would count as one
        ones = torch.ones(3, length, dtype=torch.int64)
        examples += [ones, ones.clone(), torch.zeros_like(ones)]
    plain = PlainModel(chosen.model, chosen.task, chosen.output.scores)
    num_bytes = sum(tensor.nbytes for tensor in plain.state_dict().values())
    with warnings.catch_warnings():  # of the exporter's own affairs
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            plain,
            tuple(examples),
            folder / "model.onnx",
            input_names=names,
            output_names=["logits", "scores"],
            dynamic_shapes={"inputs": tuple(shapes)},
            external_data=num_bytes > MAX_ONNX_BYTES,
            verbose=False,
        )
    about = {"model_type": "bert"} | asdict(chosen.bert.config) | label_maps(chosen.labels)
    write_json(folder / "config.json", about | {"problem_type": chosen.output.problem_type})
    write_tokenizer(folder, chosen)
    (folder / "tokenizer.json").write_text(chosen.tokenizer.settings() + "\n", encoding="utf-8")


def use_onnx(chosen: TaskModel) -> list[str]:
    sequences = input_groups(chosen).values()
    pad = chosen.tokenizer.pad_token_id
    return [
        "import numpy as np",
        "import onnxruntime",
        "from tokenizers import Tokenizer",
        "",
        *example_lines(chosen),
        f'tokenizer = Tokenizer.from_file("{FOLDER}/tokenizer.json")',
        f'tokenizer.enable_padding(pad_id={pad}, pad_token="[PAD]")',
        f"tokenizer.enable_truncation({chosen.max_length})",
        "inputs = []",
        f"for sequences in [{', '.join(sequences)}]:",
        "    found = tokenizer.encode_batch(sequences)",
        '    for part in ("ids", "attention_mask", "type_ids"):',
        "        inputs.append(np.array([getattr(each, part) for each in found]))",
        f'session = onnxruntime.InferenceSession("{FOLDER}/model.onnx")',
        "names = [each.name for each in session.get_inputs()]",
        "logits, scores = session.run(None, dict(zip(names, inputs)))",
    ]


def limits_of_onnx(chosen: TaskModel) -> list[str]:
    lines = [f"Scores are {chosen.output.columns}; float32; at most {chosen.max_length} word pieces."]
    if chosen.is_two_vector:
        lines.append(
            "The two sentences are encoded apart: inputs first_ and second_, each with its own length."
        )
    elif len(input_groups(chosen)) > 1:
        names = ", ".join(input_groups(chosen))
        lines.append(f"A pair is encoded several times: inputs {names}, each with its own length.")
    return lines


# --- all formats --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A form that a task's model can be written in.

    Args:
        refuse: why a model does not fit, or None.
        write: fills an empty folder.
        use: lines of Python for the card, from example sentences to `scores`.
        limits: what users of the folder should know, a sentence or two each.
        library: the hub's name for what opens it.
        packages: that `write` needs besides requirements.txt.
    """

    refuse: Callable[[TaskModel], str | None]
    write: Callable[[Path, TaskModel], None]
    use: Callable[[TaskModel], list[str]]
    limits: Callable[[TaskModel], list[str]]
    library: str
    packages: tuple[str, ...] = ()


FORMATS = {
    "hf": Format(refuse_hf, write_hf, use_hf, limits_of_hf, "transformers"),
    "sentence-transformers": Format(refuse_st, write_st, use_st, limits_of_st, "sentence-transformers"),
    "onnx": Format(
        lambda chosen: None, write_onnx, use_onnx, limits_of_onnx, "onnx", packages=("onnx", "onnxscript")
    ),
}


def check_packages(name: str) -> None:
    """Refuse a format whose packages are not installed, before anything is read."""
    for package in FORMATS[name].packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--to {name}: the package {package} is not installed; pip install -r {REQUIREMENTS}"
            )
