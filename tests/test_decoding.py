"""Two models at once: a draft that guesses for the model, an amateur from which it differs."""

import dataclasses
import itertools
import json
import random
from collections import Counter

import pytest
import torch
from scipy import stats

from conftest import command, flags, random_model
from data import Tokenizer
from lib import speculative
from lib.contrast import Contrast, contrast
from lib.sampling import Sampling, choose, distribution, pick
from lib.speculative import Speculation, accept
from lib.with_model import check_alike
from model import ModelConfig, load, save
from sample import Decoder, generate

TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=258, max_seq_len=48)
SMALL = ModelConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=24, vocab_size=258, max_seq_len=40)
FOUR = ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=2, ffn_dim=8, vocab_size=4, max_seq_len=8)


def prompts_of(count: int, vocab_size: int = 258) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(draw.randrange(1, 20))] for _ in range(count)]


def speculate(model, draft, prompt, count, sampling=Sampling(), tokens=4):
    made = Speculation(Decoder, draft, tokens, sampling)
    return generate(model, [prompt], count, sampling, decoder=made)[0], made


# ---- what is drawn ----


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.6), Sampling(1, min_p=0.2),
     Sampling(1.0, repetition_penalty=1.5), Sampling(0.0, repetition_penalty=2.0)],
)  # fmt: skip
def test_tokens_are_drawn_with_the_probabilities_of_distribution(sampling):
    """choose, asked with numbers that divide 0 to 1 evenly, takes each token as often as it should."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 2.0, 0.1, -3.0, 0.7]])
    even = (torch.arange(2000) + 0.5) / 2000
    drawn = choose(logits.repeat(2000, 1), [[0, 4]] * 2000, sampling, even)
    share = torch.bincount(drawn, minlength=8) / 2000
    expected = distribution(logits.clone(), [[0, 4]], sampling)[0]
    assert expected.sum() == pytest.approx(1.0) and (share - expected).abs().max() <= 1 / 2000 + 1e-6


def test_pick_never_takes_what_has_no_share():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    assert [int(pick(p, torch.tensor([u]))) for u in (0.0, 0.2499, 0.25, 0.9999999, 1.0)] == [1, 1, 3, 3, 3]


# ---- speculative decoding ----


@pytest.mark.parametrize("tokens", [1, 4, 7])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3)])
def test_without_chance_a_draft_changes_no_token(tokens, sampling):
    """Across a full context window too, and with a draft whose window is shorter."""
    model = random_model(TINY)
    drafts = [random_model(SMALL), model]  # one that is nearly always wrong, one that is always right
    for draft, prompt in itertools.product(drafts, prompts_of(4)):
        expected = generate(model, [prompt], 60, sampling)[0]
        assert speculate(model, draft, prompt, 60, sampling, tokens)[0] == expected


def test_a_draft_that_is_always_right_gives_one_token_more_than_it_guesses():
    model = random_model(TINY)
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, repetition_penalty=2.0)):
        _, made = speculate(model, model, [1, 2, 3], 40, sampling)
        assert made.rounds == 8 and made.accepted == 32 and made.described().startswith("5.00 tokens a round; 100%")


def test_the_trained_stories_are_the_known_text_with_a_draft(shared):
    model = load(shared("stories260K/stories260K.bin"))
    expected = json.loads(shared("stories260K/expected_greedy.json").read_text())["ids"]
    draft = load(shared("stories260K/stories260K.bin"))
    draft.blocks = draft.blocks[:4]  # its first four layers
    text, made = speculate(model, draft, [1], 200)
    assert text == expected[1:] and 0 < made.accepted < made.guessed


def test_the_rule_on_numbers_worked_by_hand():
    """p = (.5 .3 .2), q = (.25 .5 .25): of a guess 1, three fifths are taken, the rest goes to 0, which p has more."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.5, 0.25])
    assert [accept(p, q, 1, u) for u in (0.0, 0.59, 0.61, 0.99)] == [1, 1, 0, 0]
    assert [accept(p, q, 0, u) for u in (0.0, 0.99)] == [0, 0]
    assert [accept(p, q, 2, u) for u in (0.0, 0.79, 0.81)] == [2, 2, 0]


