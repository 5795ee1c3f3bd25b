"""Measure a model: MMLU from prompt to score, and other tasks by protocols of lib/protocols.py.

    python eval.py --model out/RUN --task mmlu --data DIR --out results.json
    python eval.py --model out/RUN --task perplexity --data data/stdlib
    python eval.py --compare a.json b.json

1. `mmlu` turns each question into a prompt, after solved examples, and the prompt into token ids.
   It yields `Question`s: context, the ids of the prompt; choices, for each the ids before it (here
   the context) and its own; gold, the places of the right choices.
2. `make_batches` puts prompts alike in length together, and sets apart the prefix with which all
   prompts of a subject begin.
3. `Reader.score` runs the model on a batch: the log-probability of every choice. (Where a protocol
   wants a text for an answer, `Reader.write` lets the model write one.)
4. `Answers` collects them until a question is complete. Then the protocol's grade compares them
   with gold: `grade_letter` takes the likeliest choice; its score is 1 if that is right, else 0.
5. `summarize` averages the scores over all questions, over subjects and in categories, with 95 %
   intervals (the headline is over questions, or as the protocol's `average` says), and
   `describe_result` makes the table, beside published scores of the same protocol.

Several processes share the batches, and the first collects. A score here is that of the protocol's
reference code, and depends neither on the batch nor on the processes.

To bring your own task, write lines {"context": ..., "choices": [...], "answer": 0} for --task
choices, or add a `Protocol` to `PROTOCOLS`: a function that yields Questions, and one that grades.
"""

from lib.cli import BadInput, run_command  # isort: skip (first: refuses old Pythons, Windows)

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from data import Dataset, Tokenizer
from lib.answers import Answers, check_free, describe, identify, read_finished, write_result
from lib.batches import ScoreBatch, make_batches, rows_to_read
from lib.comparison import report_difference
from lib.contrast import ContrastReader
from lib.curves import draw_runs
from lib.decoding import Quantize
from lib.eval_flags import settled
from lib.grades import grade_beginning, grade_document, grade_letter
from lib.identity import weights_sha256
from lib.mmlu import CATEGORIES, SUBJECTS, read_mmlu
from lib.perplexity import perplexity
from lib.prefix import SharedPrefix
from lib.prompts import Prompts, Question, chosen_subjects, pair, question_hash
from lib.protocols import MMLU_HENDRYCKS, MMLU_INSTRUCTEVAL, OTHER_TASKS, Protocol
from lib.share import World, progress
from lib.statistics import paired_difference, summarize
from lib.stream import TextStreams
from lib.tables import describe_result
from lib.with_model import asked_in_chat
from model import Transformer
from sample import Decoder, generate, load_beside, load_model

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
    """instead: two such results; tests whether their difference is more than chance"""
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
    """only the first N questions of a subject; 0 is all, of passkey 10"""
    max_prompt: int = 0
    """tokens; a longer prompt loses examples, then is cut from the left; 0 is the protocol's"""
    bos: bool = True          # begin prompts with BOS
    amateur: str = ""         # a weaker model: score a choice by what the model likes more
    beta: float = 0.5         # of --amateur, see lib/contrast.py
    chat: bool = False        # ask as a user of the model's chat template
    template: str = ""        # another one for that
    # tokens in a forward pass, padding included; caches may hold 4 times that; 0 is 16,384 on a
    # GPU, 2,048 on a CPU
    batch_tokens: int = 0
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    quantize: Quantize = "none"  # int8: matrices as whole numbers, on a CPU
    anyway: bool = False      # also measure a run whose model.py computed something else
    trust_variant: bool = False  # run the code that a variant's folder brings; read it first


# ---- the questions of MMLU ----


def mmlu(config: Config, tokenizer: Tokenizer, room: int) -> Iterator[Question]:
    """The questions of MMLU (Hendrycks et al. 2021), with prompts of at most room tokens.

    After a header come --shots solved examples (5), or as many as fit, and the question:

        The following are multiple choice questions (with answers) about  abstract algebra.

        Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.
        A. 0
        B. 1
        C. 2
        D. 3
        Answer: B

        Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.
        ...
        Answer:

    The choices are the tokens of " A" to " D"; by the protocol instructeval the model writes.
    instructeval and hendrycks have two blanks after "about", as in the original, and use cells as
    they are in the file; harness has one, strips questions, and keeps all examples, cutting the
    prompt from its left.
    """
    harness = config.protocol == "harness"
    letters: list[list[int]] = []
    if config.protocol != "instructeval":
        # encoded behind the end of a prompt: alone, they may have other tokens
        letters = [pair(config, tokenizer, "\nAnswer:", f" {letter}")[1] for letter in "ABCD"]
        room -= max(map(len, letters)) - 1  # the last token of a choice is not read
    for subject in chosen_subjects(config, SUBJECTS):
        solved = read_mmlu(Path(config.data) / "dev" / f"{subject}_dev.csv")
        rows = read_mmlu(Path(config.data) / "test" / f"{subject}_test.csv")
        header, examples = mmlu_examples(config, subject, solved)
        prompts = Prompts(config, tokenizer, header, examples, room)
        for index, row in enumerate(rows[: config.limit or None]):
            fitted = prompts.ask(mmlu_prompt(row, harness))  # context, shots and what was cut
            question = Question(subject, index, **fitted)
            if harness:  # they are in the header
                question.shots = config.shots
            question.choices = [(question.context, letter) for letter in letters]
            question.target = row[5]
            question.gold = ["ABCD".index(question.target)]
            question.sha256 = question_hash(subject, row)
            yield question


