"""Sampling: trap 29 and what generation promises."""

import json
import math
import random
from collections import Counter

import pytest
import torch

import lib.sampling
from conftest import command, flags, random_model
from data import Tokenizer
from lib.sampling import NOT_FINITE, Sampling, choose, distribution, next_tokens
from lib.stream import TextStream
from model import ModelConfig, Transformer, load, save
from sample import complete, generate, load_model

TINY = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=258, max_seq_len=48)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TINY)


@pytest.fixture(scope="module")
def stories(shared):
    return load(shared("stories260K/stories260K.bin")), Tokenizer(shared("stories260K/tok512.rebuilt.model"))


def prompts_of(lengths) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(256) for _ in range(length)] for length in lengths]


@torch.no_grad()
def without_cache(model, prompt: list[int], count: int) -> list[int]:
    """Greedy continuation by a full pass for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_trained_checkpoint_gives_its_known_text(stories, shared):
    model, _ = stories
    expected = json.loads(shared("stories260K/expected_greedy.json").read_text())["ids"]
    assert generate(model, [[1]], 200) == [expected[1:]]
    batch = [[1, 403, 407, 261], [1], [1, 376, 298, 315, 421, 395, 317, 426], expected[:50]]
    together = generate(model, batch, 200)
    assert together[1] == expected[1:] and together[3][:151] == expected[50:]


def test_cached_generation_equals_full_passes_alone_and_in_a_batch(model):
    prompts = prompts_of([1, 7, 20, 3])
    expected = [without_cache(model, prompt, 20) for prompt in prompts]
    assert generate(model, prompts, 20) == expected
    assert [generate(model, [prompt], 20)[0] for prompt in prompts] == expected


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, seed=3), Sampling(0.7, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)]
)
def test_a_random_row_is_the_same_alone_and_in_a_batch(model, sampling):
    prompts = prompts_of([4, 9, 1])
    together = generate(model, prompts, 20, sampling)
    assert together[0] == generate(model, prompts[:1], 20, sampling)[0]
    assert together == generate(model, prompts, 20, sampling)
    assert together != generate(model, prompts, 20, Sampling(**vars(sampling) | {"seed": 4}))
    twice = generate(model, [prompts[0]] * 2, 20, sampling)
    assert twice[0] != twice[1]


def draw_many(logits, sampling: Sampling, count: int = 4000) -> Counter:
    rows = torch.tensor([logits]).repeat(count, 1)
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return Counter(choose(rows, [[]] * count, sampling, uniform).tolist())


def test_temperature_zero_is_greedy_and_one_is_the_models_distribution():
    logits = torch.tensor([0.5, 0.2, 0.25, 0.05]).log().tolist()
    assert draw_many(logits, Sampling(0.0)) == {0: 4000}
    counts = draw_many(logits, Sampling(1.0))
    assert [counts[i] / 4000 for i in range(4)] == pytest.approx([0.5, 0.2, 0.25, 0.05], abs=0.03)
    assert draw_many(logits, Sampling(0.01)) == draw_many(logits, Sampling(1e-40)) == {0: 4000}


def test_top_k_keeps_k_tokens_also_when_they_are_equal():
    assert len(draw_many([1.0] * 10, Sampling(1.0, top_k=3))) == 3
    assert set(draw_many([0.0, 3.0, 1.0, 2.0], Sampling(1.0, top_k=2))) == {1, 3}


def test_top_p_keeps_the_fewest_tokens_that_reach_p():
    logits = torch.tensor([0.5, 0.2, 0.25, 0.05]).log().tolist()
    assert set(draw_many(logits, Sampling(1.0, top_p=0.49))) == {0}
    assert set(draw_many(logits, Sampling(1.0, top_p=0.51))) == {0, 2}
    assert set(draw_many(logits, Sampling(1.0, top_p=0.94))) == {0, 1, 2}
    assert set(draw_many(logits, Sampling(1.0, top_p=1e-9))) == {0}


def test_min_p_keeps_tokens_by_their_share_of_the_likeliest():
    logits = torch.tensor([0.5, 0.2, 0.25, 0.05]).log().tolist()
    assert set(draw_many(logits, Sampling(1.0, min_p=0.45))) == {0, 2}
    assert set(draw_many(logits, Sampling(1.0, min_p=1.0))) == {0}


def test_the_repetition_penalty_lowers_tokens_that_are_there_already():
    logits = torch.tensor([[2.0, 1.9, -1.0], [2.0, 1.9, -1.0]])
    assert choose(logits.clone(), [[0], [2]], Sampling(repetition_penalty=1.5), torch.zeros(2)).tolist() == [1, 0]
    picked = choose(torch.tensor([[-1.0, -1.2]]), [[0, 0]], Sampling(repetition_penalty=1.5), torch.zeros(1))
    assert picked.tolist() == [1]


@pytest.mark.parametrize(
    "sampling",
    [dict(top_p=0.3), dict(top_p=0.9), dict(min_p=0.3), dict(top_k=3), dict(top_k=8), dict(top_k=9, top_p=0.5),
     dict(top_k=5, top_p=0.5, min_p=0.1), dict(top_p=1e-9), dict()],
)  # fmt: skip
def test_the_few_that_are_ranked_first_give_what_ranking_all_gives(sampling, monkeypatch):
    """Also where many logits are equal, as in bf16, and where more than the few may be drawn."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 50, generator=draw) * 2
    logits[:150] = logits[:150].round()
    uniform, contexts = torch.rand(300, generator=draw), [[]] * 300
    found = {}
    for few in (50, 8):
        monkeypatch.setattr(lib.sampling, "FEW", few)
        for begin in range(0, 300, 2):
            rows = slice(begin, begin + 2)
            tokens = choose(logits[rows].clone(), contexts[rows], Sampling(0.9, **sampling), uniform[rows])
            p = distribution(logits[rows].clone(), contexts[rows], Sampling(0.9, **sampling))
            found.setdefault(few, []).append((tokens, p))
    for (tokens, p), (few_tokens, few_p) in zip(*found.values(), strict=True):
        assert torch.equal(tokens, few_tokens) and torch.allclose(p, few_p, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_no_token(bad):
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = bad
    tokens = next_tokens(logits, [[]] * 3, Sampling(1.0, top_p=0.9), torch.full((3,), 0.5))
    assert tokens[1] == NOT_FINITE and min(tokens[0], tokens[2]) >= 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_random_numbers_give_allowed_tokens(uniform):
    logits = torch.tensor([[0.3, 0.1, 5.0, float("-inf")]])
    assert choose(logits, [[]], Sampling(1.0, top_k=2), torch.tensor([uniform])).item() in (2, 0)


@pytest.mark.parametrize(
    "options",
    [dict(temperature=-1), dict(top_k=-1), dict(top_p=0), dict(top_p=1.5), dict(min_p=2), dict(repetition_penalty=0)],
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))} {next(iter(options.values()))}"):
        Sampling(**options).check()


