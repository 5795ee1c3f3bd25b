"""A model takes on the pieces of another tokenizer: recipes/grow.py, and what recipes/cabrita.py measures with."""

import doctest
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from conftest import ROOT, additions, assert_same_but_for_rounding, prepare, random_model
from data import Tokenizer
from lib.checkpoints import checkpoints
from lib.codecs import ODD_TEXTS
from lib.errors import BadInput
from lib.tokenizer_training import train_tokenizer
from model import ModelConfig, load, save

sys.path.insert(0, str(ROOT / "recipes"))
import cabrita
import grow
import languages
import study

SHAPE = ModelConfig(16, 2, 4, 2, 24, vocab_size=8, max_seq_len=32)
PROSE = "The old language has words of its own, and the words follow each other as they please.\n"
CODE = "def follow(self, words):\n    return [self.other(word) for word in words]\n"

# ---- tokenizers ----


def made(*pieces: tuple[str, float]) -> bytes:
    """A byte-pair encoding of these pieces and scores, behind the control tokens and the 256 bytes."""
    proto = ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    for piece, kind in kinds.items():
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score, type=1)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


LETTERS = [(letter, -100.0 - place) for place, letter in enumerate("abcd")]


def pieces_of(tokenizer: bytes) -> list[tuple[str, float, int]]:
    return [(piece.piece, piece.score, piece.type) for piece in ModelProto.FromString(tokenizer).pieces]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """One tokenizer of prose and one of code, from the sources of this project."""
    sources = [path.read_text() for path in sorted((ROOT / "lib").glob("*.py"))[:40]]
    both = [languages.languages_of(source) for source in sources]
    found = []
    for language in ("prose", "code"):
        folder = tmp_path_factory.mktemp(language)
        train_tokenizer((texts[language] for texts in both), 700, folder / "tokenizer.model")
        found.append(Tokenizer(folder))
    return tuple(found)


def test_new_pieces_follow_in_their_order_with_their_scores_and_old_ids_stay():
    old = made(*LETTERS, ("ab", 0.0))
    new = made(("cd", -1.0), ("ab", -2.0), ("abcd", -3.0), ("e", -9.0))
    merged = pieces_of(grow.merge(old, new))
    assert merged[: len(pieces_of(old))] == pieces_of(old)
    assert merged[len(pieces_of(old)) :] == [("cd", -1.0, 1), ("abcd", -3.0, 1), ("e", -9.0, 1)]
    assert pieces_of(grow.merge(old, new, len(pieces_of(old)) + 2)) == merged[:-1]
    assert grow.merge(old, grow.merge(old, new)) == grow.merge(old, new)


def test_a_size_below_the_old_one_adds_nothing():
    old = made(*LETTERS)
    assert pieces_of(grow.merge(old, made(("cd", -1.0)), 5)) == pieces_of(old)


def test_control_tokens_and_bytes_of_the_new_tokenizer_are_not_taken():
    new = ModelProto.FromString(made(("cd", -1.0)))
    new.pieces.add(piece="<more>", score=0.0, type=3)
    merged = pieces_of(grow.merge(made(*LETTERS), new.SerializeToString()))
    assert [piece for piece, _, _ in merged[263:]] == ["cd"]
    assert [kind for _, _, kind in merged[3:259]] == [6] * 256


def test_tokenizers_of_two_kinds_are_not_merged():
    other = ModelProto.FromString(made(*LETTERS))
    other.trainer_spec.model_type = 1
    with pytest.raises(BadInput, match="two kinds"):
        grow.merge(made(*LETTERS), other.SerializeToString())


@pytest.mark.parametrize(
    "more, lost",
    [
        ([("ab", 0.0), ("cd", -1.0), ("abcd", -2.0)], []),
        ([("abcd", 0.0)], ["abcd"]),  # no step between
        ([("ab", -1.0), ("cd", -2.0), ("abcd", -3.0), ("bc", 0.0)], ["abcd"]),  # bc comes first
        ([("ab", -1.0), ("bc", 0.0), ("abc", -2.0)], []),  # a and bc make abc too
        ([("xy", 0.0)], []),  # letters that are no pieces can be joined
        ([("xyz", 0.0)], ["xyz"]),
    ],
)
def test_pieces_that_no_text_gives_are_counted(more, lost):
    assert grow.unreachable(made(*LETTERS, *more)) == lost
    begin = 259 + len(LETTERS)
    assert grow.unreachable(made(*LETTERS, *more), begin) == lost
    assert grow.unreachable(made(*LETTERS, *more), begin + len(more)) == []


