"""Prompts from files: fields by name, templates, images, lengths, and where a bad record is."""

import json
import sys

import pytest
import torch.distributed as dist

from lightrft.datasets import Prompt, PromptDataset, collate
from lightrft.errors import ConfigError, RankFailedError
from lightrft.models import tiny
from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below

TOKENIZER = tiny.tokenizer()
RECORDS = [
    {"question": "one and one?", "answer": "two"},
    {"question": "b", "answer": 3},
    {"question": "c", "answer": None},
]


def lines(folder, records, name="prompts.jsonl"):
    file = folder / name
    file.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return file


def written(form, folder):
    if form == "lines":
        return lines(folder, RECORDS)
    datasets = pytest.importorskip("datasets")
    records = [{**one, "answer": one["answer"] and str(one["answer"])} for one in RECORDS]
    table = datasets.Dataset.from_list(records)
    if form == "parquet":
        table.to_parquet(folder / "prompts.parquet")
        return folder / "prompts.parquet"
    (table if form == "folder" else datasets.DatasetDict({"train": table, "test": table.select([1])})).save_to_disk(
        folder / "saved"
    )
    return folder / "saved"


@pytest.mark.parametrize("form", ["lines", "parquet", "folder", "splits"])
def test_a_file_gives_prompts_in_its_order(form, tmp_path):
    dataset = PromptDataset.from_file(written(form, tmp_path), TOKENIZER, input_key="question", label_key="answer")
    assert len(dataset) == 3
    assert dataset[0] == Prompt(prompt="one and one?", token_ids=tuple(TOKENIZER.encode("one and one?")), label="two")
    assert [one.index for one in dataset] == [0, 1, 2]
    assert [str(one.label) for one in dataset] == ["two", "3", "None"]


def test_a_split_is_chosen_by_name(tmp_path):
    folder = written("splits", tmp_path)
    assert [one.prompt for one in PromptDataset.from_file(folder, TOKENIZER, input_key="question", split="test")] == [
        "b"
    ]
    with pytest.raises(ConfigError, match="has no split 'validation': expected one of train, test"):
        PromptDataset.from_file(folder, TOKENIZER, input_key="question", split="validation")


def of(*records, **settings):
    placed = [(f"here:{number}", record) for number, record in enumerate(records, start=1)]
    return PromptDataset(placed, settings.pop("tokenizer", TOKENIZER), **settings)


@pytest.mark.parametrize(
    ("given", "system", "expected"),
    [
        ("hello", None, "user: hello<eos>assistant: "),
        ("hello", "Be kind.", "system: Be kind.<eos>user: hello<eos>assistant: "),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "Be kind.",
            "system: Be kind.<eos>user: a<eos>assistant: b<eos>user: c<eos>assistant: ",
        ),
        (
            [{"role": "system", "content": "Mine."}, {"role": "user", "content": "a"}],
            "Be kind.",
            "system: Mine.<eos>user: a<eos>assistant: ",
        ),
    ],
)
def test_the_chat_template_is_applied_with_the_system_prompt(given, system, expected):
    (found,) = of({"prompt": given}, apply_chat_template=True, system_prompt=system)
    assert found.prompt == expected
    assert found.token_ids == tuple(TOKENIZER.encode(expected))


def test_special_tokens_come_from_the_template_or_from_the_tokenizer_once():
    class Marking:
        """Begins each text with a token, as some tokenizers do; so does its template."""

        chat_template = "any"

        def encode(self, text, add_special_tokens):
            return [0] * add_special_tokens + TOKENIZER.encode(text)

        def apply_chat_template(self, messages, **_):
            return "<pad>" + messages[0]["content"]

    for applies in (False, True):
        (found,) = of({"prompt": "a"}, tokenizer=Marking(), apply_chat_template=applies)
        assert found.token_ids == (0, len(tiny.SPECIAL))


# -- Images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name in ("red", "blue"):
        image.new("RGBA", (28, 28), name).save(tmp_path / f"{name}.png")
    return tmp_path


SEEN = f"{tiny.SPECIAL[tiny.VISION_START]}{tiny.SPECIAL[tiny.IMAGE]}{tiny.SPECIAL[tiny.VISION_END]}"


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("What?", 0, "What?"),
        ("What?", 1, f"{SEEN}What?"),
        ("What?", 2, f"{SEEN}{SEEN}What?"),
        ("A <image> or <image>?", 2, f"A {SEEN} or {SEEN}?"),
    ],
)
def test_images_have_one_token_each_where_the_text_says(text, count, expected, pictures):
    record = {"prompt": text, "pictures": ["red.png", "blue.png"][:count]}
    (found,) = of(record, images_key="pictures", apply_chat_template=True, folder=pictures)
    assert found.prompt == f"user: {expected}<eos>assistant: "
    assert found.token_ids.count(tiny.IMAGE) == count
    assert [one.getpixel((0, 0)) for one in found.images] == [(255, 0, 0), (0, 0, 255)][:count]


