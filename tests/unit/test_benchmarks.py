"""Published benchmarks: rows in their published schemas, through shards to a prompt and a verdict.

None of the data sets is read: the rows are made here, with the columns that their cards have.
"""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sr1.config.loading import load_config
from megatron_sr1.data.benchmarks import BENCHMARKS
from megatron_sr1.data.shards import ShardReader
from megatron_sr1.errors import DataError
from megatron_sr1.rewards.grader import Grader
from megatron_sr1.runtime import hub
from megatron_sr1.trainer.samples import Samples, make_processor
from tests.hub_files import add_snapshot
from tests.pictures import png
from tools.make_shards import main as make_shards

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"


def picture(grey=0):
    return {"bytes": png((grey, grey, grey), (28, 28)), "path": f"{grey}.png"}


def numbered(*greys):
    return {
        f"image_{n}": picture(g) if g else None for n, g in enumerate((*greys, *[0] * 7)[:7], 1)
    }


MMMU = {
    "id": "validation_Accounting_1",
    "question": "<image 1> Which of <image 2> and <image 1> is it?",
    "options": "['$6', '$7', \"it's <image 3>\", '$9']",
    "explanation": "",
    **numbered(10, 20, 30),
    "img_type": "['Tables']",
    "answer": "B",
    "topic_difficulty": "Easy",
    "question_type": "multiple-choice",
    "subfield": "Managerial Accounting",
}
MMMU_OPEN = MMMU | {"question": "How many? <image 1>", "options": "[]", "answer": "['6', 'six']"}
MMMU_OPEN |= {"question_type": "open", **numbered(10)}
MMMU_PRO = {k: v for k, v in MMMU.items() if k not in ("subfield", "question_type")}
MMMU_PRO |= {"subject": "Accounting", "options": str([f"${n}" for n in range(10)]), "answer": "J"}
MMMU_PRO |= {"question": "What is in <image 1>?", **numbered(10)}
VISION = {"id": "test_1", "image": picture(), "options": MMMU_PRO["options"], "answer": "C"}
VISION |= {"subject": "Music"}
MMSTAR = {
    "index": 0,
    "question": "Which one?\nOptions: A: the left, B: the right, C: both, D: none",
    "image": picture(),
    "answer": "A",
    "category": "logical reasoning",
    "l2_category": "code & sequence reasoning",
    "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
}
MATHVISTA = {
    "pid": "1",
    "question": "Which is it?",
    "image": "images/1.jpg",
    "decoded_image": picture(),
    "choices": ["(0,2)", "(2,0)"],
    "unit": None,
    "precision": None,
    "answer": "(2,0)",
    "question_type": "multi_choice",
    "answer_type": "text",
    "metadata": {"category": "math-targeted-vqa", "source": "GeoQA+", "task": "geometry"},
    "query": "Hint: Please answer the question and provide the correct option letter, e.g., A, B, "
    "C, D, at the end.\nQuestion: Which is it?\nChoices:\n(A) (0,2)\n(B) (2,0)",
}
MATHVISTA_FREE = MATHVISTA | {"choices": None, "answer": "1.2", "question_type": "free_form"}
MATHVISTA_FREE |= {"query": "Hint: Please answer with one decimal place.\nQuestion: How long?"}
MATHVERSE = {
    "sample_index": "1",
    "problem_index": "1",
    "problem_version": "Text Dominant",
    "question": "What is ∠ABC?\nChoices:\nA:60°\nB:70°",
    "image": picture(),
    "answer": "B",
    "question_type": "multi-choice",
    "metadata": {"split": "testmini", "source": "Geometry3K", "subfield": "Angle"},
    "query_wo": "x",
    "query_cot": "x",
    "question_for_eval": "x",
}
MATHVERSE_SEEN = MATHVERSE | {"question": "", "problem_version": "Vision Only"}
MATHVISION = {
    "id": "4",
    "question": "Which of <image2> and <image3> fits?\n<image1>",
    "options": ["1", "2", "3", "4", "5"],
    "image": "images/4.jpg",
    "decoded_image": picture(),
    "answer": "E",
    "solution": None,
    "level": 2,
    "subject": "counting",
}
MATHVISION_LETTERS = MATHVISION | {"options": list("ABCDE"), "answer": "C"}
MMVET = {
    "question_id": "v1_0",
    "image": picture(),
    "question": "What is x in the equation?",
    "answer": "-1<AND>-5",
    "image_source": "source",
    "capability": "ocr,math",
}
MMVET_OR = MMVET | {"answer": "14:20<OR>twenty past two"}
REALWORLD = {
    "image": picture(),
    "question": "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of "
    "the correct option and nothing else.",
    "answer": "B",
    "image_path": "1.webp",
}
VISNUM = {
    "class": "synthetic",
    "id": "1",
    "question": "How large is the angle?",
    "option": "(a) 10 (b) 20 (c) 30 (d) 40",
    "answer": "c",
    "task_class": "angle",
    "Attributes": "Angle",
    "image": picture(),
}
HALLUSION = {
    "category": "VD",
    "subcategory": "illusion",
    "visual_input": "1",
    "set_id": "0",
    "figure_id": "1",
    "sample_note": "",
    "question_id": "0",
    "question": "Is the left circle larger?",
    "gt_answer_details": "They are the same.",
    "gt_answer": "0",
    "filename": "x.png",
    "image": picture(),
}
MATH500 = {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "answer": "2"}
MATH500 |= {"subject": "Algebra", "level": 1, "unique_id": "test/1.json"}
GSM8K = {"question": "Three and four?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
MMLU_PRO = {
    "question_id": 70,
    "question": "Typical advertising?",
    "options": [f"option {n}" for n in range(10)],
    "answer": "I",
    "answer_index": 8,
    "cot_content": "",
    "category": "business",
    "src": "ori_mmlu-business_ethics",
}
SUPERGPQA = {"uuid": "u", "question": "Which?", "options": ["x", "y"], "answer": "y"}
SUPERGPQA |= {"answer_letter": "B", "discipline": "Law", "field": "Law", "is_calculation": False}
PLAIN = {"problem": "<image>Which?\nA. cat\nB. dog", "answer": "B", "images": [picture()]}
PLAIN |= {"problem_id": "1", "file_name": "mm-vet", "subset_name": "Art", "question": "<image 1>"}
CASES = {  # rows, and of each a right and a wrong answer, its number of images, category, source
    "mmmu": [
        (MMMU, "B", "$6", 3, "Managerial Accounting", None),
        (MMMU_OPEN, "six", "7", 1, "Managerial Accounting", None),
    ],
    "mmmu_pro_10": [(MMMU_PRO, "$9", "I", 1, "Accounting", None)],
    "mmmu_pro_4": [(MMMU_PRO, "J", "$4", 1, "Accounting", None)],
    "mmmu_pro_vision": [(VISION, "C", "A", 1, "Music", None)],
    "mmstar": [(MMSTAR, "the left", "B", 1, "logical reasoning", "MMBench")],
    "mathvista": [
        (MATHVISTA, "B", "A", 1, "geometry", "GeoQA+"),
        (MATHVISTA_FREE, "1.20", "1.3", 1, "geometry", "GeoQA+"),
    ],
    "mathverse": [
        (MATHVERSE, "70", "60°", 1, "Text Dominant", "Geometry3K"),
        (MATHVERSE_SEEN, "B", "A", 1, "Vision Only", "Geometry3K"),
    ],
    "mathvision": [(MATHVISION, "5", "A", 1, "counting", None)],
    "mathvision_mini": [(MATHVISION_LETTERS, "C", "D", 1, "counting", None)],
    "mmvet": [
        (MMVET, "-5 and -1", "-1", 1, "ocr,math", None),
        (MMVET_OR, "twenty past two", "14:30", 1, "ocr,math", None),
    ],
    "realworldqa": [(REALWORLD, "Right", "A", 1, None, None)],
    "visnumbench": [(VISNUM, "30", "b", 1, "angle", "synthetic")],
    "hallusionbench": [(HALLUSION, "no", "Yes", 1, "illusion", "VD")],
    "math500": [(MATH500, "\\frac{4}{2}", "3", 0, "Algebra", None)],
    "gsm8k": [(GSM8K, "7", "8", 0, None, None)],
    "mmlu_pro": [(MMLU_PRO, "option 8", "J", 0, "business", "ori_mmlu-business_ethics")],
    "supergpqa": [(SUPERGPQA, "y", "A", 0, "Law", None)],
}
for name, benchmark in BENCHMARKS.items():
    if name.startswith("sr1_"):
        row = PLAIN | ({benchmark.only[0]: benchmark.only[1]} if benchmark.only[0] else {})
        category = "Art" if benchmark.category else None
        source = row["file_name"] if benchmark.source else None
        CASES[name] = [(row, "dog", "A", 1, category, source)]


@pytest.fixture(scope="module")
def config(tiny_model):
    return load_config(None, [f"model.path={tiny_model}", "data.max_prompt_tokens=4000"])


@pytest.fixture(scope="module")
def processor(config):
    return make_processor(config)


@pytest.fixture(scope="module")
def grader():
    grader = Grader("rules", 5.0)
    yield grader
    grader.worker.close()


@pytest.fixture
def read(config, processor, tmp_path):
    """Make shards of rows in a parquet file, read as a benchmark."""

    def run(name, rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        arguments = [str(tmp_path / "rows.parquet"), str(tmp_path / "shards"), "--benchmark", name]
        assert make_shards([*arguments, "--max-skipped", "0"]) == 0
        return Samples(config, str(tmp_path / "shards"), processor)

    return run


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_as_published_become_prompts_and_verdicts(read, grader, name):
    samples = read(name, [case[0] for case in CASES[name]])
    for index, (_, right, wrong, num_images, category, source) in enumerate(CASES[name]):
        example, prompt = samples.example(index), samples.prompt(index)
        assert example.num_images == len(prompt.image_grid_thw) == num_images
        assert example.metadata.get("category") == category
        assert example.metadata.get("data_source") == source
        for answer, wanted in ((right, True), (wrong, False)):
            verdicts = [grader.judge(answer, g, example.question, "s") for g in example.golds]
            assert any(verdict.right for verdict in verdicts) is wanted, example


def test_images_are_in_the_order_in_which_the_text_names_them(read):
    samples = read("mmmu", [MMMU, MMMU | {"question": "Which? <image 2>"}])
    question = samples.example(0).question
    assert question.startswith("<image> Which of <image> and image 1 is it?\nA. $6\nB. $7\n")
    assert question.endswith("C. it's <image>\nD. $9")
    greys = [[image.getpixel((0, 0))[0] for image in samples.images(i)] for i in (0, 1)]
    assert greys == [[10, 20, 30], [10, 20, 30]]
    assert samples.example(1).question.startswith("<image>Which? <image>\n"), "unnamed ones first"


def test_questions_are_as_published_but_for_what_contradicts_the_prompts():
    asked = BENCHMARKS["realworldqa"].row(REALWORLD)["problem"]
    assert asked == "<image>Which way?\n\nA. Left\nB. Right"
    asked = BENCHMARKS["mathvision"].row(MATHVISION)["problem"]
    assert asked.startswith("Which of image 2 and image 3 fits?\n<image>\nA. 1\n")
    assert "A. A" not in BENCHMARKS["mathvision"].row(MATHVISION_LETTERS)["problem"]
    assert "solution" not in BENCHMARKS["math500"].row(MATH500)
    literal = HALLUSION | {"question": "Is <image> a tag?"}
    assert BENCHMARKS["hallusionbench"].row(literal)["problem"] == "<image>Is \\<image> a tag?"


def test_rows_of_other_sets_in_the_same_file_are_passed_over(read):
    other = PLAIN | {"file_name": "mathverse"}
    clevr = PLAIN | {"file_name": "clevr_count_70k", "answer": "3"}
    samples = read("sr1_clevr_count", [other, clevr, PLAIN])
    assert [samples.example(i).answer for i in range(len(samples))] == ["3"]


def test_a_benchmark_is_read_from_the_hub_by_its_name(tmp_path, monkeypatch, capsys):
    import datasets
    from huggingface_hub import constants

    card, folder = "---\nconfigs:\n", tmp_path / "set"
    for config, answer in (("standard (4 options)", "D"), ("standard (10 options)", "J")):
        card += f"- config_name: {config}\n  data_files:\n  - split: test\n"
        card += f"    path: {config}/test-*\n"
        kinds = dict.fromkeys(MMMU_PRO, datasets.Value("string"))
        kinds |= {f"image_{n}": datasets.Image() for n in range(1, 8)}
        rows = datasets.Dataset.from_list(
            [MMMU_PRO | {"answer": answer}], features=datasets.Features(kinds)
        )
        (folder / config).mkdir(parents=True)
        rows.to_parquet(str(folder / config / "test-00000-of-00001.parquet"))
    (folder / "README.md").write_text(f"{card}---\n")
    home = tmp_path / "home"
    datasets.disable_progress_bars()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
    hub._find.cache_clear()
    add_snapshot(home, "MMMU/MMMU_Pro", folder, kind="dataset")
    assert make_shards(["benchmark:mmmu_pro_10", str(tmp_path / "out")]) == 0
    hub._find.cache_clear()
    example = ShardReader(tmp_path / "out").example(0)
    assert example.answer == "J" and example.question.endswith("J. $9")
    with pytest.raises(SystemExit):
        make_shards(["benchmark:mmmuu", str(tmp_path / "none")])
    assert "benchmark:mmmuu: expected one of mmmu, mmmu_pro_10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmmu", MMMU | {"image_3": None}, "names <image 3>, but image_3 is empty"),
        ("mmstar", {"image": picture(), "answer": "A"}, "question is ''; expected the text"),
        ("mmstar", MMSTAR | {"question": 3}, "question is 3; expected the text of a question"),
    ],
)
def test_a_row_of_another_schema_is_an_error(name, row, message):
    with pytest.raises(DataError, match=message):
        BENCHMARKS[name].row(row)


def test_each_benchmark_is_on_the_page_with_its_name_split_and_size():
    page = PAGE.read_text()
    for name, benchmark in BENCHMARKS.items():
        row = next((line for line in page.splitlines() if line.startswith(f"| `{name}`")), "")
        assert f"`{benchmark.hub}`" in row, name
        assert f"| {benchmark.split}" in row and benchmark.config in row, name
        assert not benchmark.num_questions or f"{benchmark.num_questions:,}" in row, name
        assert benchmark.metric in row, name
