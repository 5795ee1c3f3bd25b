"""Two models at once: a draft that guesses for the model, an amateur from which it differs."""

import copy
import dataclasses
import gc
import itertools
import json
import math
import random
import weakref
from collections import Counter

import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

from conftest import command, flags, random_model
from data import Tokenizer
from lib import decoding, recording, speculative
from lib.contrast import Contrast, contrast
from lib.decoding import FEW, Int8Linear, PackedLinear, has_packed, lay_out, prepare
from lib.errors import BadInput
from lib.identity import weights_sha256
from lib.recording import Recorded
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
    for draft, prompt in itertools.product(drafts, prompts_of(3)):
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
    assert p_of_chi_square(1500) > 0.001


def test_a_rule_that_draws_from_the_model_where_a_guess_is_rejected_is_found_wrong(monkeypatch):
    """So the test above has the power to find a rule that is nearly right."""

    def wrong(p, q, guess, uniform):
        taken = min(1.0, float(p[guess] / q[guess]))
        if uniform < taken:
            return guess
        return int(pick(p[None], torch.tensor([(uniform - taken) / (1 - taken)])))

    monkeypatch.setattr(speculative, "accept", wrong)
    assert p_of_chi_square(700) < 1e-6


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


# ---- how matrices lie in memory ----


def test_matrices_that_lie_column_by_column_are_the_same_matrices():
    for tied in (True, False):
        model = random_model(dataclasses.replace(TINY, tie_embeddings=tied))
        expected, prompts = copy.deepcopy(model), prompts_of(3)
        prepare(model, "none")
        assert all(map(torch.equal, model.parameters(), expected.parameters()))
        assert model.unembedding.weight.stride() == (1, 258)
        assert (model.embedding.weight is model.unembedding.weight) == tied
        assert generate(model, prompts, 20) == generate(expected, prompts, 20)


