"""The tokenizer against Hugging Face's, on ordinary and hostile text, and against pieces worked out by hand.

Damaged vocabularies are refused, with one case for each kind of message.
"""

import json
import os
import random
import time
from itertools import pairwise

import pytest
import torch

from base_bert import resolve_pretrained, warn_once
from tests.tiny import any_text, refusal
from tokenizer import SPECIAL_TOKENS, BertTokenizer, clean_surrogates, read_vocab

MAX_LENGTHS = (2, 3, 4, 5, 8, 13, 512)
ORDINARY = [
    "What's the best way to learn Python in 2017? A patient, moving and thoroughly honest film.",
    "Two dogs run -- across a field; one barks! U.S. stocks rose 3.5% (to $12,345.67) on Tuesday...",
    "It's not n't-able: don't, can't, won't. unbelievably untokenizable supercalifragilisticexpialidocious",
    "café naïve Zürich Ångström façade résumé 北京 is the capital of 中国",
    "e-mail: first.last+tag@example.com, http://example.com/?q=a&b=c#d",
]
HOSTILE = [
    *("", " ", "\t\n\r \u00a0\u2003\u3000", "😀", "\x00", "[SEP]", "a\ufffdb", "soft\u00adhyphen"),
    "a😀b 👩‍👩‍👧‍👦 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301 e\u0301\u0301\u0301 n\u0303o \u0301 \u0301a",
    "Z\u0351\u036b\u0343\u036aA\u0321\u034aL\u0320G\u0321O\u0361",
    "İstanbul ISSIZ ıI ß ẞ ŉ ǰ ΐ ﬁ ﬀ ǅ Σας ΣΑΣ",
    "日本語のテキスト 한국어 텍스트 ภาษาไทย \U00020000\U0002a6df\uf900\u3400",
    "a\x00b\x01c\x1fd\x7fe\x80f\x9fg",
    "zero\u200bwidth\u200cnon\u200djoin\u2060er\ufeff",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c \u200fx",
    "line\u2028separator\u2029paragraph\x0bvertical\x0cform\x85next",
    "a [SEP] b [MASK] c [CLS][PAD] d [UNK] [sep] [ SEP ] [SEP [[SEP]] [MASK]ing un[MASK]",
    "##ing ## #hash ## «quotes» “curly” ‘single’ … — – ‐ ¿qué? ¡",
    "$€£¥ ±×÷ ½ ² ³ ™ © ° № 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙 ｆｕｌｌｗｉｄｔｈ　ＡＢＣ１２３",
    "\ue000 \U000f0000 \ufdd0 \uffff",
    # BERT gives up on words above 100 characters.
    *("a" * 100, "a" * 101, "antidisestablishmentarianism" * 11, "\u0301" * 300, "!" * 300),
    *("word " * 10_000, "中" * 600),
]
# A vocabulary small enough to work with by hand, with both cases and accents.
PIECES = "the The cat Cat ##s , ! ? é e cafe café É 中 a中 ##a a A un ##want ##ed [ ] ß ss"
VOCAB = [*SPECIAL_TOKENS, *PIECES.split()]
SENTENCE = "the The cat Cat s , ! ? é É e café cafe 中 a A unwanted unwanteds [MASK] [SEP] ß"


VOCAB_IDS = {piece: index for index, piece in enumerate(VOCAB)}


def write_settings(folder, settings):
    if settings:
        settings = {"tokenizer_class": "BertTokenizer"} | settings
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_vocab(folder, pieces, end="\n", **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(piece + end for piece in pieces), encoding="utf-8", newline="")
    return write_settings(folder, settings)


