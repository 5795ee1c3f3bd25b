"""What a fine-tuner sweeps: lengths in epochs, schedules, noise, smoothed targets, z-loss, frozen parameters."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import additions, assert_same_but_for_rounding, byte_data, command, forecast_of
from data import Dataset
from lib import kernels
from lib.objectives import noise
from model import IGNORE, Transformer, load
from ranks import CONFIG
from test_train import log, read_checkpoint, same_bits
from train import Config, learning_rate

CPU = torch.device("cpu")


# ---- lengths ----


def test_an_epoch_is_every_sequence_once_rounded_up_to_a_whole_step(tiny_run, tmp_path, capsys):
    data = byte_data(tmp_path, 60)
    sequences = len(Dataset(data, "train", 32))
    assert sequences % 12
    run = tiny_run(data=str(data), epochs=2, batch_size=12, save_every="0.5epoch", eval_every="1epoch", keep=9)
    steps, half = math.ceil(2 * sequences / 12), math.ceil(sequences / 24)
    assert len(log(run, "loss")) == steps and 2 <= log(run, "epochs")[-1][str(data)] < 2 + 12 / sequences
    saved = [int(path.name[5:]) for path in sorted(run.glob("step_*"))]
    assert saved == [0, half, 2 * half, 3 * half, steps]
    assert [row["step"] for row in map(json.loads, open(run / "log.jsonl")) if "val_loss" in row] == [
        0, math.ceil(sequences / 12), steps,
    ]  # fmt: skip
    assert f"{steps} steps of 12 × 32 tokens, saved every {half}, 2.0" in capsys.readouterr().out
    planned = Config(data=(str(data),), epochs=2, batch_size=16, seq_len=32, size="260K")
    assert f"{math.ceil(2 * sequences / 16)} steps of 16 × 32, 2 epochs of {sequences} sequences" in train.plan(planned)


def test_a_run_of_epochs_is_resumed_exactly(tiny_run, tmp_path):
    options = dict(data=str(byte_data(tmp_path, 30)), epochs=1.5, batch_size=12, save_every="0.25epoch")
    straight = tiny_run("straight", **options)
    tiny_run("cut", **options, stop_at=3)
    assert same_bits(tiny_run(resume="cut"), straight) and log(straight, "lr") == log(tiny_run("cut", **options), "lr")


def test_a_length_that_cannot_be_read_is_one_sentence(tiny_run):
    for name in ("save_every", "eval_every"):
        for value in ("half", "0.5 epochs", "nanepoch", "infepoch", "1.5"):
            with pytest.raises(ValueError, match=f"--{name} {value} is neither a number of steps nor one of epochs"):
                tiny_run(**{name: value})
        for value in (0, "0epoch", "-1epoch"):
            with pytest.raises(ValueError, match=f"--{name} {value} must be above 0"):
                tiny_run(**{name: value})
    with pytest.raises(ValueError, match="--steps 7 does not go with --epochs 1"):
        tiny_run(steps=7, epochs=1)
    words = ["--save_every", "0.5epoch", "--eval_every", "7", "--plan", "--epochs", "-1"]
    assert "--epochs -1.0 must be a number that is not negative" in command("train.py", *words, check=False).stderr


# ---- schedules ----


@pytest.mark.parametrize("schedule, middle, late, end", [
    ("cosine", 0.55, 0.1 + 0.45 * (1 + math.cos(0.9 * math.pi)), 0.1), ("linear", 0.55, 0.19, 0.1),
    ("constant", 1.0, 1.0, 1.0), ("wsd", 1.0, 0.55, 0.1),
])  # fmt: skip
def test_the_learning_rate_warms_up_and_goes_down_as_the_schedule_says(schedule, middle, late, end):
    config = Config(steps=1101, warmup=100, learning_rate=1.0, final_lr=0.1, schedule=schedule, decay=201 / 1101)
    rates = [learning_rate(step, config) for step in range(1101)]
    assert rates[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert [rates[step] for step in (100, 600, 1000, 1100)] == pytest.approx([1.0, middle, late, end])
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.011


# ---- the gradient's terms ----


def written_out(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, z_loss: float) -> torch.Tensor:
    """Cross-entropy with targets that are spread over the vocabulary (Szegedy et al. 2016), and PaLM's z-loss."""
    spread = F.one_hot(targets, logits.size(-1)) * (1 - smoothing) + smoothing / logits.size(-1)
    return -(spread * logits.log_softmax(-1)).sum() + z_loss * logits.exp().sum(-1).log().square().sum()


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.003)])
@pytest.mark.parametrize("compiled", [False, True])
def test_smoothing_and_z_loss_are_in_the_gradient_and_not_in_the_loss(smoothing, z_loss, compiled, monkeypatch):
    monkeypatch.setattr("lib.kernels.LOSS_CHUNK", 5)
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    model.unembedding.weight.data.mul_(40)
    tokens, targets = torch.randint(50, (2, 2, 16))
    targets[0, :7] = IGNORE
    logits, kept = model(tokens), targets != IGNORE
    written_out(logits[kept], targets[kept], smoothing, z_loss).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    flags = train.Config(label_smoothing=smoothing, z_loss=z_loss)
    kernels.install(model, flags, compiled, "cpu")
    loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(F.cross_entropy(logits[kept], targets[kept], reduction="sum").item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert_same_but_for_rounding(p.grad, expected[name], 3 * additions(CONFIG, 16))


def test_a_run_takes_the_terms_and_reports_the_plain_loss(tiny_run):
    plain = tiny_run("plain", steps=3)
    for name, value in (("label_smoothing", 0.3), ("z_loss", 0.1)):
        run = tiny_run(name, steps=3, **{name: value})
        assert log(run, "loss")[0] == log(plain, "loss")[0] and log(run, "grad_norm")[0] != log(plain, "grad_norm")[0]
        val_loss = log(run, "val_loss")[-1]
        assert val_loss != log(plain, "val_loss")[-1]
    with pytest.raises(ValueError, match="--label_smoothing 1.5 must lie between 0 and 1"):
        tiny_run(label_smoothing=1.5)


# ---- noise ----


def noise_of(numbers: range, seed: int = 0) -> torch.Tensor:
    tokens = torch.zeros(len(numbers), 16, dtype=torch.long)
    return noise(train.Batch(tokens, tokens, None, numbers), 32, 5.0, seed)


def test_the_noise_of_a_sequence_depends_on_the_seed_and_its_number_alone():
    noise, bound = noise_of(range(3, 9)), 5 / math.sqrt(16 * 32)
    assert 0.98 * bound < noise.abs().max() <= bound and abs(noise.mean()) < 0.02 * bound
    assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(noise, torch.cat((noise_of(range(3, 5)), noise_of(range(5, 9)))))
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise, noise_of(range(3, 9), seed=1))


