"""Another implementation, for bench.py to measure beside this one: transformers' LLaMA, which
trains or writes."""

import functools

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

from lib import world
from lib.configs import config_to_hugging_face
from lib.naming import HF_NAMES, translate
from lib.rows import local_rows

CACHES = ("dynamic", "static")  # of transformers' generate


class HuggingFace:
    """LlamaForCausalLM of the same shape, trained the same way as far as that goes.

    As its own Trainer does it: fp32 weights, bf16 by autocast, an ordinary process. Or "hf here":
    with the sharding, mixed precision and memory allocator that train.py gives a model. Its loss
    takes the tokens themselves as targets, one fewer in a row than train.py has.
    """

    def __init__(self, setting, config, shape, batches: list, device: torch.device):
        """setting is a bench.Setting, config the train.Config that it stands for.

        shape is a model.ModelConfig; batches are the micro-batches of a step, data.Batch.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config = config
        self.batches = batches
        self.here = setting.side == "hf here"
        dtype = world.compute_dtype(setting.dtype, device)
        world.keep_freed_memory(self.here)
        settings = config_to_hugging_face(shape)
        theirs = LlamaConfig(**settings, attn_implementation="sdpa")
        with torch.device("meta" if self.here else device):
            self.model = LlamaForCausalLM(theirs)
        if setting.checkpointing == "full":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.here:
            self._shard(theirs, dtype, device)
        if setting.compile == "whole":
            self.model.compile()
        adamw = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.optimizers = [adamw]
        mixed = not self.here and dtype != torch.float32
        self.autocast = torch.autocast(device.type, dtype, enabled=mixed)

    def _shard(self, theirs, dtype: torch.dtype, device: torch.device):
        """Shard the model, on the meta device until then, and draw its weights."""
        model = self.model
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        mesh = world.make_mesh(self.config.shard_over, device)
        shard = functools.partial(fully_shard, mp_policy=policy, mesh=mesh)
        for layer in model.model.layers:
            shard(layer, reshard_after_forward=self.config.reshard_after_forward)
        shard(model).to_empty(device=device)
        if theirs.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        fill_rotary(model, device)
        for p in model.parameters():
            weights = local_rows(p)[1]
            if p.dim() == 1:
                weights.fill_(1)
            else:
                weights.normal_(0, 0.02)

    def step(self) -> torch.Tensor:
        """An optimizer step; its loss."""
        losses = []
        for i, (tokens, *_) in enumerate(self.batches, 1):
            if self.here:
                last = i == len(self.batches)
                self.model.set_requires_gradient_sync(self.config.reduce_each or last)
            with self.autocast:
                # the loss alone is kept: its logits would be in memory during the backward pass
                loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
                loss = loss / len(self.batches)
            loss.backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return sum(losses)


def fill_rotary(model, device: torch.device):
    """The wavelengths of a model from the meta device, which has not kept them."""
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config).to(device)


class HuggingFaceWriter:
    """LlamaForCausalLM that writes, with the very weights of a model of this project."""

    def __init__(self, model, cache: str):
        """model is a Transformer, cache one of CACHES."""
        from transformers import LlamaConfig, LlamaForCausalLM

        self.cache = cache
        self.device = model.norm.weight.device
        settings = config_to_hugging_face(model.config)
        with torch.device("meta"):
            self.model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="sdpa"))
        weights = {}
        for name, weight in model.state_dict().items():
            weights[translate(name, HF_NAMES)] = weight.detach()
        self.model.load_state_dict(weights, assign=True)
        fill_rotary(self.model, self.device)
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # nothing to rule out

    def write(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """So many likeliest tokens after each prompt, all of one length."""
        tokens = torch.tensor(prompts, device=self.device)
        rows = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=self.cache,
        )
        return rows[:, tokens.size(1) :].tolist()