def write_tokenizer_json(folder, ids=None, normalizer=None, change=None, **settings):
    """The `tokenizer.json` of the packaged encoder with other contents, and no `vocab.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = json.loads((resolve_pretrained("minilm") / "tokenizer.json").read_text(encoding="utf-8"))
    stored["normalizer"] |= normalizer or {}
    if ids is not None:
        stored["model"]["vocab"] = ids
        for token in stored["added_tokens"]:
            token["id"] = ids[token["content"]]
        stored["post_processor"] = None
    for part, changes in (change or {}).items():
        stored[part] = stored[part] + changes if isinstance(changes, list) else stored[part] | changes
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return write_settings(folder, settings)


def made_up_texts():
    """The same ones every time: any characters but surrogates, and words glued to odd characters."""
    rng = random.Random(0)
    words = [*SENTENCE.split(), "film", "play##ing", "don't", "\u0301", "\u200b", "\x00", "😀", "  ", "\n"]
    glued = {"".join(rng.choices(words, k=rng.randrange(30))) for _ in range(60)}
    return sorted(glued | {any_text(rng).encode("utf-8", "replace").decode() for _ in range(60)})


def pairs_of(texts):
    """The shortest with the longest and so on, both ways round; neighbours; and every small pair of lengths.

    Never two long texts: Hugging Face cuts the rest of each in pieces and joins every two of them, which
    takes minutes and gigabytes.
    """
    by_length = sorted(texts, key=len)
    short = [text for text in texts if len(text) < 60]
    words = ["the " * i for i in range(9)]
    pairs = [*zip(by_length, reversed(by_length), strict=True), *pairwise(short)]
    return [list(pair) for pair in pairs + [(a, b) for a in words for b in words]]


REFERENCE = """
import json
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

def plain(encoded):
    return {"input_ids": encoded["input_ids"], "token_type_ids": encoded["token_type_ids"]}

results = {}
for name, case in json.load(open("cases.json")).items():
    tokenizer = BertTokenizer.from_pretrained(case["folder"])
    result = results[name] = {"single": {}, "pair": {}}
    firsts, seconds = [list(texts) for texts in zip(*case["pairs"])]
    for max_length in case["max_lengths"]:
        how = dict(truncation="longest_first", max_length=max_length)
        result["single"][max_length] = plain(tokenizer(case["texts"], **how))
        if max_length > 2:
            result["pair"][max_length] = plain(tokenizer(firsts, seconds, **how))
    if "ordinary" in case:
        legacy = BertTokenizerLegacy.from_pretrained(case["folder"])
        result["legacy"] = [legacy(text)["input_ids"] for text in case["ordinary"]]
