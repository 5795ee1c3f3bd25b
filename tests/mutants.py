"""Put bugs back, one at a time, and see whether a test notices each. Run by hand.

    python tests/mutants.py             # all of them
    python tests/mutants.py -k cache    # those with this word in their name
    python tests/mutants.py --jobs 1    # one at a time; the default is two

A copy of the project gets one bug, and the tests that should notice run there. The tests that did
notice run once more at the end on the code as it is: what fails there too has noticed nothing. The
exit code is 1 where a bug survives, and where its line in the code has changed so that it can no
longer be put back.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
# with compiled files, a bug of the same size in the same second would not be read
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
os.environ.setdefault("PLAINLLAMA_TEST_DATA", str(ROOT.parent / "shared" / "data"))
sys.dont_write_bytecode = True

# what takes seconds to import is there once, for all that is forked from this process
import pytest  # noqa: E402
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401

with contextlib.suppress(ImportError):
    from transformers import LlamaForCausalLM  # noqa: F401

SECONDS = 300  # for the tests of one bug; a bug may be noticed by a test that no longer ends


class Mutant(NamedTuple):
    what: str   # is wrong then
    file: str
    old: str    # is there exactly once
    new: str
    tests: str  # "model train: words" is pytest tests/test_model.py tests/test_train.py -k "words"


MUTANTS = [
    # ---- two models at once, and the recipes of papers ----
    Mutant("a dip is at the lowest step of the same questions", "recipes/stability.py",
           "right[:, 1 - half :: 2]", "right[:, half::2]",
           "stability: random"),
    Mutant("an n-gram's rest is not that of its context", "recipes/ngrams.py",
           "left + self.discount * kinds[known] * found", "left + self.discount * found",
           "stability: by_hand or distribution"),
    Mutant("early and late are measured on the same items", "recipes/foretelling.py",
           "means[late][1 - half, :, -1]", "means[late][half, :, -1]",
           "fineline: luck"),
    Mutant("a rejected guess is drawn from the model as it is", "lib/speculative.py",
           "(p - q).clamp(min=0)[None]", "p[None]",
           "decoding: own_distribution or by_hand"),
    Mutant("a guess is accepted too often", "lib/speculative.py",
           "ratio = float(p[guess] / q[guess])", "ratio = 1.5 * float(p[guess] / q[guess])",
           "decoding: own_distribution or by_hand"),
    Mutant("a draft has not read its own last guess", "lib/speculative.py",
           "unread = context[self.draft.cache.longest :]", "unread = context[-1:]",
           "decoding: always_right or no_token"),
    Mutant("guesses are drawn without the penalty of repetition", "lib/speculative.py",
           "distribution(logits, [so_far]", "distribution(logits, [[]]",
           "decoding: always_right"),
    Mutant("rejected guesses stay in the cache", "lib/speculative.py",
           "self.target.trim([read])", "pass",
           "decoding: no_token"),
    Mutant("an amateur's liking is added", "lib/contrast.py",
           "expert + beta * likelier", "expert - beta * likelier",
           "decoding: by_hand or full_passes"),
    Mutant("the mask of contrast is not relative to the likeliest", "lib/contrast.py",
           "least = expert.amax(-1, keepdim=True) + math.log(alpha)", "least = math.log(alpha)",
           "decoding: by_hand or full_passes"),
    Mutant("choices are scored without the amateur", "lib/contrast.py",
           "value = (1 + self.beta) * expert - self.beta * amateur", "value = expert",
           "decoding: scored"),
    Mutant("threads of OpenMP wait as long as ever", "lib/cli.py",
           'os.environ.setdefault("GOMP_SPINCOUNT", "1000")', "pass", "structure: sleep_soon"),
    Mutant("whole numbers are cut off, not rounded", "lib/decoding.py",
           "codes.round()", "codes.trunc()", "decoding: near_the_matrix"),
    Mutant("a tied matrix is laid out twice", "lib/decoding.py",
           "linear.weight.data = linear.weight.data.t().contiguous().t()",
           "linear.weight = nn.Parameter(linear.weight.data.t().contiguous().t())", "decoding: same_matrices"),
    Mutant("a product without gradients is used with them", "lib/decoding.py",
           "if rows < 2 or torch.is_grad_enabled():", "if rows < 2:", "decoding: have_gradients"),
    Mutant("norms beside packed matrices stay in bf16", "lib/decoding.py",
           "parameter.data = parameter.data.float()", "pass", "decoding: packed_matrices"),
    Mutant("one thread is left behind", "lib/decoding.py",
           "        torch.set_num_threads(threads)", "        pass", "decoding: leaves_the_others"),
    Mutant("a model is exported as it was packed", "sample.py",
           "export(config, ModelConfig, load, save)",
           "export(config, ModelConfig, lambda *w, **kw: prepare(load(*w, **kw), 'none'), save)",
           "decoding: exported_and_measured"),
    Mutant("tokens as likely as the last that was ranked are left out", "lib/sampling.py",
           "(p > 0) & (values <= last)", "(p > 9) & (values <= last)",
           "sample: ranked_first"),
    Mutant("small blocks are gathered one by one", "lib/kernels.py",
           "size = blocks_together(blocks[0])", "size = 1", "scale: gathered_together"),
    Mutant("alpha is the first model's", "recipes/weights.py",
           "weight.copy_((1 - alpha) * weight + alpha * theirs[name])",
           "weight.copy_(alpha * weight + (1 - alpha) * theirs[name])",
           "papers: alpha"),
    Mutant("ties of magnitude are all kept", "recipes/ternary.py",
           "kept = tau.abs().topk(round(share * tau.numel())).indices",
           "kept = tau.abs() >= tau.abs().topk(round(share * tau.numel())).values[-1]",
           "papers: by_hand"),
    Mutant("an adapter's task vector begins at zero", "recipes/compeft.py",
           "init_adapters(model, seed)", "pass",
           "papers: adapters_task"),
    Mutant("gaps lose their last bit", "recipes/ternary.py",
           "bits[starts + ones + 1 + j] = gaps >> (b - 1 - j) & 1", "bits[starts + ones + 1 + j] = gaps >> (b - j) & 1",
           "papers: file_holds"),
    Mutant("what is seen stands behind the question", "recipes/seeing.py",
           "torch.cat((x[:, :1], self.seen, x[:, 1 + self.seen.size(1) :]), 1)",
           "torch.cat((x[:, : -self.seen.size(1)], self.seen), 1)",
           "llava: in_place"),
    Mutant("the tower's last layer is what is read", "recipes/seeing.py",
           "for layer in self.layers[:-1]:", "for layer in self.layers:",
           "llava: last_layer"),
    Mutant("held-out pairs are trained on", "recipes/scenes.py",
           "if (colors != shapes).all():", "if True:",
           "llava: held_out"),
    Mutant("interpolation stretches positions instead", "recipes/longer.py",
           "changed(start, rope_scale=SCALE)", "changed(start, rope_scale=1 / SCALE)",
           "interpolation: every_arm"),
    Mutant("k_max is the farthest key found, whatever lies before", "recipes/passkeys.py",
           "([0] + distances)[good.index(False)]", "([0] + distances)[len(good) - 1 - good[::-1].index(True) + 1]",
           "interpolation: docstrings"),
    Mutant("bad batches never end", "recipes/faults.py",
           "at <= step < at + lasts", "at <= step",
           "spikes: bad_batches"),
    Mutant("going back ends a wrong rate", "recipes/faults.py",
           "(seen or step == at) and len(seen) < lasts", "at <= step < at + lasts",
           "spikes: wrong_rate"),
    Mutant("a verdict does not ask every seed", "recipes/study.py",
           "if away and all(side * value > 0 for value in found.seeds):", "if away:",
           "papers: verdict"),
    Mutant("a verdict forgets its bound", "recipes/study.py",
           "verdict(found.less(bound), sign)", "verdict(found, sign)",
           "papers: finished"),
    Mutant("wrong answers are from the same document", "recipes/cloze.py",
           "if elsewhere if kind == \"other\" else far and not elsewhere:", "if far:",
           "papers: questions_have"),
    Mutant("an item's entities are counted without the set's", "recipes/entropy.py",
           "change = times_log(before + self.times) - times_log(before)", "change = times_log(self.times)",
           "choosing: authors_tests or written_out"),
    Mutant("sources are drawn by their size", "recipes/curating.py",
           "len(some) ** (1 / temperature)", "len(some)",
           "choosing: temperature"),
    Mutant("instructions as alike as seven tenths are dropped too", "recipes/filters.py",
           "if max(scores, default=0) > MOST_ALIKE:", "if max(scores, default=0) >= MOST_ALIKE:",
           "writing: seven_tenths"),
    Mutant("the half written end of a cut text is trained on", "recipes/writing.py",
           "stream.finished or len(tokens) < size", "stream.finished or len(tokens) <= size",
           "writing: local_model"),
    Mutant("the rows of a word's tokens are added up", "recipes/attention_maps.py",
           "return (member / sizes).T @ weights @ member", "return member.T @ weights @ member",
           "attention: added_up"),
    Mutant("a regression has seen the sentence that it is tried on", "recipes/attention_maps.py",
           "if at != fold]", "]",
           "attention: as_their_mean"),
    Mutant("a weight's gradient keeps the scale of the loss", "recipes/rounded.py",
           ".float() / after, None", ".float(), None",
           "incite: scale_goes_in"),
    Mutant("gradients are not rounded", "recipes/rounded.py",
           "(gradient * before).to(dtype)", "(gradient * before)",
           "incite: small_gradients"),
    Mutant("a code takes the value below, not the nearest", "recipes/codes.py",
           "(values[1:] + values[:-1]) / 2", "values[1:]",
           "qlora: by_hand or nearest"),
    Mutant("scales lose their mean", "recipes/codes.py",
           "[: len(scales), None] + mean", "[: len(scales), None]",
           "qlora: bitsandbytes"),
    Mutant("each stage begins with the base", "recipes/bezoar.py",
           'start = train(HERE / f"{done}{seed}", *words', 'made = train(HERE / f"{done}{seed}", *words',
           "bezoar: stages"),
    Mutant("the rejected answer may be the right one", "recipes/bezoar.py",
           'row["choices"][1 - row["answer"]]) for', 'row["choices"][0]) for',
           "bezoar: a_pair"),
    # ---- variants and ablations ----
    Mutant("code in somebody else's folder runs", "lib/variants.py",
           "if digest not in known and not", "if False and not",
           "variants: somebody or trust"),
    Mutant("a variant may see the future", "lib/variants.py",
           "if not (earlier - whole[:, :12]).abs().max() <= 1e-3 * scale:", "if False:",
           "variants: mistake"),
    Mutant("a variant may write other text than it learned", "lib/variants.py",
           "if not (steps - whole).abs().max() <= 1e-3 * scale:", "if False:",
           "variants: mistake"),
    Mutant("a plain model becomes the variant that was loaded last", "lib/variants.py",
           "        setattr(copy, name, vars(file)[name])",
           "        setattr(copy, name, vars(file)[name])\n"
           "        setattr(sys.modules['model'], name, vars(file)[name])",
           "variants: stays_plain"),
    Mutant("a run of a variant goes on with the file as it is now", "lib/variant_flags.py",
           "    if begun and kept.exists():", "    if False:",
           "variants: its_copy"),
    Mutant("a changed copy of a variant is taken", "lib/variant_flags.py",
           "    if before != now:", "    if False:",
           "variants: changed_copy"),
    Mutant("an exported variant calls itself LLaMA", "lib/configs.py",
           "    if not variants.is_llama(type(config)):", "    if False:",
           "variants: export"),
    Mutant("in packed rows a variant's attention is not used", "lib/variants.py",
           "copy.Attention.attend_within = property(_within)", "pass",
           "variants: packed"),
    Mutant("attention written out forgets the root of the width", "model.py",
           "scores = q @ k.mT / q.size(-1) ** 0.5 ", "scores = q @ k.mT / q.size(-1) ",
           "variants: written_out"),
    Mutant("ALiBi's slopes fall half as fast", "variants/alibi.py",
           "slopes = 2 ** (-8 *", "slopes = 2 ** (-4 *",
           "variants: alibi"),
    Mutant("a sliding window sees one token more", "variants/sliding_window.py",
           "(distance < self.window)", "(distance <= self.window)",
           "variants: sliding"),
    Mutant("the spread of differences is that of a population", "lib/paired.py",
           "ddof=1", "ddof=0",
           "paired"),
    Mutant("the interval is the normal distribution's", "lib/paired.py",
           "half = critical(n) * error", "half = 1.96 * error",
           "paired: covers"),
    Mutant("power counts one degree of freedom too many", "lib/paired.py",
           "bound = critical(n)", "bound = critical(n + 1)",
           "paired: power"),
    Mutant("Holm's correction is forgotten", "lib/paired.py",
           "p = min(1.0, remaining * ps[place])", "p = ps[place]",
           "paired: holm"),
    Mutant("runs are paired with those of other seeds", "lib/ablation.py",
           "arm.values_of(both))", "arm.values_of(both[::-1]))",
           "ablate: own_best"),
    Mutant("the runs of a killed ablation go on alone", "lib/side_by_side.py",
           "ctypes.CDLL(None).prctl(1, 9)", "pass",
           "ablate: even_when_it_is_killed"),
    Mutant("arms are compared at the first arm's setting", "lib/ablation.py",
           "        best = best_setting(settings, lower, sweep)", "        best = next(iter(settings))",
           "ablate: own_best"),
    # ---- model.py ----
    Mutant("a query of a filled cache sees one token of the future", "model.py",
           "future = slots > positions[..., None]", "future = slots > positions[..., None] + 1",
           "model: cached_logits and GQA"),
    Mutant("a chunk for a filled cache counts its positions from the longest row", "model.py",
           "positions = self.lengths[:, None] + torch.arange(num_tokens, "
           "device=self.lengths.device)",
           "positions = self.longest + torch.arange(num_tokens, "
           "device=self.lengths.device).expand(len(self.lengths), -1)",
           "model: rows_of_different_lengths"),
    Mutant("trimming a cache keeps the shortest row's length as the longest", "model.py",
           "self.longest = max(lengths)", "self.longest = min(lengths)",
           "model: rows_of_different_lengths"),
    Mutant("a cache rounds keys and values to bf16", "model.py",
           "new.detach().transpose(1, 2)", "new.detach().bfloat16().transpose(1, 2)",
           "model: cached_logits and GQA"),
    Mutant("rotary angles turn the other way", "model.py",
           "torch.cat((a * cos - b * sin, b * cos + a * sin), -1)",
           "torch.cat((a * cos + b * sin, b * cos - a * sin), -1)",
           "model: transformers_gives and MHA"),
    Mutant("position interpolation stretches instead of shrinking", "model.py",
           "/ config.rope_scale\n", "* config.rope_scale\n",
           "model: transformers_gives and rope_scale"),
    Mutant("the rotary wavelengths are those of half a head", "model.py",
           "(channel / config.head_dim)", "(2 * channel / config.head_dim)",
           "model: transformers_gives and MHA"),
    Mutant("grouped keys are repeated head after head in packed rows", "lib/packed.py",
           "k, v = (heads.repeat_interleave(queries_per_key, 2) for heads in (k, v))",
           "k, v = (heads.repeat(1, 1, queries_per_key, 1) for heads in (k, v))",
           "model: packed_document"),
    Mutant("packed documents keep the positions of the row", "model.py",
           "            positions = documents.positions",
           "            positions = torch.arange(num_tokens, device=tokens.device)",
           "model: packed_document"),
    Mutant("the gradients of grouped heads are summed over the wrong ones", "lib/cpu_attention.py",
           "by_group = gradient.unflatten(1, (groups, -1))\n    return by_group.sum(2)",
           "by_group = gradient.unflatten(1, (-1, groups))\n    return by_group.sum(1)",
           "model: written_out_gradients"),
    Mutant("the written-out gradient of attention leaves a token out of its own past",
           "lib/cpu_attention.py", ".exp().tril(begin)", ".exp().tril(begin - 1)", "model: written_out_gradients"),
    Mutant("the norm's mean of squares is rounded to bf16", "model.py",
           "x32.square().mean(-1, keepdim=True)", "x.square().mean(-1, keepdim=True).float()",
           "model: mean_of_squares"),
    Mutant("the norm's epsilon stands outside the root", "model.py",
           "torch.rsqrt(mean_square + self.eps)",
           "1 / (mean_square.sqrt() + self.eps)", "model: mean_of_squares"),
    Mutant("gate and up change places", "model.py",
           "F.silu(self.gate(x)) * self.up(x)", "self.gate(x) * F.silu(self.up(x))",
           "model: transformers_gives and MHA"),
    Mutant("the second half of a block reads what the first half read", "model.py",
           "        x = x + self.attention(self.attention_norm(x), rope, cache, documents)\n"
           "        return x + self.feed_forward(self.feed_forward_norm(x))",
           "        y = x + self.attention(self.attention_norm(x), rope, cache, documents)\n"
           "        return y + self.feed_forward(self.feed_forward_norm(x))",
           "model: transformers_gives and MHA"),
    Mutant("the loss is divided by all tokens instead of the targets", "model.py",
           "max(1, int((targets != IGNORE).sum()))", "targets.numel()", "model: sum_over_targets"),
    Mutant("a last chunk of the loss that is not full is left out", "lib/kernels.py",
           "for begin in range(0, len(x), size):",
           "for begin in range(0, len(x) - size + 1, size):", "model: loss_in_chunks_is"),
    Mutant("the output layer's gradient is that of the last chunk alone", "lib/kernels.py",
           "                if weight_grad is None:", "                if True:",
           "model: loss_in_chunks_is"),
    Mutant("smoothing takes nothing from the target", "lib/kernels.py",
           "- share - (1 - smoothing)", "- share - 1", "finetune: smoothing_and_z_loss and False"),
    Mutant("the z-loss has half its gradient", "lib/kernels.py",
           "(1 + 2 * z_loss * normalizers)", "(1 + z_loss * normalizers)",
           "finetune: smoothing_and_z_loss and False"),
    Mutant("log-probabilities in chunks all count alike in the backward pass", "lib/kernels.py",
           "(logits_grad * -scale[chunk, None])", "(logits_grad * -scale.mean())",
           "dpo: log_probabilities_in_chunks"),
    Mutant("log-probabilities are those of logits in bf16", "lib/kernels.py",
           "F.cross_entropy(F.linear(inputs, weight).float()",
           "F.cross_entropy(F.linear(inputs, weight).bfloat16().float()",
           "dpo: formula_of_the_paper and 1-4"),
    Mutant("residual writers start as if a block had one", "model.py",
           "0.02 / (2 * len(self.blocks)) ** 0.5", "0.02 / len(self.blocks) ** 0.5",
           "model: drawn_row_by_row"),
    Mutant("all rows of a matrix are drawn from one seed", "lib/rows.py",
           'f"{key} {begin}"', 'f"{key}"', "model: drawn_row_by_row"),
    Mutant("a process that holds later rows draws the first ones", "lib/rows.py",
           "drawn[max(0, first - begin) :]", "drawn[0:]", "scale: starts_from_the_same_weights"),
    Mutant("a process that holds later rows reads the first ones", "lib/weights.py",
           "tensor[first : first + len(local)]", "tensor[: len(local)]", "scale: reads_its_rows"),
    Mutant("LoRA's A is drawn with another standard deviation than PEFT's", "lib/lora.py",
           "(3 * weight.size(1)) ** -0.5", "weight.size(1) ** -0.5", "lora: pefts_is"),
    Mutant("an adapter counts by the root of its rank", "lib/lora.py",
           "alpha / rank if rank else 0.0", "alpha / rank**0.5 if rank else 0.0",
           "lora: what_the_paper_says"),
    Mutant("dropout leaves out the same of every sequence", "lib/dropout.py",
           'f"{seed} dropout {number} {row}"', 'f"{seed} dropout {row}"',
           "lora: left_out_depends"),
    Mutant("dropout leaves out the same at every matrix", "lib/dropout.py",
           "[_digest(name) for name in names]", "[0 for name in names]",
           "lora: left_out_depends"),
    Mutant("what dropout leaves counts no more than before", "lib/lora.py",
           "scale = self.scale / (1 - self.dropout)", "scale = self.scale",
           "lora: leaves_out_its_share"),
    Mutant("dropout goes on in evaluation", "lib/lora.py",
           "if torch.is_grad_enabled() and self.dropout:", "if self.dropout:",
           "lora: absent_from_validation"),
    Mutant("what was left out has a gradient", "lib/dropout.py",
           "x_grad = grad @ weight * mask", "x_grad = grad @ weight",
           "lora: gradient_of_its_formula"),
    Mutant("a slower card is taken for another of its name", "lib/gpus.py",
           " and not words & OTHERS.get(card, set())", "", "lib: known_by_the_name"),
    Mutant("the forecast of a checkpoint counts frozen weights beside adapters", "lib/forecast.py",
           "4 * whole.trained if config.lora_rank else whole.stored", "whole.stored",
           "scale: takes_on_disk"),
    Mutant("merging an adapter forgets to divide by the rank", "lib/weights.py",
           'settings["lora_alpha"] / settings["r"] * (b @ a)', 'settings["lora_alpha"] * (b @ a)',
           "lora: merged_weights and none"),
    Mutant("an adapter is merged into weights in bf16", "lib/weights.py",
           "tensor = tensor.float() + settings", "tensor = tensor.bfloat16().float() + settings",
           "lora: merged_weights and none"),
    Mutant("Meta's keys are reordered with the number of query heads", "lib/formats.py",
           'config.num_heads if kind == "attention.wq" else config.num_kv_heads',
           "config.num_heads", "model: metas_release"),
    Mutant("Meta's embedding parts are joined along the vocabulary", "lib/formats.py",
           '"embedding": ("tok_embeddings", 1)', '"embedding": ("tok_embeddings", 0)',
           "model: metas_release"),
    Mutant("a saved config forgets the position interpolation", "lib/rope_configs.py",
           'None if config.rope_scale == 1 else {"rope_type": "linear", "factor": '
           "config.rope_scale}", "None", "model: transformers_gives and rope_scale"),
    # ---- data.py ----
    Mutant("documents have no EOS", "lib/tokenizer.py",
           "[*ids, self.eos_id] if eos else ids", "ids", "data: holds_every_document"),
    Mutant("where a document goes depends on the process", "lib/shards.py",
           "digest = hashlib.sha256(content(item)).digest()",
           'digest = hashlib.sha256(b"%d %s" % (os.getpid(), content(item))).digest()',
           "data: hash_of_a_text"),
    Mutant("copies are told by one byte of their hash", "lib/shards.py",
           "digest[:16],", "digest[:1],", "data: holds_every_document"),
    Mutant("the end of a text begins with a piece", "lib/documents.py",
           '(("train", text[:left]), ("val", text[left:]))', '((("train", "val")[left < len(text)], text),)',
           "data: end_of_a_text"),
    Mutant("a tokenizer is trained on the end too", "lib/documents.py",
           "texts, counts = read_texts(files, Counter(), flags)", "texts, counts = read_pieces(files, Counter())",
           "data: end_of_a_text"),
    Mutant("bytes are counted as characters", "lib/documents.py",
           "Encoded(ids, None, len(text.encode()))", "Encoded(ids, None, len(text))",
           "data: holds_every_document"),
    Mutant("results of workers are taken as they come", "lib/shards.py",
           "if len(running) >= 3 * workers:\n                yield running.popleft().result()",
           "if len(running) >= 3 * workers:\n                yield running.pop().result()",
           "data: number_of_workers"),
    Mutant("cutting a long text loses a character", "lib/documents.py",
           "            start = end\n", "            start = end + 1\n",
           "data: without_losing"),
    Mutant("a separator at the end of a block is not seen", "lib/documents.py",
           "tail = rest[-len(SEPARATOR) :]", "tail = rest[-4:]", "data: separator_is_found"),
    Mutant("U+2581 comes back behind what follows it", "lib/codecs.py",
           "for part in rest for i in self.blank + part]", "for part in rest for i in part + self.blank]",
           "data: any_unicode_text and trained"),
    Mutant("65,536 ids need four bytes", "lib/shards.py",
           "vocab_size <= 65_536", "vocab_size < 65_536", "data: four_bytes"),
    Mutant("the last token before an answer counts as a target", "lib/templates.py",
           "[0] * len(ids) + [1] * len(said)", "[0] * (len(ids) - 1) + [1] * (len(said) + 1)",
           "chat: exactly_the_answers and bytes"),
    Mutant("EOS after an answer is not learned", "lib/templates.py",
           "[0] * len(ids) + [1] * len(said)",
           "[0] * len(ids) + [1] * (len(said) - 1) + [0]",
           "chat: exactly_the_answers and bytes"),
    Mutant("LLaMA-2's answers lack the blank before EOS", "lib/template_forms.py",
           '" {answer} "', '" {answer}"',
           "chat: written_as_published"),
    Mutant("only the first exchange begins with BOS", "lib/templates.py",
           "form.every_bos or first and form.bos", "first and form.bos", "chat: written_as_published"),
    Mutant("the system's text stands before every question", "lib/templates.py",
           "before = form.later", 'before = form.system if system else ""',
           "chat: written_as_published"),
    Mutant("an answer is encoded as if it began a text", "lib/tokenizer.py",
           "return self.codec.encode(lead + text)[len(self.codec.encode(lead)) :]",
           "return self.codec.encode(text)", "chat: small_conversation"),
    Mutant("a piece of a conversation may be a token too long", "lib/templates.py",
           "if len(ids) <= room:", "if len(ids) <= room + 1:",
           "chat: split_between_exchanges or fills_a_piece"),
    Mutant("an exchange that just fits is left out", "lib/templates.py",
           "if len(ids) > max_len:", "if len(ids) >= max_len:",
           "chat: split_between_exchanges or fills_a_piece"),
    Mutant("of a preference pair all answers are targets", "lib/templates.py",
           "mask[:end_of_question] = [0] * end_of_question", "pass", "chat: pair_is_two_rows"),
    Mutant("the bounds of later tasks begin anew", "lib/shards.py",
           'files[-1]["tokens"] + np.cumsum(sizes)', "np.cumsum(sizes)",
           "chat: many_files and not preference"),
    Mutant("rows that are padded to others' width count the padding", "data.py",
           "targets = np.full_like(tokens, IGNORE)", "targets = np.zeros_like(tokens)", "chat: batch_of_pairs"),
    Mutant("a rejected conversation runs over its end", "lib/layouts.py",
           "(file, middle, end - middle - 1)", "(file, middle, end - middle)",
           "chat: pair_is_two_rows"),
    Mutant("EOS is an input, whose target is the next document", "lib/layouts.py",
           "bounds[:-1], np.diff(bounds) - 1", "bounds[:-1], np.diff(bounds)", "data: whole_documents"),
    Mutant("a row is filled as badly as it can be", "lib/layouts.py",
           "(fitting & -fitting).bit_length()", "fitting.bit_length()",
           "readme data: docstrings or whole_documents"),
    Mutant("targets are the inputs themselves", "lib/datasets.py",
           "self.targets(file, start + 1, start + size + 1)",
           "self.targets(file, start, start + size)", "data: windows_are_the_tokens"),
    Mutant("an id as large as the vocabulary passes", "lib/datasets.py",
           'largest >= self.meta["vocab_size"]:', 'largest > self.meta["vocab_size"]:',
           "data: damaged_dataset or outside_the_voc"),
    Mutant("every epoch goes through the data in the same order", "data.py",
           "(seed, epoch)", "(seed, 0)", "data: every_epoch"),
    Mutant("every block of a mixture draws the same sequences", "lib/order.py",
           "drawn = [block * (end - begin)", "drawn = [0 * (end - begin)",
           "data: exactly_its_proportions"),
    Mutant("processes read overlapping sequences", "data.py",
           "first = step * batch_size + rank * share", "first = step * batch_size + rank",
           "data: all_ranks_together"),
    Mutant("answers before the first question stay", "lib/cleaning_steps.py",
           "        rest = rest[1:]\n", "        pass\n", "cleaning: turns_out_of_order"),
    Mutant("conversations that share a passage are taken for copies", "lib/cleaning_steps.py",
           "if all(a.jaccard(b) >= threshold", "if any(a.jaccard(b) >= threshold",
           "cleaning: passage_are_no"),
    Mutant("a refused question stays without its answer", "lib/cleaning_steps.py",
           "next(refused, len(turns) + 1) - 1", "next(refused, len(turns))",
           "cleaning: cut_before_the_first"),
    Mutant("what a page shows before an answer makes its HTML plain text", "lib/cleaning_steps.py",
           "return html[number.end() :] if number else html", "return html", "vicuna: cleaned_as"),
    Mutant("the language above a block of code is lost", "lib/cleaning_steps.py",
           "if bar and not _code_language(block):", "if False:", "vicuna: cleaned_as"),
    Mutant("a service's message is learnt as an answer", "lib/cleaning_steps.py",
           "if text and not failed:", "if text:", "vicuna: cleaned_as"),
    # ---- train.py ----
    Mutant("the warm-up begins at zero", "train.py",
           "config.learning_rate * (step + 1) / (warmup + 1)",
           "config.learning_rate * step / warmup", "train: warms_up"),
    Mutant("norms decay", "train.py",
           '[p for p in others if p.dim() < 2], "weight_decay": 0.0',
           '[p for p in others if p.dim() < 2], "weight_decay": config.weight_decay',
           "train: only_matrices"),
    Mutant("small gradients are enlarged to the norm of clipping", "train.py",
           "(norm / config.grad_clip).clamp(min=guard.scale)", "(norm / config.grad_clip)",
           "train: clipped and adamw"),
    Mutant("a gradient that overflows fp16 is used", "lib/guard.py",
           "skip = skip | ~excess.isfinite()", "pass",
           "fp16: skips_the_step or until_its_scale_fits"),
    Mutant("an overflow of fp16 is a bad step", "lib/guard.py",
           "bad = ~sound & ~overflow", "bad = ~sound",
           "fp16: skips_the_step or no_bad_step"),
    Mutant("no gradient is bad in fp16, at whatever scale", "lib/guard.py",
           "loss.isfinite() & (self.scale > 1)", "loss.isfinite() & torch.tensor(self.loss_scale.used)",
           "fp16: no_bad_step"),
    Mutant("a loss that is not finite is no bad step in fp16", "lib/guard.py",
           "loss.isfinite() & (self.scale > 1)", "self.scale > 1",
           "fp16: no_bad_step"),
    Mutant("an overflow moves the level of loss and norm", "lib/guard.py",
           "torch.where(sound, level, self.level)", "torch.where(bad, self.level, level)",
           "fp16: skips_the_step or no_bad_step"),
    Mutant("gradients are not scaled", "train.py",
           "backward(guard.scale)", "backward()",
           "fp16: without_its_scale or without_a_scale"),
    Mutant("gradients keep their scale", "train.py",
           ".clamp(min=guard.scale)", ".clamp(min=1)",
           "fp16: without_its_scale"),
    Mutant("the norm is that of the scaled gradient", "train.py",
           "    norm /= guard.scale ", "    norm = norm ",
           "fp16: without_its_scale"),
    Mutant("the scale is not in the checkpoint", "lib/scaling.py",
           "        if not self.used:\n            return {}\n        return {\"scale\"",
           "        if True:\n            return {}\n        return {\"scale\"",
           "fp16: bit_for_bit or in_no_checkpoint"),
    Mutant("the steps since the scale moved are not in the checkpoint", "lib/scaling.py",
           '"good_steps": self.steps}', '"good_steps": self.steps.clone()}',
           "fp16: bit_for_bit"),
    Mutant("the scale grows at once after it was halved", "lib/scaling.py",
           "torch.where(finite, self.steps + 1, 0)", "self.steps + finite",
           "fp16: as_is_written or pytorchs_own"),
    Mutant("the scale grows with every step after it has grown", "lib/scaling.py",
           "torch.where(grows, 0, steps)", "steps.clamp(max=self.PATIENCE - 1)",
           "fp16: as_is_written or pytorchs_own"),
    Mutant("the scale falls below 1", "lib/scaling.py",
           "moved.clamp(1, self.LARGEST)", "moved.clamp(2.0**-9, self.LARGEST)",
           "fp16: no_bad_step"),
    Mutant("fp16 is trained without a scale", "train.py",
           'config.dtype == "fp16")', "False)",
           "fp16: bit_for_bit or on_one_process"),
    Mutant("the loss's gradient is copied whole in fp32", "lib/kernels.py",
           "gradient[rows, targets] = at_target.to(dtype)[:, 0]", "gradient.scatter_(1, answers, at_target.to(dtype))",
           "bench: measured_memory"),
    Mutant("FSDP copies targets to the GPU and waits", "lib/objectives.py",
           "else OnHost(targets)", "else targets",
           "lib: on_the_host"),
    Mutant("a recorded step sees only as far as it was recorded", "lib/recording.py",
           "self.cache.longest = self.size[1] - 1", "self.cache.longest = max(1, int(self.cache.lengths.max()))",
           "decoding: host_counts or write_the_same"),
    Mutant("a cache has no more room than a recording", "lib/recording.py",
           "if cache.keys.size(3) < min(room_for, cache.longest + tokens.size(1)):", "if False:",
           "decoding: as_much_as_it_was_made_for or draft_in_recorded"),
    Mutant("what a former tenant left is read", "lib/recording.py",
           "new[:, :, :, cache.longest :] = 0", "pass",
           "decoding: gone_with_its_tenant"),
    Mutant("two caches live in one room", "lib/recording.py",
           "room.size == size and room.is_free()", "room.size == size",
           "decoding: write_the_same or live_together"),
    Mutant("fp16 means bf16", "lib/tensors.py",
           '"fp16": torch.float16', '"fp16": torch.bfloat16',
           "fp16: sampled"),
    Mutant("a T4 packs rows with a kernel that it lacks", "lib/kernels.py",
           "torch.cuda.get_device_capability() < (8, 0)", "False",
           "fp16: ampere"),
    Mutant("a plan for a T4 is in bf16", "lib/gpus.py",
           "GPU(65e12, 14.5, 0.40, bf16=False)", "GPU(65e12, 14.5, 0.40)",
           "lib scale: boost_clock or without_bf16"),
    Mutant("a plan for a T4 does not say that it is in fp16", "lib/planning.py",
           "return PLAN.format(**facts) + note", "return PLAN.format(**facts)",
           "scale: without_bf16"),
    Mutant("Muon's gradients are not clipped", "lib/guard.py",
           'for p in group["params"]], excess)',
           'for p in group["params"]], torch.ones_like(excess))', "train: clipped and muon"),
    Mutant("Muon makes a bad step", "lib/guard.py",
           "elif not skip:", "else:", "scale: gradient_that_is_not_finite"),
    Mutant("AdamW makes a bad step", "lib/guard.py",
           "optimizer.grad_scale, optimizer.found_inf = excess, skip.float()",
           "optimizer.grad_scale, optimizer.found_inf = excess, torch.zeros_like(excess)",
           "scale: gradient_that_is_not_finite"),
    Mutant("a spike is measured in variances", "lib/guard.py",
           "mean + self.spike * variance.sqrt()", "mean + self.spike * variance",
           "scale: far_above"),
    Mutant("one wild step hides the next", "lib/guard.py",
           "change = values.minimum(limit) - mean", "change = values - mean", "scale: far_above"),
    Mutant("a bad step spoils the level", "lib/guard.py",
           "torch.where(sound, level, self.level)", "level", "scale: far_above"),
    Mutant("each process counts its own targets", "train.py",
           "    dist.all_reduce(counts)  ", "    # ", "train: how_a_step_is_divided"),
    Mutant("the loss of many processes is divided by their number twice", "train.py",
           "(counts[0].clamp(min=1) / size)", "counts[0].clamp(min=1)",
           "train: how_a_step_is_divided"),
    Mutant("gradients are reduced with the first micro-batch", "train.py",
           "is_last = i == len(batches) - 1", "is_last = i == 0", "train: how_a_step_is_divided"),
    Mutant("what fills up a validation batch is counted", "data.py",
           "                batch.targets[rows_each * len(local) :] = IGNORE\n", "",
           "train: does_not_depend_on_the_batch"),
    Mutant("the noise of a run is the same for every sequence", "lib/objectives.py",
           'f"{seed} neftune {number}"', 'f"{seed} neftune"',
           "finetune: noise_of_a_sequence"),
    Mutant("the noise shrinks with the batch", "lib/objectives.py",
           "math.sqrt(drawn[0].numel())", "math.sqrt(drawn.numel())",
           "finetune: noise_of_a_sequence"),
    Mutant("DPO forgets the reference", "lib/objectives.py",
           "drifts = (after - before).sum(1)", "drifts = (after - 0 * before).sum(1)",
           "dpo: formula_of_the_paper and 1-4"),
    Mutant("DPO's loss counts the pairs of one process", "lib/objectives.py",
           "torch.stack((pairs, *count", "torch.stack((pairs * 0 + 1, *count",
           "dpo: formula_of_the_paper and 2-2"),
    Mutant("frozen parameters have moments and decay", "train.py",
           "trained = [p for p in model.parameters() if p.requires_grad]",
           "trained = [*model.parameters()]", "finetune: what_is_frozen and adamw"),
    Mutant("a checkpoint has no moments", "lib/saving.py",
           '"optimizer": state,', '"optimizer": {},', "train: same_command_again"),
    Mutant("a checkpoint is of the weights while it is written", "lib/saving.py",
           "staged = self.stager.stage(detached(self.tensors), non_blocking=self.device.type == \"cuda\")",
           "staged = detached(self.tensors)",
           "scale: goes_on_while"),
    Mutant("a checkpoint with infinite numbers counts", "lib/saving.py",
           "if not all_agree(finite, self.group):", "if False:", "scale: read_again_before"),
    Mutant("one checkpoint more than --keep stays", "lib/checkpoints.py",
           "for path in ours[:-keep]:", "for path in ours[: -keep - 1]:",
           "train: newest_checkpoints"),
    Mutant("a checkpoint's files are not synced before its name", "lib/saving.py",
           "        for path in aside.iterdir():\n            sync(path)\n", "",
           "train: on_the_disk"),
    Mutant("`last` names a checkpoint before it has its name", "lib/saving.py",
           'os.rename(aside, self.folder / name)\n        write_whole(self.folder / "last", name)',
           'write_whole(self.folder / "last", name)\n        os.rename(aside, self.folder / name)',
           "train: on_the_disk"),
    Mutant("`last` is written in place", "lib/saving.py",
           'write_whole(self.folder / "last", name)', '(self.folder / "last").write_text(name)',
           "train: on_the_disk"),
    Mutant("a run goes on from its oldest checkpoint", "lib/restoring.py",
           "in newest_first(folder):", "in newest_first(folder)[::-1]:", "train: same_command_again"),
    Mutant("a torchrun that restarts finds the keys of the last attempt", "lib/world.py",
           'store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)',
           "pass", "scale: restarted_attempt"),
    Mutant("after a rollback the same data comes again", "train.py",
           "range(step + shift, self.last + shift)", "range(step, self.last)",
           "scale: rolled_back_past and rollback"),
    Mutant("bad steps are counted though good ones lie between", "lib/report.py",
           "self.bad_in_a_row + 1 if bad else 0", "self.bad_in_a_row + bad",
           "scale: bad_steps_in_a_row"),
    Mutant("selective checkpointing keeps the products that it should not", "lib/checkpointing.py",
           "products[context.is_recompute] % 2 == 1", "products[context.is_recompute] % 4 == 1",
           "scale: keeps_what_it_says"),
    Mutant("an epoch is rounded down to whole steps", "lib/planning.py",
           'lengths["steps"] = math.ceil(round(config.epochs * epoch, 6))',
           'lengths["steps"] = int(config.epochs * epoch)', "finetune: rounded_up"),
    Mutant("the forecast has one of AdamW's two moments", "lib/forecast.py",
           "moments = 8 * shard", "moments = 4 * shard", "scale: forecast_of_memory and 15M"),
    Mutant("attention is left out of a token's work", "lib/planning.py",
           "count_parameters(shape) + 12 * shape.num_layers",
           "count_parameters(shape) + 0 * shape.num_layers", "train: work_of_a_token"),
    # ---- sample.py ----
    Mutant("the repetition penalty makes unlikely tokens likelier", "lib/sampling.py",
           "before * penalty)", "before / penalty)", "sample: repetition_penalty"),
    Mutant("top_k lets one more through", "lib/sampling.py",
           "keep[:, sampling.top_k :] = False", "keep[:, sampling.top_k + 1 :] = False",
           "sample: top_k"),
    Mutant("top_p leaves out the token that reaches p", "lib/sampling.py",
           "likelier = p.cumsum(-1) - p", "likelier = p.cumsum(-1)",
           "sample: top_p"),
    Mutant("min_p is an absolute probability", "lib/sampling.py",
           "sampling.min_p * p[:, :1]", "sampling.min_p", "sample: min_p"),
    Mutant("the temperature multiplies", "lib/sampling.py",
           "scaled = logits / sampling.temperature", "scaled = logits * sampling.temperature",
           "sample: temperature_zero"),
    Mutant("all rows draw the same random numbers", "lib/sampling.py",
           "seed * 1_000_003 + row", "seed * 1_000_003", "sample: random_row"),
    Mutant("shorter prompts go on after their padding", "sample.py",
           "self.states(chunks)[torch.arange(len(chunks)), places]",
           "self.states(chunks)[:, -1]", "sample: alone_and_in_a_batch and cached"),
    Mutant("the cache keeps the last token and reads it again", "sample.py",
           "reader.trim([len(contexts[row]) - 1 for row in rows])",
           "reader.trim([len(contexts[row]) for row in rows])",
           "sample: alone_and_in_a_batch and cached"),
    Mutant("a full window goes on with all of itself but the first token", "lib/growing.py",
           "self.contexts[row][-half:]", "self.contexts[row][1:]", "sample: beyond_the_context"),
    Mutant("a full chat forgets a question and keeps its answer", "lib/conversation.py",
           "del turns[:2]", "del turns[:1]", "mini: full_context"),
    Mutant("a chat goes on from what it has read though the prompt differs", "sample.py",
           "len(os.path.commonprefix([self.ids, ids]))", "min(len(self.ids), len(ids))",
           "mini: what_is_remembered"),
    # ---- eval.py ----
    Mutant("the harness has the original's two blanks", "eval.py",
           'blanks = " " if harness else "  "', 'blanks = "  "', "eval: other_protocols"),
    Mutant("a choice's log-probabilities are read one place late", "eval.py",
           "outputs[before_choice : len(row.ids) - past]",
           "outputs[before_choice + 1 : len(row.ids) - past + 1]", "eval: choices_of_any_length"),
    Mutant("a second batch reads behind the first one's rows", "lib/prefix.py",
           "        cache.trim([len(self.ids)] * rows)\n", "", "eval: hundred_questions"),
    Mutant("letters are compared in bf16", "eval.py",
           "logits = chunk @ self.unembedding.T",
           "logits = (chunk.bfloat16() @ self.unembedding.bfloat16().T).float()",
           "eval: letters_are"),
    # ---- bench.py ----
    Mutant("a speed forgets the micro-batches of a step", "bench.py",
           "= micro_batch * config.accumulate * self.world", "= micro_batch * self.world",
           "bench: speed_times"),
    Mutant("a speed is that of the best round", "bench.py",
           'speed = tokens / median(row["seconds"])', 'speed = tokens / min(row["seconds"])',
           "bench: speed_times"),
    Mutant("the share of a product is that of all devices together", "bench.py",
           "* speed / self.world\n", "* speed\n", "bench: several_processes"),
    Mutant("the ratio of two speeds is turned round", "lib/rounds.py",
           "their_time / our_time for", "our_time / their_time for",
           "bench: takes_turns"),
    Mutant("one side has all its rounds before the next", "lib/rounds.py",
           "    for _ in range(rounds):\n        for action, returned in zip(actions, results):\n",
           "    for action, returned in zip(actions, results):\n        for _ in range(rounds):\n",
           "bench_modes: rounds_in_turn"),
    Mutant("a pass reads the whole embedding", "lib/writing.py",
           "if not isinstance(module, nn.Embedding)]", "]", "bench_modes: looks_up"),
    Mutant("weights are read once a token of a batch", "lib/writing.py",
           'row["weight_bytes"] * row["passes"] / row["tokens_per_round"]', 'row["weight_bytes"]',
           "bench_modes: share_of_reading"),
    Mutant("int8 is compared with the slowest of the peer", "lib/writing.py",
           "best = max(theirs", "best = min(theirs", "bench_modes: fastest_of_the_others"),
    Mutant("the peer takes its slower cache", "lib/writing.py",
           "seconds.index(min(seconds))", "seconds.index(max(seconds))", "bench_modes: fastest_cache"),
    Mutant("the peer writes with weights of its own", "lib/peers.py",
           "self.model.load_state_dict(weights, assign=True)",
           "self.model.to_empty(device=self.device).init_weights()",
           "bench_modes: same_text"),
    Mutant("busy processes stay after an error", "lib/busy.py",
           "    finally:\n        for process in started:\n            process.kill()",
           "    except ZeroDivisionError:\n        for process in started:\n            process.kill()",
           "bench_modes: left_running"),
    Mutant("busy processes outlive a killed parent", "lib/busy.py",
           "while os.getppid() == int(sys.argv[1]):", "while True:", "bench_modes: parent_is_killed"),
    Mutant("busy processes are idle", "lib/busy.py",
           "    for _ in range(10**6):\n        pass", "    __import__('time').sleep(1)",
           "bench_modes: are_gone"),
    Mutant("a longer row is as many rows", "lib/growth.py",
           "micro_batch=tokens // length", "micro_batch=config.micro_batch", "bench_modes: tokens_a_step"),
    Mutant("a large case takes as many steps as a small one", "lib/growth.py",
           "return min(steps, afforded // rounds), rounds", "return steps, rounds", "bench_modes: budget"),
    Mutant("a document of packed rows goes on in the next row", "bench.py",
           "        begins[:, 0] = True  # no document goes on in the next row\n", "",
           "bench: beside_the_same_rows"),
    Mutant("peak memory is what is left at the end", "lib/peak_memory.py",
           "int(np.cumsum(changes).max())", "sum(changes)",
           "bench: measured_memory and not options2"),
    Mutant("the peer adds up the losses of micro-batches", "lib/peers.py",
           "loss = loss / len(self.batches)", "loss = loss",
           "bench: same_model"),
    # ---- lib ----
    Mutant("the examples leave from the front", "lib/prompts.py",
           '"".join(self.examples[:shots])', '"".join(self.examples[len(self.examples) - shots :])',
           "eval: as_many_examples"),
    Mutant("a prompt that just fits loses an example", "lib/prompts.py",
           "if len(more) > self.room:", "if len(more) >= self.room:",
           "eval: as_many_examples or just_fits"),
    Mutant("a prompt that is too long loses its right", "lib/prompts.py",
           '"context": ids[cut:]', '"context": ids[: len(ids) - cut]', "eval: as_many_examples"),
    Mutant("the shared prefix swallows the token before the choice", "lib/batches.py",
           "common = common[: min(row.begin for row in group) - 1]",
           "common = common[: min(row.begin for row in group)]", "eval: choices_of_any_length"),
    Mutant("acc_norm is not normalised", "lib/grades.py",
           "per_character.append(logprob / max(1, size))", "per_character.append(logprob)",
           "eval_tasks: your_own_task or by_their_characters"),
    Mutant("ties go to the last choice", "lib/grades.py",
           "pick = logprobs.index(largest)",
           "pick = len(logprobs) - 1 - logprobs[::-1].index(largest)", "eval_tasks: ties_go"),
    Mutant("mc2 takes the likeliest true choice alone", "lib/grades.py",
           "probabilities[question.gold].sum()", "probabilities[question.gold].max()",
           "eval_tasks: probability_of_the_true"),
    Mutant("GSM8K's strict rule takes any beginning", "lib/grades.py",
           'r"The answer is (', 'r"answer is (', "eval_tasks: numbers_are_found"),
    Mutant("GSM8K's flexible rule takes the first number", "lib/grades.py",
           "long, short = anywhere[-1]", "long, short = anywhere[0]",
           "eval_tasks: numbers_are_found"),
    Mutant("a chain's first answer counts", "lib/grades.py",
           'text.split("answer is ")[-1]', 'text.split("answer is ", 1)[-1].split(".")[0]',
           "eval_tasks: answer_of_a_chain"),
    Mutant("the examples of BIG-Bench Hard are asked too", "lib/tasks.py",
           "first, header = 3,", "first, header = 0,", "eval_tasks: direct_prompts"),
    Mutant("a passkey may stand anywhere", "lib/grades.py",
           'right = re.findall(r"\\d+", text)[:1] == [question.target]',
           "right = question.target in text", "eval_tasks: first_number_written"),
    Mutant("a rolling window has a token less of context", "lib/perplexity.py",
           "ids[max(0, end - 1 - window) : start]", "ids[max(0, end - window) : start]",
           "eval_tasks: rolling_windows"),
    Mutant("Wilson's interval lacks a factor", "lib/statistics.py",
           "Z * Z / (4 * n * n)", "Z * Z / (4 * n)", "eval: wilsons"),
    Mutant("a macro average's variance is that of one question", "lib/statistics.py",
           "float(np.var(values)) / len(values)", "float(np.var(values))", "eval: wilsons"),
    Mutant("McNemar's tail leaves its end out", "lib/statistics.py",
           "range(min(gained, lost) + 1)", "range(min(gained, lost))", "eval: from_chance"),
    Mutant("a stop string is let out but for its last letter", "lib/stream.py",
           "(n for n in range(1, len(word)) if", "(n for n in range(1, len(word) - 1) if",
           "sample: stop_string"),
    Mutant("the first stop string named cuts, not the first in the text", "lib/stream.py",
           "text[: min(found)]", "text[: found[0]]", "sample: stop_string"),
    Mutant("streamed text loses the blank that it begins with", "lib/stream.py",
           "self.ids = prompt[-8:]", "self.ids = []", "sample: streamed_text and llama2"),
    Mutant("half a character is let out", "lib/stream.py",
           'if after.endswith("\\ufffd"):', "if not after:", "sample: streamed_text and bytes"),
    Mutant("a small file is replaced before it is synced", "lib/files.py",
           "        sync(aside)\n        os.replace(aside, path)",
           "        os.replace(aside, path)\n        sync(path)", "train: on_the_disk"),
    Mutant("a new name in a folder is not synced", "lib/files.py",
           "    sync(path.parent)\n", "", "train: on_the_disk"),
    Mutant("what failed to be written stays as an unfinished folder", "lib/files.py",
           "    except BaseException as error:\n        shutil.rmtree(aside, ignore_errors=True)\n",
           "    except BaseException as error:\n", "lib: writing_fails"),
    Mutant("a folder gets its name though writing it failed", "lib/files.py",
           "        yield aside\n"
           "        (aside / OURS).unlink()\n"
           "        os.rename(aside, folder)  # onto an empty folder it works\n",
           "        try:\n"
           "            yield aside\n"
           "        finally:\n"
           "            (aside / OURS).unlink()\n"
           "            os.rename(aside, folder)\n", "lib: writing_fails"),
    Mutant("two processes hold one lock", "lib/files.py",
           "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "lib: a_lock"),
    Mutant("a missing field is found only where it is used", "lib/records.py",
           "if missing := [key for key in keys if key not in values]:", "if missing := []:",
           "lib: names_the_field"),
    Mutant("a record's problem does not say which field", "lib/records.py",
           "{f'field {field}: ' if field else ''}", "", "lib: names_the_field"),
    Mutant("bad input ends with exit code 0", "lib/cli.py",
           "sys.exit(2)", "sys.exit(0)", "train: exit_code_2"),
    Mutant("a bug deep in a library is told as bad input", "lib/cli.py",
           "except (BadInput, OSError) as error:", "except (ValueError, OSError) as error:",
           "train: exit_code_2"),
    # ---- models and tokenizers of others ----
    Mutant("a typed </s> is the special token", "lib/codecs.py",
           "self.model.encode_special_tokens = True", "self.model.encode_special_tokens = False",
           "family: ids_of_transformers"),
    Mutant("an answer of Llama 3 ends with EOS", "lib/templates.py",
           "    if form.end:", "    if form.end is None:", "family: control_tokens_of_their_own"),
    Mutant("Llama 3 stretches short wavelengths too", "model.py",
           "((turns - 1) / 3).clamp(0, 1)", "((turns - 1) / 3).clamp(0, 0)",
           "family: llamas_of_transformers_5"),
    Mutant("Mistral sees past its sliding window", "lib/configs.py",
           'window = min(window, values.get("sliding_window") or window)', "pass", "family: mistral"),
    Mutant("an attention bias is left out without a word", "lib/configs.py",
           "if value is True or value not in", "if value not in", "family: refused_by_name"),
    Mutant("other programs write on after the template's end", "lib/tokenizer_export.py",
           "stops = end_ids(template, tokenizer)", 'stops = end_ids("", tokenizer)', "journey: comes_back"),
    Mutant("an exported chat template begins without BOS", "lib/jinja_template.py",
           'else "loop.first" if form.bos', 'else "false" if form.bos', "export: tokens_of_training"),
    Mutant("an exported tokenizer.json merges in the order of length", "lib/tokenizer_json.py",
           "sorted(ordinary, key=ordinary.get, reverse=True)", "sorted(ordinary, key=len)",
           "export: cuts_texts"),
    # ---- what the kind of a run decides ----
    Mutant("--steps is as if it had not been typed", "lib/defaults.py",
           'changes.pop("epochs", None)', "pass", "journey: brings_its_rate"),
    Mutant("the best checkpoint is the newest", "lib/checkpoints.py",
           "    if loss < lowest:", "    if True:", "journey: best_checkpoint_by"),
    Mutant("the best checkpoint is deleted", "lib/checkpoints.py",
           "if path.name != best and (", "if (", "journey: best_checkpoint_by"),
    Mutant("a best checkpoint that is yet to come is kept", "lib/checkpoints.py",
           '(folder / "best").unlink()', "pass", "journey: forgets_a_best"),
    # ---- what people bring ----
    Mutant("a csv by Excel has a first column of another name", "lib/record_files.py",
           'name.removeprefix("\\ufeff")', "name", "brought: csv_and_parquet"),
    Mutant("answers go on in the middle of a batch", "lib/prompt_files.py",
           "done -= done % BATCH", "pass", "brought: goes_on_where"),
    Mutant("dropped turns of tools are not counted", "lib/chats.py",
           "] += of_tools", "] += 0", "brought: turns_of_tools"),
    Mutant("what a user types fills in the template", "lib/templates.py",
           "    return re.sub(places, value, text)",
           "    for name in values:\n        text = text.replace(name, values[name])\n    return text",
           "brought: template_of_your_own"),
    # ---- the page to talk on ----
    Mutant("another site's page is answered", "lib/server.py",
           "if self.is_foreign() or self.headers.get_content_type()", "if self.headers.get_content_type()",
           "serve: other_sites"),
    Mutant("a request may be of any size", "lib/server.py",
           "or int(size) > LARGEST", "", "serve: other_sites"),
    Mutant("an answer that was cut ended by itself", "lib/conversation.py",
           '"stop" if ended else "length"', '"stop"', "serve: client_of_openai"),
    Mutant("stop strings do nothing in a chat", "lib/conversation.py",
           "            return stream.finished", "            return False", "serve: what_a_request_says"),
    Mutant("several requests are answered at a time", "lib/server.py",
           "ThreadPoolExecutor(1)", "ThreadPoolExecutor(4)", "serve: each_its_own"),
    Mutant("a client may be silent for ever", "lib/server.py",
           "timeout, begun, stream = PATIENCE,", "timeout, begun, stream = None,",
           "serve: says_nothing"),
    Mutant("a damaged run.json ends a run", "lib/report.py",
           "contextlib.suppress(OSError, BadInput)", "contextlib.suppress(OSError)",
           "pictures: damaged_meanwhile"),
    # ---- pictures and reports ----
    Mutant("validation begins after the first steps", "lib/opening.py",
           "    run.report.validation(0, scores)", "    pass", "pictures: tells_of_itself"),
    Mutant("a mean loss is the last step's", "lib/report.py",
           "mean = torch.stack(losses).mean().item()", "mean = losses[-1].item()",
           "pictures: tells_of_itself"),
    Mutant("trials are drawn beside rounds in turn", "lib/plots.py",
           "    if not contests:", "    if True:", "pictures: bar_a_side"),
]  # fmt: skip


def copy_of_the_project(folder: Path) -> Path:
    """What git knows, and what it does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def begin_pytest(folder: Path, words: list[str]) -> int:
    """Run tests in a child of this process, which has its libraries; they print to FOLDER.txt."""
    if child := os.fork():
        return child
    os.setsid()  # so that what the tests start can be ended with them
    os.chdir(folder)
    output = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.path[0] = str(folder)  # as `python -m pytest` has it; here it is tests/ of the project
    sys.modules["__main__"] = types.ModuleType("__main__")  # else new processes import this file
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-rfE"]
    code = 3
    try:
        code = int(pytest.main([*options, *words]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def end_pytest(child: int):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def failed_tests(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (tests/\S+::.*?)(?: - .*)?$", output, re.MULTILINE)


class Trial:
    """A bug in a copy of the project, and the tests that run there."""

    def __init__(self, mutant: Mutant, folder: Path):
        self.mutant, self.folder, self.child = mutant, folder, 0
        self.path = folder / mutant.file
        self.text = self.path.read_text()
        files, _, expression = mutant.tests.partition(": ")
        self.words = [*(f"tests/test_{name}.py" for name in files.split()), "-k", expression]
        if self.text.count(mutant.old) == 1:
            self.path.write_text(self.text.replace(mutant.old, mutant.new))
            self.child = begin_pytest(folder, ["-x", *self.words])
            self.ends = time.monotonic() + SECONDS

    def verdict(self) -> tuple[str, str] | None:
        """("caught", the test), ("SURVIVED", the tests) or ("STALE", why); None while they run."""
        if not self.child:
            return "STALE", f"its line is there {self.text.count(self.mutant.old)} times"
        ended, status = os.waitpid(self.child, os.WNOHANG)
        if not ended and time.monotonic() < self.ends:
            return None
        end_pytest(self.child)
        if not ended:
            os.waitpid(self.child, 0)
        self.path.write_text(self.text)
        if not ended:
            return "caught", "a test that does not end"
        output, command = Path(f"{self.folder}.txt").read_text(), f"pytest {shlex.join(self.words)}"
        if failed := failed_tests(output):
            return "caught", failed[0]
        if code := os.waitstatus_to_exitcode(status):
            return "STALE", f"{command} ended with {code}: {output.strip().splitlines()[-1:]}"
        return "SURVIVED", command


def try_out(mutants: list[Mutant], copies: list[Path]) -> dict[Mutant, tuple[str, str]]:
    """The verdict on each, as many at a time as there are copies."""
    waiting, running, found = list(mutants), [], {}
    while waiting or running:
        while waiting and copies:
            running.append(Trial(waiting.pop(0), copies.pop()))
        for trial in list(running):
            if verdict := trial.verdict():
                found[trial.mutant] = word, reason = verdict
                print(f"{word}: {trial.mutant.what} ({trial.mutant.file}): {reason}", flush=True)
                running.remove(trial)
                copies.append(trial.folder)
        time.sleep(0.05)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="NAME", help="only bugs with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.k.lower() in mutant.what.lower()]
    with tempfile.TemporaryDirectory(prefix="mutants-") as top:
        copies = [copy_of_the_project(Path(top, str(number))) for number in range(arguments.jobs)]
        found = try_out(chosen, copies)
        reasons = {reason for verdict, reason in found.values() if verdict == "caught"}
        noticed = sorted(reason for reason in reasons if "::" in reason)
        fails_anyway = []
        if noticed:
            os.waitpid(begin_pytest(copies[0], noticed), 0)
            fails_anyway = failed_tests(Path(f"{copies[0]}.txt").read_text())
    for mutant, (_, reason) in found.items():
        if reason in fails_anyway:
            found[mutant] = "STALE", reason
            print(f"STALE: {mutant.what} ({mutant.file}): {reason} fails without it too")
    counts = Counter(word for word, _ in found.values())
    stale = f", {counts['STALE']} stale" * bool(counts["STALE"])
    print(f"{len(found)} mutants: {counts['caught']} caught, {counts['SURVIVED']} survived{stale}")
    return int(counts["caught"] < len(found))


if __name__ == "__main__":
    sys.exit(main())
