"""Additional training data (`--extra_data`): which task each source feeds, how, and where it is published.

A row of EXTRA_SOURCES is all that a source needs: `training.sources` reads it, `training.download` fetches
it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Where the files of a source are to be had: in one commit of a public repository on GitHub.

    `files` are their paths there with their git blob ids, in the order of `SourceSpec.files`. `licence` is
    that of the data, as far as it is stated; that of the repository's code says nothing about them.
    """

    repository: str
    commit: str
    licence: str
    files: dict[str, str]


@dataclass(frozen=True)
class SourceSpec:
    """A data set that adds training rows to a task.

    `labels` turns its labels into the task's: a dict from a cell's text to a label (rows with any other text
    are left out), or (low, high), a scale that is stretched to the task's; None if they are the task's
    already.

    `screened_column` is for sources made of the very texts that our sentences come from: a row whose sentence
    in this column contains a held-out sentence is dropped too.
    """

    task: str  # whose training rows it adds to
    files: tuple[str, ...]  # under --data_dir
    form: str  # row of SOURCE_FORMS; a file whose ending is a row there has that form
    text_columns: tuple[str, ...]
    label_column: str
    labels: dict[str, float] | tuple[float, float] | None = None
    columns: tuple[str, ...] | None = None  # of files without a header
    max_examples: int | None = None  # how many are taken, at random; None: all
    screened_column: str | None = None
    published: Published | None = None  # None: not to be had as it is
    other_files: tuple[str, ...] = ()  # read where `files` are not there: the same rows in other files


NLI_LABELS = {"entailment": 1.0, "contradiction": 0.0}  # neutral pairs say nothing about paraphrase
# The most frequent SST labels among the negative and among the positive sentences of Movie Review.
POLARITY_LABELS = {"0": 1.0, "1": 3.0}
# Of SemEval's STS tasks, the files of which STS-B, whose pairs the class's files hold, took nothing.
STS_BLOB_IDS = {
    "2012/OnWN.test.tsv": "ca8017cdfe3aa31909db9e70b1044391cb37c5dc",
    "2012/SMTeuroparl.train.tsv": "7d956134763b9e2df724ad5fe704cda328417453",
    "2012/SMTeuroparl.test.tsv": "78239b936d1a9d38b0b4e6540742266ad639a594",
    "2012/SMTnews.test.tsv": "ff8a97f47e64244d652b215b3eaedb22edb24434",
    "2013/FNWN.test.tsv": "27697aff63ab83b7c6ab67fa613982a2541cde9c",
    "2013/OnWN.test.tsv": "9d333546407afe2c53681beb2f1fa489b182ab6f",
    "2014/OnWN.test.tsv": "c52bc93fdbc66168893124a82527b3e1fa77117e",
    "2014/tweet-news.test.tsv": "bec300cd9ee190a420c60f215048d17c0f7b7349",
    "2015/answers-students.test.tsv": "17af339e57fd239db69a5b4c65183138e4ce48ce",
    "2015/belief.test.tsv": "80e544db60e7489e9f1a6bece4eb81d8f5856c7c",
    "2016/plagiarism.test.tsv": "369e0e445f19723418c88190a5a494f7458662a8",
    "2016/postediting.test.tsv": "001e702a5da32b28d711196f6a205b7508557c9f",
    "2016/question-question.test.tsv": "8c64cdc2eda13842522e555bd69f5a8c57439624",
}