json.dump(results, open("results.json", "w"))
"""


def saved(folder, source):
    BertTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


# Name -> makes a checkpoint folder at the path it is given, or names another.
FOLDERS = {
    "minilm": lambda path: resolve_pretrained("minilm"),
    "saved_cased": lambda path: saved(path, write_vocab(path / "from", VOCAB, do_lower_case=False)),
    "vocab_only": lambda path: write_vocab(path, VOCAB),
    "windows": lambda path: write_vocab(path, VOCAB, end="\r\n"),
    "odd_vocab": lambda path: write_vocab(path, [*VOCAB, "", "dog", "\u2028", "film"]),
    "accents_kept": lambda path: write_vocab(path, VOCAB, do_lower_case=True, strip_accents=False),
    "accents_cut": lambda path: write_vocab(path, VOCAB, do_lower_case=False, strip_accents=True),
    "chinese_words": lambda path: write_vocab(path, VOCAB, tokenize_chinese_chars=False),
    "json_only": lambda path: write_tokenizer_json(path),
    "json_and_vocab": lambda path: write_tokenizer_json(
        write_vocab(path, VOCAB[::-1]), VOCAB_IDS, {"lowercase": False}, do_lower_case=False
    ),
}


@pytest.fixture(scope="module")
def minilm():
    return BertTokenizer.from_pretrained("minilm")


@pytest.fixture
def small():
    return BertTokenizer(VOCAB_IDS)


# --- against Hugging Face -----------------------------------------------------------------------------------


def same(encodings, expected, inputs):
    for i, (encoding, text) in enumerate(zip(encodings, inputs, strict=True)):
        wanted = {key: expected[key][i] for key in ("input_ids", "token_type_ids")}
        assert encoding == wanted, repr(text)[:200]


@pytest.mark.slow  # a process that imports transformers, once for all folders
def test_sentences_and_pairs_equal_hugging_face_and_once_saved_read_the_same(tmp_path, run_transformers):
    everything = ORDINARY + HOSTILE + made_up_texts()
    some = [*ORDINARY, *HOSTILE[:-7], SENTENCE, SENTENCE.replace(" ", "")]
    assert len(everything) > 100
    cases = {}
    for name, make in FOLDERS.items():
        texts, max_lengths = (everything, MAX_LENGTHS) if name == "minilm" else (some, (5, 512))
        case = {"folder": str(make(tmp_path / name)), "texts": texts}
        cases[name] = case | {"pairs": pairs_of(texts), "max_lengths": max_lengths}
    cases["minilm"]["ordinary"] = ORDINARY
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run_transformers(REFERENCE, tmp_path)
    for name, expected in json.loads((tmp_path / "results.json").read_text()).items():
        texts, pairs = cases[name]["texts"], cases[name]["pairs"]
        tokenizer = BertTokenizer.from_pretrained(cases[name]["folder"])
        for max_length, single in expected["single"].items():
            same(tokenizer.encode_batch(texts, int(max_length)), single, texts)
        for max_length, pair in expected["pair"].items():
            same(tokenizer.encode_pair_batch(pairs, int(max_length)), pair, pairs)
        tokenizer.save_pretrained(tmp_path / "again" / name)
        again = BertTokenizer.from_pretrained(tmp_path / "again" / name)
        same(again.encode_batch(texts, int(max_length)), expected["single"][max_length], texts)
        # Hugging Face's present tokenizer is the Rust library too; its old one shares no code with it.
        for text, ids in zip(ORDINARY, expected.get("legacy", []), strict=name == "minilm"):
            assert tokenizer.encode(text)["input_ids"] == ids, text


# --- by hand ------------------------------------------------------------------------------------------------


def ids(text):
    return [VOCAB.index(piece) for piece in text.split()]


BY_HAND = {
    "The cats, unwanted!": "the cat ##s , un ##want ##ed !",
    "CAFÉ café": "cafe cafe",
    "dog the dogs": "[UNK] the [UNK]",
    "a中a": "a 中 a",
    "the[MASK]cat": "the [MASK] cat",
    "the[mask]cat": "the [ [UNK] ] cat",
    "t\x00he \u200bcat": "the cat",
    "": "",
}
PAIRS_BY_HAND = [  # max_length, pieces, how many of the first segment
    (8, "[CLS] the cat ##s [SEP] a ! [SEP]", 5),  # as long as it is
    (7, "[CLS] the cat [SEP] a ! [SEP]", 4),  # the longer one is cut first
    (5, "[CLS] the [SEP] a [SEP]", 3),
    (3, "[CLS] [SEP] [SEP]", 2),
]


def test_pieces_by_hand(small):
    for text, pieces in BY_HAND.items():
        expected = [2, *ids(pieces), 3]
        assert small.encode(text) == {"input_ids": expected, "token_type_ids": [0] * len(expected)}
        assert all(type(number) is int for number in small.encode(text)["input_ids"])
    assert small.encode_batch([]) == small.encode_pair_batch([]) == []
    cased = BertTokenizer(VOCAB_IDS, do_lower_case=False)
    assert cased.encode("The the Café café É")["input_ids"] == [2, *ids("The the [UNK] café É"), 3]


def test_pairs_by_hand(small):
    for max_length, pieces, num_first in PAIRS_BY_HAND:
        expected = ids(pieces)
        segments = [0] * num_first + [1] * (len(expected) - num_first)
        encoding = small.encode_pair("The cats", "a !", max_length)
        assert encoding == {"input_ids": expected, "token_type_ids": segments}


def test_truncation_of_a_sentence_by_hand(small):
    assert small.encode("the cats !", max_length=4)["input_ids"] == ids("[CLS] the cat [SEP]")
    assert small.encode("the cats !", max_length=2)["input_ids"] == ids("[CLS] [SEP]")
    assert len(small.encode("the " * 999)["input_ids"]) == 512
    tokenizer = BertTokenizer(VOCAB_IDS, max_length=6)
    for max_length, expected in ((None, 6), (8, 8), (None, 6)):  # one call's is not the next one's
        assert len(tokenizer.encode("the " * 9, max_length)["input_ids"]) == expected


def test_ids_of_special_tokens(minilm):
    # bert-base-uncased's vocabulary, which MiniLM shares.
    assert (minilm.pad_token_id, minilm.cls_token_id, minilm.sep_token_id) == (0, 101, 102)
    assert minilm.mask_token_id == 103 and len(minilm) == 30522
    assert minilm.encode("Hello world")["input_ids"] == [101, 7592, 2088, 102]


# --- hostile strings and arguments --------------------------------------------------------------------------


def test_lone_surrogates(minilm):
    """Hugging Face's tokenizer raises; ours reads a question mark."""
    plain_of = {
        "\ud800": "?",
        "a\udfffb": "a?b",
        "the \ud83d cat \ude00": "the ? cat ?",
        "\ude00\ud83d": "??",
    }
    for text, plain in plain_of.items():
        assert clean_surrogates(text) == plain
        assert minilm.encode(text) == minilm.encode(plain)
        assert minilm.encode_pair(text, text) == minilm.encode_pair(plain, plain)
    assert all(clean_surrogates(text) == text for text in ORDINARY + HOSTILE)