def p_of_chi_square(count: int) -> float:
    """How likely chance makes two sampled tokens differ so from the model's exact distribution."""
    model, draft = random_model(FOUR), random_model(FOUR, seed=1)
    for each in (model, draft):
        each.unembedding.weight.data *= 4  # so that some tokens are likely
    logits = model(torch.tensor([[1, 2, first] for first in range(4)]))
    first, second = logits[0, 1].double().softmax(-1), logits[:, 2].double().softmax(-1)
    exact = (first[:, None] * second).flatten().detach().numpy()
    drawn = Counter()
    for seed in range(count):
        text, _ = speculate(model, draft, [1, 2], 2, Sampling(1.0, seed=seed), tokens=2)
        drawn[4 * text[0] + text[1]] += 1
    seen = [drawn[place] for place in range(16)]
    return stats.chisquare(seen, exact / exact.sum() * count).pvalue


def test_sampled_text_has_the_models_own_distribution():
    assert p_of_chi_square(3000) > 0.001


def test_a_rule_that_draws_from_the_model_where_a_guess_is_rejected_is_found_wrong(monkeypatch):
    """So the test above has the power to find a rule that is nearly right."""

    def wrong(p, q, guess, uniform):
        taken = min(1.0, float(p[guess] / q[guess]))
        if uniform < taken:
            return guess
        return int(pick(p[None], torch.tensor([(uniform - taken) / (1 - taken)])))

    monkeypatch.setattr(speculative, "accept", wrong)
    assert p_of_chi_square(1000) < 1e-6


# ---- contrastive decoding ----


def test_contrast_on_numbers_worked_by_hand():
    """With beta 1 the scores are p² / a, and .03 is less than a tenth of .6."""
    expert = torch.tensor([[0.6, 0.3, 0.07, 0.03]]).log()
    amateur = torch.tensor([[0.4, 0.1, 0.4, 0.1]]).log()
    scores = contrast(expert, amateur, alpha=0.1, beta=1.0)[0]
    assert scores[:3].exp().tolist() == pytest.approx([0.9, 0.9, 0.07**2 / 0.4])
    assert scores[3] == -1e30
    shifted = contrast(expert + 5, amateur - 3, alpha=0.1, beta=1.0)[0]
    assert (shifted - scores)[:3].tolist() == pytest.approx([5, 5, 5], abs=1e-5)


def test_without_weight_an_amateur_changes_nothing():
    """beta 0 is greedy; and an amateur that is the model itself has nothing to differ from."""
    model, amateur = random_model(TINY), random_model(SMALL)
    prompts = prompts_of(3)
    expected = generate(model, prompts, 20)
    assert generate(model, prompts, 20, decoder=Contrast(Decoder, amateur, 0.1, 0.0)) == expected
    assert generate(model, prompts, 20, decoder=Contrast(Decoder, model, 0.1, 2.0)) == expected
    assert generate(model, prompts, 20, decoder=Contrast(Decoder, amateur, 0.1, 2.0)) != expected


def test_contrast_with_the_cache_equals_full_passes_alone_and_in_a_batch():
    model, amateur = random_model(TINY), random_model(SMALL)
    prompts = prompts_of(4)
    together = generate(model, prompts, 12, decoder=Contrast(Decoder, amateur))
    for prompt, found in zip(prompts, together):
        ids = list(prompt)
        for _ in range(12):
            both = (each(torch.tensor([ids]))[:, -1] for each in (model, amateur))
            ids.append(int(contrast(*both, 0.1, 0.5).argmax()))
        assert found == ids[len(prompt) :]