def test_rows_end_by_themselves_at_an_end_token_or_when_told(model):
    prompts = prompts_of([5, 8, 2])
    free = generate(model, prompts, 15)
    end = free[0][4]
    ended = generate(model, prompts, 15, end_ids=(end,))
    assert ended == [row[: row.index(end)] if end in row else row for row in free]
    told = generate(model, prompts, 15, stop=lambda row, token: row == 1)
    assert told == [free[0], free[1][:1], free[2]]


def test_generation_goes_on_beyond_the_context_window_and_says_so(model, capsys):
    prompts = prompts_of([40, 48, 3])
    long = generate(model, prompts, 60)
    assert "the context window of 48 tokens is full; reading on with the last 24" in capsys.readouterr().err
    for prompt, row in zip(prompts, long):
        assert len(row) == 60 and row == generate(model, [prompt], 60)[0]
        context, expected = list(prompt), []
        for _ in range(60):
            context = context[-24:] if len(context) > 48 else context
            expected += without_cache(model, context, 1)
            context.append(expected[-1])
        assert row == expected


def test_a_row_may_end_at_the_very_moment_its_window_overflows(model):
    prompts = prompts_of([48, 5, 30])
    free = generate(model, prompts, 10)
    assert generate(model, prompts, 10, stop=lambda row, token: row == 0) == [free[0][:1], *free[1:]]


@pytest.mark.parametrize("length", [0, 49])
def test_a_prompt_that_does_not_fit_is_refused(model, length):
    with pytest.raises(ValueError, match=f"a prompt of {length} tokens does not fit the model's context window of 48"):
        generate(model, [[5], [5] * length], 4)


# ---- text ----