def mmlu_examples(
    config: Config, subject: str, solved: list[list[str]]
) -> tuple[str, list[str]]:
    """What the prompts of a subject begin with: a header, and the examples that may leave."""
    harness = config.protocol == "harness"
    blanks = " " if harness else "  "
    about = f"about{blanks}{subject.replace('_', ' ')}"
    header = f"The following are multiple choice questions (with answers) {about}.\n\n"
    if len(solved) < config.shots:
        few = f"the {len(solved)} examples of {subject}"
        raise BadInput(f"--shots {config.shots} is more than {few}")
    examples = [f"{mmlu_prompt(row, harness)} {row[5]}\n\n" for row in solved[: config.shots]]
    if harness:  # which keeps all of them
        return header + "".join(examples), []
    return header, examples


def mmlu_prompt(row: list[str], strip: bool) -> str:
    """The prompt for a row of the CSV file, whose last cell, the answer, is left out."""
    prompt = row[0].strip() if strip else row[0]
    for letter, choice in zip("ABCD", row[1:5]):
        prompt += f"\n{letter}. {choice}"
    return prompt + "\nAnswer:"


PROTOCOLS = {  # by task and name
    "mmlu": {
        "hendrycks": Protocol(
            mmlu, grade_letter, shots=5, most_shots=99, max_prompt=2048, published=MMLU_HENDRYCKS
        ),
        "instructeval": Protocol(
            mmlu, grade_beginning, shots=5, most_shots=99, max_prompt=2048, max_new_tokens=2,
            published=MMLU_INSTRUCTEVAL,
        ),
        "harness": Protocol(mmlu, grade_letter, shots=5, most_shots=99),
    },
    **OTHER_TASKS,
    "perplexity": {
        "windows": Protocol(questions=perplexity(Dataset), grade=grade_document),
    },
}


def chosen_protocol(config: Config) -> Protocol:
    return PROTOCOLS[config.task][config.protocol]


# ---- what the model answers ----


class Reader:
    """A model that scores choices or writes answers; a batch's common prefix is read once."""

    def __init__(self, model: Transformer):
        self.model = model
        self.device = model.norm.weight.device
        # in bf16, letters would often have equal logits
        self.unembedding = model.unembedding.weight.to_dense().float()
        self.prefix = SharedPrefix(model, Decoder)

    @torch.no_grad()
    def score(self, batch: ScoreBatch) -> list[tuple[int, int, float]]:
        """(question, choice, log-probability in nats), in fp32 over the whole vocabulary.

        A row's ids are a context and, from `begin` on, a choice but for its last token. Choices
        that differ in this one alone, as letters do, share a row: `last` has it for each of them.
        Rows are padded on the right, which a causal model cannot see. Only the positions that count
        are projected on the vocabulary.
        """
        past = len(batch.prefix)  # tokens that are in the cache already
        unread = [row.ids[past:] for row in batch.rows]
        longest = max(map(len, unread))
        cache = self.prefix.cache(batch.prefix, len(batch.rows), past + longest)
        hidden = self.model.hidden(padded(unread, longest).to(self.device), cache)  # (B, T, D)
        states, wanted = [], []  # at each position that counts, and the tokens that may come next
        for row, outputs in zip(batch.rows, hidden):
            before_choice = row.begin - 1 - past  # the output there predicts its first token
            states.append(outputs[before_choice : len(row.ids) - past])
            wanted += [[token] for token in row.ids[row.begin :]]
            wanted.append(list(row.last.values()))
        logprobs = iter(self.logprobs(torch.cat(states), wanted))
        results = []
        for row in batch.rows:
            *shared, last = islice(logprobs, len(row.ids) - row.begin + 1)
            beginning = sum(values[0] for values in shared)  # 0 where a choice is one token
            for choice, ending in zip(row.last, last):
                results.append((row.question, choice, beginning + ending))
        return results

    def logprobs(self, states: torch.Tensor, wanted: list[list[int]]) -> list[list[float]]:
        """The log-probabilities of the wanted tokens after each position, states being (N, D).

        Positions with fewer wanted tokens are filled up; ignore what follows theirs.
        """
        most = max(map(len, wanted))
        tokens = padded(wanted, most).to(self.device)
        parts = []
        for chunk, chosen in zip(states.float().split(1024), tokens.split(1024)):
            logits = chunk @ self.unembedding.T  # (1024, V), so many exist at a time
            parts.append(logits.log_softmax(-1).gather(1, chosen))
        return torch.cat(parts).tolist()

    def write(
        self, batch: ScoreBatch, tokenizer: Tokenizer, protocol: Protocol
    ) -> list[tuple[int, int, str]]:
        """(question, 0, the greedy text after it, up to EOS or a stop of the protocol)."""
        prompts = [row.ids for row in batch.rows]
        texts = TextStreams(tokenizer, prompts, protocol.stop)
        generate(
            self.model, prompts, protocol.max_new_tokens, end_ids=(tokenizer.eos_id,),
            stop=texts.add, prefix=self.prefix.read(batch.prefix),
        )  # fmt: skip
        return [(row.question, 0, text) for row, text in zip(batch.rows, texts.end())]


