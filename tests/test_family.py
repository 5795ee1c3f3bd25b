"""Models and tokenizers of LLaMA's family, as the releases and transformers 5 write them."""

import base64
import json

import pytest
import torch

from conftest import ROOT
from data import Tokenizer
from lib.chat_formats import Turn
from lib.codecs import LLAMA3
from lib.templates import bracketed, end_ids, render, render_prompt
from lib.with_model import chosen_template
from model import ModelConfig, Transformer, load, save
from test_export import real_texts
from test_model import meta_state

TYPED = "Hi </s> <s> <|eot_id|> <|begin_of_text|> <|im_end|> <|endoftext|> <|start_header_id|> [INST]"
LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TALK = [Turn("system", "Be kind."), Turn("user", " Hi <|im_end|>? "), Turn("assistant", "Yes."), Turn("user", "Ho?")]


def write_tokenizer(kind: str, folder, shared, size: int = 1200):
    """What transformers 5 saves of a tokenizer of this kind, trained for the test: tokenizer.json alone."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    steps = {
        "llama3": [pre_tokenizers.Split(tokenizers.Regex(LLAMA3_CUT), "isolated"), byte_level],
        "smollm2": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "gpt2": [byte_level],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps[kind])
    tokenizer.decoder = decoders.ByteLevel()
    specials = {
        "llama3": list(LLAMA3),
        "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "gpt2": ["<|endoftext|>"],
    }[kind]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(real_texts(shared)[:200], trainer)
    bos, eos = specials[0], specials[0]
    if kind == "llama3":
        eos = "<|end_of_text|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    if kind == "smollm2":
        fast.chat_template = (ROOT / "tests/chatml.jinja").read_text()
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("kind", ["llama3", "smollm2", "gpt2"])
def test_a_tokenizer_json_gives_the_ids_of_transformers(kind, shared, tmp_path):
    theirs = write_tokenizer(kind, tmp_path, shared)
    assert not (tmp_path / "tokenizer.model").exists()
    ours = Tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in [*real_texts(shared)[::3], TYPED, "", " ", "\n\n \n"]:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.decode(ids) == text
        assert ours.encode_after(text) == ids
    assert not {*ours.codec.specials.values()} & {*ours.encode(TYPED)}
    assert ours.decode([ours.bos_id, *ours.encode("é"), ours.vocab_size + 7, ours.eos_id]) == "é"
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy")
    again = Tokenizer(tmp_path / "copy")
    assert again.sha256 == ours.sha256 and again.eos_id == ours.eos_id


def test_llama_3_and_chatml_have_control_tokens_of_their_own(shared, tmp_path):
    theirs = write_tokenizer("llama3", tmp_path / "a", shared)
    ours = Tokenizer(tmp_path / "a")
    with pytest.raises(ValueError, match="no special token <|im_start|>"):
        render_prompt(TALK, "chatml-tokens", ours)
    eot = ours.special("<|eot_id|>")
    ids, mask = render([*TALK, Turn("assistant", "Hey.")], "llama3", ours)
    assert bracketed(ids, mask, ours) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <|im_end|>?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nHo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hey.<|eot_id|>⟧"
    )
    assert ids.count(eot) == 5 and eot in end_ids("llama3", ours)
    theirs = write_tokenizer("smollm2", tmp_path / "b", shared)
    ours = Tokenizer(tmp_path / "b")
    assert chosen_template("", str(tmp_path / "b"), ours) == "chatml-tokens"
    messages = [{"role": role, "content": text.strip()} for role, text in TALK]
    messages[1]["content"] = "Hi?"
    prompt = render_prompt([TALK[0], Turn("user", "Hi?"), *TALK[2:]], "chatml-tokens", ours)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
    assert ours.eos_id not in prompt and ours.bos_id not in prompt


def test_metas_file_of_llama_3_is_no_sentencepiece_model(shared, tmp_path):
    """Its tokenizer.model holds ranks, the first 100,256 of which are cl100k's."""
    lines = shared("gpt2_bpe/cl100k_base.tiktoken").read_bytes().splitlines()
    for rank in range(len(lines), 128_000):
        lines.append(base64.b64encode(f" made up {rank}".encode()) + b" %d" % rank)
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    llama, cl100k = Tokenizer(tmp_path), Tokenizer(shared("gpt2_bpe/cl100k_base.tiktoken"))
    assert llama.file == "tokenizer.tiktoken" and llama.vocab_size == 128_256
    assert llama.encode(TYPED, bos=True, eos=True) == [128_000, *cl100k.encode(TYPED), 128_001]
    assert llama.special("<|eot_id|>") == 128_009


def test_a_token_added_to_a_sentencepiece_model_is_in_tokenizer_json_alone(shared, tmp_path):
    """Of both files tokenizer.model counts, which other programs prefer, unless the other has more."""
    plain = Tokenizer(shared("llama2_tokenizer/tokenizer.model"))
    model = Transformer(ModelConfig(8, 1, 2, 2, 8, plain.vocab_size, 16))
    save(model, tmp_path / "m", plain)
    assert Tokenizer(tmp_path / "m").file == "tokenizer.model"
    (tmp_path / "more").mkdir()
    for path in (tmp_path / "m").glob("tokenizer*"):
        (tmp_path / "more" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "more" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 32_000, "content": "<|im_end|>"})
    file.write_text(json.dumps(values))
    larger = Tokenizer(tmp_path / "more")
    assert larger.file == "tokenizer.json" and larger.special("<|im_end|>") == 32_000
    assert larger.encode(TYPED) == plain.encode(TYPED) and larger.vocab_size == 32_001
    (tmp_path / "copy").mkdir()
    larger.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").exists() and Tokenizer(tmp_path / "copy").sha256 == larger.sha256


