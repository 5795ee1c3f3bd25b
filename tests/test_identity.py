"""What a model, the code of a run, and the machine are known by; and how the next token is drawn."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import eval
import model as module
import sample
import train
from conftest import ROOT, random_model
from data import Tokenizer
from lib import weights
from lib.defaults import by_kind
from lib.sampling import choose
from lib.world import from_first_rank
from model import SIZES, FeedForward, ModelConfig, RMSNorm, load, save
from sample import Sampling, generate, load_model
from test_dpo import OPTIONS as DPO
from test_dpo import pairs  # noqa: F401

SHAPE = ModelConfig(32, 2, 4, 2, 64, vocab_size=258, max_seq_len=64)
LORA = dict(lora_rank=2, steps=4, save_every=2)


@pytest.fixture
def base(tiny_data, tmp_path):
    """A Hugging Face folder with the tokenizer of the tests' data."""
    vocabulary = Tokenizer(tiny_data).vocab_size
    model = random_model(dataclasses.replace(SHAPE, vocab_size=vocabulary))
    save(model, tmp_path / "base", Tokenizer(tiny_data))
    return tmp_path / "base"


def change_last_row(folder, name: str = "model.layers.1.mlp.down_proj.weight", row: int = -1):
    """Other weights in one row of one matrix of a Hugging Face folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# ---- a model is known by all its weights ----


def test_a_model_is_known_by_every_row_however_it_is_stored(base, tmp_path):
    from lib.identity import weights_sha256

    model = load(base)
    known = weights.fingerprint(base, ModelConfig)
    assert known == weights_sha256(model.named_parameters())
    assert known == weights_sha256(reversed(list(model.named_parameters())))
    save(model, tmp_path / "shards", max_shard_bytes=10_000)
    assert known == weights.fingerprint(tmp_path / "shards", ModelConfig)
    save(load(base, dtype=torch.bfloat16), tmp_path / "bf16")
    rounded = weights.fingerprint(tmp_path / "bf16", ModelConfig)
    assert rounded == weights_sha256(load(tmp_path / "bf16").named_parameters()) != known
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1
            assert weights_sha256(model.named_parameters()) != known, name
            weight.view(-1)[-1] -= 1
    change_last_row(base)
    assert weights.fingerprint(base, ModelConfig) != known


def test_a_lora_run_goes_on_with_its_base_alone_in_every_row(tiny_run, base):
    run = tiny_run("lora", init_from=str(base), stop_at=2, **LORA)
    known = json.loads((run / "step_00000002" / "adapter_config.json").read_text())["base_sha256"]
    assert known == weights.fingerprint(base, ModelConfig)
    change_last_row(base)
    for use in (
        lambda: tiny_run("lora", init_from=str(base), **LORA),
        lambda: tiny_run(resume="lora"),
        lambda: load_model(str(run)),
        lambda: sample.main(sample.Config(model=str(run), export_adapter="adapter")),
    ):
        with pytest.raises(ValueError, match="base holds other weights than those it was trained on"):
            use()


def test_a_run_of_before_is_known_by_the_first_rows_that_it_wrote_down(tiny_run, base, monkeypatch):
    from lib.identity import first_rows_sha256

    known = weights.fingerprint(base, ModelConfig, first_rows_sha256)
    with monkeypatch.context() as before:
        before.setattr("lib.run_record.fingerprint", lambda path, config_class: known)
        run = tiny_run("lora", init_from=str(base), stop_at=2, **LORA)
    load_model(str(tiny_run(resume="lora")))
    change_last_row(base, row=0)
    with pytest.raises(ValueError, match="base holds other weights than those it was trained on"):
        load_model(str(run))


def test_the_reference_of_pairs_is_the_same_in_every_row(tiny_run, base, pairs):  # noqa: F811
    options = DPO | dict(data=str(pairs), init_from=str(base), steps=4)
    run = tiny_run("dpo", stop_at=2, **options)
    assert json.loads((run / "run.json").read_text())["init_sha256"] == weights.fingerprint(base, ModelConfig)
    change_last_row(base)
    with pytest.raises(ValueError, match="base holds other weights than when .*dpo began"):
        tiny_run("dpo", **options)


def test_an_evaluation_goes_on_with_its_model_alone_in_every_row(base, tmp_path):
    rows = [{"context": f"{i}", "choices": ["a", "b"], "answer": 0} for i in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "result.json"
    config = eval.Config((str(base),), "choices", str(tmp_path / "questions.jsonl"), str(out))
    eval.main(config)
    first = json.loads(out.read_text())
    assert first["weights_sha256"] == weights.fingerprint(base, ModelConfig)
    out.unlink()  # broken off after three questions
    lines = out.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    out.with_suffix(".jsonl").write_text("".join(lines[:3]))
    change_last_row(base)
    with pytest.raises(ValueError, match="result.jsonl.* of another evaluation"):
        eval.main(config)


def test_a_base_is_hashed_once_in_a_process(tiny_run, base):
    run = tiny_run("lora", init_from=str(base), **LORA)
    assert weights._fingerprint.cache_info().misses > 0
    weights._fingerprint.cache_clear()
    load_model(str(run))
    assert weights._fingerprint.cache_info().misses == 1 and weights._fingerprint.cache_info().hits > 0


def test_one_process_hashes_a_model_for_all(monkeypatch):
    """Two ranks, one after the other."""
    asked = []

    def find(problem: str) -> str:
        asked.append(train.dist.get_rank())
        if problem:
            raise ValueError(problem)
        return "known"

    for problem in ("", "the base is not there"):
        sent = []

        def broadcast(answer: list, src: int):
            sent.extend([] if sent else answer)
            answer[:] = sent

        monkeypatch.setattr(train.dist, "broadcast_object_list", broadcast)
        for rank in (0, 1):
            monkeypatch.setattr(train.dist, "get_rank", lambda: rank)
            if problem:
                with pytest.raises(ValueError, match=problem):
                    from_first_rank(lambda: find(problem))
            else:
                assert from_first_rank(lambda: find(problem)) == "known"
    assert asked == [0, 0]


# ---- the code belongs to the run ----


def squared_relu(self, x):
    return self.down(F.relu(self.up(x)).square())


def test_a_run_remembers_its_code_and_is_not_continued_by_another(tiny_run, monkeypatch, capsys):
    first = tiny_run("first", steps=4, stop_at=2)
    options = dict(steps=4, stop_at=2)
    with monkeypatch.context() as changed:
        changed.setattr(FeedForward, "forward", squared_relu)
        tiny_run("second", **options)
        with pytest.raises(ValueError, match="first.step_00000002 was trained by other .*--anyway"):
            tiny_run("first", steps=4)
    tiny_run(resume="first")
    for again in (lambda: tiny_run("second", steps=4), lambda: tiny_run(resume="second")):
        with pytest.raises(ValueError, match="second.step_00000002 was trained by other .*--anyway"):
            again()
    capsys.readouterr()
    second = tiny_run("second", steps=4, anyway=True)
    assert "second/step_00000002 was trained by other code" in (said := capsys.readouterr().err), said
    assert "going on, as --anyway says" in said
    same, other = (json.loads((run / "run.json").read_text())["probe"] for run in (first, second))
    assert json.loads((first / "step_00000004" / "probe.json").read_text()) == same
    assert len(same) == 16
    assert max(abs(a - b) for a, b in zip(same, other)) > 0.1 * max(map(abs, same))
    assert json.loads((second / "step_00000002" / "probe.json").read_text()) == other
    assert json.loads((second / "step_00000004" / "probe.json").read_text()) == same


def test_a_run_of_other_code_is_not_scored_sampled_exported_or_trained_further(
    tiny_run, tiny_data, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as changed:
        changed.setattr(FeedForward, "forward", squared_relu)
        run = str(tiny_run(steps=2))
    data, step = str(tiny_data), f"{run}/step_00000002"
    for use in (
        lambda **flags: sample.main(sample.Config(model=run, max_new_tokens=2, **flags)),
        lambda **flags: sample.main(sample.Config(model=step, max_new_tokens=2, **flags)),
        lambda **flags: eval.main(eval.Config((run,), "perplexity", data, **flags)),
        lambda **flags: tiny_run("more", init_from=run, steps=1, **flags),
        lambda **flags: sample.main(sample.Config(model=run, export=str(tmp_path / "export"), **flags)),
    ):
        with pytest.raises(ValueError, match="step_00000002 was trained by other code .*--anyway"):
            use()
        assert not (tmp_path / "export").exists()
        capsys.readouterr()
        use(anyway=True)
        assert "step_00000002 was trained by other code" in capsys.readouterr().err
    resumed = by_kind(train.Config(resume=str(tmp_path / "more")))
    assert not resumed.anyway  # it is said anew each time


def test_an_adapter_of_other_code_is_not_exported(tiny_run, base, monkeypatch, capsys):
    with monkeypatch.context() as changed:
        changed.setattr(FeedForward, "forward", squared_relu)
        run = str(tiny_run("lora", init_from=str(base), **LORA))
    with pytest.raises(ValueError, match="step_00000004 was trained by other code"):
        sample.main(sample.Config(model=run, export_adapter="adapter"))
    sample.main(sample.Config(model=run, export_adapter="adapter", anyway=True))
    assert "going on" in capsys.readouterr().err


def test_a_run_of_before_there_were_probes_goes_on_without_a_word(tiny_run, monkeypatch, capsys):
    from lib import probe

    with monkeypatch.context() as before:
        before.setattr(probe, "write", lambda folder, found: None)
        run = tiny_run(steps=4, stop_at=2)
    capsys.readouterr()
    monkeypatch.setattr(FeedForward, "forward", squared_relu)
    tiny_run(resume="run", stop_at=3)
    assert "other code" not in capsys.readouterr().err
    (run / "step_00000003" / "probe.json").write_text('["a"]')
    with pytest.raises(ValueError, match="probe.json: field "):
        load_model(str(run))


class Renamed(torch.nn.Module):
    """SwiGLU in other words: other names, another order, all at once."""

    def __init__(self, config):
        super().__init__()
        self.w2 = torch.nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = torch.nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w1 = torch.nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x):
        gate = x @ self.w1.weight.T
        return self.w2(gate.sigmoid() * gate * self.w3(x))


SDPA = F.scaled_dot_product_attention
CHANGES = {
    "a squared ReLU": (FeedForward, "forward", squared_relu),
    "gate and up swapped": (
        FeedForward, "forward", lambda self, x: self.down(F.silu(self.up(x)) * self.gate(x))
    ),
    "another epsilon": (
        RMSNorm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.eps / 10)
    ),
    "no rotary embedding": (module, "rotate", lambda x, rope: x),
    "another attention scale": (
        F, "scaled_dot_product_attention", lambda q, *a, **k: SDPA(q, *a, **k, scale=1.2 / q.size(-1) ** 0.5)
    ),
    "no causal mask": (
        F, "scaled_dot_product_attention", lambda *a, is_causal, **k: SDPA(*a, **k, is_causal=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, dict(tie_embeddings=True, norm_eps=1e-6)])
def test_the_probe_knows_what_code_computes_and_not_how_it_is_written(changes, monkeypatch):
    from lib.naming import HF_NAMES
    from lib.probe import TOLERANCE, difference, probe

    config = dataclasses.replace(SIZES["7B"], **changes)
    state = torch.random.get_rng_state()
    found = probe(module.Transformer, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert probe(module.Transformer, dataclasses.replace(config, dim=8192, num_layers=2)) == found
    with monkeypatch.context() as changed:
        names = {"w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj"}
        names = {f"feed_forward.{ours}": theirs for ours, theirs in names.items()}
        others = {ours: name for ours, name in HF_NAMES.items() if not ours.startswith("feed_forward.")}
        changed.setattr(module, "FeedForward", Renamed)
        changed.setattr("lib.probe.HF_NAMES", others | names)
        assert difference(probe(module.Transformer, config), found) < TOLERANCE / 50
    for what, (place, name, function) in CHANGES.items():
        with monkeypatch.context() as changed:
            changed.setattr(place, name, function)
            assert difference(probe(module.Transformer, config), found) > 20 * TOLERANCE, what
    for other in ({"rope_theta": 20_000.0}, {"rope_scale": 2.0}, {"norm_eps": config.norm_eps * 3}):
        changed = dataclasses.replace(config, **other)
        assert difference(probe(module.Transformer, changed), found) > 20 * TOLERANCE, other
    assert difference(found[:-1], found) == difference([math.nan] * 16, found) == math.inf


def test_runs_of_two_codes_are_two_curves(tiny_run, tiny_data, tmp_path, monkeypatch):
    runs = [str(tiny_run(f"swiglu_{seed}", seed=seed, steps=1)) for seed in (0, 1)]
    with monkeypatch.context() as changed:
        changed.setattr(FeedForward, "forward", squared_relu)
        runs.append(str(tiny_run("relu2_0", steps=1)))
    seen = []
    monkeypatch.setattr("lib.curves.draw_curves", lambda points, *_: seen.extend(point[:2] for point in points))
    out = str(tmp_path / "curve.json")
    config = eval.Config(tuple(runs), "perplexity", str(tiny_data), out, checkpoints="all")
    with pytest.raises(ValueError, match="relu2_0.step_00000000 was trained by other code"):
        eval.main(config)
    eval.main(dataclasses.replace(config, anyway=True))
    names = ("swiglu_0", "swiglu_1", "relu2_0")
    first, again, other = ({setting for setting, run in seen if run == name} for name in names)
    assert first == again != other and len(first) == len(other) == 1


# ---- how the next token is drawn ----


def drawn_as_in_transformers(logits, sampling: Sampling, uniform) -> torch.Tensor:
    """The token at the same place of the distribution that transformers' warpers leave; -1 where
    that is within rounding of another token."""
    from transformers.generation import logits_process as theirs

    warpers = [theirs.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for warper in warpers:  # in the order of GenerationMixin._get_logits_processor
        logits = warper(None, logits)
    p, tokens = logits.double().softmax(-1).sort(descending=True)
    mass = p.cumsum(-1)
    at_an_edge = (mass - uniform[:, None]).abs().min(-1).values < 1e-5
    place = (mass <= uniform[:, None]).sum(-1, keepdim=True)
    return tokens.gather(-1, place)[:, 0].where(~at_an_edge, -1)


def test_top_k_top_p_and_min_p_keep_what_they_keep_in_transformers():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(500, generator=generator)
    random = torch.randn(24, 12, generator=generator) * 1.5
    for number, logits in enumerate(random.repeat_interleave(500, 0).split(500)):
        pick = torch.rand(4, generator=generator).tolist()
        top_k, top_p, min_p = int(1 + 11 * pick[0]), 0.3 + 0.69 * pick[1], 0.3 * pick[2]
        every = dict(temperature=0.5 + pick[3], top_k=top_k, top_p=top_p, min_p=min_p)
        two = dict(top_k=8, top_p=0.8, min_p=0.0)
        for changes in ({"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 0}, {}, two):
            options = every | changes
            mine = choose(logits.clone(), [[]] * 500, sampling := Sampling(**options), uniform)
            expected = drawn_as_in_transformers(logits, sampling, uniform)
            clear = expected >= 0
            assert clear.float().mean() > 0.95, (number, options)
            assert torch.equal(mine[clear], expected[clear]), (number, options)


def test_random_numbers_are_drawn_when_they_are_needed_and_stay_those_of_the_seed(monkeypatch):
    model = random_model(SHAPE)
    prompts = [[1, 2, 3], [4]]
    expected = generate(model, prompts, 20, Sampling(1.0, seed=3))
    generators = [torch.Generator().manual_seed(3 * 1_000_003 + row) for row in range(2)]
    at_once = torch.stack([torch.rand(20, generator=generator) for generator in generators])
    used = []
    with monkeypatch.context() as watched:
        watched.setattr("lib.sampling.DRAWN", 7)
        watched.setattr("lib.sampling.choose", lambda *args: used.append(args[-1]) or choose(*args))
        assert generate(model, prompts, 20, Sampling(1.0, seed=3)) == expected
    assert torch.equal(torch.stack(used, 1), at_once)
    endless = generate(model, prompts[:1], 2**40, Sampling(1.0), stop=lambda row, token: True)
    assert len(endless[0]) == 1


@pytest.mark.parametrize("flag", ["num", "max_new_tokens"])
def test_absurd_numbers_of_samples_and_tokens_are_refused_before_anything_is_read(flag):
    for number in (2**31, 2**70):
        with pytest.raises(ValueError, match=f"--{flag} {number} must be at most 1"):
            sample.main(sample.Config(model="nowhere", **{flag: number}))


@pytest.mark.parametrize("flag", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_sampling_takes_no_number_that_is_not_finite(flag):
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"--{flag} {number}"):
            Sampling(**{"temperature": 1.0} | {flag: number}).check()


# ---- where it runs ----

FAKE = """
import io, os, runpy, sys
version, system = sys.version_info, os.name
for script in sys.argv[1:]:
    for old, windows in ((True, False), (False, True)):
        sys.version_info = (3, 10, 13) if old else version
        os.name = "nt" if windows else system
        for name in ("torch", "numpy", "fcntl", "resource", "msgspec", "tyro"):
            sys.modules[name] = None  # importing it fails
        sys.argv, sys.stderr, before = [script, "--help"], io.StringIO(), set(sys.modules)
        try:
            runpy.run_path(script, run_name="__main__")
            print("it ran")
        except BaseException as error:
            name = "version" if old else "windows"
            said = repr(sys.stderr.getvalue())
            print(name, os.path.basename(script), type(error).__name__, error, said, sep="|")
"""


def test_an_old_python_and_windows_are_named_in_one_sentence_before_anything_else():
    scripts = [str(ROOT / f"{name}.py") for name in ("data", "train", "sample", "eval", "bench")]
    words = [sys.executable, "-c", FAKE, *scripts]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == 10, done.stdout + done.stderr
    for _, script, kind, code, said in lines:
        assert (kind, code) == ("SystemExit", "2"), (script, kind, code, said)
        assert "needs Python 3.11 or newer on Linux, macOS or Windows' WSL" in said
        assert said.count("\\n") == 1
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Python 3.11 or newer, on Linux, macOS or Windows' WSL" in readme