def test_what_is_called_unreachable_is_in_no_text_and_all_else_can_be():
    """Every text of up to six of the letters."""
    tokenizer = made(*LETTERS, ("ab", -1.0), ("cd", -2.0), ("abcd", -3.0), ("bc", 0.0), ("dd", 5.0), ("add", -1.5))
    read = grow.read(tokenizer)
    texts = ["".join(letters) for size in range(1, 7) for letters in itertools.product("abcd", repeat=size)]
    seen = {token for text in texts for token in read.encode(text)}
    pieces = pieces_of(tokenizer)
    never = [piece for number, (piece, _, _) in enumerate(pieces) if number >= 259 and number not in seen]
    assert never == grow.unreachable(tokenizer) == ["abcd"]


def test_every_text_comes_back_from_a_merged_tokenizer(trained):
    old, new = trained
    merged = grow.read(grow.merge(old.data, new.data, 900))
    assert merged.vocab_size == 900 and (merged.bos_id, merged.eos_id) == (old.bos_id, old.eos_id)
    for text in (*ODD_TEXTS, PROSE, CODE, (ROOT / "model.py").read_text(), "a▁b"):
        assert merged.decode(merged.encode(text)) == text
    code = (ROOT / "model.py").read_text()
    assert len(merged.encode(code)) < 0.9 * len(old.encode(code))


def test_the_old_pieces_of_a_new_one_are_its_text(trained):
    old, new = trained
    merged = grow.read(grow.merge(old.data, new.data))
    found = grow.old_pieces(old, merged)
    assert len(found) == merged.vocab_size - old.vocab_size > 100
    for number, ids in enumerate(found, old.vocab_size):
        assert old.decode(ids) == merged.decode([number])
        assert len(ids) > 1 or old.codec.model.is_byte(ids[0])  # a letter that old had not


def test_a_tokenizer_that_begins_texts_with_a_blank_is_read_right(shared):
    """LLaMA's own: neither its pieces nor those of others begin with one blank more."""
    llama = Tokenizer(shared("llama2_tokenizer/tokenizer.model"))
    assert grow.unreachable(llama.data) == []
    merged = grow.read(grow.merge(llama.data, made(("▁▁▁▁def", -1.0), ("self.", -2.0))))
    assert [llama.decode(ids) for ids in grow.old_pieces(llama, merged)] == ["   def", "self."]


# ---- the model ----


def tiny(tie: bool = False):
    """Four pieces of two channels; the embedding counts from 0, the output from 10."""
    model = random_model(ModelConfig(2, 1, 1, 1, 4, vocab_size=4, max_seq_len=8, tie_embeddings=tie))
    with torch.no_grad():
        model.embedding.weight.copy_(torch.arange(8.0).view(4, 2))
        if not tie:
            model.unembedding.weight.copy_(torch.arange(10.0, 18.0).view(4, 2))
    return model


@pytest.mark.parametrize(
    "rows, inputs, outputs",
    [
        ("mean", [[3, 4], [3, 4]], [[13, 14], [13, 14]]),
        ("pieces", [[3, 4], [4, 5]], [[13, 14], [14, 15]]),  # of pieces 0 and 3, and of 1, 2 and 3
        ("first", [[3, 4], [4, 5]], [[10, 11], [12, 13]]),
    ],
)
def test_new_rows_are_as_worked_by_hand(rows, inputs, outputs):
    larger = grow.grow(tiny(), 4, [[0, 3], [1, 2, 3]], rows)
    assert larger.config.vocab_size == 6
    assert larger.embedding.weight[4:].tolist() == inputs
    assert larger.unembedding.weight[4:].tolist() == outputs
    assert larger.embedding.weight[:4].equal(tiny().embedding.weight)
    assert larger.unembedding.weight[:4].equal(tiny().unembedding.weight)


def test_random_rows_have_the_spread_of_the_old_ones_and_follow_the_seed():
    model = random_model(replace(SHAPE, vocab_size=300))
    one, same, other = (grow.grow(model, 300, [[0]] * 1000, "random", seed) for seed in (1, 1, 2))
    for end in ("embedding", "unembedding"):
        old, rows = model.get_submodule(end).weight.detach(), one.get_submodule(end).weight[300:].detach()
        assert abs(rows.std() / old.std() - 1) < 0.05 and abs(rows.mean()) < 0.1 * rows.std()
        assert rows.equal(same.get_submodule(end).weight[300:])
        assert not rows.equal(other.get_submodule(end).weight[300:])
    assert not one.embedding.weight[300:].equal(one.unembedding.weight[300:])


def test_tied_matrices_stay_one_and_cannot_have_two_kinds_of_rows():
    larger = grow.grow(tiny(tie=True), 4, [[0, 3]], "pieces")
    assert larger.unembedding.weight is larger.embedding.weight
    assert larger.embedding.weight[4].tolist() == [3, 4]
    with pytest.raises(BadInput, match="--rows first"):
        grow.grow(tiny(tie=True), 4, [[0, 3]], "first")