def padded(rows: list[list[int]], length: int) -> torch.Tensor:
    """Rows of different lengths as one tensor (B, length), zeros on their right."""
    zeros = [[0] * (length - len(row)) for row in rows]
    return torch.tensor([row + more for row, more in zip(rows, zeros)])


# ---- an evaluation ----


def make_questions(
    model: Transformer, tokenizer: Tokenizer, config: Config, world: World
) -> list[Question]:
    """The questions of a task, their prompts so short that the answer fits in the window too."""
    protocol = chosen_protocol(config)
    window = model.config.max_seq_len
    room = min(config.max_prompt or window, window - protocol.max_new_tokens)
    if room < 1:
        new = f"answers of {protocol.max_new_tokens} tokens"
        raise BadInput(f"--task {config.task}: its {new} leave no room in a window of {window}")
    yielded = protocol.questions(config, tokenizer, room)
    questions = list(progress(world, yielded, desc="prompts"))
    if not questions:
        raise BadInput(f"--data {config.data} has no questions")
    return questions


def answer_questions(
    reader: Reader, tokenizer: Tokenizer, config: Config, world: World, answers: Answers
):
    """Let the model answer, and the first process grade, what is not answered yet."""
    protocol = chosen_protocol(config)
    answered = set(world.first(answers.resume))  # before this evaluation was broken off
    rows = [row for row in rows_to_read(answers.questions) if row.question not in answered]
    default = 16_384 if reader.device.type == "cuda" else 2_048
    batch_tokens = config.batch_tokens or default
    batches = make_batches(answers.questions, rows, batch_tokens, protocol.max_new_tokens)
    work = reader.score
    if protocol.max_new_tokens:
        work = partial(reader.write, tokenizer=tokenizer, protocol=protocol)
    counts = {"total": len(answers.questions), "initial": len(answers.records)}
    with progress(world, desc=config.task, **counts) as bar:
        for results in world.share(batches, work):
            bar.update(answers.add(results))
            bar.set_postfix_str(answers.share_right(), refresh=False)


def evaluate(config: Config, path: str, world: World) -> dict | None:
    """Measure one model and write what --out asks for; the result, on the first process."""
    protocol, out = chosen_protocol(config), Path(config.out)
    # a checkpoint of a curve may be measured already
    finished = config.checkpoints == "all" and world.first(out.exists)
    if config.out and not finished:
        world.first(check_free, out, config.task, config.protocol)
    settings = (config.tokenizer, config.dtype, config.anyway, config.quantize)
    model, tokenizer = load_model(path, *settings)
    config = asked_in_chat(config, path, tokenizer, world.rank == 0)
    if config.out:
        world.first(out.parent.mkdir, parents=True, exist_ok=True)
    started = time.perf_counter()
    reader = Reader(model)
    model_hash = world.first(weights_sha256, model.named_parameters())
    if config.amateur:
        amateur = load_beside(config.amateur, config, model, tokenizer)
        reader = ContrastReader(reader, Reader(amateur), config.beta)
        model_hash += world.first(weights_sha256, amateur.named_parameters()) + str(config.beta)
    questions = make_questions(model, tokenizer, config, world)
    keys, asked = identify(questions, tokenizer, model, model_hash, config.protocol)
    result = describe(config, protocol, path, model, tokenizer) | asked
    if finished:
        return world.first(read_finished, out, result)
    answers = Answers(config, protocol.grade, questions, keys)
    answer_questions(reader, tokenizer, config, world, answers)
    if world.rank > 0:
        return None
    records = answers.in_order()
    categories = CATEGORIES if config.task == "mmlu" else None
    result["seconds"] = round(time.perf_counter() - started, 1)
    result["scores"] = summarize(records, config.task, categories)
    table = describe_result(result, protocol.published)
    print(table)
    if config.out:
        write_result(out, result, records, table)
    return result


def compare(paths: tuple[str, ...], draws: int = 4000) -> dict:
    """Second result less the first, see lib.statistics.paired_difference."""
    return paired_difference(paths, PROTOCOLS, draws)


def main(config: Config):
    if config.compare:
        report_difference(config.compare, config.out, compare)
        return
    config, world = settled(config, PROTOCOLS), World()
    if config.checkpoints == "all":
        draw_runs(config, world, evaluate, PROTOCOLS)
    else:
        evaluate(config, config.model[0], world)


if __name__ == "__main__":
    run_command(main, Config)
