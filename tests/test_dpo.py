"""Preference pairs: DPO as the paper writes it, however the work is divided, and what a run with a reference is."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import train
from conftest import TINY_RUN, additions, assert_same_but_for_rounding, forecast_of, run_ranks
from data import Mixture, Tokenizer
from lib import objectives
from lib.objectives import DPO
from lib.world import join_world
from model import IGNORE, load
from ranks import CONFIG
from test_train import log, read_checkpoint, same_bits
from train import Config

CPU, BETA = torch.device("cpu"), 0.3


def write_pairs(folder, tiny_data, **num_pairs: int):
    """A preference set of bytes: the chosen answer to a question is vowels, the rejected one consonants."""
    folder.mkdir()
    Tokenizer(tiny_data).save(folder)
    meta = json.loads((tiny_data / "meta.json").read_text())
    random = np.random.default_rng(0)
    letter = lambda letters, n: [ord(c) for c in random.choice(list(letters), n)]
    for split, count in num_pairs.items():
        tokens, mask, bounds = [], [], [0]
        for _ in range(count):
            question = [meta["bos"], *letter("abcdefgh", random.integers(3, 30)), ord(":")]
            for letters in ("aeiou", "xyz"):
                answer = [*letter(letters, random.integers(2, 30)), meta["eos"]]
                tokens += question + answer
                mask += [0] * len(question) + [1] * len(answer)
                bounds.append(len(tokens))
        path = folder / f"{split}_00000.bin"
        np.array(tokens, meta["dtype"]).tofile(path)
        np.array(mask, np.uint8).tofile(path.with_suffix(".mask"))
        np.array(bounds, "<u8").tofile(path.with_suffix(".bounds"))
        numbers = dict(tokens=len(tokens), documents=2 * count, bytes=sum(mask), targets=sum(mask))
        meta["splits"][split] = numbers | {"files": [numbers | {"file": path.name}]}
    (folder / "meta.json").write_text(json.dumps(meta | {"kind": "preference", "template": "plain", "max_len": 64}))
    return folder


@pytest.fixture(scope="module")
def pairs(tiny_data, tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "data", tiny_data, train=61, val=21)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Four pairs, the answers of very different lengths, one of them without targets."""
    tokens = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    for row, (begin, end) in enumerate([(3, 16), (3, 5), (9, 10), (9, 16), (0, 1), (0, 16), (4, 8), (4, 4)]):
        targets[row, :begin] = targets[row, end:] = IGNORE
    return tokens[:, :-1], targets


def models() -> tuple:
    """A model, and its reference with weights of its own so that all margins differ."""
    model = train.build(CONFIG, Config(dtype="fp32"), CPU)
    reference = train.build(CONFIG, Config(dtype="fp32"), CPU, frozen=True)
    model.init_weights(0)
    reference.init_weights(1)
    with torch.no_grad():
        for weight in (*model.parameters(), *reference.parameters()):
            weight.mul_(5 if weight.dim() > 1 else 1)
    return model, reference


def one_step(path, micro_batch: int):
    """A step of SGD at a learning rate of 1 moves the weights by the gradient."""
    device = join_world()
    try:
        model, reference = models()
        before = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
        tokens, targets = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in rows())
        parts = zip(tokens.split(2 * micro_batch), targets.split(2 * micro_batch))
        batches = [train.Batch(*part, documents=None) for part in parts]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config, guard = Config(grad_clip=float("inf")), train.Guard(6.0, device)
        outcome = train.train_step(model, [optimizer], batches, 1.0, config, guard, DPO(BETA, reference))
        grads = {name: before[name] - p.detach().full_tensor() for name, p in model.named_parameters()}
        theirs = {name: p.detach().full_tensor() for name, p in reference.named_parameters()}
        if dist.get_rank() == 0:
            torch.save((before, theirs, grads, outcome._replace(counts=None)._asdict()), path)
    finally:
        dist.destroy_process_group()