def test_rows_behind_the_vocabulary_are_padding_that_is_replaced():
    larger = grow.grow(tiny(), 3, [[0, 2], [0]], "pieces")  # the row of 3 belongs to no piece
    assert larger.embedding.weight.tolist() == [[0, 1], [2, 3], [4, 5], [2, 3], [0, 1]]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("rows", ["random", "mean", "pieces"])
def test_old_texts_have_the_logits_they_had(rows, tie):
    """Of the old ids; a new piece's logit comes beside them and takes its share of the probability."""
    model = random_model(replace(SHAPE, tie_embeddings=tie))
    larger = grow.grow(model, 8, [[1, 2], [3, 4, 5]], rows)
    tokens = torch.randint(8, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = model(tokens), larger(tokens)
    assert after.shape == (3, 20, 10)
    assert_same_but_for_rounding(after[..., :8], before, additions(SHAPE, 20))
    losses = [torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for x in
              (before, after[..., :8], after)]  # fmt: skip
    assert abs(losses[0] - losses[1]) < 1e-5 < losses[2] - losses[0]


def test_the_command_writes_a_model_that_reads_the_merged_tokenizer(trained, tmp_path, monkeypatch, capsys):
    old, new = trained
    model = random_model(replace(SHAPE, vocab_size=700))
    save(model, tmp_path / "base", old)
    (tmp_path / "new").mkdir()
    new.save(tmp_path / "new")
    config = grow.Config(str(tmp_path / "base"), str(tmp_path / "new"), str(tmp_path / "grown"), size=800)
    grow.main(config)
    merged, larger = Tokenizer(tmp_path / "grown"), load(tmp_path / "grown")
    assert merged.vocab_size == larger.config.vocab_size == 800
    ids = grow.old_pieces(old, merged)[99]
    assert_same_but_for_rounding(larger.unembedding.weight[799], model.unembedding.weight[ids].mean(0), len(ids))
    assert f"100 new pieces; no text gives {len(grow.unreachable(merged.data, 700))} of them" in capsys.readouterr().out
    with pytest.raises(BadInput, match="no piece to add"):
        grow.main(replace(config, out=str(tmp_path / "none"), size=700))


# ---- two languages, and how well a model knows them ----

MODULE = '''"""Says what it is.

    >>> f(1)
    2
"""

def f(x):  # a comment
    """Adds one."""
    return x + 1

class C:
    "Nothing."
'''


def test_prose_and_code_of_a_module_are_told_apart():
    found = languages.languages_of(MODULE)
    assert found["prose"] == "Says what it is.\n\n2\n\nAdds one.\n\nNothing."
    assert found["code"] == "def f(x):\n    return x + 1\n\nclass C:\n    pass"
    assert languages.languages_of("") == {"code": "", "prose": ""}


def test_passages_are_held_out_lines_whatever_the_tokenizer(trained, tmp_path):
    (tmp_path / "texts").mkdir()
    texts = [f"{number} {PROSE}" * 30 for number in range(40)]
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.md").write_text(text)
    found = []
    for name, tokenizer in (("bytes", "bytes"), ("prose", tmp_path / "tokenizer.model")):
        trained[0].save(tmp_path)
        prepare((str(tmp_path / "texts"),), tmp_path / name, str(tokenizer), val_fraction=0.2, workers=1)
        found.append(languages.passages(tmp_path / name, 10))
    assert found[0] == found[1] and len(set(found[0])) > 5
    trained_on = Tokenizer(tmp_path / "bytes").decode(np.fromfile(tmp_path / "bytes" / "train_00000.bin", np.uint16))
    for passage in found[0]:
        assert 600 <= len(passage) < 700 and passage.endswith("\n")
        assert any(passage in text for text in texts) and passage not in trained_on


def test_a_model_that_knows_nothing_needs_the_bits_of_a_uniform_choice():
    """However long a text is, in one window or in several, and in whatever vocabulary."""
    tokenizer, model = Tokenizer("bytes"), random_model(replace(SHAPE, vocab_size=1024))
    with torch.no_grad():
        model.unembedding.weight.zero_()
    found = languages.bits(model, tokenizer, ["a" * 10, "é" * 45])
    assert np.allclose(found, [10 * 10 / 50, 10 * 90 / 50]) and np.isclose(np.mean(found), 10)


def test_bits_count_every_token_once_with_what_stands_before_it():
    """Of a text that fits in a window of 32, with BOS; of a longer one the last window has 32 tokens too."""
    tokenizer, model = Tokenizer("bytes"), random_model(replace(SHAPE, vocab_size=258))

    def nats(ids: list[int], last: int) -> float:
        whole = torch.tensor([ids])
        with torch.no_grad():
            each = model(whole[:, :-1]).log_softmax(-1).gather(-1, whole[:, 1:, None])
        return -float(each[0, -last:].sum())

    short, long = "a word, and more", "all the words of a text that is longer than a window"
    ids = tokenizer.encode(long, bos=True)
    assert len(ids) == 53
    wanted = [nats(tokenizer.encode(short, bos=True), 16), nats(ids[:33], 32) + nats(ids[20:], 20)]
    assert np.allclose(languages.bits(model, tokenizer, [short, long]), np.array(wanted) / np.log(2) / 34)


def test_fertility_is_tokens_a_word_and_bytes_a_token(trained):
    assert languages.fertility(Tokenizer("bytes"), ["a bc", "é\n"]) == (7 / 3, 1.0)
    old, new = trained
    merged = grow.read(grow.merge(old.data, new.data))
    (before, size), (after, larger) = (languages.fertility(one, [CODE]) for one in (old, merged))
    assert after < before and larger > size and np.isclose(before * size, after * larger)


def test_the_two_texts_are_files_for_data_py(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text(MODULE)
    monkeypatch.setattr(languages, "find_files", lambda *_: [tmp_path / "m.py", Path("/x/encodings/y.py")])
    languages.write_languages(tmp_path / "out")
    code = (tmp_path / "out" / "code.jsonl").read_text().splitlines()
    prose = (tmp_path / "out" / "prose.jsonl").read_text().splitlines()
    assert len(code) == 1 and "return x + 1" in code[0]
    assert len(prose) > 50 and "Adds one." in prose[-1] and "Adds one." not in code[0]


@pytest.mark.parametrize("module", [cabrita, grow, languages])
def test_what_is_written_beside_the_functions_is_true(module):
    assert doctest.testmod(module).failed == 0


# ---- the experiment ----


def test_a_curve_is_measured_at_the_steps_asked_and_kept(tiny_run, tiny_data, tmp_path, monkeypatch):
    run = tiny_run(steps=8, save_every=2, keep_every=2)
    words = []
    monkeypatch.setattr(cabrita, "HERE", tmp_path)
    monkeypatch.setattr(cabrita, "STEPS", (0, 4))
    monkeypatch.setattr(cabrita, "equal_text", lambda config: 8)
    monkeypatch.setattr(cabrita, "code_of", lambda *_: tiny_data)
    monkeypatch.setattr(cabrita, "first_model", lambda *_: "start")
    monkeypatch.setattr(cabrita, "train", lambda out, *more: words.append((out.name, *more)) or run)
    monkeypatch.setattr(cabrita, "held_out", lambda count: {"code": ["a"], "prose": ["b", "Document 7."]})
    model, tokenizer = load(run / "step_00000004"), Tokenizer("bytes")
    found = cabrita.curve(3, "old", cabrita.Config())
    assert words[0][0] == "on_old_3" and ("--steps", 8) in zip(words[0], words[0][1:])
    assert {step: {name: len(bits) for name, bits in row.items()} for step, row in found.items()} == {
        step: {"code": 1, "prose": 2} for step in ("0", "4", "8")
    }
    assert np.allclose(found["4"]["prose"], languages.bits(model, tokenizer, ["b", "Document 7."]))
    assert [path.name for path in checkpoints(run)] == ["step_00000008"]
    assert cabrita.curve(3, "old", cabrita.Config()) == found and len(words) == 1


@pytest.mark.parametrize("good", [True, False])
def test_predictions_are_judged_by_the_sides_on_which_curves_lie(good, tmp_path, monkeypatch):
    """Where every prediction is true, and where each is false: the same curves with their order turned."""
    start = {"old": 4.0, "random": 5.0, "mean": 4.5, "pieces": 3.0, "first": 2.0}
    end = {"old": 2.0, "random": 1.8, "mean": 1.7, "pieces": 1.5, "first": 1.4}
    sign = 1 if good else -1
    for seed in range(2):
        for arm in cabrita.ARMS:
            noise = np.array([0.0, 0.01, -0.01])
            values = {
                "0": {"code": start[arm], "prose": start[arm]},
                "200": {"code": end[arm], "prose": 6.0},
                "244": {"code": 1.6, "prose": 6.0},
            }
            rows = {step: {name: list(sign * v + noise) for name, v in row.items()} for step, row in values.items()}
            (tmp_path / f"curve_{arm}_{seed}.json").write_text(json.dumps(rows))
    monkeypatch.setattr(cabrita, "HERE", tmp_path)
    monkeypatch.setattr(cabrita, "STEPS", (0, 200))
    monkeypatch.setattr(cabrita, "equal_text", lambda config: 244)
    report = study.Report("x", "X")
    cabrita.results(report, cabrita.Config())
    text = "\n".join(report.parts)
    assert text.count("**confirmed in direction**" if good else "**refuted in direction**") == 7
    assert f"pieces less old are then {-0.1 * sign:+.4g}" in text
