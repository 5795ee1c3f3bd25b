"""Measure a model: MMLU here, by protocols of lib/grades.py reasoning, choices, texts and more.

    python eval.py --model out/RUN --task mmlu --data DIR --out results.json
    python eval.py --model out/RUN --task perplexity --data data/stdlib
    python eval.py --compare a.json b.json

1. A task, such as `mmlu`, yields `Question`s: a context as ids, and the choices or the text that
   may follow it.
2. `make_batches` lays them out: alike in length, what the questions of a subject begin with in
   common set apart.
3. `Reader.score` gives log-probabilities, `write` text; every process has its share of the batches,
   the first collects.
4. The protocol's grade makes a record of each answer (lib/answers.py), lib/statistics.py the
   averages, lib/tables.py the tables.

A score here is that of the protocol's reference code, and depends neither on the batch nor on the
processes. To bring your own task, write lines {"context": ..., "choices": [...], "answer": 0} for
--task choices, or add a Protocol to `PROTOCOLS`.
"""

from lib.cli import run_command  # isort: skip (first: lib refuses old Pythons and Windows)

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from data import Dataset, Tokenizer
from lib import grades
from lib.answers import ALIKE, FLAGS, Answers, describe, identify, write_result
from lib.batches import ScoreBatch, make_batches, rows_to_read
from lib.curves import draw_runs
from lib.files import write_whole
from lib.grades import Protocol, check_out_name, settled
from lib.identity import weights_sha256
from lib.mmlu import CATEGORIES, read_mmlu
from lib.perplexity import perplexity
from lib.prompts import Prompts, Question, chosen_subjects, pair, question_hash
from lib.results import append_lines, check_out, read_result
from lib.share import World, progress
from lib.statistics import paired_difference, summarize
from lib.stream import TextStream
from lib.tables import describe_result, heading, headline, say_difference
from model import KVCache, Transformer
from sample import Decoder, generate, load_model

Task = Literal[
    "mmlu", "bbh", "gsm8k", "arc", "hellaswag", "truthfulqa", "choices", "perplexity", "passkey", ""
]


@dataclass
class Config:
    """Measure a model."""

    model: tuple[str, ...] = ()
    """a run or checkpoint folder, a Hugging Face or Meta folder, or a llama2.c .bin"""
    task: Task = ""
    """choices is any .jsonl of {context, choices, answer}"""
    # mmlu: the folder with dev/ and test/; bbh: with bbh/ and cot-prompts/; perplexity: a dataset
    # or text files; passkey: nothing; else the file of questions
    data: str = ""

    out: str = ""
    """results as JSON; one line a question goes beside it in .jsonl, a table in .md"""
    compare: tuple[str, ...] = ()
    """instead: two such results, whose difference is told from chance"""
    checkpoints: Literal["last", "all"] = "last"
    """all: curves over every checkpoint of the runs that --model names"""
    tokenizer: str = ""       # where the model's folder holds none
    protocol: str = ""
    """mmlu: hendrycks, instructeval, harness; bbh: instructeval, cot; else the first"""
    shots: int = -1           # examples before each question; -1 is the protocol's number
    subjects: str = ""        # mmlu and bbh: only these, divided by commas
    lengths: str = ""
    """passkey: tokens of the prompts, as 1024,2048; else 1/4, 1/2, all that fits"""
    limit: int = 0
    """only the first so many questions of a subject; 0 is all, of passkey 10"""
    max_prompt: int = 0
    """tokens; a longer prompt loses examples, then its left; 0 is the protocol's"""
    bos: bool = True          # begin prompts with BOS
    chat: bool = False        # wrap prompts as LLaMA-2's chat models know them: [INST] … [/INST]
    # tokens in a forward pass, padding included; caches may hold 4 times that; 0 is 16,384 on a
    # GPU, 2,048 on a CPU
    batch_tokens: int = 0

    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    anyway: bool = False      # also measure a run of code that computes something else than this


# ---- MMLU, and the other protocols ----


