"""LoRA and QLoRA: what is trained, what is kept, and that others read what is written here, and the other way round."""

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import model as module
import simulate
import train
from conftest import TINY_RUN, command, flags, random_model, run_ranks
from model import SIZES, TARGETS, ModelConfig, Transformer, adapters, load, save
from test_train import CPU, log, read_checkpoint, same_bits, world  # noqa: F401
from train import Config

SHAPE = ModelConfig(64, 2, 4, 2, 128, vocab_size=259, max_seq_len=32)  # 259: bytes
LORA = dict(lora_rank=4, lora_alpha=8.0, weight_decay=0.0)
nf4 = pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", id="nf4")])


@pytest.fixture(autouse=True)
def bitsandbytes_where_needed(request):
    if "nf4" in request.node.name:
        pytest.importorskip("bitsandbytes", reason="NF4 is made by bitsandbytes")


@pytest.fixture
def base(tiny_data, tmp_path):
    """A Hugging Face folder to adapt, with the tokenizer of the test's data."""
    from data import Tokenizer

    model = random_model(SHAPE)
    for p in model.parameters():
        p.data.mul_(0.3 if p.dim() > 1 else 1)  # as large as those of trained models
    save(model, tmp_path / "base", Tokenizer(tiny_data))
    return tmp_path / "base"


def merged_and_not(run, base, quantize="none") -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the run's last checkpoint: as `load` merges it, and with the adapters beside the base as in training."""
    settings = json.loads((run / "run.json").read_text())["adapter"]
    beside = module._empty(SHAPE, "cpu", torch.float32)
    targets = [ours for ours in TARGETS if module.HF_NAMES[f"{TARGETS[ours]}.{ours}"].split(".")[1] in str(settings)]
    beside = module.add_adapters(beside, settings["r"], settings["lora_alpha"], targets, quantize == "nf4")
    module.load_weights(beside, base)
    learned = module.read_adapter(run).tensors
    assert learned.keys() == adapters(beside).keys()
    for name, p in adapters(beside).items():
        p.data.copy_(learned[name])
    tokens = torch.randint(259, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load(run)(tokens), beside(tokens)


@nf4
def test_merged_weights_give_the_logits_of_base_and_adapter(quantize, tiny_run, base):
    run = tiny_run(init_from=str(base), steps=10, quantize=quantize, **LORA)
    merged, beside = merged_and_not(run, base, quantize)
    assert (merged - load(base)(torch.zeros(2, 32, dtype=torch.long))).abs().max() > 0.01
    torch.testing.assert_close(merged, beside, atol=1e-5, rtol=0)