def test_two_long_texts_cost_no_more_than_their_length(minilm):
    start = time.perf_counter()
    encoding = minilm.encode_pair("word " * 500, "word " * 500, 5)
    assert encoding == minilm.encode_pair("word", "word")
    # About a millisecond; many seconds where what is cut off both texts is joined.
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("max_length", [-1, 0, 1, 2])
def test_no_room_for_the_special_tokens(small, max_length):
    for encode, texts, needed in ((small.encode_pair, ("the", "cat"), 3), (small.encode, ("the",), 2)):
        if max_length < needed:
            message = f"max_length is {max_length}; the special tokens alone take {needed}"
            with pytest.raises(ValueError, match=message):
                encode(*texts, max_length)


def test_call_by_hand(small):
    two = small(["the cat", "a"], padding=True, truncation=True, return_tensors="pt")
    assert two["input_ids"].tolist() == [ids("[CLS] the cat [SEP]"), ids("[CLS] a [SEP] [PAD]")]
    assert two["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert two["token_type_ids"].tolist() == [[0] * 4] * 2
    assert all(tensor.dtype == torch.int64 for tensor in two.values())
    pair = small("the cat", "a", padding="max_length", max_length=7)
    assert pair["input_ids"] == ids("[CLS] the cat [SEP] a [SEP] [PAD]")
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 0] and pair["attention_mask"] == [1] * 6 + [0]
    assert small("the cat", return_tensors="pt")["input_ids"].shape == (1, 4)
    assert len(small(900 * "the ")["input_ids"]) == 902  # cut only if asked
    assert small([], padding=True)["input_ids"] == []


# (arguments, keyword arguments); texts of different lengths
CALLS = [
    ((["the cat sat", "a"],), {"padding": True, "truncation": True}),
    ((["the cat sat", "a"],), {"padding": "longest", "truncation": True, "max_length": 4}),
    ((["the cat sat", "a"],), {"padding": "max_length", "truncation": True, "max_length": 9}),
    (
        (["the cat sat", "a"], ["on a mat", "b c d e f"]),
        {"padding": True, "truncation": True, "max_length": 8},
    ),
    ((["the cat sat", "a"], ["on a mat", "b"]), {}),
    (("the cat sat",), {}),
    (("the cat sat", "on a mat"), {"truncation": True, "max_length": 6}),
]


@pytest.mark.slow
def test_call_equals_hugging_face(minilm, run_transformers, tmp_path):
    folder = str(resolve_pretrained("minilm"))
    code = f"""
import json
from transformers import BertTokenizer
tokenizer = BertTokenizer.from_pretrained({folder!r})
json.dump([dict(tokenizer(*args, **options)) for args, options in {CALLS!r}], open("results.json", "w"))
"""
    run_transformers(code, tmp_path)
    expected = json.loads((tmp_path / "results.json").read_text())
    assert [minilm(*args, **options) for args, options in CALLS] == expected


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((["the cat", "a"],), {"return_tensors": "pt"}, "give padding=True"),
        (("a",), {"return_tensors": "np"}, "return_tensors 'np'"),
        (("a",), {"padding": "left"}, "padding is 'left'"),
        (("a", ["b"]), {}, "one sentence and text_pair several"),
        ((["a", "b"], ["c"]), {}, "shorter"),
    ],
)
def test_calls_that_cannot_be_meant(small, args, options, message):
    with pytest.raises(ValueError, match=message):
        small(*args, **options)


# --- files --------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    vocab = {piece: index for index, piece in enumerate([*VOCAB, "\u2028", "\u00a0", "##\u0301"])}
    folder = tmp_path / "deep" / "folder"
    for do_lower_case in (True, False):
        BertTokenizer(vocab, do_lower_case).save_pretrained(folder)
        again = BertTokenizer.from_pretrained(folder)
        assert again.do_lower_case is do_lower_case and read_vocab(folder / "vocab.txt") == vocab


