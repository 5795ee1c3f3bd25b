"""Scoring questions of multiple choice without a new process, for recipes that change a model many times."""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation
from lib.batches import make_batches, rows_to_read
from lib.eval_flags import settled
from lib.share import World
from lib.with_model import asked_in_chat
from sample import load_model


class Questions:
    """The questions of a file of multiple choice, asked as `eval.py --task choices` asks the run, or with --chat."""

    def __init__(self, run: Path, data: Path, limit: int = 0, chat: bool = True):
        model, tokenizer = load_model(str(run))
        words = dict(model=(str(run),), task="choices", data=str(data), chat=chat, limit=limit)
        config = settled(evaluation.Config(**words), evaluation.PROTOCOLS)
        config = asked_in_chat(config, str(run), tokenizer, False)
        self.questions = evaluation.make_questions(model, tokenizer, config, World())

    def logprobs(self, model) -> np.ndarray:
        """The log-probability of each choice (questions, choices), in nats."""
        scores, reader = defaultdict(dict), evaluation.Reader(model.eval())
        for batch in make_batches(self.questions, list(rows_to_read(self.questions)), 2048):
            for question, choice, logprob in reader.score(batch):
                scores[question][choice] = logprob
        return np.array([[scores[n][choice] for choice in sorted(scores[n])] for n in range(len(self.questions))])

    def gold(self) -> np.ndarray:
        """The right choice of each question."""
        return np.array([question.gold[0] for question in self.questions])

    def right(self, model) -> np.ndarray:
        """Whether the likeliest choice is the right one, of each question."""
        return self.logprobs(model).argmax(1) == self.gold()