# ---- commands ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, a small one of the same tokenizer, and one of another."""
    where = tmp_path_factory.mktemp("two")
    bytes_ = Tokenizer("bytes")
    for seed, name in enumerate(("model", "small")):
        save(random_model(TINY, seed), where / name, bytes_)
    save(random_model(SMALL), where / "short", bytes_)
    save(random_model(dataclasses.replace(TINY, vocab_size=300)), where / "wide", bytes_)
    return where


def test_sample_with_a_draft_prints_the_same_text_and_what_was_accepted(folders):
    common = flags(dict(model=folders / "model", prompt="abc", temperature=0, max_new_tokens=30))
    plain = command("sample.py", *common)
    guessed = command("sample.py", *common, *flags(dict(draft=folders / "small", draft_tokens=3)))
    assert guessed.stdout == plain.stdout and "tokens a round" in guessed.stderr
    other = command("sample.py", *common, *flags(dict(amateur=folders / "small", alpha=1e-9, beta=3)))
    assert other.returncode == 0 and other.stdout != plain.stdout


@pytest.mark.parametrize(
    "more, sentence",
    [
        (dict(draft="{small}", num=2), "guesses for one text at a time"),
        (dict(draft="{small}", draft_tokens=0), "--draft_tokens 0 must lie between 1 and 64"),
        (dict(draft="{small}", amateur="{small}"), "does not go with --amateur"),
        (dict(amateur="{small}", serve=8000), "is for --prompt, not for --serve"),
        (dict(amateur="{short}"), "has a window of 40, less than the model's 48"),
        (dict(draft="{wide}"), "has 300 logits, not 258 as the model"),
        (dict(amateur="{small}", alpha=0.0), "--alpha 0.0 must lie between 0 and 1"),
        (dict(amateur="{small}", beta=-1.0), "--beta -1.0 must be a number that is not negative"),
    ],
)
def test_two_models_that_cannot_go_together_are_refused_in_one_sentence(folders, more, sentence):
    paths = {name: str(folders / name) for name in ("small", "short", "wide")}
    more = {name: value.format(**paths) if isinstance(value, str) else value for name, value in more.items()}
    done = command("sample.py", *flags(dict(model=folders / "model") | more), check=False)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_second_model_needs_the_same_tokenizer(shared):
    other = Tokenizer(shared("stories260K/tok512.rebuilt.model"))
    with pytest.raises(ValueError, match="PATH has another tokenizer than the model: tok512.rebuilt.model"):
        check_alike("PATH", Tokenizer("bytes"), other, TINY, TINY)


def test_choices_are_scored_by_contrast(folders, tmp_path):
    """--amateur's scores are (1 + beta) times the model's less beta times the amateur's, and compared with its own."""
    asked = [("ab", ["cd", "xyz", "q"]), ("b", ["a", "b"])]
    rows = [json.dumps({"context": context, "choices": choices, "answer": 1}) for context, choices in asked]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))

    def scored(name, **more):
        out = tmp_path / f"{name}.json"
        common = flags(dict(task="choices", data=tmp_path / "q.jsonl", out=out, **more))
        command("eval.py", *common)
        return [json.loads(line)["logprobs"] for line in out.with_suffix(".jsonl").read_text().splitlines()]

    expert, amateur = (scored(name, model=folders / name) for name in ("model", "small"))
    both = scored("both", model=folders / "model", amateur=folders / "small", beta=0.75)
    for three in zip(expert, amateur, both):
        for e, a, s in zip(*three):
            assert s == pytest.approx(1.75 * e - 0.75 * a, abs=1e-4)
    assert json.loads((tmp_path / "both.json").read_text())["beta"] == 0.75
    command("eval.py", "--compare", str(tmp_path / "model.json"), str(tmp_path / "both.json"))
    words = flags(dict(model=folders / "model", task="passkey", amateur=folders / "small"))
    refused = command("eval.py", *words, check=False)
    assert refused.returncode == 2 and "scores choices, and passkey has none" in refused.stderr
