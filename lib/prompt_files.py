"""Files of prompts and their answers: what is asked, what is answered already, lines as they come."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from lib.chat_formats import INPUT, Turn, messages_of
from lib.errors import BadInput
from lib.files import write_whole
from lib.identity import weights_sha256
from lib.record_files import read_records
from lib.records import parse_json
from lib.results import append_lines
from lib.sampling import Sampling
from lib.templates import end_ids, render_prompt
from lib.with_model import found_template

BATCH = 16  # prompts that are answered together
ASKED_IN = ("prompt", "question", "instruction", "text")


def answer_file(config, model, tokenizer, complete: Callable[..., list[str]]):
    """Write --out: each record of --prompts with its answer, a batch of lines at a time.

    A model that has a chat template answers, any other continues; complete is that of sample.py.
    Lines that are there already, of the same prompts, weights and flags, are not written again.
    Raises ValueError for other lines, and for a record that asks nothing or too much.
    """
    from tqdm import tqdm

    template = found_template(config.template, config.model, tokenizer)
    ends = end_ids(template, tokenizer)
    window = model.config.max_seq_len
    records, prompts = [], []
    for place, record in read_records(Path(config.prompts)):
        try:
            ids = ids_of(record, template, config.system, tokenizer)
        except ValueError as error:
            raise BadInput(f"{place}: {error}") from None
        if len(ids) > window:
            raise BadInput(f"{place}: {len(ids)} tokens do not fit the model's window of {window}")
        records.append(record)
        prompts.append(ids)
    if not prompts:
        raise BadInput(f"--prompts {config.prompts} has no prompts")
    drawn = {field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)}
    known = weights_sha256(model.named_parameters())
    same = json.dumps([known, drawn, config.max_new_tokens, config.stop])
    keys = [key_of(same, ids) for ids in prompts]
    out = Path(config.out)
    done = answered(out, keys)
    with tqdm(total=len(prompts), initial=done, desc="answers") as bar:
        for first in range(done, len(prompts), BATCH):
            part = slice(first, first + BATCH)
            answers = complete(
                model, tokenizer, prompts[part], config.max_new_tokens, config, config.stop,
                end_ids=ends,
            )  # fmt: skip
            lines = zip(records[part], answers, keys[part])
            append_lines(out, [one | {"answer": text, "key": key} for one, text, key in lines])
            bar.update(len(answers))
    print(f"wrote {out}")


def ids_of(record, template: str, system: str, tokenizer) -> list[int]:
    """The prompt of a record. Raises ValueError for one that asks nothing."""
    if not isinstance(record, dict):
        raise record if isinstance(record, ValueError) else BadInput("it is not an object")
    before = [Turn("system", system)] if system else []
    if "messages" in record or "conversations" in record:
        if not template:
            raise BadInput("messages need a model of chats, or a --template")
        (turns,) = messages_of(record)
        return render_prompt([*before, *turns], template, tokenizer)
    text = next((record[name] for name in ASKED_IN if isinstance(record.get(name), str)), None)
    if text is None:
        raise BadInput(f"it has none of the fields {', '.join(ASKED_IN)}, messages")
    if record.get("input"):
        text += INPUT + str(record["input"])
    if not template:
        return tokenizer.encode_prompt(text)
    return render_prompt([*before, Turn("user", text)], template, tokenizer)


def key_of(same: str, ids: list[int]) -> str:
    return hashlib.sha256(f"{same} {ids}".encode()).hexdigest()[:16]


def answered(out: Path, keys: list[str]) -> int:
    """How many of the prompts, whose keys these are, have their line in a file already: whole
    batches, since what is drawn depends on the place in one.

    What a kill left of the next batch is cut off. Raises ValueError for other lines.
    """
    lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    for number, line in enumerate(whole, 1):
        values = parse_json(line, f"{out}:{number}")
        key = values.get("key") if isinstance(values, dict) else None
        if number > len(keys) or key != keys[number - 1]:
            problem = "is no answer to the prompt at this place by this model with these flags"
            raise BadInput(f"--out {out}: line {number} {problem}; choose another name")
    done = len(whole)
    if done < len(keys):
        done -= done % BATCH
        if lines[done:]:
            write_whole(out, b"".join(lines[:done]))
    return done
