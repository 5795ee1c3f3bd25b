"""plainllama promises that training in fp16 loses no small gradient, and that one which overflows does no harm."""

import json
import types

import pytest
import torch
import torch.distributed as dist

import train
from conftest import TINY_RUN, run_ranks
from lib import kernels
from lib.packed import attend_within, one_by_one
from lib.scaling import LossScale
from model import Transformer, plain_attention
from sample import load_model
from test_dpo import pairs  # noqa: F401
from test_train import CPU, build, log, micro_batch, read_checkpoint, rows, same_bits, world  # noqa: F401
from train import Config, Guard

YES, NO = torch.tensor(True), torch.tensor(False)


def scaled_guard(scale: float = 2.0**16) -> Guard:
    guard = Guard(6.0, CPU, scaled=True)
    guard.scale.fill_(scale)
    return guard


def step(model, optimizers, guard, config=None):
    return train.train_step(model, optimizers, [micro_batch(rows())], 1e-3, config or Config(), guard)


def whole(tensors) -> list[torch.Tensor]:
    """Copies of these, with all ranks' parts."""
    return [t.full_tensor().clone() if hasattr(t, "full_tensor") else t.clone() for t in tensors]


def moments(optimizers) -> list[torch.Tensor]:
    return whole(t for optimizer in optimizers for state in optimizer.state.values() for t in state.values())


def events(run) -> list[dict]:
    return [row for row in map(json.loads, open(run / "log.jsonl")) if "event" in row]


# ---- the scale ----


def test_the_scale_begins_halves_and_doubles_as_is_written():
    scale = LossScale(True, CPU)
    assert scale.factor == 65_536
    scale.take_notice(NO)
    scale.take_notice(NO)
    assert scale.factor == 16_384
    for _ in range(1999):
        scale.take_notice(YES)
    assert scale.factor == 16_384
    scale.take_notice(YES)
    assert scale.factor == 32_768 and scale.steps == 0
    for _ in range(1999):
        scale.take_notice(YES)
    scale.take_notice(NO)  # they are no longer in a row
    assert scale.factor == 16_384
    scale.take_notice(YES)
    assert scale.factor == 16_384 and scale.steps == 1