def by_the_paper(weights: dict, reference: dict) -> tuple:
    """Equation 7 of Rafailov et al. 2023 by softmax over whole logits, on a model that nobody sharded."""
    tokens, targets = rows()
    policy, frozen = train.Transformer(CONFIG), train.Transformer(CONFIG)
    policy.load_state_dict(weights)
    frozen.load_state_dict(reference)

    def log_pi(model) -> torch.Tensor:
        log_probs = model(tokens).log_softmax(-1)
        return torch.stack([
            sum((log_probs[row, t, targets[row, t]] for t in range(16) if targets[row, t] != IGNORE), torch.tensor(0.0))
            for row in range(len(tokens))
        ])

    with torch.no_grad():
        ref = log_pi(frozen)
    pi = log_pi(policy)
    w, l = slice(0, None, 2), slice(1, None, 2)
    rewards = BETA * (pi - ref)
    loss = -torch.log(torch.sigmoid(BETA * (pi[w] - ref[w]) - BETA * (pi[l] - ref[l]))).mean()
    loss.backward()
    margin = (rewards[w] - rewards[l]).detach()
    kl = (pi - ref)[w].sum().item() / (targets[w] != IGNORE).sum().item()
    means = dict(loss=loss.item(), margin=margin.mean().item(), accuracy=(margin > 0).float().mean().item(), kl=kl)
    return means, {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("ranks, micro_batch", [(1, 4), (1, 1), (2, 2), (2, 1)])
def test_dpo_is_the_formula_of_the_paper_however_it_is_divided(ranks, micro_batch, tmp_path, monkeypatch):
    """Trap 13. Loss, gradients and what is reported of the pairs."""
    run_ranks(ranks, one_step, tmp_path / "step.pt", micro_batch)
    before, reference, grads, outcome = torch.load(tmp_path / "step.pt")
    means, expected = by_the_paper(before, reference)
    assert 0 < means["accuracy"] < 1 and abs(means["loss"] - math.log(2)) > 0.1
    assert outcome["loss"].item() == pytest.approx(means["loss"], rel=1e-5)
    found = DPO(BETA).scores(outcome["means"].tolist())
    size = math.log(CONFIG.vocab_size)  # of the log-probabilities whose differences these are
    assert found.keys() == means.keys()
    for name in means:
        assert_same_but_for_rounding(found[name], means[name], additions(CONFIG, 16), size)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


def test_log_probabilities_in_chunks_are_those_of_whole_logits(monkeypatch):
    """Also their gradients, where every target counts differently."""
    monkeypatch.setattr("lib.kernels.LOSS_CHUNK", 3)
    torch.manual_seed(0)
    model, (tokens, targets) = train.Transformer(CONFIG), rows()
    counts = torch.randn(targets.shape)
    whole = -F.cross_entropy(model(tokens).transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
    (whole * counts).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    each = model.log_probs(tokens, targets)
    (each * counts).sum().backward()
    torch.testing.assert_close(each, whole)
    for name, p in model.named_parameters():
        assert_same_but_for_rounding(p.grad, expected[name], 3 * additions(CONFIG, 16))


OPTIONS = dict(seq_len=64, batch_size=8, micro_batch=4, learning_rate=3e-4, eval_tokens=10**6, eval_every=4, warmup=0)


@pytest.fixture
def dpo_run(tiny_run, pairs):
    base = tiny_run("base", steps=4, seq_len=64)
    return lambda out, **flags: tiny_run(out, **OPTIONS | {"data": str(pairs), "init_from": str(base)} | flags)


def test_a_run_begins_at_log_2_and_ends_above_chance_on_pairs_held_out(dpo_run):
    run = dpo_run("run", steps=40, eval_every=10, learning_rate=3e-3)
    first, last = (json.loads((run / "log.jsonl").read_text().splitlines()[i]) for i in (1, -1))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == first["margin"] == 0
    assert first["kl"] == 0 and first["pairs"] == 8 and first["epochs"].popitem()[1] == pytest.approx(8 / 61, abs=1e-4)
    assert last["val_pairs"] == 21 and last["val_accuracy"] > 0.9 and last["val_margin"] > 0.1
    assert last["val_loss"] < first["loss"] and log(run, "kl")[-1] != 0


def test_the_reference_is_the_first_model_also_after_the_run_was_resumed(dpo_run, monkeypatch):
    straight = dpo_run("straight", steps=8)
    seen = []
    validation = objectives.DPO.validation

    def look(self, sums, val):
        parameters = self.reference.named_parameters()
        seen.append({name: p.detach().full_tensor().clone() for name, p in parameters})
        return validation(self, sums, val)

    monkeypatch.setattr(objectives.DPO, "validation", look)
    cut = dpo_run("cut", steps=8, stop_at=3)
    before = len(seen)
    dpo_run("cut", steps=8)
    assert same_bits(cut, straight) and log(cut, "loss") == log(straight, "loss")
    assert log(cut, "val_loss") == log(straight, "val_loss") and log(cut, "kl") == log(straight, "kl")
    base = dict(load(straight.parent / "base").named_parameters())
    assert 0 < before < len(seen)
    assert all(torch.equal(reference[name], base[name]) for reference in seen for name in base)
    dpo_run("other", steps=8, stop_at=3)
    monkeypatch.setattr("lib.opening.is_known", lambda path, known, config_class: False)
    with pytest.raises(ValueError, match="holds other weights than when .*other began"):
        dpo_run("other", steps=8)


def test_with_lora_the_base_is_the_reference(dpo_run):
    """No second model is held: the loss begins at log 2, the pairs are learned, a resumed run is the straight one."""
    lora = dict(lora_rank=4, learning_rate=3e-2, steps=40, eval_every=10)
    straight, cut = dpo_run("straight", **lora), dpo_run("cut", **lora, stop_at=7)
    assert log(straight, "loss")[0] == pytest.approx(math.log(2), abs=1e-6) and log(straight, "val_accuracy")[-1] > 0.9
    cut = dpo_run("cut", **lora)
    assert same_bits(cut, straight) and log(cut, "val_loss") == log(straight, "val_loss")


def test_with_dropout_the_reference_has_none_and_the_work_is_divided_freely(dpo_run):
    lora = dict(lora_rank=4, lora_dropout=0.4, learning_rate=3e-2, steps=5)
    whole, parts = dpo_run("whole", **lora, micro_batch=8), dpo_run("parts", **lora, micro_batch=2)
    assert log(whole, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert log(parts, "loss") == pytest.approx(log(whole, "loss"), rel=1e-5)
    plain = dpo_run("plain", **lora | dict(lora_dropout=0.0))
    assert abs(log(plain, "loss")[-1] - log(whole, "loss")[-1]) > 1e-4


def test_what_the_run_started_from_may_be_trained_further(dpo_run, tiny_run):
    """The run names the checkpoint, not the run folder whose last one changes."""
    straight = dpo_run("straight", steps=6)
    cut = dpo_run("cut", steps=6, stop_at=3)
    tiny_run("base", steps=4, seq_len=64, stop_at=0)
    (straight.parent / "base" / "last").write_text("step_00000000")
    dpo_run("cut", steps=6)
    assert same_bits(cut, straight)


def train_here(folder, options: dict):
    os_options = TINY_RUN | OPTIONS | options
    train.main(Config(**os_options | {"out": str(folder / options["out"])}))


def test_pairs_give_the_same_losses_on_any_number_of_processes(pairs, tmp_path):
    options = {"data": (str(pairs),), "steps": 4, "micro_batch": 2, "learning_rate": 1e-2}
    run_ranks(1, train_here, tmp_path, options | {"out": "one"})
    run_ranks(2, train_here, tmp_path, options | {"out": "two"})
    for name in ("loss", "grad_norm", "accuracy", "val_loss", "val_accuracy", "val_pairs"):
        assert log(tmp_path / "two", name) == pytest.approx(log(tmp_path / "one", name), rel=1e-4)


def test_a_bad_step_with_pairs_is_skipped_and_named(dpo_run, monkeypatch, capsys):
    """Trap 16."""
    sums = DPO.sums

    def poisoned(self, model, batch):
        factor = math.nan if [*batch.numbers][:1] == [8] else 1.0
        return sums(self, model, batch) * factor

    monkeypatch.setattr(DPO, "sums", poisoned)
    run = dpo_run("run", steps=3)
    assert "step 2: bad step" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in read_checkpoint(run).values())
    (event,) = [row for row in map(json.loads, open(run / "log.jsonl")) if "event" in row]
    assert len(event["data"]) == 4


def test_flags_of_the_next_token_loss_are_refused_for_pairs(dpo_run):
    for name in ("neftune", "label_smoothing", "z_loss"):
        with pytest.raises(ValueError, match=f"--{name} 0.1 does not go with preference pairs"):
            dpo_run(name, **{name: 0.1})


def test_the_mixture_gives_pairs_row_by_row(pairs):
    data = Mixture((str(pairs),), "train", 64)
    batch = data.batch(range(4), seed=0)
    assert data.kind == "preference" and len(data) == 61 and len(batch.tokens) == len(batch.targets) == 8
    for chosen, rejected in zip(batch.targets[::2], batch.targets[1::2]):
        assert set(chosen) - {IGNORE} <= {*b"aeiou", data.parts[0].meta["eos"]}
        assert set(rejected) - {IGNORE} <= {*b"xyz", data.parts[0].meta["eos"]}


def test_the_forecast_of_pairs_has_two_rows_each_and_the_reference():
    config = Config(seq_len=4096, batch_size=16, micro_batch=2, dtype="bf16", checkpointing="full")
    text, of_pairs = (forecast_of(train.SIZES["7B"], config, 8, True, pairs=flag) for flag in (False, True))
    assert of_pairs["reference"] == text["weights"] // 2
    assert sum(of_pairs.values()) > sum(text.values()) + of_pairs["reference"] + 2 * 4096 * 4096 * 2 * 32