def test_save_keeps_ids_when_some_are_unused(tmp_path):
    """A tokenizer.json with gaps leaves ids that no piece has."""
    folder = write_tokenizer_json(tmp_path / "a", VOCAB_IDS | {"dog": len(VOCAB) + 2})
    BertTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    for name in "ab":
        tokenizer = BertTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.encode("the cat dog")["input_ids"] == [2, *ids("the cat"), len(VOCAB) + 2, 3]
        assert len(tokenizer) == len(VOCAB) + 3


@pytest.mark.parametrize("setting", [None, True, False])
@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("with_vocab", [True, False])
def test_tokenizer_json_goes_first(tmp_path, capsys, with_vocab, lowercase, setting):
    """Before another vocab.txt, and before another casing, which is warned about; its own is not doubted."""
    warn_once.cache_clear()
    settings = {} if setting is None else {"do_lower_case": setting}
    if with_vocab:
        write_vocab(tmp_path, VOCAB[::-1])
    write_tokenizer_json(tmp_path, VOCAB_IDS, {"lowercase": lowercase}, **settings)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer.do_lower_case is lowercase
    assert tokenizer.encode("The cat")["input_ids"] == [2, *ids("the cat" if lowercase else "The cat"), 3]
    warning = (
        f"warning: {tmp_path}/tokenizer.json: lowercase is {json.dumps(lowercase)}, which goes before"
        f" {tmp_path}/tokenizer_config.json: do_lower_case is {json.dumps(setting)}\n"
    )
    assert capsys.readouterr().out == warning * (setting is not None and setting != lowercase)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("contents", [["[ENT]", "<e>"], ["[MASK]"], [3]])
def test_added_tokens_are_warned_about(tmp_path, capsys, name, contents):
    warn_once.cache_clear()
    tokens = [{"id": len(VOCAB) + number, "content": content} for number, content in enumerate(contents)]
    is_own = name == "tokenizer.json"
    settings = {} if is_own else {"added_tokens_decoder": {token["id"]: token for token in tokens}}
    write_tokenizer_json(tmp_path, VOCAB_IDS, change={"added_tokens": tokens * is_own}, **settings)
    assert len(BertTokenizer.from_pretrained(tmp_path)) == len(VOCAB)
    warning = (
        f"warning: {tmp_path / name}: adds 2 tokens to the vocabulary, such as '[ENT]'; in a text they are"
        " read as ordinary characters\n"
    )
    assert capsys.readouterr().out == warning * ("[ENT]" in contents)


def test_every_choice_of_tokenizer_json_goes_first_and_null_is_none(tmp_path):
    own = {"strip_accents": True, "handle_chinese_chars": False}
    write_tokenizer_json(tmp_path, VOCAB_IDS, own, strip_accents=False, tokenize_chinese_chars=True)
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert tokenizer.strip_accents is True and tokenizer.tokenize_chinese_chars is False
    write_tokenizer_json(tmp_path, VOCAB_IDS, {"strip_accents": None}, strip_accents=False)
    assert BertTokenizer.from_pretrained(tmp_path).strip_accents is False


CAPITALS = [  # pieces, settings, what the warning says
    ("the The ##S cat", {}, "2 of 9 word pieces have capitals, such as 'The'"),
    ("the ##S", {"strip_accents": None}, "1 of 7 word pieces have capitals, such as '##S'"),
    ("the Élan", {}, "1 of 7 word pieces have capitals, such as 'Élan'"),
    ("the The", {"do_lower_case": True}, None),
    ("the The", {"do_lower_case": False}, None),
    ("the ##s 中 é ß [X] <Y> [unused1]", {}, None),
]


@pytest.mark.parametrize(("pieces", "settings", "warned"), CAPITALS)
def test_capitals_without_a_word_on_casing_are_warned_about_once(tmp_path, capsys, pieces, settings, warned):
    warn_once.cache_clear()
    write_vocab(tmp_path, [*SPECIAL_TOKENS, *pieces.split()], **settings)
    for _ in range(2):
        assert BertTokenizer.from_pretrained(tmp_path).do_lower_case is settings.get("do_lower_case", True)
    out = capsys.readouterr().out
    assert out.count("warning") == (warned is not None)
    assert warned is None or out.startswith(f"warning: {tmp_path}/vocab.txt: {warned}, but nothing says")