def test_the_scale_is_pytorchs_own(monkeypatch):
    """torch.amp.GradScaler under the same gradients, of which every tenth is not finite."""
    monkeypatch.setattr(LossScale, "PATIENCE", 7)
    mine, theirs = LossScale(True, CPU), torch.amp.GradScaler("cpu", growth_interval=7)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer, draw = torch.optim.SGD([weight], lr=0.0), torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(400):
        finite = torch.rand((), generator=draw) > 0.1
        theirs.scale(weight.sum()).backward()
        weight.grad.fill_(1.0 if finite else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        mine.take_notice(finite)
        assert mine.factor == theirs.get_scale()
        seen.add(float(mine.factor))
    assert len(seen) > 5 and min(seen) > 1


def test_a_scale_that_is_not_used_is_one_for_good_and_in_no_checkpoint():
    guard = Guard(6.0, CPU)
    for norm in (1.0, float("inf"), 1.0):
        guard.judge(torch.tensor(1.0), torch.tensor(norm))
    assert guard.scale == 1 and guard.state().keys() == {"level", "passed_over"}
    assert scaled_guard().state().keys() == {"level", "passed_over", "scale", "good_steps"}


def test_an_overflow_is_no_bad_step_until_the_scale_is_down_at_one():
    guard, infinite = scaled_guard(4.0), torch.tensor(float("inf"))
    judged = [[bool(flag) for flag in guard.judge(torch.tensor(2.0), infinite)] for _ in range(4)]
    assert judged == [[False, False]] * 2 + [[True, False]] * 2 and guard.scale == 1
    bad, spike = scaled_guard().judge(torch.tensor(float("nan")), infinite)
    assert bad and not spike  # the forward pass: a smaller scale does not help
    assert guard.level[0] == 0  # and none of them has moved the level


# ---- a step ----


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_infinite_gradient_skips_the_step_halves_the_scale_and_is_not_bad(optimizer, world):  # noqa: F811
    model, config = build("fp16", optimizer=optimizer), Config(optimizer=optimizer)
    optimizers, guard = train.make_optimizers(model, config), scaled_guard()
    assert step(model, optimizers, guard, config).norm.isfinite()
    before = whole(model.parameters()) + moments(optimizers) + [guard.level.clone()]
    hook = model.blocks[1].register_full_backward_hook(lambda module, to, back: (to[0] * float("inf"), *to[1:]))
    outcome = step(model, optimizers, guard, config)
    hook.remove()
    assert outcome.loss.isfinite() and not outcome.norm.isfinite() and not outcome.bad and not outcome.spike
    after = whole(model.parameters()) + moments(optimizers) + [guard.level]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert guard.scale == 2**15 and guard.loss_scale.steps == 0
    assert step(model, optimizers, guard, config).norm.isfinite()
    assert not torch.equal(whole(model.parameters())[0], before[0])


def test_a_loss_too_large_for_fp16_is_skipped_until_its_scale_fits(world):  # noqa: F811
    """Nothing is injected: at this scale the gradients themselves overflow."""
    model = build("fp16")
    optimizers, guard = train.make_optimizers(model, Config()), scaled_guard(2.0**30)
    before, outcomes = whole(model.parameters()), []
    while not outcomes or not outcomes[-1].norm.isfinite():
        assert all(torch.equal(old, new) for old, new in zip(before, whole(model.parameters())))
        outcomes.append(step(model, optimizers, guard))
    assert 4 < len(outcomes) < 20 and not any(outcome.bad for outcome in outcomes)
    assert guard.scale == 2.0 ** (30 - len(outcomes) + 1)
    assert guard.level[0] == 1 and {int(state["step"]) for state in optimizers[0].state.values()} == {1}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norm_and_clipping_are_of_the_gradient_without_its_scale(optimizer, world):  # noqa: F811
    """The first moments hold what the optimizers got: that of fp32, but for the 11 bits of fp16, at any scale."""

    def taken(dtype: str, clip: float, scale: float = 1.0) -> tuple[float, list[torch.Tensor]]:
        model, config = build(dtype), Config(optimizer=optimizer, grad_clip=clip)
        optimizers = train.make_optimizers(model, config)
        guard = scaled_guard(scale) if dtype == "fp16" else Guard(6.0, CPU)
        norm = step(model, optimizers, guard, config).norm.item()
        states = [state for each in optimizers for state in each.state.values()]
        return norm, whole(state.get("exp_avg", state.get("momentum_buffer")) for state in states)

    norm, _ = taken("fp32", 1e9)
    for clip in (norm / 4, 2 * norm):
        _, exact = taken("fp32", clip)
        for scale in (2.0**8, 2.0**16):
            rounded_norm, rounded = taken("fp16", clip, scale)
            assert rounded_norm == pytest.approx(norm, rel=0.01)
            for mine, theirs in zip(rounded, exact, strict=True):
                assert (mine - theirs).norm() < 0.02 * theirs.norm()


def test_small_gradients_are_lost_without_a_scale_and_kept_with_it(world):  # noqa: F811
    """The control: the loss of a step divided by 2^20, as if it had that many targets more."""

    class Small(train.NextToken):
        def sums(self, model, batch):
            return super().sums(model, batch) / 2**20

    def norm(dtype: str, scale: float) -> float:
        model, guard = build(dtype), scaled_guard(scale)
        batches = [micro_batch(rows())]
        return train.train_step(model, [], batches, 0.0, Config(), guard, Small()).norm.item()

    exact = norm("fp32", 1.0)
    assert norm("fp16", 2.0**16) == pytest.approx(exact, rel=0.02)
    assert norm("fp16", 1.0) != pytest.approx(exact, rel=0.1)


# ---- a run ----


@pytest.fixture
def restless(monkeypatch):
    """A scale that begins too high and grows often, so that a short run overflows now and then."""
    monkeypatch.setattr(LossScale, "FIRST", 2.0**28)
    monkeypatch.setattr(LossScale, "PATIENCE", 3)


@pytest.mark.parametrize("options", [dict(micro_batch=2), dict(optimizer="muon", max_bad_steps=1)])
def test_a_run_in_fp16_resumes_bit_for_bit_also_between_overflows(options, restless, tiny_run, capsys):
    options = dict(dtype="fp16", steps=24, **options)
    straight = tiny_run("straight", **options)
    told = capsys.readouterr().out
    kinds = [event["event"] for event in events(straight)]
    steps = [event["step"] for event in events(straight)]
    assert kinds == ["overflow"] * len(kinds) and 1 in steps and max(steps) > 10
    assert "the gradient overflows fp16, no update; the scale of the loss is now 134,217,728" in told
    tiny_run("cut", stop_at=steps[-1] - 2, **options)  # a step before the scale grows again
    cut = tiny_run(resume="cut")
    assert same_bits(cut, straight) and log(cut, "loss_scale") == log(straight, "loss_scale")
    saved = read_checkpoint(straight)
    assert saved["guard.scale"] == log(straight, "loss_scale")[-1] < 2**28
    assert {p.dtype for name, p in saved.items() if name.startswith(("model.", "optimizer."))} == {torch.float32}
    assert log(straight, "loss")[-1] < log(straight, "loss")[0]


def test_training_in_fp16_follows_training_in_fp32(tiny_run):
    exact, rounded = (log(tiny_run(dtype, steps=12, dtype=dtype), "loss") for dtype in ("fp32", "fp16"))
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.01)