def test_images_may_be_paths_bytes_or_what_the_processor_takes(pictures):
    data = (pictures / "red.png").read_bytes()
    whole = of(
        *({"prompt": "a", "images": one} for one in ["red.png", str(pictures / "red.png"), data, {"bytes": data}]),
        {"prompt": "a", "images": 5},
        {"prompt": "a", "images": None},
        {"prompt": "a"},
        images_key="images",
        folder=pictures,
    )
    assert [one.images[0].getpixel((0, 0)) for one in list(whole)[:4]] == [(255, 0, 0)] * 4
    assert [one.images for one in list(whole)[4:]] == [(5,), (), ()]


def test_paths_of_images_are_relative_to_their_file(pictures):
    file = lines(pictures, [{"prompt": "a", "images": "red.png"}])
    (found,) = PromptDataset.from_file(file, TOKENIZER, images_key="images")
    assert found.images[0].size == (28, 28)


# -- Lengths ----------------------------------------------------------------------------------------------------------

LONG = ({"prompt": "a"}, {"prompt": "abcdefgh"}, {"prompt": "abcd"}, {"prompt": "xyabcd", "images": 5})


@pytest.mark.parametrize(
    ("way", "expected", "line"),
    [
        ("drop", {0: "a", 2: "abcd"}, "2 of 4 prompts have more than 4 tokens: 2 dropped"),
        ("cut", {0: "a", 1: "efgh", 2: "abcd"}, "2 of 4 prompts have more than 4 tokens: 1 dropped, 1 cut"),
    ],
)
def test_prompts_that_are_too_long_are_dropped_or_cut_and_counted(way, expected, line):
    told = []
    dataset = of(*LONG, images_key="images", max_length=4, too_long=way, tell=told.append)
    assert {one.index: one.prompt for one in dataset} == expected
    assert all(one.token_ids == tuple(TOKENIZER.encode(one.prompt)) for one in dataset)
    assert told == [line]


def test_nothing_is_told_if_all_prompts_fit(capsys):
    assert len(of(*LONG, max_length=8)) == 4
    assert not capsys.readouterr().out


def test_the_line_comes_from_one_rank(capsys):
    def program():
        dist.init_process_group("gloo")
        of(*LONG, max_length=4)
        dist.destroy_process_group()

    SimWorld(2).run(program)
    assert capsys.readouterr().out.count("2 of 4 prompts have more than 4 tokens: 2 dropped") == 1


