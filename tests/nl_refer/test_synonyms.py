"""Variants with synonyms: what is replaced, in which form, and what is left."""

import json

import pytest

from swim_fast.cli import main
from swim_fast.data.source.records import RecordFile
from swim_fast.jobs import Synonyms
from swim_fast.nl_refer.english.inflection import pluralize, takes_an
from swim_fast.nl_refer.synonyms import SynonymTable, write_variant

TABLE = """# mine
dog\thound
person\tindividual
eagle\traptor, bird
car\tautomobile
knife\tblade
SUV\tvan
cup
"""


def record(*turns, name=""):
    tags = sum(text.count("<ins>") for text in turns)
    conversations = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {
        "index": name,
        "video": "a.mp4",
        "conversations": conversations,
        "annotation": [{str(i): None} for i in range(tags)],
    }


def variant(tmp_path, *records, **options):
    source, table = tmp_path / "set.jsonl", tmp_path / "table.tsv"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    table.write_text(TABLE)
    report = write_variant(Synonyms(file=source, out=tmp_path / "out.jsonl", table=table, **options), progress=False)
    return report, [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


FORMS = {
    "Where is the <ins>dog</ins>?": "Where is the <ins>hound</ins>?",
    "Two <ins>dogs</ins> and the <ins>Dog</ins>.": "Two <ins>hounds</ins> and the <ins>Hound</ins>.",
    "<ins>DOGS</ins>": "<ins>HOUNDS</ins>",
    "A <ins>person</ins> or <ins>people</ins>": "An <ins>individual</ins> or <ins>individuals</ins>",
    "a tall <ins>person</ins>": "a tall <ins>individual</ins>",
    "an <ins>knife</ins>, the <ins>knives</ins>": "a <ins>blade</ins>, the <ins>blades</ins>",
    "a <ins> car </ins> a cat": "an <ins> automobile </ins> a cat",
    "an <ins>SUV</ins>": "a <ins>VAN</ins>",
    "the <ins>eagle</ins> and a bird": "the <ins>raptor</ins> and a bird",  # "bird" is taken
}


@pytest.mark.parametrize("question", FORMS)
def test_number_capitals_and_articles(tmp_path, question):
    report, (out,) = variant(tmp_path, record(question, "The dog and the <ins>dog</ins>, a car."))
    assert out["conversations"][0]["value"] == FORMS[question]
    assert out["conversations"][1]["value"] == "The dog and the <ins>dog</ins>, a car."
    assert len(out["annotation"]) == question.count("<ins>") + 1 and out["synonyms"]
    assert report.counts["replaced"] == report.counts["tags"] == question.count("<ins>")


def test_records_without_synonyms_are_kept_or_dropped(tmp_path):
    records = [
        record("The <ins>dog</ins> and the <ins>quark</ins>?", "x", name="partly"),
        record("The <ins>quark</ins>, the <ins>cup</ins>?", "x", name="unknown"),
        record("Nothing?", "The <ins>dog</ins>", name="in the answer"),
        record("No tag?", "No.", name="untagged"),
        {**record("The <ins>dog</ins>?", "x", name="malformed"), "annotation": []},
    ]
    report, out = variant(tmp_path, *records)
    assert [entry["index"] for entry in out] == ["partly", "unknown", "in the answer", "untagged"]
    assert out[1:] == records[1:4]
    wanted = {
        "records": 5,
        "changed": 1,
        "partly": 1,
        "unknown": 1,
        "untagged": 2,
        "malformed": 1,
        "tags": 4,
        "replaced": 1,
    }
    assert +report.counts == wanted
    assert report.unknown_nouns == {"quark": 2, "cup": 1}, "a noun without synonyms in one's own table is taken out"
    assert "kept as they are" in str(report) and "quark (2)" in str(report)
    assert len(list(RecordFile(tmp_path / "out.jsonl"))) == 4
    report, out = variant(tmp_path, *records, missing="drop")
    assert [entry["index"] for entry in out] == ["partly"] and "left out" in str(report)


def test_the_seed_decides(tmp_path):
    records = [record("the <ins>eagle</ins>, the <ins>eagle</ins>", "x") for _ in range(40)]

    def chosen(**options):
        return [entry["synonyms"]["eagle"] for entry in variant(tmp_path, *records, **options)[1]]

    first = chosen(seed=1)
    assert set(first) == {"raptor", "bird"} and chosen(seed=1) == first != chosen(seed=2)
    assert chosen(seed=1, limit=7) == first[:7]
    for entry in variant(tmp_path, *records)[1]:
        assert entry["conversations"][0]["value"].count(entry["synonyms"]["eagle"]) == 2


def test_the_table_that_is_built_in():
    table = SynonymTable()
    assert len(table) >= 150
    assert table.of("Man") and table.of("people") == ("individuals", "humans") and table.of("glasses") == ()
    for noun, synonyms in table.singular.items():
        assert noun not in synonyms and len(set(synonyms)) == len(synonyms)


@pytest.mark.parametrize("line", ["dog\tbig hound", "ice cream\tgelato", "dog hound", "3\tthree"])
def test_a_malformed_table_says_where(tmp_path, line, capsys):
    (tmp_path / "table.tsv").write_text(f"cat\tfeline\n{line}\n")
    (tmp_path / "set.jsonl").write_text(json.dumps(record("a", "b")) + "\n")
    arguments = ["nl-refer", "synonyms", str(tmp_path / "set.jsonl"), str(tmp_path / "out.jsonl")]
    assert main([*arguments, "--table", str(tmp_path / "table.tsv")]) == 2
    assert "table.tsv, line 2: " in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_plurals():
    for words in (
        "dog dogs,box boxes,lady ladies,boy boys,knife knives,woman women,human humans,person people,foot feet,"
        "mouse mice,sportsperson sportspeople,grandchild grandchildren,sheep sheep,roof roofs,photo photos,"
        "couch couches,TV TVs,bus buses"
    ).split(","):
        singular, wanted = words.split()
        assert pluralize(singular) == wanted


def test_articles():
    assert all(map(takes_an, ["animal", "umbrella", "hour", "SUV", "uninvited", "X-ray"[:1] + "RAY"]))
    assert not any(map(takes_an, ["dog", "uniform", "user", "European", "one-wheeler", "TV", "house", "unicycle"]))
