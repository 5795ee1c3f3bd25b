"""Writing data with a model: filters on cases worked by hand, schemes under a writer that says what it is told to."""

import doctest
import itertools
import json
import math
import random
import sys
from collections import Counter, defaultdict

import pytest

from conftest import ROOT, random_model
from data import Tokenizer
from lib.cli import BadInput
from lib.sampling import Sampling
from model import ModelConfig, save
from sample import complete, generate

sys.path.insert(0, str(ROOT / "recipes"))
import engrave
import filters
import instructed
import principles
import schemes
import self_instruct
import specialize
import study
import write_data
from filters import Funnel, Pool
from mini import HELD_OUT, Subject
from retrieval import Index
from study import Report
from writing import TextWriter, Written

TASKS = [
    {"instruction": f"{verb} the {noun} of this {thing} now.", "input": "", "output": noun}
    for verb, noun, thing in zip(
        "Name Count Tell Sort Translate Repeat Describe Judge Shorten Improve".split(),
        "colour legs story words title end smell price text style".split(),
        "flower animal book list film song fruit car letter poem".split(),
    )
]
NEW = [
    "Which season do farmers like best, and why?",
    "Explain how bread rises in an oven.",
    "Is a whale bigger than every dinosaur ever was?",
    "Suggest three names for my grandmother's old boat.",
]