def test_products_column_by_column_are_those_of_the_formula_and_have_gradients():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=False)
    expected = copy.deepcopy(linear)
    lay_out(linear)
    changed = copy.deepcopy(linear)
    with torch.no_grad():
        changed.weight.mul_(2)
    for shape in ((1, 1, 24), (1, 5, 24), (3, 1, 24), (7, 24), (0, 24)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.allclose(linear(x), expected(x), atol=1e-5)
            assert torch.allclose(changed(x), 2 * expected(x), atol=1e-5)
    x = torch.randn(5, 24)
    linear(x).sum().backward()
    expected(x).sum().backward()
    assert torch.allclose(linear.weight.grad, expected.weight.grad, atol=1e-5)


def test_a_prepared_model_has_its_log_probabilities(random_rows=(2, 9)):
    model = random_model(TINY)
    tokens = torch.randint(TINY.vocab_size, random_rows, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.log_probs(tokens[:, :-1], tokens[:, 1:])
        assert torch.allclose(prepare(model, "none").log_probs(tokens[:, :-1], tokens[:, 1:]), expected, atol=1e-5)


needs_bf16 = pytest.mark.skipif(not has_packed(), reason="this CPU has no products of bf16")


@needs_bf16
@pytest.mark.parametrize("tied", [True, False])
def test_packed_matrices_are_the_same_matrices(tied):
    """Their products are rounded once, and what is between them is fp32: nearer than all in bf16."""
    exact = random_model(dataclasses.replace(TINY, tie_embeddings=tied)).to(torch.bfloat16)
    plain, packed = exact.float(), prepare(copy.deepcopy(exact).to(torch.bfloat16), "none")
    assert isinstance(packed.unembedding, PackedLinear) and packed.norm.weight.dtype == torch.float32
    both = (plain, packed)
    names = [sorted(name for name, _ in model.named_parameters()) for model in both]
    assert names[1] == sorted({*names[0], "unembedding.weight"})
    if not tied:
        assert weights_sha256(plain.named_parameters()) == weights_sha256(packed.named_parameters())
    tokens = torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (model(tokens) for model in both)
        rough = copy.deepcopy(plain).to(torch.bfloat16)(tokens)
    assert found.dtype == torch.float32
    assert (found - expected).square().mean() < (rough - expected).square().mean()
    reader = Decoder(packed, 2, 40)
    assert reader.cache.keys.dtype == torch.float32
    pieces = [reader.read(tokens[:, begin:end].tolist()) for begin, end in ((0, 7), (7, 8), (8, 40))]
    assert (pieces[-1] - found[:, -1]).square().mean() < 0.2 * (rough - expected).square().mean()


@needs_bf16
def test_a_model_in_bf16_is_exported_and_measured_as_it_is(folders, tmp_path):
    words = flags(dict(model=folders / "model", dtype="bf16"))
    command("sample.py", *words, *flags(dict(export=tmp_path / "exported")))
    exported = load(tmp_path / "exported", dtype=torch.bfloat16)
    source = load(folders / "model", dtype=torch.bfloat16)
    assert all(map(torch.equal, exported.parameters(), source.parameters()))
    (tmp_path / "t.txt").write_text("some text " * 20)
    results = []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / f"{dtype}.json"
        command("eval.py", *flags(dict(model=folders / "model", task="perplexity", data=tmp_path / "t.txt", out=out,
                                       dtype=dtype)))  # fmt: skip
        results.append(json.loads(out.read_text()))
    first, second = results
    assert [first["dtype"], second["dtype"]] == ["float32", "bfloat16"]
    bits = [result["scores"]["bits_per_byte"][0] for result in results]
    assert bits[1] == pytest.approx(bits[0], rel=0.01)


def test_little_work_takes_one_thread_and_leaves_the_others_as_they_were(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        model = random_model(TINY)
        hidden = model.hidden

        def watched(*words):
            seen.append(torch.get_num_threads())
            return hidden(*words)

        model.hidden = watched
        generate(model, [[1, 2, 3]], 3)
        assert seen == [1, 1, 1] and torch.get_num_threads() == 2
        size = sum(p.numel() for p in model.parameters())
        monkeypatch.setattr(decoding, "LITTLE", 2 * size)  # three tokens are more, one is not
        generate(model, [[1, 2, 3]], 3)
        assert seen[3:] == [2, 1, 1]
        with pytest.raises(ZeroDivisionError), decoding.threads_for(1):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [64, 40])
def test_a_matrix_in_whole_numbers_is_near_the_matrix(width):
    """Each number is at most half a step off, and scales are rounded before the numbers are.

    Of a width that is no multiple of 32, PyTorch's product would read what lies behind a row.
    """
    torch.manual_seed(0)
    linear = torch.nn.Linear(width, 24, bias=False)
    small = Int8Linear(linear)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((small.weight - linear.weight).abs() <= 0.51 * step).all()
    assert sum(p.nbytes for p in small.parameters()) == 24 * width + 24 * 2
    for rows in (1, FEW, FEW + 1, 30):  # by PyTorch's product, or as a matrix of bf16
        x = torch.randn(rows, width)
        y, expected = small(x[None])[0], x @ small.weight.T
        assert y.dtype == torch.float32 and (y - expected).abs().max() < 0.02 * expected.abs().max()


# ---- recorded steps ----


def played_again(action):
    """As lib.recording.cuda_graph, without a GPU: the same operations on the same tensors, whatever the host counts."""
    results = []

    def first():
        results.append(action())
        return results[0]

    graph = make_fx(first)()  # which runs it, as recording on a GPU does not
    return lambda: results.pop() if results else graph()


@pytest.fixture
def recorded(monkeypatch):
    """A model, and the same whose steps are recorded, in rooms of 16 tokens and more."""
    monkeypatch.setattr(recording, "LEAST", 16)
    model = random_model(TINY)
    other = copy.deepcopy(model)
    other.hidden = Recorded(other, played_again)
    return model, other


@pytest.mark.parametrize("end_ids", [(), tuple(range(30, 40))])
def test_recorded_steps_write_the_same(end_ids, recorded):
    """While a cache moves to a larger room, rows leave, and the window is full and read anew."""
    texts = [generate(model, prompts_of(4), 90, end_ids=end_ids) for model in recorded]
    assert texts[0] == texts[1]
    assert bool(end_ids) == (len(set(map(len, texts[0]))) > 1)
    assert len({room.size for room in recorded[1].hidden.rooms}) > 1


def test_a_recorded_step_depends_on_nothing_that_the_host_counts(recorded):
    """Played again for another tenant, shorter than the one it was recorded with, it is still right."""
    model, other = recorded
    for length in (11, 3, 7):
        readers = [Decoder(net, 1, 16) for net in recorded]
        for tokens in (list(range(1, 1 + length)), [7], [8], [9], [10]):
            mine, expected = (reader.read([tokens]) for reader in reversed(readers))
            assert torch.allclose(mine, expected, atol=1e-5)
        assert readers[1].cache.longest == length + 4 == int(readers[1].cache.lengths)
    assert len(other.hidden.rooms) == 1 and other.hidden.rooms[0].steps > 6


def test_two_that_live_together_have_a_room_each(recorded):
    plain, model = recorded
    readers = [Decoder(net, 1, 16) for net in (model, model, plain, plain)]
    for tokens in ([1, 2], [3], [4], [5], [6]):
        both = [tokens, [token + 9 for token in tokens]]
        mine_a, mine_b, plain_a, plain_b = (reader.read([chunk]) for reader, chunk in zip(readers, 2 * both))
        assert torch.allclose(mine_a, plain_a, atol=1e-5) and torch.allclose(mine_b, plain_b, atol=1e-5)
    assert len(model.hidden.rooms) == 2


def test_only_what_goes_on_moves_into_a_room(recorded):
    """Not a cache that reads one token after a prefix, as scoring does, nor what asks for gradients."""
    _, model = recorded
    reader = Decoder(model, 2, 20)
    reader.read([[1, 2], [3, 4]])
    reader.read([[5], [6]])
    assert not model.hidden.rooms
    with torch.enable_grad():
        reader.model.hidden(torch.tensor([[5], [6]]), reader.cache)
    assert not model.hidden.rooms
    reader.read([[5], [6]])
    assert [room.size for room in model.hidden.rooms] == [(2, 16)]


def test_rooms_take_no_more_than_their_share_of_memory(recorded):
    """Those that nobody is in go first; a cache that finds no room is read without one."""
    plain, model = recorded
    model.hidden.most_bytes = most = 100_000
    readers = []
    for rows in range(1, 11, 3):
        prompts = [[1, 2, 3]] * rows
        assert generate(model, prompts, 5) == generate(plain, prompts, 5)
        assert sum(room.nbytes for room in model.hidden.rooms) <= most
    assert len(model.hidden.rooms) > 1
    for _ in range(8):
        readers.append(Decoder(model, 4, 40))
        for token in range(4):
            readers[-1].read([[token]] * 4)
    assert sum(room.nbytes for room in model.hidden.rooms) <= most < 8 * model.hidden.rooms[0].nbytes


def test_without_memory_for_a_room_a_cache_stays_where_it_is(recorded, monkeypatch):
    def full(like, tokens):
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain, model = recorded
    monkeypatch.setattr(recording, "Room", full)
    assert generate(model, prompts_of(2), 30) == generate(plain, prompts_of(2), 30)
    assert not model.hidden.rooms


@pytest.mark.parametrize("then", [[1] * 20, [1, 2]])
def test_a_cache_in_a_room_still_takes_as_much_as_it_was_made_for(then, recorded):
    """Its room is of 16 tokens, and it was made for 60."""
    readers = [Decoder(model, 1, 60) for model in recorded]
    for tokens in ([1, 2, 3], *([token] for token in range(10)), then, [4], [5], [6], [7] * 9):
        expected, mine = (reader.read([tokens]) for reader in readers)
        assert torch.allclose(mine, expected, atol=1e-5)
    with pytest.raises(BadInput, match="do not fit"):
        readers[1].read([[1] * 40])


def test_a_draft_in_recorded_steps_writes_what_the_model_writes(recorded):
    """Across the ends of rooms, where it reads two tokens at once after a full success."""
    plain, model = recorded
    for prompt in prompts_of(2):
        expected = generate(plain, [prompt], 40)[0]
        assert speculate(model, copy.deepcopy(model), prompt, 40)[0] == expected


def test_what_cannot_be_recorded_is_read_plainly(recorded):
    plain, model = recorded

    def refuses(action):
        raise RuntimeError("operation not permitted when stream is capturing")

    model.hidden.record = refuses
    assert generate(model, prompts_of(3), 30) == generate(plain, prompts_of(3), 30)
    assert not model.hidden.rooms and model.hidden.record is None


def test_what_was_not_finite_is_gone_with_its_tenant(recorded):
    _, model = recorded
    for bad in (True, False):
        reader = Decoder(model, 1, 16)
        reader.read([[1]])
        for _ in range(4):
            reader.read([[2]])
        if bad:
            reader.cache.keys[:, :, :, 3] = math.nan
            reader.cache.values[:, :, :, 3:] = math.inf
        reader.trim([2])
        finite = [reader.read([[2]]).isfinite().all() for _ in range(2)]
        del reader
        assert bad or all(finite)
    assert len(model.hidden.rooms) == 1


def test_a_copy_of_a_model_has_recordings_of_its_own_and_no_model_stays_behind(recorded):
    plain, model = recorded
    generate(model, [[1, 2]], 10)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    assert generate(model, [[1, 2]], 10) == generate(plain, [[1, 2]], 10)
    del other.hidden
    expected = generate(other, [[1, 2]], 10)
    assert expected != generate(plain, [[1, 2]], 10)
    third = copy.deepcopy(model)
    third.load_state_dict(other.state_dict())
    assert generate(third, [[1, 2]], 10) == expected
    gc.disable()
    gone = weakref.ref(third)
    del third
    assert gone() is None
    gc.enable()


def test_in_whole_numbers_the_stories_lose_little(shared):
    """Bits a byte rise by less than half a per cent, and cached decoding equals full passes but for rounding."""
    model = load(shared("stories260K/stories260K.bin"))
    ids = json.loads(shared("stories260K/expected_greedy.json").read_text())["ids"]
    tokens = torch.tensor([ids])

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).detach())

    before = loss()
    prepare(model, "int8")
    assert abs(loss() / before - 1) < 0.02  # of one text
    reader = Decoder(model, 1, 201)
    one_by_one = torch.cat([reader.read([[token]]) for token in ids])
    difference = (one_by_one - model(tokens)[0]).abs().max()
    assert difference < 0.05 * one_by_one.abs().max()
    assert torch.equal(one_by_one.argmax(-1)[:50], tokens[0, 1:51])


def test_a_command_writes_and_measures_in_whole_numbers(folders, tmp_path):
    words = flags(dict(model=folders / "model", quantize="int8"))
    command("sample.py", *words, *flags(dict(prompt="abc", max_new_tokens=5)))
    (tmp_path / "t.txt").write_text("some text " * 20)
    results = []
    for kind in ("none", "int8"):
        out = tmp_path / f"{kind}.json"
        more = dict(model=folders / "model", task="perplexity", data=tmp_path / "t.txt", out=out, quantize=kind)
        command("eval.py", *flags(more))
        results.append(json.loads(out.read_text()))
    first, second = results
    assert first["weights_sha256"] != second["weights_sha256"] and second["quantize"] == "int8"
    refused = command("sample.py", *words, *flags(dict(export=tmp_path / "x")), check=False)
    assert refused.returncode == 2 and "--quantize int8 does not go with --export" in refused.stderr