@pytest.mark.parametrize("change, message", [
    (dict(model={"type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]",
                 "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}), "model WordPiece cannot be"),
    (dict(normalizer={"type": "Lowercase"}), "its normalizer Lowercase cannot be honoured"),
    (dict(normalizer={"type": "NFKC"}), "its normalizer NFKC cannot be honoured"),
    (dict(model=7), r"is not a tokenizer.json \(no object `model`\)"),
    (dict(decoder={"type": "Nonsense"}), "cannot be read"),
])  # fmt: skip
def test_a_tokenizer_json_that_cannot_be_honoured_says_which_part(change, message, shared, tmp_path):
    write_tokenizer("gpt2", tmp_path, shared, 300)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
        Tokenizer(tmp_path)


def test_bos_and_eos_come_from_the_files_beside(shared, tmp_path):
    write_tokenizer("smollm2", tmp_path, shared, 300)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="name no BOS token of it"):
        Tokenizer(tmp_path)
    ids = {"bos_token_id": 0, "eos_token_id": [2, 0]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ids))
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (0, 2)
    names = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    assert (Tokenizer(tmp_path).bos_id, Tokenizer(tmp_path).eos_id) == (1, 2)


# ---- models ----

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
    vocab_size=100, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip


def check_same(theirs, folder, ours=None):
    """Our logits are transformers', and so are those of our own export."""
    theirs.save_pretrained(folder)
    ours = load(folder) if ours is None else ours
    tokens = torch.randint(100, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    return ours


@pytest.mark.parametrize("extra", [
    dict(rope_parameters=LLAMA3_ROPE), dict(rope_parameters=LLAMA3_ROPE | {"factor": 32.0}, tie_word_embeddings=True),
    dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), dict(head_dim=16), dict(head_dim=4),
])  # fmt: skip
def test_llamas_of_transformers_5_are_read(extra, tmp_path):
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **extra)).eval()
    ours = check_same(theirs, tmp_path / "theirs")
    save(ours, tmp_path / "ours")
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    check_same(back.eval(), tmp_path / "again", ours)
    assert load(tmp_path / "again").config == ours.config


@pytest.mark.parametrize("window, longest", [(None, 64), (4096, 64), (40, 40)])
def test_mistral_is_llama_within_its_sliding_window(window, longest, tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.MistralConfig(**SMALL, sliding_window=window)
    theirs = transformers.MistralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.max_seq_len == longest
    tokens = torch.randint(100, (2, longest), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(attention_bias=True), "attention_bias True is not LLaMA-2's"),
    (dict(num_local_experts=8), "num_local_experts 8 is not LLaMA-2's"),
    (dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not LLaMA-2's"),
    (dict(rope_parameters=LLAMA3_ROPE | {"high_freq_factor": 8.0}), "high_freq_factor 8.0 is not Llama 3's, 4.0"),
    (dict(rope_parameters=LLAMA3_ROPE | {"factor": None}), "rope_type llama3, but no factor"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type yarn is not supported"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
    (dict(model_type="qwen2"), "model_type qwen2 is not LLaMA-2's"),
])  # fmt: skip
def test_what_computes_something_else_is_refused_by_name(change, message, tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(32, 2, 4, 2, 48, 100, 64))
    model.init_weights()
    save(model, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize("params, factor, longest", [
    ({"use_scaled_rope": True}, 32.0, 131_072), ({"use_scaled_rope": True, "rope_scaling_factor": 8.0}, 8.0, 131_072),
    ({}, 1.0, 8192),
])  # fmt: skip
def test_metas_llama_3_scales_its_rope(params, factor, longest, tmp_path):
    import transformers

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    if params:
        rope = LLAMA3_ROPE | {"factor": factor, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(**SMALL, rms_norm_eps=1e-5, rope_parameters=rope)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "meta").mkdir()
    torch.save(meta_state(load(tmp_path / "hf"), 1)[0], tmp_path / "meta" / "consolidated.00.pth")
    plain = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, norm_eps=1e-5, rope_theta=500_000.0)
    (tmp_path / "meta" / "params.json").write_text(json.dumps(plain | params))
    ours = load(tmp_path / "meta")
    assert ours.config.max_seq_len == longest and ours.config.rope_scale == factor
    tokens = torch.randint(100, (1, 64), generator=torch.Generator().manual_seed(0))
    far = torch.arange(64) + 5000
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        expected = theirs(tokens, position_ids=far[None]).logits
        cache_free = ours.unembedding(hidden_at(ours, tokens, far))
        torch.testing.assert_close(cache_free, expected, atol=1e-4, rtol=1e-4)


def hidden_at(model: Transformer, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    from model import rope_table

    rope, x = rope_table(model.config, positions), model.embed(tokens, positions)
    for block in model.blocks:
        x = block(x, rope, None, None)
    return model.norm(x)