def test_read_vocab_without_what_editors_add(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("a\r\nb\n\u2028\n\nlast".encode())
    assert read_vocab(path) == {"a": 0, "b": 1, "\u2028": 2, "": 3, "last": 4}
    for start in ("", "\ufeff"):
        for end in ("", "\n", "\n\n", "\r\n\r\n", "\n\n\n\n"):
            path.write_text(start + "\n".join(VOCAB) + end, encoding="utf-8", newline="")
            assert read_vocab(path) == VOCAB_IDS


def write(name, contents):
    return lambda folder: (folder / name).write_bytes(contents)


def vocab(*pieces, **settings):
    return lambda folder: write_vocab(folder, pieces, **settings)


def change(part, **changes):
    return lambda folder: write_tokenizer_json(folder, VOCAB_IDS, change={part: changes})


def model(text):
    return write("tokenizer.json", b'{"model": ' + text + b"}")


def with_id(piece, value):
    return change("model", vocab=VOCAB_IDS | {piece: value})


def bad_id(value):
    return f"tokenizer.json: 'cat' has the id {value!r}; expected a whole number from 0 to 4194303"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 438\n"
NO_PIECES = "tokenizer.json: not a word-piece vocabulary"
TWICE = f"vocab.txt:{len(VOCAB) + 2}: 'cat' appears twice, first in line 8; expected each word piece once"
DAMAGE = [
    (lambda folder: None, "holds neither vocab.txt nor tokenizer.json"),
    (write("vocab.txt", "[PAD]\ncafé\n".encode("latin-1")), "vocab.txt: not UTF-8 text"),
    (write("vocab.txt", b""), "vocab.txt: vocabulary lacks the special token [PAD]"),
    (vocab(*VOCAB[:4]), "vocab.txt: vocabulary lacks the special token [MASK]"),
    (vocab(*VOCAB, "dog", "cat"), TWICE),
    (vocab(*VOCAB, "", "", "dog"), "'' appears twice"),
    (vocab(*VOCAB, "cat\r"), "'cat' appears twice"),
    (write("vocab.txt", POINTER), "vocab.txt: a Git LFS pointer, not yet the file itself"),
    (lambda folder: os.mkfifo(folder / "vocab.txt"), "vocab.txt: cannot be read (not a regular file)"),
    (lambda folder: (folder / "vocab.txt").symlink_to("none"), "vocab.txt: cannot be read (No such file"),
    (
        lambda folder: (write_vocab(folder, VOCAB) / "tokenizer_config.json").mkdir(),
        "tokenizer_config.json: cannot be read (not a regular file)",
    ),
    (vocab(*VOCAB, do_lower_case="false"), "do_lower_case is 'false'; expected true or false"),
    (change("normalizer", lowercase=1), "tokenizer.json: lowercase is 1; expected true or false"),
    (write("tokenizer.json", b"{"), "tokenizer.json: not a JSON file"),
    (model(b'{"type": "BPE", "vocab": {}}'), NO_PIECES),
    (model(b'{"vocab": [["a", 0.5]]}'), NO_PIECES),
    (model(b"null"), NO_PIECES),
    (model(b'"WordPiece"'), NO_PIECES),
    (model(b'{"vocab": {}}, "normalizer": "Bert"'), "normalizer is 'Bert'; expected a JSON object"),
    *((with_id("cat", value), bad_id(value)) for value in (-1, 2**22, 5.0, "5", True, None)),
    (with_id("cat", 5), "tokenizer.json: 'the' and 'cat' have the same id 5"),
    (with_id("\ud800", 99), r"'\ud800' is not a word piece"),
    (with_id("a\nb", 99), r"'a\nb' is not a word piece"),
    (with_id("\x1b[2J" + "x" * 9999, -1), r"tokenizer.json: '\x1b[2Jxxxxx"),
    (change("model", continuing_subword_prefix="@@"), "continuing_subword_prefix '@@'; expected \"##\""),
    (change("model", unk_token="<unk>"), "model has unk_token '<unk>'"),
    (change("normalizer", type="Sequence"), "normalizer has type 'Sequence'"),
    (change("pre_tokenizer", type="Whitespace"), "pre_tokenizer has type 'Whitespace'"),
]


@pytest.mark.parametrize(("spoil", "message"), DAMAGE, ids=[message[:60] for _, message in DAMAGE])
def test_damaged_folder_is_refused(tmp_path, spoil, message):
    spoil(tmp_path)
    assert message in refusal(BertTokenizer.from_pretrained, tmp_path)


def test_no_such_folder(tmp_path):
    assert "no such folder" in refusal(BertTokenizer.from_pretrained, tmp_path / "missing")
