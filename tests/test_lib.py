"""The library beside the scripts: folders that appear whole, locks, records that are checked."""

import dataclasses
import errno
import json
import os
from typing import TypedDict

import numpy as np
import pytest
import torch
from torch.distributed.utils import _to_kwargs

import train
from data import Batch
from lib import gpus, objectives
from lib.cli import run_command
from lib.errors import BadInput
from lib.files import lock, new_folder, write_whole
from lib.records import read_json, read_record
from lib.tensors import unwrapped


def test_a_folder_whose_writing_fails_is_not_there_and_a_whole_one_is(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with new_folder(tmp_path / "d") as aside:
            (aside / "part").write_text("half")
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "d") as aside:
        (aside / "part").write_text("whole")
        assert not (tmp_path / "d").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "part"]


def test_a_small_file_is_the_old_one_or_the_new_one_also_when_writing_fails(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"
    write_whole(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"


def test_a_lock_belongs_to_one_until_it_is_given_back(tmp_path):
    mine = lock(tmp_path)
    assert mine is not None and lock(tmp_path) is None
    os.close(mine)
    again = lock(tmp_path)
    assert again is not None
    os.close(again)


class Sizes(TypedDict):
    width: int


@pytest.mark.parametrize("text, sentence", [
    ("{}", "a.json has no field width"),
    ("[1]", "a.json must be an object with width, and is a list"),
    ("{", "a.json is not JSON"),
    ('{"width": "8"}', "a.json: field width: Expected `?int`?, got `?str`?"),
])  # fmt: skip
def test_a_record_that_is_not_what_it_should_be_names_the_field(text, sentence, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_json(tmp_path / "a.json", "width")
        read_record(tmp_path / "a.json", Sizes)


# ---- what ends a command ----


def test_a_closed_pipe_or_a_full_disk_for_the_output_is_one_sentence(monkeypatch, capsys):
    @dataclasses.dataclass
    class Nothing:
        pass

    def full(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.argv", ["sample.py"])
    with pytest.raises(SystemExit) as ended:
        run_command(full, Nothing)
    assert ended.value.code == 2 and "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["9" * 5000, "0", "-1", "2.5", "often"])
def test_a_way_of_checkpointing_that_there_is_not_is_refused(mode):
    from lib import train_flags
    from train import Config

    with pytest.raises(BadInput, match="is not none, selective, full or a number of blocks"):
        train_flags.check_flags(Config(checkpointing=mode), 1)


def test_half_of_a_character_in_a_question_is_named(tmp_path):
    from lib.choices import parse_choices
    from lib.tasks import read_bbh

    (tmp_path / "bbh.json").write_text(json.dumps({"examples": [{"input": "q \ud800", "target": "a"}]}))
    with pytest.raises(BadInput, match="example 0"):
        read_bbh(tmp_path / "bbh.json")
    with pytest.raises(UnicodeEncodeError):
        list(parse_choices({"subject": "\ud800", "context": "c", "choices": ["a", "b"], "answer": 0}))


@pytest.mark.parametrize("found, name", [
    ("NVIDIA GeForce RTX 4090", "RTX4090-24GB"), ("NVIDIA GeForce RTX 3090", "RTX3090-24GB"),
    ("NVIDIA A10G", "A10G-24GB"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA A100 80GB PCIe", "A100-80GB"),
    ("NVIDIA H100 80GB HBM3", "H100-80GB"), ("NVIDIA H200", "H200"), ("NVIDIA RTX A6000", "A6000-48GB"),
    ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA H100 PCIe", None), ("NVIDIA A10", "A10-24GB"),
    ("Tesla T4", "T4-16GB"), ("NVIDIA L4", "L4-24GB"), ("NVIDIA L40S", None), ("NVIDIA T4G", None),
    ("Tesla V100-SXM2-32GB", "V100-32GB"), ("Tesla V100-PCIE-32GB", None), ("Tesla V100S-PCIE-32GB", None),
    ("NVIDIA GeForce RTX 5090", "RTX5090-32GB"), ("NVIDIA GeForce RTX 5090 D", None),
    ("NVIDIA RTX 6000 Ada Generation", None),
])  # fmt: skip
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it_and_no_other_card_is_taken_for_it(found, name, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: found)
    assert gpus.gpu_peak(torch.device("cuda")) == (gpus.GPUS[name].peak if name else None)
    assert gpus.gpu_peak(torch.device("cpu")) is None


@pytest.mark.parametrize("name, processors, clock, each", [
    ("A100-40GB", 108, 1410, 2048), ("A100-80GB", 108, 1410, 2048), ("H100-80GB", 132, 1830, 4096),
    ("H200", 132, 1830, 4096), ("A6000-48GB", 84, 1800, 1024), ("A10G-24GB", 80, 1710, 512),
    ("RTX5090-32GB", 170, 2407, 512), ("RTX4090-24GB", 128, 2520, 512), ("RTX3090-24GB", 82, 1695, 512),
    ("A10-24GB", 72, 1695, 1024), ("L4-24GB", 58, 2040, 1024), ("T4-16GB", 40, 1590, 1024),
    ("V100-32GB", 80, 1530, 1024),
])  # fmt: skip
def test_a_gpus_peak_is_what_its_multiprocessors_do_at_their_boost_clock(name, processors, clock, each):
    """Without sparsity, summed in fp32: operations of a multiprocessor in a clock, clocks in MHz."""
    assert gpus.GPUS[name].peak == pytest.approx(processors * clock * 1e6 * each, rel=0.01)
    assert gpus.GPUS[name].bf16 == (name[:2] not in ("T4", "V1"))
    box = int(name.partition("-")[2].removesuffix("GB") or 141)
    assert 0.9 * box < gpus.GPUS[name].memory < box


def test_a_pause_in_which_a_run_goes_back_is_not_counted_twice():
    from lib.report import Report

    report = Report.__new__(Report)
    report.clock = 0.0
    with report.paused():
        report.clock = 123.0  # as rolling back sets it
    assert report.clock == 123.0
    with report.paused():
        pass
    assert report.clock > 123.0


def test_a_copy_of_a_checkpoint_is_no_step_of_a_curve(tmp_path):
    from lib.curves import setting_of

    for name in ("step_00000012", "step_original"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    assert setting_of(tmp_path, {}, [])[1] == [tmp_path / "step_00000012"]


class Asked(torch.nn.Module):
    """In place of a model: keeps what FSDP would make of the arguments it is called with."""

    config = None

    def loss(self, *arguments):
        (self.given,), _ = _to_kwargs(arguments, {}, torch.device("meta"), False)
        return torch.zeros(())

    def log_probs(self, *arguments):
        self.loss(*arguments)
        return torch.zeros(2, 3)


@pytest.mark.parametrize("objective", [train.NextToken(), objectives.DPO(0.1, Asked())])
def test_fsdp_leaves_targets_on_the_host(objective):
    """It copies the tensors that a sharded model is called with to the GPU, and waits; here "meta" is the GPU."""
    tokens = np.arange(6).reshape(2, 3)
    model = Asked()
    objective.sums(model, Batch(tokens, tokens).to(torch.device("cpu")))
    asked = [model, objective.reference] if isinstance(objective, objectives.DPO) else [model]
    for tokens, targets, _ in (each.given for each in asked):
        assert tokens.device.type == "meta" and unwrapped(targets).device.type == "cpu"