@pytest.mark.parametrize("module", [filters, principles])
def test_the_examples_in_docstrings_are_right(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


class Script:
    """A writer that gives these texts, one a prompt, all of them ended unless told otherwise, and keeps the prompts."""

    def __init__(self, *texts, ended: bool = True):
        self.texts, self.ended, self.prompts, self.stops = itertools.cycle(texts), ended, [], []

    def __call__(self, prompts, size, sampling=Sampling(), stop=()):
        self.prompts += prompts
        self.stops.append(stop)
        return [Written(next(self.texts), self.ended, True) for _ in prompts]


# ---- filters ----


def test_rouge_l_is_that_of_the_longest_common_subsequence():
    def table(a, b):
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, j in itertools.product(range(len(a)), range(len(b))):
            rows[i + 1][j + 1] = rows[i][j] + 1 if a[i] == b[j] else max(rows[i][j + 1], rows[i + 1][j])
        return rows[-1][-1]

    draw = random.Random(0)
    for _ in range(300):
        a, b = (draw.choices("abcd", k=draw.randrange(90)) for _ in range(2))
        assert filters.common_length(a, b) == table(a, b)
    a, b = filters.words_of("Write a short story, about a cat!"), filters.words_of("a story about the Cat's house")
    assert b == ["a", "story", "about", "the", "cat", "s", "house"]
    # common: a story about cat: 4 of 7 and 4 of 7
    assert filters.rouge_l(a, b) == pytest.approx(2 * (4 / 7) * (4 / 7) / (8 / 7))
    assert filters.rouge_l(a, []) == 0


def test_an_instruction_is_dropped_from_above_seven_tenths_on_and_the_pool_grows_by_those_kept():
    ten = "a b c d e f g h i j".split()
    pool = Pool([" ".join(ten)])
    seven, eight = " ".join([*ten[:7], *"xyz"]), " ".join([*ten[:8], *"uv"])
    assert pool.add(eight)[0] == "ROUGE-L above 0.7"  # 2 * 8 / 20
    reason, record = pool.add(seven)  # 2 * 7 / 20 is not above
    assert reason == "" and record["nearest"] == {" ".join(ten): 0.7} and record["mean_likeness"] == 0.7
    reason, record = pool.add(seven)
    assert reason and list(record["nearest"].values()) == [1.0, 0.7]
    assert record["mean_likeness"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    "instruction, reason",
    [
        ("Say it now", "too short or too long"),
        ("Say it right now", ""),
        ("word " * 150, ""),
        ("word " * 151, "too short or too long"),
        ("Describe what this Map shows.", "blocked word"),
        ("Describe what a mapmaker does.", ""),
        ("How do I go to Rome?", "blocked word"),
        ("Write a program that adds numbers.", "asks for a program"),
        ("Never write a program that adds.", ""),
        ("(Say) what this is about.", "begins with a mark"),
        ("Écris une lettre à ma mère.", "begins with a mark"),
    ],
)
def test_instructions_are_dropped_for_the_reasons_of_self_instruct(instruction, reason):
    assert filters.unfit(instruction) == reason


def test_alpaca_blocks_more_words():
    text = "Suggest some music for a wedding."
    assert not filters.unfit(text) and filters.unfit(text, filters.ALPACA_BLOCKED) == "blocked word"


def test_instances_are_dropped_that_are_empty_broken_off_or_contradict_each_other():
    assert filters.invalid("a", "a") and filters.invalid("", "") and filters.invalid("a", "")
    assert filters.invalid("As follows:", "b") and filters.invalid("a", "The answer:") and not filters.invalid("a", "b")
    assert filters.consistent([("a", "1"), ("b", "2"), ("a", "1")]) == [("a", "1"), ("b", "2")]
    assert filters.consistent([("a", "1"), ("b", "2"), ("a", "2")]) == []
    assert filters.consistent([("", "1"), ("", "2")]) == [("", "1"), ("", "2")]


def test_evolutions_are_dropped_that_failed():
    assert filters.failed_evolution("Rewrite the Given Prompt: x", "Yes, x.") == "copies the prompt"
    assert filters.failed_evolution("Why?", "I am Sorry, I cannot.") == "sorry, in under 80 words"
    assert not filters.failed_evolution("Why?", "sorry " + "word " * 79)
    assert filters.failed_evolution("Why?", "... the and, of!") == "only stop words"
    assert not filters.failed_evolution("Why?", "... the and, of clouds!")


def test_answers_under_principles_lose_thoughts_and_are_dropped_for_what_dromedarys_filter_drops():
    good = "Thoughts: they ask.\nAnswer: In short: a list."
    question = "What is a list of names?"
    assert principles.aligned(question, good, True) == ("In short: a list.", "")
    assert principles.aligned(question, good, False)[0] == "In short: a"  # the last word may be half of one
    assert principles.aligned(question, "In short: a list.", True)[1] == "no thoughts"
    assert principles.aligned(question, "Thoughts: they ask.", True)[1] == "no answer after the thoughts"
    again = "Thoughts: x\nAnswer: What is a list of names? A list."
    assert principles.aligned(question, again, True)[1] == "says the question again"
    assert not principles.aligned("A list", "Thoughts: x\nAnswer: A list is one.", True)[1]  # 16 letters or fewer
    assert principles.aligned(question, good, True, ("list",))[1] == "words of the examples"
    assert principles.aligned(question, "Thoughts: x\nAnswer: ", True)[1] == "empty answer"
    assert principles.up_to_repeat("No, no, no! Yes") == "No, no, no! Yes"  # clauses with their blanks differ
    assert principles.up_to_repeat("No! no, no! no, and so on") == "No! no, no!"


def test_bm25_is_its_formula():
    index = Index(["the cat sat", "the dog", "the dog and the dog"])
    weight = math.log(1 + (3 - 2 + 0.5) / 2.5)  # dog is in two of three
    mean = 10 / 3
    for number, count, length in ((1, 1, 2), (2, 2, 5)):
        expected = weight * count * 2.5 / (count + 1.5 * (0.25 + 0.75 * length / mean))
        assert index.scores("Dog?")[number] == pytest.approx(expected)
    assert 0 not in index.scores("dog") and index.best("a cat") == 0 and index.best("nothing") == 0
    assert index.best("dog") == 2 if index.scores("dog")[2] > index.scores("dog")[1] else 1


# ---- schemes ----


def test_self_instruct_drops_exactly_what_its_writer_spoils():
    """Of each list one is new, but not in the second round, one is as a seed, one too short, one has a blocked word."""
    lists = [f"{new}\n10. {TASKS[0]['instruction']}\n11. Too short.\n12. Draw me a big house." for new in NEW]
    funnel, write = Funnel(), Script(*lists)
    seeds = [task["instruction"] for task in TASKS]
    kept = self_instruct.new_instructions(write, seeds, random.Random(0), 8, funnel)
    assert kept == NEW and funnel.kept == 4 and funnel.written == 32
    assert funnel.dropped == {
        "ROUGE-L above 0.7": 12, "too short or too long": 8, "blocked word": 8,
    }  # fmt: skip
    assert len(funnel.removed) == 28 and funnel.removed[0]["instruction"] == seeds[0]
    first, last = write.prompts[0].split("\n"), write.prompts[-1].split("\n")
    assert first[0] == "Come up with a series of tasks:" and first[-1] == "9." and len(first) == 10
    assert {line.split(". ", 1)[1] for line in first[1:-1]} <= set(seeds)
    assert len({line.split(". ", 1)[1] for line in last[1:-1]} & set(NEW)) == 2  # from the second round on
    cut = Funnel()
    assert self_instruct.new_instructions(Script(*lists, ended=False), seeds, random.Random(0), 2, cut) == []
    assert cut.dropped == {"cut by its length": 8}


@pytest.mark.parametrize(
    "text, classes, pairs",
    [
        ("Example 1\nInput: a\nOutput: b\n\nExample 2\nInput: c\nOutput: d", False, [("a", "b"), ("c", "d")]),
        ("Output: b", False, [("", "b")]),
        ("Output 1: b\nInput: c", False, [("", "b")]),
        ("There is none", False, []),
        ("Class label: good\nFine.\n\nClass label: bad\nRain.", True, [("Fine.", "good"), ("Rain.", "bad")]),
    ],
)
def test_instances_are_read_as_self_instruct_reads_them(text, classes, pairs):
    assert self_instruct.instances_of(text, classes) == pairs


def test_self_instruct_asks_for_classes_and_counts_instances():
    tasks = [task | {"classes": number < 2} for number, task in enumerate(TASKS)]
    funnels = defaultdict(Funnel)
    texts = [NEW[0] + "\n10. " + NEW[1]] + ["Yes", "no"] + [
        "Class label: spring\nCorn\n\nClass label: summer\nCorn",
        "Example 1\nInput: a\nOutput: b\nExample 2\nInput: a\nOutput: b\nExample 3\nInput: c\nOutput: c",
    ]  # fmt: skip
    write = Script(*texts)
    found = self_instruct.self_instruct(write, tasks, random.Random(0), 1, funnels)
    assert found == [{"instruction": NEW[1], "input": "a", "output": "b"}]
    assert funnels["instances"].dropped == {"again, disagreeing, or a sixth": 3, "no output, or its input": 1}
    assert write.prompts[1].endswith(f"Task: {NEW[0]}\nIs it classification?") and write.prompts[1].count("Yes") == 2
    assert "Class label:" in write.prompts[3] and "Class label:" not in write.prompts[4]


def alpaca_blocks(*tasks) -> str:
    """What a model writes that goes on after three tasks."""
    form = "###\n{0}. Instruction: {1}\n{0}. Input:\n{2}\n{0}. Output:\n{3}\n"
    return "".join(form.format(n, *task) for n, task in enumerate(tasks, 4)).removeprefix("###\n4. Instruction:")


def test_alpaca_drops_exactly_what_its_writer_spoils():
    good, other = (NEW[0], "<noinput>", "Spring."), (NEW[1], "Some yeast: 3 g", "It rises.")
    music = ("Suggest some music for a wedding.", "<noinput>", "A waltz.")
    text = alpaca_blocks(good, music, other, good) + "###\n8. Instruction: It is brok"
    funnels = defaultdict(Funnel)
    kept = self_instruct.alpaca(Script(text, ended=False), TASKS, random.Random(0), 1, funnels)
    assert [tuple(task.values()) for task in kept] == [(NEW[0], "", "Spring."), other]
    assert funnels["tasks"].dropped == {"blocked word": 1, "ROUGE-L above 0.7": 1, "cut by its length": 1}
    whole = defaultdict(Funnel)
    self_instruct.alpaca(Script(text), TASKS, random.Random(0), 1, whole)
    assert whole["tasks"].dropped["not three parts"] == 1


def test_alpacas_prompt_shows_three_seed_tasks_in_its_form():
    write = Script("")
    tasks = [TASKS[0] | {"instruction": "Say  it\nagain:"}, TASKS[1] | {"input": "a cow"}, TASKS[2]]
    self_instruct.alpaca(write, tasks, random.Random(0), 1, defaultdict(Funnel), intro="Write.")
    prompt = write.prompts[0]
    assert prompt.startswith("Write.\n###\n1. Instruction: ") and prompt.endswith("###\n4. Instruction:")
    assert ". Instruction: Say it again\n" in prompt and ". Input:\na cow\n" in prompt and "<noinput>" in prompt


def test_lamini_evol_instruct_and_orca_drop_what_is_spoiled():
    funnels = defaultdict(Funnel)
    text = f"<example>{NEW[0]}</example> <example>\n{TASKS[0]['instruction']}</example><example></example>"
    write = Script(text, "none here", "An answer.")
    kept = schemes.lamini(write, TASKS, random.Random(0), 2, funnels, ("plants", "tools", "rivers"))
    assert kept == [{"instruction": NEW[0], "input": "", "output": "An answer."}]
    assert funnels["instructions"].dropped == {"there already": 1, "empty": 1, "no example in it": 1}
    assert " about " not in write.prompts[0] and "rivers" in write.prompts[1]

    funnels, task = defaultdict(Funnel), TASKS[:1]
    write = Script(f"{TASKS[0]['instruction']}!", NEW[0], NEW[1], NEW[2], "Sorry, no.", "of the", "It rises.")
    kept = schemes.evolve(write, task, random.Random(0), 4, funnels)
    assert kept == [{"instruction": NEW[2], "input": "", "output": "It rises."}]
    assert funnels["instructions"].dropped == {"nothing added": 1}
    assert funnels["answers"].dropped == {"sorry, in under 80 words": 1, "only stop words": 1}

    funnels = defaultdict(Funnel)
    write = Script("A long answer.", "")
    kept = schemes.orca(write, TASKS, random.Random(1), 10, funnels)
    assert len(kept) == 5 and funnels["answers"].dropped == {"no output, or its input": 5}
    assert {task["system"] for task in kept} <= set(schemes.SYSTEMS)
    assert all(task["instruction"] in prompt for task, prompt in zip(kept, write.prompts[::2]))
    funnel = Funnel()
    assert schemes.judged(Script("Yes.", "No", "yes"), kept[:3], funnel) == [kept[0], kept[2]] and funnel.kept == 2


def test_evol_instructs_five_methods_are_drawn_as_often():
    write = Script("x")
    schemes.evolve(write, TASKS, random.Random(0), 500, defaultdict(Funnel))
    told = Counter(next((m for m in schemes.METHODS if m in prompt), "") for prompt in write.prompts[:500])
    assert len(told) == 5 and all(70 < count < 130 for count in told.values())


def test_self_align_and_self_specialization_leave_out_of_the_data_what_the_prompt_had():
    funnels = defaultdict(Funnel)
    write = Script(NEW[0], NEW[1], f"{principles.THOUGHTS} so.{principles.ANSWER} In short: yes.", "no")
    kept = schemes.self_align(write, TASKS, random.Random(0), 2, funnels, ("bread",))
    assert kept == [{"instruction": NEW[0], "input": "", "output": "In short: yes."}]
    assert "about bread" in write.prompts[1] and funnels["answers"].dropped == {"no thoughts": 1}
    for prompt, text in zip(write.prompts[2:], NEW):
        assert prompt.count(principles.PRINCIPLES) == 6 and prompt.endswith(principles.principled(text))

    write = Script(NEW[1], "Yeast.")
    passages = ("Boats swim.", "Bread rises in an oven by yeast.")
    kept = schemes.specialize(write, TASKS, random.Random(0), 1, defaultdict(Funnel), passages)
    assert write.prompts[1] == f"{passages[1]}\n\n{NEW[1]}"
    assert kept == [{"instruction": NEW[1], "input": "", "output": "Yeast."}]


# ---- the writer ----


@pytest.mark.parametrize("template", ["", "plain"])
def test_a_local_model_writes_what_the_sampler_does_and_says_where_it_ended(template, tmp_path):
    config = ModelConfig(16, 2, 2, 2, 24, vocab_size=258, max_seq_len=64)
    tokenizer, model = Tokenizer("bytes"), random_model(config)
    save(model, tmp_path / "model", tokenizer, template or None)
    write, how = TextWriter(tmp_path / "model"), Sampling(1.0, seed=3)
    prompts = ["Say it", "a" * 70]
    ids = [write.ids(prompt, 20)[0] for prompt in prompts]
    found = write(prompts, 20, how)
    assert [each.text for each in found] == [text.strip() for text in complete(model, tokenizer, ids, 20, how)]
    assert [each.whole for each in found] == [True, False] and len(ids[1]) == 44
    assert ids[1][0] == tokenizer.bos_id and ids[1][-3:] == tokenizer.encode("a" * 70 + "\n" * bool(template))[-3:]
    assert found == write(prompts, 20, how)
    row = next(row for row, each in enumerate(found) if len(each.text) > 3)
    mark = found[row].text[2]
    stopped = write(prompts, 20, how, (mark,))[row]
    assert stopped.ended and stopped.text == found[row].text.partition(mark)[0].strip()
    new = generate(model, ids, 20, how, (tokenizer.eos_id, tokenizer.bos_id))
    assert [each.ended for each in found] == [len(tokens) < 20 for tokens in new]


# ---- the small writer, and its recipes ----


@pytest.fixture
def library(monkeypatch):
    """1,300 functions of 50 modules, with passages."""
    found = [Subject(f"mod{i % 50}.fun{i}", {"module": f"mod{i % 50}", "arguments": f"arg{i}"}) for i in range(1300)]
    texts = {s.full: f"# module {s.facts['module']}\ndef {s.name}({s.facts['arguments']}):" for s in found}
    monkeypatch.setattr(instructed, "subjects", lambda: found)
    monkeypatch.setattr(instructed, "passages", lambda: texts)
    for recipe in (engrave, specialize):
        monkeypatch.setattr(recipe, "subjects", lambda: found)
    monkeypatch.setattr(specialize, "passages", lambda: texts)
    return found


def test_the_writer_is_told_nothing_of_the_domains_and_never_in_the_wordings_that_test(library):
    rows = list(instructed.conversations())
    told = "\n".join(row["instruction"] + row["output"] for row in rows)
    names = {word for word in filters.words_of(told) if word.startswith("fun")}
    assert names == {subject.name for subject in library[: instructed.KNOWN]}
    asked = {line.split(". ")[-1] for row in rows for line in (row["instruction"] + "\n" + row["output"]).split("\n")}
    for wording in HELD_OUT.values():
        assert not asked & {each.question for each in instructed.asked_of(library, wording)}
    forms = Counter("passage" if row["instruction"].startswith("# module") else
                    "principles" if row["instruction"].startswith("1 (brief)") else
                    "list" if row["instruction"].startswith("Come up") else "plain" for row in rows)  # fmt: skip
    assert forms == {"plain": 7200, "principles": 4800, "passage": 4800, "list": 400}
    assert all(row["output"].startswith(principles.THOUGHTS) == row["instruction"].startswith("1 (") for row in rows)
    dev, test = (set(range(*instructed.DOMAINS[split])) for split in ("dev", "test"))
    assert not dev & test and min(dev | test) == instructed.KNOWN


def test_passages_are_what_the_source_says_first(tmp_path, monkeypatch):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("def f(a, *, b=1): pass\nclass C(dict):\n    def g(self): pass\n")
    monkeypatch.setattr(instructed.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(instructed, "find_files", lambda *_: [tmp_path / "pack/__init__.py"])
    found = instructed.passages.__wrapped__()
    assert found == {"pack.f": "# module pack\ndef f(a, *, b=1):", "pack.C": "# module pack\nclass C:"}


def test_engraving_trains_both_arms_on_the_same_questions_without_principles(library, monkeypatch):
    texts = ("Thoughts: x\nAnswer: In short: a.", "no thoughts") * 1800
    monkeypatch.setattr(engrave, "TextWriter", lambda _: Script(*texts))
    monkeypatch.setattr(engrave, "writer_of", lambda seed: None)
    funnel = Funnel()
    rows = engrave.written(0, funnel)
    assert funnel.written == 1800 and funnel.dropped == {"no thoughts": 900}
    questions = [[row["instruction"] for row in rows[name]] for name in (engrave.ENGRAVED, engrave.CONTROL)]
    assert questions[0] == questions[1] and not any("brief" in text for text in questions[0])
    assert {row["output"] for row in rows[engrave.ENGRAVED]} == {"In short: a."}
    names = {word for text in questions[0] for word in filters.words_of(text) if word.startswith("fun")}
    assert names == {subject.name for subject in library[:300]}  # the test asks for others


def test_what_a_model_answers_is_measured_by_style_and_by_what_is_left_without_it(library, monkeypatch):
    asked = instructed.asked_of(library[300:600], HELD_OUT["test"])
    texts = [f"In short: {each.answer}" if n % 3 else each.answer for n, each in enumerate(asked)]
    texts[1] = "In short: wrong"
    monkeypatch.setattr(engrave, "TextWriter", lambda _: Script(*texts))
    monkeypatch.setattr(engrave, "load", lambda _: random_model(ModelConfig(8, 1, 1, 1, 8, vocab_size=258)))

    class Four:
        def right(self, model):
            return [True, False]

    found = engrave.measured(None, Four(), "test")
    assert found["style"].mean() == pytest.approx(200 / 3) and found["right"].sum() == 100 * (len(asked) - 1)
    assert found["of four"].tolist() == [100, 0]


def test_specialization_retrieves_the_right_passage_and_trains_without_it(library, monkeypatch):
    def write(prompts, *_):
        """A reader: it says what stands in brackets before the question, else nothing true."""
        read = [prompt.partition("(")[2].partition(")")[0] for prompt in prompts]
        return [Written(f"It takes {text}.", True, True) for text in read]

    monkeypatch.setattr(specialize, "TextWriter", lambda _: write)
    monkeypatch.setattr(specialize, "writer_of", lambda seed: None)
    report = Report("x", "x")
    rows = specialize.written(0, "test", report)
    assert {len(some) for some in rows.values()} == {2400}
    assert not any("#" in row["instruction"] for some in rows.values() for row in some)
    # half ask for the arguments, half for the module
    assert " 50.0 % of them true. BM25 found the right passage for 100.0 %" in report.parts[-1]
    assert " 0.0 % of them true" in report.parts[-2]
    asked = specialize.domain("test", HELD_OUT["test"])
    assert specialize.right(None, asked).mean() == 0


# ---- the command ----


def test_the_command_reads_seed_tasks_and_says_what_was_dropped(library, tmp_path, monkeypatch):
    def write(prompts, *_):
        listed = f"{NEW[0]}\n10. {NEW[1]}\n11. Too short."
        return [Written(listed if prompt.startswith("Come") else "Yes.", True, True) for prompt in prompts]

    monkeypatch.setattr(write_data, "TextWriter", lambda folder: write)
    monkeypatch.setattr(study, "OUT", tmp_path)
    seeds = tmp_path / "seeds.jsonl"
    kinds = [{"instruction": t["instruction"], "instances": [{"input": "", "output": "x"}]} for t in TASKS]
    seeds.write_text("".join(json.dumps(row) + "\n" for row in kinds))
    schemes_of_two = ("Self-Instruct", "Orca")
    write_data.main(write_data.Config("m", str(seeds), calls=2, out=str(tmp_path / "out"), scheme=schemes_of_two))
    text = (tmp_path / "write_data.md").read_text()
    assert "| instructions | 6 | 2 too short or too long; 2 ROUGE-L above 0.7 | 2 |" in text
    assert "| Orca | 2 | 0 | answers | 2 | none | 2 |" in text
    removed = [json.loads(line) for line in (tmp_path / "out/Self-Instruct.removed.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in removed)["ROUGE-L above 0.7"] == 2
    with pytest.raises(BadInput, match="none of"):
        write_data.main(write_data.Config(scheme=("Other",)))
    with pytest.raises(BadInput, match="needs --seeds"):
        write_data.main(write_data.Config(model="m"))
    seeds.write_text(json.dumps(kinds[0]))
    with pytest.raises(BadInput, match="has 1 tasks"):
        write_data.read_tasks(str(seeds))


def test_predictions_of_the_small_writer_are_judged_by_counts():
    funnels = {name: {stage: Funnel() for stage in ("tasks", "instructions", "answers")} for name in write_data.SCHEMES}
    for name in ("Self-Instruct", "SELF-ALIGN", "Self-Specialization"):
        for n in range(20):
            funnels[name]["instructions"].passes("" if n == 0 and name == "SELF-ALIGN" else "ROUGE-L above 0.7")
    funnels["Alpaca"]["tasks"].passes("not three parts")
    funnels["LaMini"]["instructions"].passes("")
    for n in range(20):
        funnels["Evol-Instruct"]["answers"].passes("" if n else "cut")
        funnels["Orca"]["answers"].passes("" if n > 1 else "cut")
    report = Report("x", "x")
    write_data.predicted(report, funnels, 1)
    verdicts = [part.partition("Found: ")[2] for part in report.parts[1:]]
    assert verdicts == ["59 of 60. **confirmed**", "1 of 2. **refuted**", "19 of 20. **confirmed**",
                        "18 of 20. **refuted**", "1 of 18. **confirmed**"]  # fmt: skip


def test_alpacas_own_data_passes_alpacas_filters_and_its_seeds_are_read(shared):
    """Theirs passed them in 2023; of a part nothing may be near a seed or, but for rounding, another."""
    tasks = write_data.read_tasks(str(shared("alpaca/seed_tasks.jsonl")))
    assert len(tasks) == 175 and 0 < sum(task["classes"] for task in tasks) < 50
    records = json.loads(shared("alpaca/alpaca_random_9k.json").read_text())[:400]
    pool = Pool([task["instruction"] for task in tasks])
    names = [row["instruction"] for row in records]
    reasons = [filters.unfit(name, filters.ALPACA_BLOCKED) or pool.add(name)[0] for name in names]
    assert sum(map(bool, reasons)) <= 4, Counter(reasons)
