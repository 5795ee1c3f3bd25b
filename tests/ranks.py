"""One step of SGD over eight rows of very uneven target counts: alone, or under torchrun with any number of ranks.

torchrun --standalone --nproc_per_node 2 tests/ranks.py FILE MICRO_BATCH    saves loss, norm and all weights to FILE
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Batch
from lib.world import join_world, leave
from model import IGNORE, ModelConfig
from train import Config, Guard, build, train_step

CONFIG = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, vocab_size=50, max_seq_len=64)


def one_step(micro_batch: int) -> dict:
    """The weights move by exactly the gradient, since the learning rate is 1 and nothing is clipped."""
    device = join_world()
    try:
        model = build(CONFIG, Config(dtype="fp32"), device)
        model.init_weights(0)
        rows = torch.randint(50, (8, 17), generator=torch.Generator().manual_seed(1))
        tokens, targets = rows[:, :-1], rows[:, 1:].clone()
        for row, count in enumerate((16, 1, 0, 9, 2, 16, 1, 0)):
            targets[row, count:] = IGNORE
        share = 8 // dist.get_world_size()
        mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
        parts = zip(tokens[mine].split(micro_batch), targets[mine].split(micro_batch))
        batches = [Batch(*part, documents=None) for part in parts]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        config, guard = Config(grad_clip=float("inf")), Guard(6.0, device)
        loss, norm, *_ = train_step(model, [optimizer], batches, 1.0, config, guard)
        weights = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        return {"loss": loss, "norm": norm, "rank": torch.tensor(dist.get_rank())} | weights
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    result = one_step(int(sys.argv[2]))
    if result["rank"] == 0:
        torch.save(result, sys.argv[1])
    leave()