def mmlu(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """MMLU as in hendrycks/test: few-shot prompt, one of four letters (Hendrycks et al. 2021).

    hendrycks and instructeval have two blanks after "about", as in the original, and use cells as
    they are in the file; harness has one, strips questions, and keeps all examples, cutting the
    prompt from its left.
    """
    harness, writes = config.protocol == "harness", config.protocol == "instructeval"
    letters = [pair(config, tokenizer, "\nAnswer:", f" {letter}")[1] for letter in "ABCD"]
    if not writes:
        room -= max(map(len, letters)) - 1
    blanks = " " if harness else "  "
    for subject in chosen_subjects(config, sorted(sum(CATEGORIES.values(), []))):
        about = f"about{blanks}{subject.replace('_', ' ')}"
        header = f"The following are multiple choice questions (with answers) {about}.\n\n"
        dev = read_mmlu(Path(config.data) / "dev" / f"{subject}_dev.csv")
        test = read_mmlu(Path(config.data) / "test" / f"{subject}_test.csv")
        if len(dev) < config.shots:
            few = f"the {len(dev)} examples of {subject}"
            raise ValueError(f"--shots {config.shots} is more than {few}")
        shots = [f"{mmlu_prompt(row, harness)} {row[5]}\n\n" for row in dev[: config.shots]]
        if harness:
            header, shots = header + "".join(shots), []
        prompts = Prompts(config, tokenizer, header, shots, room)
        for index, row in enumerate(test[: config.limit or None]):
            question = Question(subject, index, **prompts.ask(mmlu_prompt(row, harness)))
            if harness:
                question.shots = config.shots
            if not writes:
                question.choices = [(question.context, ids) for ids in letters]
            question.target = row[5]
            question.gold = ["ABCD".index(row[5])]
            question.sha256 = question_hash(subject, row)
            yield question


def mmlu_prompt(row: list[str], strip: bool) -> str:
    question = row[0].strip() if strip else row[0]
    for letter, text in zip("ABCD", row[1:5]):
        question += f"\n{letter}. {text}"
    return question + "\nAnswer:"


MMLU = {
    "hendrycks": Protocol(
        mmlu, grades.grade_letter, shots=5, most_shots=99, max_prompt=2048,
        published=(
            ("LLaMA-1 7B / 13B / 65B (paper)", "35.1 / 46.9 / 63.4"),
            ("LLaMA-2 7B / 13B / 70B (paper)", "45.3 / 54.8 / 68.9"),
            ("Falcon 7B / 40B (LLaMA-2 paper)", "26.2 / 55.4"),
        ),
    ),
    "instructeval": Protocol(
        mmlu, grades.grade_beginning, shots=5, most_shots=99, max_prompt=2048, max_new_tokens=2,
        published=(
            ("LLaMA-1 7B / 13B / 65B", "35.2 / 46.2 / 62.6"),
            ("GOAT-7B-Community (its card)", "49.31"),
            ("Alpaca-7B", "41.6"),
            ("Vicuna-13B", "49.7"),
            ("RedPajama-INCITE-7B-Instruct", "38.1"),
        ),
    ),
    "harness": Protocol(mmlu, grades.grade_letter, shots=5, most_shots=99),
}  # fmt: skip
TEXT = Protocol(
    perplexity(Dataset), grades.grade_document
)
PROTOCOLS = {"mmlu": MMLU, **grades.PROTOCOLS, "perplexity": {"windows": TEXT}}


# ---- what the model says ----


class Reader:
    """A model, and the prefix that it has read last: alone, and in every row of a wide decoder."""

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.norm.weight.device
        # in bf16, letters would often have equal logits
        self.unembedding = model.unembedding.weight.float()
        self.prefix: list[int] = []
        self.decoder: Decoder | None = None
        self.wide: Decoder | None = None

    def begin(self, prefix: list[int]) -> Decoder | None:
        """Let a decoder of one row have read the prefix, if there is any."""
        if prefix != self.prefix:
            self.decoder = Decoder(self.model, 1, len(prefix)) if prefix else None
            if prefix:
                self.decoder.read([prefix])
            self.prefix, self.wide = prefix, None
        return self.decoder

    def spread(self, rows: int, slots: int) -> KVCache:
        """A cache whose rows all hold the prefix.

        Its memory is that of the last one where it suffices.
        """
        shape = self.wide.cache.keys.shape if self.wide else (0, 0, 0, 0)  # (layers, B, G, S, K)
        if shape[1] < rows or shape[3] < slots:
            more = rows + rows // 4  # later batches have more rows
            self.wide = Decoder(self.model, more, slots, self.decoder)
        cache = copy.copy(self.wide.cache)
        cache.keys = cache.keys[:, :rows]
        cache.values = cache.values[:, :rows]
        cache.lengths = cache.lengths[:rows]
        cache.trim([len(self.prefix)] * rows)
        return cache

    @torch.no_grad()
    def score(self, batch: ScoreBatch) -> list[tuple[int, int, float]]:
        """(question, choice, log-probability in nats), in fp32 over the whole vocabulary.

        Rows are padded on the right, which a causal model cannot see. Only the positions that count
        are projected.
        """
        self.begin(batch.prefix)
        past = len(batch.prefix)
        longest = max(len(row.ids) for row in batch.rows) - past
        tokens = padded([row.ids[past:] for row in batch.rows], longest).to(self.device)
        cache = self.spread(len(batch.rows), past + longest) if past else None
        hidden = self.model.hidden(tokens, cache)  # (B, T, D)
        places, wanted = [], []
        for i, row in enumerate(batch.rows):
            first = i * longest - past  # where the row's ids begin in hidden, if all were read
            places += range(first + row.begin - 1, first + len(row.ids))
            wanted += [[token] for token in row.ids[row.begin :]]
            wanted.append(list(row.last.values()))
        logprobs = iter(self.logprobs(hidden.flatten(0, 1)[places], wanted))
        results = []
        for row in batch.rows:
            start = sum(next(logprobs)[0] for _ in range(len(row.ids) - row.begin))
            for choice, end in zip(row.last, next(logprobs)):
                results.append((row.question, choice, start + end))
        return results

    def logprobs(self, hidden: torch.Tensor, wanted: list[list[int]]) -> list[list[float]]:
        """The log-probabilities of the wanted tokens after each position of hidden (N, D).

        Positions with fewer wanted tokens have others at the end.
        """
        wanted = padded(wanted, max(map(len, wanted))).to(self.device)
        parts = []
        for some, tokens in zip(hidden.float().split(1024), wanted.split(1024)):
            logits = some @ self.unembedding.T  # (1024, V), so many exist at a time
            parts.append(logits.log_softmax(-1).gather(1, tokens))
        return torch.cat(parts).tolist()

    def write(
        self, batch: ScoreBatch, tokenizer: Tokenizer, protocol: Protocol
    ) -> list[tuple[int, int, str]]:
        """(question, 0, the greedy text after it, up to EOS or a stop of the protocol)."""
        streams = [TextStream(tokenizer, row.ids, protocol.stop) for row in batch.rows]
        texts = [""] * len(streams)

        def add(place: int, token: int) -> bool:
            texts[place] += streams[place].add(token)
            return streams[place].finished

        generate(
            self.model, [row.ids for row in batch.rows], protocol.max_new_tokens,
            end_ids=(tokenizer.eos_id,), stop=add, prefix=self.begin(batch.prefix),
        )  # fmt: skip
        ends = [stream.end() for stream in streams]
        return [(row.question, 0, text + end) for row, text, end in zip(batch.rows, texts, ends)]


def padded(rows: list[list[int]], length: int) -> torch.Tensor:
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


# ---- an evaluation ----

def make_questions(
    reader: Reader, tokenizer: Tokenizer, config: Config, world: World
) -> tuple[list[Question], list[str], dict]:
    """The questions, a key for each by which its answer is known again, what is said of them."""
    protocol, window = PROTOCOLS[config.task][config.protocol], reader.model.config.max_seq_len
    room = min(config.max_prompt or window, window - protocol.max_new_tokens)
    if room < 1:
        new = f"answers of {protocol.max_new_tokens} tokens"
        raise ValueError(f"--task {config.task}: its {new} leave no room in a window of {window}")
    yielded = protocol.questions(config, tokenizer, room)
    questions = list(progress(world, yielded, desc="prompts"))
    if not questions:
        raise ValueError(f"--data {config.data} has no questions")
    model_hash = None
    if world.rank == 0:
        model_hash = weights_sha256(reader.model.named_parameters())
    model_hash = world.agree(model_hash)
    keys, hashes = identify(questions, reader.model, model_hash, config.protocol)
    return questions, keys, {
        "questions": len(questions),
        "prompt_tokens": sum(len(question.context) for question in questions),
        **hashes,
        "weights_sha256": model_hash,
        "first_prompt": tokenizer.decode(questions[0].context),
    }  # fmt: skip


def run_questions(
    reader: Reader, tokenizer: Tokenizer, config: Config, world: World, answers: Answers
) -> list[dict]:
    """Ask the questions that are not answered yet; on the first process all records in order."""
    protocol, questions = PROTOCOLS[config.task][config.protocol], answers.questions
    lines, answered = Path(config.out or "-").with_suffix(".jsonl"), set()
    if config.out:
        answered = set(world.first(answers.resume, lines))
    rows = [row for row in rows_to_read(questions) if row.question not in answered]
    batch_tokens = config.batch_tokens or (16_384 if reader.device.type == "cuda" else 2_048)
    batches = make_batches(questions, rows, batch_tokens, protocol.max_new_tokens)
    work = reader.score
    if protocol.max_new_tokens:
        work = partial(reader.write, tokenizer=tokenizer, protocol=protocol)
    counts = {"total": len(questions), "initial": len(answers.records)}
    with progress(world, desc=config.task, **counts) as bar:
        for results in world.share(batches, work):
            new = answers.add(results)
            bar.update(len(new))
            if config.out:
                append_lines(lines, new)
            bar.set_postfix_str(answers.share_right(), refresh=False)
    return answers.in_order()


def evaluate(config: Config, path: str, world: World) -> dict | None:
    """Measure one model and write what --out asks for; the result, on the first process."""
    out, protocol = Path(config.out), PROTOCOLS[config.task][config.protocol]
    reuse = config.checkpoints == "all" and world.first(out.exists)
    if config.out and not reuse:
        lines = json.dumps({"task": config.task, "subject": ""}).removesuffix('"}')
        title = heading(config.task, config.protocol) + "\n"
        world.first(check_out, out, jsonl=lines, md=title)
    model, tokenizer = load_model(path, config.tokenizer, config.dtype, config.anyway)
    if config.out:
        world.first(out.parent.mkdir, parents=True, exist_ok=True)
    started, reader = time.perf_counter(), Reader(model)
    questions, keys, asked = make_questions(reader, tokenizer, config, world)
    result = describe(config, protocol, path, model, tokenizer) | asked
    if reuse:
        return world.first(read_result, out, {name: result[name] for name in ALIKE})
    answers = Answers(config.task, protocol.grade, questions, keys)
    records = run_questions(reader, tokenizer, config, world, answers)
    if world.rank:
        return None
    result["seconds"] = round(time.perf_counter() - started, 1)
    categories = CATEGORIES if config.task == "mmlu" else None
    result["scores"] = summarize(records, config.task, categories)
    table = describe_result(result, protocol.published)
    print(table)
    if config.out:
        write_result(out, result, records, table)
    return result


# ---- command line ----


def compare(paths: tuple[str, ...], draws: int = 4000) -> dict:
    """Second result less the first on the same questions, with a 95 % interval and a test.

    Questions (of perplexity: documents) are drawn with replacement. Where every score is 0 or 1,
    McNemar's exact test counts who alone is right; else the bootstrap's share beyond 0 is doubled.
    Whether another run of the same settings would do alike is not in it. Raises ValueError unless
    both were asked the same questions in the same way.
    """
    return paired_difference(paths, PROTOCOLS, draws)


def curves(config: Config, world: World):
    """Every checkpoint of every run, measured: a table, and a picture of the main score."""

    def measure(one: Config, path: str) -> tuple[str, list[float]] | None:
        result = evaluate(one, path, world)
        average = PROTOCOLS[one.task][one.protocol].average
        return headline(result, average) if world.rank == 0 else None

    draw_runs(config, world, measure, {name: getattr(config, name) for name in FLAGS})


def main(config: Config):
    if config.compare:
        out = Path(config.out)
        if config.out:
            check_out_name(config.out)
            check_out(out)
        found = compare(config.compare)
        say_difference(found, config.compare)
        if config.out:
            write_whole(out, json.dumps(found, indent=2))
        return
    config, world = settled(config, PROTOCOLS), World()
    if config.checkpoints == "all":
        curves(config, world)
    else:
        evaluate(config, config.model[0], world)


if __name__ == "__main__":
    run_command(main, Config)