def overflowing(folder, options: dict):
    """Train in fp16 with an infinite gradient on the second of two ranks in step 3; the loss stays as it is."""
    from test_scale import train_here

    loss_of, calls = Transformer.loss, [0]

    def poisoned(self, tokens, targets, documents=None):
        loss = loss_of(self, tokens, targets, documents)
        if torch.is_grad_enabled():
            calls[0] += 1
            if dist.get_rank() == 1 and calls[0] == 5:  # two micro-batches a step
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    Transformer.loss = poisoned
    train_here(folder, options)


def test_an_overflow_on_one_process_skips_the_step_on_all(tiny_data, tmp_path):
    options = TINY_RUN | dict(data=(str(tiny_data),), out="run", dtype="fp16", steps=5, batch_size=8, micro_batch=2)
    run_ranks(2, overflowing, tmp_path, options | dict(save_every=1, keep=9))
    run = tmp_path / "run"
    states = [read_checkpoint(run / f"step_{number:08d}") for number in (1, 2, 3, 4)]
    names = [name for name in states[0] if name.startswith(("model.", "optimizer."))]
    same = [all(torch.equal(a[name], b[name]) for name in names) for a, b in zip(states, states[1:])]
    assert same == [False, True, False]
    (event,) = events(run)
    assert event["event"] == "overflow" and event["step"] == 3
    assert log(run, "loss_scale") == [65_536.0] * 2 + [32_768.0] * 4  # one of them the event


def test_adapters_and_preferences_train_in_fp16_as_in_fp32(tiny_run, pairs, monkeypatch):  # noqa: F811
    monkeypatch.setattr(LossScale, "FIRST", 2.0**10)  # at which nothing overflows
    first = tiny_run("first", steps=30, seq_len=64)
    for name, options in dict(
        lora=dict(lora_rank=4, learning_rate=1e-2),
        dpo=dict(data=str(pairs), learning_rate=1e-3, seq_len=64),
    ).items():
        options = dict(init_from=str(first), steps=8) | options
        exact = log(tiny_run(f"{name} fp32", **options), "loss")
        rounded = tiny_run(f"{name} fp16", dtype="fp16", **options)
        assert log(rounded, "loss") == pytest.approx(exact, rel=0.02) and log(rounded, "loss")[-1] != exact[-1]
        tiny_run(f"{name} cut", dtype="fp16", stop_at=3, **options)
        assert same_bits(tiny_run(resume=f"{name} cut"), rounded)


# ---- what else has the type ----


def test_a_model_is_sampled_in_fp16(tiny_run):
    run = str(tiny_run(steps=2))
    tokens = rows()[:, :20]
    exact, half = (load_model(run, dtype=dtype)[0] for dtype in ("fp32", "fp16"))
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert half(tokens).dtype == torch.float32
    assert (half(tokens) - exact(tokens)).abs().max() < 0.01 * exact(tokens).abs().max()


@pytest.mark.parametrize("capability, expected", [((7, 5), one_by_one), ((8, 0), attend_within)])
def test_gpus_before_ampere_pack_rows_without_the_kernel_that_they_lack(capability, expected, monkeypatch, world):  # noqa: F811
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *args: capability)
    model, config = build("fp16"), Config(dtype="fp16", pack=True, compile="off")
    kernels.install(model, config, "cuda", plain_attention)
    found = [block.attention.attend_within for block in model.blocks]
    assert found == [expected] * len(found)
    own = types.SimpleNamespace(attend_within=None)  # a variant's
    assert not kernels.lacks_kernel(own)
    assert kernels.in_one_graph(model.blocks[0], config, "cuda") == (expected is attend_within)