def streamed(tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream, pieces = TextStream(tokenizer, prompt, stop), []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.finished:
            break
    return [*pieces, stream.end()]


@pytest.mark.parametrize(
    "name",
    ["bytes", "llama2_tokenizer/tokenizer.model", "stories260K/tok512.rebuilt.model", "gpt2_bpe/cl100k_base.tiktoken"],
)
def test_streamed_text_is_the_whole_text(name, shared):
    tokenizer, draw = Tokenizer(name if name == "bytes" else shared(name)), random.Random(0)
    texts = ["Hello  world,\n\n  how are you?", "né 🙂🙂 안녕 ▁ \u2028", "a🙂", " blank", ""]
    for text in texts:
        prompt, ids = tokenizer.encode_prompt("Say"), tokenizer.encode("Say" + text)[len(tokenizer.encode("Say")) :]
        pieces = streamed(tokenizer, prompt, ids)
        assert "".join(pieces) == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]
        assert not any("\ufffd" in piece for piece in pieces)
    for _ in range(200):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(20)]
        assert "".join(streamed(tokenizer, [tokenizer.bos_id], ids)) == tokenizer.decode([tokenizer.bos_id, *ids])


def test_a_stop_string_ends_the_text_wherever_it_is_split():
    tokenizer = Tokenizer("bytes")
    text = "one STO two STOP three"
    pieces = streamed(tokenizer, [256], list(text.encode()), ("STOP", "never"))
    assert "".join(pieces) == "one STO two "
    assert "".join(streamed(tokenizer, [256], list(b"one STO"), ("STOP",))) == "one STO"
    assert "".join(streamed(tokenizer, [256], list(b"a b c"), ("c", "b"))) == "a "
    assert "".join(streamed(tokenizer, [256], list(b"x ab"), ("b", "ab"))) == "x "  # at once


def test_a_completion_streams_what_it_returns(stories):
    model, tokenizer = stories
    got = {0: "", 1: ""}
    prompts = [tokenizer.encode_prompt(text) for text in ("Once upon a time ", "Lily")]
    texts = complete(
        model,
        tokenizer,
        prompts,
        40,
        on_text=lambda row, text: got.update({row: got[row] + text}),
    )
    assert texts == [got[0], got[1]] and texts[0].startswith(", there was a little")
    assert texts[1] == complete(model, tokenizer, prompts[1:], 40)[0]
    stopped = complete(model, tokenizer, prompts, 40, stop=("girl",))
    assert stopped[0] == texts[0].split("girl")[0]


def test_the_command_prints_prompt_and_continuation(shared):
    files = {"model": shared("stories260K/stories260K.bin"), "tokenizer": shared("stories260K/tok512.rebuilt.model")}
    done = command("sample.py", *flags(files | {"prompt": "Once upon a time", "temperature": 0, "max_new_tokens": 12}))
    assert done.stdout == "Once upon a time, there was a little girl named Lily. She\n"
    done = command("sample.py", *flags(files | {"num": 2, "max_new_tokens": 5, "prompt": "Lily"}), "Tom")
    assert [line for line in done.stdout.splitlines() if line.startswith("---")] == ["--- 1", "--- 2", "--- 3", "--- 4"]
    assert done.stdout.count("Lily") >= 2 and done.stdout.count("Tom") >= 2


def test_a_model_and_its_tokenizer_must_be_there_and_fit(model, tmp_path):
    save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="brings no tokenizer; name one with --tokenizer"):
        load_model(str(tmp_path / "m"))
    assert load_model(str(tmp_path / "m"), "bytes")[1].name == "bytes"
    small = Transformer(ModelConfig(8, 1, 1, 1, 8, vocab_size=100))
    save(small, tmp_path / "small", Tokenizer("bytes"))
    with pytest.raises(ValueError, match="tokenizer bytes has 258 tokens, more than the model's 100"):
        load_model(str(tmp_path / "small"))


@pytest.mark.parametrize("options, message", [
    ({"model": "nowhere"}, "sample.py: nowhere: no such file or folder"),
    ({"prompt": "x" * 60}, "a prompt of 61 tokens does not fit the model's context window of 48"),
    ({"num": 0}, "--num 0 must be at least 1"),
    ({"stop": ""}, "--stop texts that are not empty"),
    ({"temperature": "nan"}, "--temperature nan"),
    ({"export": "m"}, "m exists; choose another folder"),
])  # fmt: skip
def test_bad_input_is_one_sentence(options, message, model, tmp_path, monkeypatch, capsys):
    import sample
    from lib.cli import run_command

    monkeypatch.chdir(tmp_path)
    save(model, tmp_path / "m", Tokenizer("bytes"))
    monkeypatch.setattr("sys.argv", ["sample.py", *flags({"model": "m"} | options)])
    with pytest.raises(SystemExit) as stopped:
        run_command(sample.main, sample.Config)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