def test_noise_is_resumed_exactly_divided_freely_and_absent_from_validation(tiny_run):
    options = dict(steps=7, neftune=20.0, batch_size=4)
    straight = tiny_run("straight", **options)
    tiny_run("cut", **options, stop_at=3)
    assert same_bits(tiny_run(resume="cut"), straight)
    assert log(tiny_run("parts", **options, micro_batch=1), "loss") == pytest.approx(log(straight, "loss"), rel=1e-5)
    plain = tiny_run("plain", steps=7, batch_size=4)
    assert log(plain, "loss")[0] != log(straight, "loss")[0]
    still = dict(steps=1, learning_rate=1e-12, weight_decay=0.0, batch_size=4)
    without, noisy = tiny_run("without", **still), tiny_run("noisy", **still, neftune=20.0)
    assert log(noisy, "val_loss") == pytest.approx(log(without, "val_loss"), rel=1e-9)


# ---- frozen parameters ----


@pytest.mark.parametrize("optimizer, checkpointing", [("adamw", "none"), ("muon", "full")])
def test_what_is_frozen_keeps_its_bits_and_has_no_moments(optimizer, checkpointing, tiny_run):
    base = tiny_run("base", steps=2)
    options = dict(steps=5, init_from=str(base), optimizer=optimizer, checkpointing=checkpointing, grad_clip=0.1)
    frozen = ("embedding.*", "blocks.0.*", "*.attention.key.weight", "norm.weight")
    run = tiny_run("run", **options, freeze=frozen)
    before, after = load(base).state_dict(), load(run).state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    is_frozen = {
        name for name in before
        if name.startswith(("embedding", "unembedding", "blocks.0.")) or "key" in name or name == "norm.weight"
    }  # fmt: skip
    assert kept == is_frozen and 8 < len(kept) < len(before)
    of_moments = [name for name in read_checkpoint(run) if name.startswith("optimizer.")]
    moments = {name.removeprefix("optimizer.").rpartition(".")[0] for name in of_moments}
    assert moments == before.keys() - is_frozen
    tiny_run("cut", **options, freeze=frozen, stop_at=2)
    assert same_bits_of(tiny_run(resume="cut"), run)


def same_bits_of(a, b) -> bool:
    mine, theirs = read_checkpoint(a), read_checkpoint(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_output_alone_can_be_trained(tiny_run):
    run = tiny_run("run", steps=4, size="1.1B", freeze=("embedding.*", "blocks.*", "norm.*"))
    start = load(run / "step_00000000").state_dict()
    end = load(run).state_dict()
    assert [name for name in start if not torch.equal(start[name], end[name])] == ["unembedding.weight"]


def test_a_pattern_must_fit_something_and_leave_something(tiny_run):
    with pytest.raises(ValueError, match="--freeze blocks.9.* fits no parameter"):
        tiny_run(freeze=("blocks.9.*",))
    with pytest.raises(ValueError, match=r"--freeze \* leaves nothing to train"):
        tiny_run(freeze=("*",))


def test_frozen_parameters_need_neither_moments_nor_gradients_in_the_forecast():
    whole, half = (
        forecast_of(train.SIZES["7B"], Config(seq_len=4096, dtype="bf16", freeze=freeze), 8, compiled=True)
        for freeze in ((), ("blocks.?.*", "blocks.1[0-5].*"))
    )
    assert half["weights"] == whole["weights"] and half["moments"] == pytest.approx(0.52 * whole["moments"], rel=0.02)