# -- What is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b"', "prompts.jsonl:3: no JSON: Expecting ',' delimiter"),
        ("[1]", "prompts.jsonl:3: got list, expected an object with fields"),
        ('{"prompts": "b"}', "prompts.jsonl:3: no field 'prompt': the record has prompts"),
        ('{"prompt": "b", "label": 1}', None),
        (
            '{"prompt": 5}',
            "prompts.jsonl:3: 'prompt' is int: expected a text, or apply_chat_template=True for messages",
        ),
        ('{"prompt": ""}', "prompts.jsonl:3: 'prompt' is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line, message, tmp_path):
    file = lines(tmp_path, ['{"prompt": "a"}', "", line])
    if message is None:
        assert len(PromptDataset.from_file(file, TOKENIZER)) == 2
        return
    with pytest.raises(ConfigError, match=message):
        PromptDataset.from_file(file, TOKENIZER)


def test_bytes_that_are_no_text_are_named_by_file_and_number(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match="prompts.jsonl:2: no JSON: 'utf-8' codec"):
        PromptDataset.from_file(file, TOKENIZER)


def test_a_bad_row_of_a_table_is_named(tmp_path):
    file = written("parquet", tmp_path)
    with pytest.raises(ConfigError, match="prompts.parquet, row 0: no field 'prompt': the record has question, answer"):
        PromptDataset.from_file(file, TOKENIZER)
    file.write_text("none")
    with pytest.raises(ConfigError, match="prompts.parquet: no Parquet"):
        PromptDataset.from_file(file, TOKENIZER)


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        ({"prompt": "a"}, {"label_key": "label"}, "here:1: no field 'label': the record has prompt"),
        ({"prompt": []}, {"apply_chat_template": True}, r"here:1: 'prompt' is \[\]: expected a text, or messages"),
        ({"prompt": [{"role": "user"}]}, {"apply_chat_template": True}, "expected a text, or messages with role and"),
        (
            {"prompt": "<image>", "images": [1, 2]},
            {"apply_chat_template": True, "images_key": "images"},
            "here:1: 2 images and 1 <image> in the text: expected as many",
        ),
        ({"prompt": "a"}, {"system_prompt": "b"}, "system_prompt needs apply_chat_template=True"),
        ({"prompt": "a"}, {"max_length": 0, "too_long": "cut"}, "max_length=0: expected 1 at least, or None"),
        ({"prompt": "a"}, {"too_long": "keep"}, "too_long='keep': expected 'drop' or 'cut'"),
        (
            {"prompt": "abc"},
            {"max_length": 2},
            "no prompt is left of 1: 1 of 1 prompts have more than 2 tokens: 1 dropped",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(record, settings, message):
    with pytest.raises(ConfigError, match=message):
        of(record, **settings)


def test_a_tokenizer_without_template_is_refused():
    class Plain:
        chat_template = None

    with pytest.raises(ConfigError, match="Plain has no chat template: set its chat_template"):
        of({"prompt": "a"}, tokenizer=Plain(), apply_chat_template=True)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "prompts.csv").write_text("a")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in {
        "nothing.jsonl": "no prompts at .*nothing.jsonl: there is no such file or folder",
        "prompts.csv": "ends in '.csv': expected .jsonl",
        "empty.jsonl": "no prompt is left of 0: the file is empty",
        ".": "is no folder that the package datasets has written with save_to_disk",
    }.items():
        with pytest.raises(ConfigError, match=message):
            PromptDataset.from_file(tmp_path / name, TOKENIZER)


@pytest.mark.parametrize(("form", "package"), [("parquet", "pyarrow"), ("folder", "datasets")])
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(form, package, tmp_path, monkeypatch):
    file = written(form, tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'needs the package {package}, .*: pip install "lightrft\[data\]"'):
        PromptDataset.from_file(file, TOKENIZER, input_key="question")


# -- Batches and loaders ----------------------------------------------------------------------------------------------


def test_k21_a_batch_keeps_prompts_labels_and_images_together_also_when_repeated():
    records = [{"prompt": letter, "label": number, "images": [number] * number} for number, letter in enumerate("abc")]
    batch = collate(list(of(*records, label_key="label", images_key="images")))
    assert batch.prompts == ("a", "b", "c")
    assert batch.images == ((), (1,), (2, 2))
    twice = batch.repeated(2)
    assert len(twice) == 6
    assert twice.prompts == ("a", "a", "b", "b", "c", "c")
    assert twice.labels == twice.indices == (0, 0, 1, 1, 2, 2)
    assert [len(one) for one in twice.images] == [0, 0, 1, 1, 2, 2]
    assert [TOKENIZER.decode(list(one)) for one in twice.token_ids] == list(twice.prompts)
    with pytest.raises(ConfigError, match="a prompt is repeated 0 times"):
        batch.repeated(0)


def loaded(consumed, sp_size=1):
    strategy = get_strategy({"strategy": "fake", "fsdp": True, "train_batch_size": 4, "sp_size": sp_size})
    dataset = of(*({"prompt": letter} for letter in "abcdefghijkl"))
    loader = strategy.setup_dataloader(dataset, 2, collate_fn=collate, consumed_samples=consumed)
    found = [batch.indices for batch in loader]
    dist.destroy_process_group()
    return found


def test_k16_f18_order_resumes_exactly_and_every_prompt_comes_once():
    whole = SimWorld(2).run(loaded, 0)
    assert sorted(index for rank in whole for batch in rank for index in batch) == list(range(12))
    assert SimWorld(2).run(loaded, 4) == [rank[1:] for rank in whole]
    assert SimWorld(2).run(loaded, 8) == [rank[2:] for rank in whole]


def test_k16_ranks_that_share_a_sequence_get_the_same_prompts():
    first, second, third, fourth = SimWorld(4).run(loaded, 0, 2)
    assert first == second
    assert third == fourth
    assert first != third


def test_batches_go_into_generation_as_they_are(tmp_path):
    tiny.tiny_text_model(tmp_path)

    def program():
        settings = {"pretrain": str(tmp_path), "prompt_max_len": 16, "generate_max_len": 16}
        strategy = get_strategy({"strategy": "fake", "fsdp": True, "train_batch_size": 2, **settings})
        strategy.setup_inference_engine()
        dataset = of({"prompt": "ab"}, {"prompt": "c"}, {"prompt": "def"}, {"prompt": "g"})
        (batch, *_) = strategy.setup_dataloader(dataset, 2, collate_fn=collate)
        found = strategy.gather_and_generate(
            {"max_tokens": 2, "n": 2}, all_prompt_token_ids=batch.token_ids, all_images=batch.images
        )
        strategy.inference_engine.shutdown()
        dist.destroy_process_group()
        assert [one.prompt_token_ids for one in found] == list(batch.repeated(2).token_ids)

    SimWorld(2).run(program)


def test_a_bad_line_is_an_error_on_all_ranks(tmp_path):
    file = lines(tmp_path, ["none"])

    def program():
        PromptDataset.from_file(file, TOKENIZER)

    with pytest.raises(RankFailedError, match="prompts.jsonl:1: no JSON"):
        SimWorld(2).run(program)