EXTRA_SOURCES = {
    "sick": SourceSpec(
        task="sts",
        files=("extra/sick/SICK.txt",),
        form="plain",
        text_columns=("sentence_A", "sentence_B"),
        label_column="relatedness_score",
        labels=(1, 5),
        published=Published(
            "kkalouli/SICK-processing",
            "0848f4aec60870122a4ca18de08ba0e25f6f9a75",
            "CC BY-NC-SA 3.0",
            {"SICK.txt": "5139c1155ea34aba3b51c784c4f561d1061b1c0b"},
        ),
    ),
    "sts_2012_2016": SourceSpec(
        task="sts",
        files=tuple(
            f"extra/sts_2012_2016/{path.removesuffix('.tsv').replace('/', '-').replace('.', '-')}.tsv"
            for path in STS_BLOB_IDS
        ),
        form="plain",
        text_columns=("sentence1", "sentence2"),
        label_column="score",
        columns=("score", "sentence1", "sentence2"),
        published=Published(
            "brmson/dataset-sts",
            "e1d3375f5b3bc24f21aa4e46f96eb379e9fc1081",
            "2012 under the Microsoft Research terms; 2016 question-question CC BY-SA 3.0, postediting CC BY"
            " 4.0, plagiarism CC BY-NC-SA 2.0 UK; none stated for the others",
            {f"data/sts/semeval-sts/{path}": blob_id for path, blob_id in STS_BLOB_IDS.items()},
        ),
    ),
    "mrpc": SourceSpec(
        task="para",
        files=("extra/mrpc/msr_paraphrase_train.txt", "extra/mrpc/msr_paraphrase_test.txt"),
        form="plain",
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
        published=Published(
            "wasiahmad/paraphrase_identification",
            "88b208d0d094ab945d2401d9393531be1fec0076",
            "Microsoft Shared Source",
            {
                "dataset/msr-paraphrase-corpus/msr_paraphrase_train.txt": (
                    "65b1088b29011d0bbe549e20354781f812c8179f"
                ),
                "dataset/msr-paraphrase-corpus/msr_paraphrase_test.txt": (
                    "f47174d7abcf521b1cd35c220bbe1207b43e26db"
                ),
            },
        ),
    ),
    "paws_wiki": SourceSpec(
        task="para",
        files=("extra/paws_wiki/dev.tsv", "extra/paws_wiki/test.tsv"),
        form="plain",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        columns=("id", "sentence1", "sentence2", "label"),
        published=Published(
            "hoangdzung/simmat",
            "7e55b810e8c462041e8de83cdfddfd429dff6996",
            "free for any purpose; Google, who made it, is to be acknowledged",
            {
                "data/final/dev.tsv": "5fcd8f9c42c932e3c645b157aad741598dafc571",
                "data/final/test.tsv": "c92db3e389e10d8428a4b38aa27bc184b4449d92",
            },
        ),
    ),
    "paws_qqp": SourceSpec(
        task="para",
        files=("extra/paws_qqp/dev_and_test.tsv",),
        form="byte_literals",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        published=Published(
            "uds-lsv/llmft",
            "3acc3894fa4111d9155190a98a147e3e664ff3da",
            "free for any purpose, Google is to be acknowledged; and Quora's terms",
            {"data/paws_qqp/dev_and_test.tsv": "8987fd8ee17cea2706448e8a362bd8dfe532f9c7"},
        ),
    ),
    "quora_positives": SourceSpec(  # put together from some ten repositories
        task="para",
        files=("extra/quora_positives/quora-positives.tsv",),
        form="quoted",
        text_columns=("sentence1", "sentence2"),
        label_column="is_duplicate",
        max_examples=10_000,  # all of them would reverse the majority of the training labels
    ),
    "snli": SourceSpec(
        task="para",
        files=("extra/snli_sample/train.json", "extra/snli_sample/dev.json"),
        other_files=("extra/snli_sample/train.tsv", "extra/snli_sample/dev.tsv"),
        form="quoted",
        text_columns=("text_a", "text_b"),
        label_column="label",
        labels=NLI_LABELS,
        published=Published(
            "ZhengxiangShi/PowerfulPromptFT",
            "b4ecdea060847115e9909b442ab4eb15bcb2a2c4",
            "CC BY-SA 4.0",
            {
                "data/glue_pretrain/SNLI/train.json": "18dc8e747bfbbb6f9ae30db2c07dfe5d8170b1c7",
                "data/glue_pretrain/SNLI/dev.json": "24af95387c5fbec5e230b9ba4d9e8902da52d956",
            },
        ),
    ),
    "mnli": SourceSpec(
        task="para",
        files=("extra/mnli_sample/train.json", "extra/mnli_sample/dev.json"),
        other_files=("extra/mnli_sample/train.tsv", "extra/mnli_sample/dev.tsv"),
        form="quoted",
        text_columns=("text_a", "text_b"),
        label_column="label",
        labels=NLI_LABELS,
        published=Published(
            "ZhengxiangShi/PowerfulPromptFT",
            "b4ecdea060847115e9909b442ab4eb15bcb2a2c4",
            "of the Open American National Corpus, and others",
            {
                "data/glue_pretrain/MNLI/train.json": "1f611d1bebf4a286026f31d6cfb1acdf13e66d4a",
                "data/glue_pretrain/MNLI/dev.json": "820663d37b9b15b3e98ba34258962beb7ae13a79",
            },
        ),
    ),
    "counterfactual": SourceSpec(
        task="para",
        files=("extra/counterfactual/nli-train.tsv",),
        form="quoted",
        text_columns=("sentence1", "sentence2"),
        label_column="gold_label",
        labels=NLI_LABELS,
        published=Published(
            "acmi-lab/counterfactually-augmented-data",
            "6f232a1d2a11462a30ce08fb4825b734ab30828e",
            "Apache-2.0; the sentences of SNLI CC BY-SA 4.0",
            {"NLI/all_combined/train.tsv": "b5c3e5d2937d6c3bb054e2da7ba305ffdf46b829"},
        ),
    ),
    "nli_triplets": SourceSpec(
        task="para",
        files=("extra/nli_triplets/nli_for_simcse-dev.csv",),
        form="triplets",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=NLI_LABELS,
        max_examples=20_000,
        published=Published(
            "patrickdonohue/minbert-default-final-project",
            "ad8fc33ebd642a986e96e2049e9b4efd39e54665",
            "CC BY-SA 4.0 (SNLI); of the Open American National Corpus, and others (MNLI)",
            {"data/nli_for_simcse-dev.csv": "660a8eac4cd8f2904b9697a9e148468c145e42f0"},
        ),
    ),
    "sst_trees": SourceSpec(
        task="sst",
        files=("extra/sst_trees/train.txt",),
        form="trees",
        text_columns=("phrase",),
        label_column="label",
        max_examples=20_000,
        screened_column="sentence",
        published=Published(
            "KevinChunye/NLPspotifylyrics",
            "b2c3908dc25559021cc51cc30aa113fb64fb585a",
            "free for research; no licence stated",
            {"data/sst/raw_data/train.txt": "1c5317f7ccdc638e30091da2605654f0755e7ab5"},
        ),
    ),
    "movie_review": SourceSpec(
        task="sst",
        files=("extra/rotten_tomatoes_mr/rt-polarity.pos", "extra/rotten_tomatoes_mr/rt-polarity.neg"),
        other_files=("extra/rotten_tomatoes_mr/rt-polarity.tsv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="label",
        labels=POLARITY_LABELS,
        screened_column="sentence",
        published=Published(
            "dennybritz/cnn-text-classification-tf",
            "18762b459e21d9c70e5c242f8d43fc4e6db37a0d",
            "free for research; no licence stated",
            {
                "data/rt-polaritydata/rt-polarity.pos": "16fe13880ebd3241c5e8a485d31588ac2884d6d7",
                "data/rt-polaritydata/rt-polarity.neg": "c3a869462ce54dbb10b05f6a32e0869b8102f94c",
            },
        ),
    ),
    "rotten_tomatoes": SourceSpec(
        task="sst",
        files=("extra/rotten_tomatoes_5class/rotten15k.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
        screened_column="sentence",
        published=Published(
            "cyingliu/CS224n-Efficient-MT-BERT",
            "d8e59d4f8d6835b3127f06c32ff70a3e722e4b69",
            "none stated",
            {"data/ids-sst-rotten15k-train.csv": "60e249fc45e24a379ee37ee643eee43d624b7cc7"},
        ),
    ),
    "kindle": SourceSpec(
        task="sst",
        files=("extra/kindle_5class/kindle15k.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
        screened_column="sentence",
        published=Published(
            "cyingliu/CS224n-Efficient-MT-BERT",
            "d8e59d4f8d6835b3127f06c32ff70a3e722e4b69",
            "none stated",
            {"data/ids-sst-kindle15k-train.csv": "0d634882fbf20c4066da47c12211237c61f70f2b"},
        ),
    ),
    "cfimdb": SourceSpec(
        task="sst",
        files=("ids-cfimdb-train.csv",),
        form="quoted",
        text_columns=("sentence",),
        label_column="sentiment",
        labels=POLARITY_LABELS,
        published=Published(
            "gpoesia/minbert-default-final-project",
            "7ac8260577fc12a86c7aaf38918056c30054ef39",
            "Apache-2.0",
            {"data/ids-cfimdb-train.csv": "cd57bcbd2f7214ea6dd1783d3e885d324b1f478d"},
        ),
    ),
}
