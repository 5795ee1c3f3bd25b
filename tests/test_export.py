"""What other programs find in an exported folder: the same tokens, the same prompts, the same answers."""

import json

import pytest
import torch

from data import Tokenizer
from lib.chat_formats import Turn
from lib.sampling import Sampling
from lib.template_forms import TEMPLATES
from lib.templates import render, render_prompt
from lib.tokenizer_training import train_tokenizer
from lib.with_model import chosen_template
from model import ModelConfig, Transformer, load, save
from sample import Chat

WRITTEN = [name for name, form in TEMPLATES.items() if not form.special]
TYPED = ["Hi, who are you?", "Name two\n\nthings: ", "  Then  what  is 12.5 × 3? 🙂 日本 "]
SAID = ["A program.", "Tea, and\n    code.", "37.5"]
KINDS = {
    "llama2": "llama2_tokenizer/tokenizer.model",
    "stories": "stories260K/tok512.rebuilt.model",
    "gpt2": "gpt2_bpe/r50k_base.tiktoken",
    "cl100k": "gpt2_bpe/cl100k_base.tiktoken",
    "bytes": "bytes",
    "trained": "",
}


def real_texts(shared, size: int = 1000) -> list[str]:
    """Pieces of all shared texts and chats."""
    texts = []
    for folder in ("text", "chat"):
        for path in sorted(shared(folder).glob("**/*")):
            if path.suffix in (".txt", ".json", ".jsonl") or path.is_file() and not path.suffix:
                text = path.read_bytes()[:6_000].decode(errors="ignore")
                texts += [text[i : i + size] for i in range(0, len(text), size)]
    assert len(texts) > 100
    return texts


def of_kind(kind: str, shared, folder) -> Tokenizer:
    if kind == "bytes":
        return Tokenizer("bytes")
    if KINDS[kind]:
        return Tokenizer(shared(KINDS[kind]))
    text = shared("text/tinyshakespeare").glob("*.txt")
    train_tokenizer(iter([path.read_text()[:200_000] for path in text]), 600, folder / "t.model")
    return Tokenizer(folder / "t.model")


def tiny(tokenizer: Tokenizer, window: int = 256, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(32, 2, 4, 2, 64, tokenizer.vocab_size, window))
    model.init_weights(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stories"])
def test_transformers_cuts_texts_as_we_do(kind, shared, tmp_path):
    from transformers import AutoTokenizer

    ours = of_kind(kind, shared, tmp_path)
    save(tiny(ours), tmp_path / "m", ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    texts = real_texts(shared)[::6] + [" ", "", "\n\n", " a", "▁ a", "x" * 50]
    for text in texts:
        ids = ours.encode(text, bos=True)
        assert theirs(text, split_special_tokens=True).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    again = Tokenizer(tmp_path / "m")
    assert again.sha256 == ours.sha256
    alone = tmp_path / "alone"  # as a folder that holds nothing but tokenizer.json
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (alone / name).write_bytes((tmp_path / "m" / name).read_bytes())
    read = Tokenizer(alone)
    assert read.file == "tokenizer.json" and read.vocab_size == ours.vocab_size
    for text in [*texts, *TYPED, "</s> <s> <|endoftext|>"]:
        assert read.encode(text) == ours.encode(text)
        assert read.decode(read.encode(text)) == ours.decode(ours.encode(text))
        assert read.encode_after(text) == ours.encode_after(text)
    assert (read.bos_id, read.eos_id) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("kind", ["llama2", "gpt2", "bytes"])
def test_a_chat_template_gives_the_tokens_of_training(kind, template, shared, tmp_path):
    from transformers import AutoTokenizer

    ours = of_kind(kind, shared, tmp_path)
    save(tiny(ours), tmp_path / "m", ours, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    talk = [Turn(role, text) for pair in zip(TYPED, SAID) for role, text in zip(("user", "assistant"), pair)]
    for system in ([], [Turn("system", "Be kind, {system}.")]):
        for count in (1, 3, 5):
            turns = [*system, *talk[:count]]
            messages = [{"role": role, "content": text} for role, text in turns]
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ids == render_prompt(turns, template, ours)
            whole, _ = render([*system, *talk[: count + 1]], template, ours)
            answered = [*messages, {"role": "assistant", "content": talk[count].text}]
            assert theirs.apply_chat_template(answered)["input_ids"] == whole
    with pytest.raises(Exception, match="take turns"):
        theirs.apply_chat_template(messages[-1:] + messages[-1:])
    assert chosen_template("", str(tmp_path / "m"), Tokenizer(tmp_path / "m")) == template


@pytest.mark.parametrize("template", WRITTEN)
def test_pipeline_answers_as_a_chat_here(template, shared, tmp_path):
    from transformers import pipeline

    ours = of_kind("stories", shared, tmp_path)
    save(tiny(ours), tmp_path / "m", ours, template)
    chat = Chat(load(tmp_path / "m").eval(), Tokenizer(tmp_path / "m"), template, "Be kind.")
    ask = pipeline("text-generation", model=str(tmp_path / "m"), device="cpu")
    written, write = [], chat.write

    def recorded(ids, count, sampling, add):
        def keep(row: int, token: int) -> bool:
            written.append(token)
            return add(row, token)

        written.clear()
        write(ids, count, sampling, keep)

    chat.write = recorded
    messages = [{"role": "system", "content": "Be kind."}]
    for text in TYPED[:2]:
        messages.append({"role": "user", "content": text})
        answer = chat.answer(text, 30, Sampling(temperature=0), lambda text: None)
        ids = ask(messages, do_sample=False, max_new_tokens=30, return_tensors=True)[0]
        whole = ids["generated_token_ids"]
        assert whole[: len(chat.ids)] == chat.ids  # the prompt, but for its last token
        said = whole[len(chat.ids) + 1 :]
        assert [token for token in said if token not in (ours.bos_id, ours.eos_id)] == written
        messages.append({"role": "assistant", "content": answer})
    assert len(written) > 5


def test_generation_ends_at_the_tokens_at_which_a_chat_ends(shared, tmp_path):
    ours = of_kind("llama2", shared, tmp_path)
    save(tiny(ours), tmp_path / "m", ours, "llama2-chat")
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 1]}
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] and config["add_bos_token"]


def test_llama_cpp_finds_the_template_and_the_ends(shared, tmp_path):
    """Its converter asks the gguf package for these, and takes tokenizer.model as it is."""
    import gguf

    ours = of_kind("trained", shared, tmp_path)
    save(tiny(ours), tmp_path / "m", ours, "vicuna")
    found = gguf.SpecialVocab(tmp_path / "m", load_merges=False)
    assert found.special_token_ids == {"bos": ours.bos_id, "eos": ours.eos_id}
    assert found.add_special_token["bos"] and found.chat_template.startswith("{%- set given")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False  # or it would put a blank before every prompt
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == ours.data


def test_a_template_of_your_own_is_exported_and_known_again(shared, tmp_path):
    from transformers import AutoTokenizer

    from lib.template_forms import spelled

    (tmp_path / "mine.toml").write_text('question = "{system}Q: {question}\\nA:"\nanswer = " {answer}"\nlater = "\\n"')
    ours, template = of_kind("llama2", shared, tmp_path), spelled(str(tmp_path / "mine.toml"))
    save(tiny(ours), tmp_path / "m", ours, template)
    assert chosen_template("", str(tmp_path / "m"), Tokenizer(tmp_path / "m")) == template
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    messages = [{"role": "user", "content": TYPED[0]}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == render_prompt([Turn("user", TYPED[0])], template, ours)
    config = tmp_path / "m" / "tokenizer_config.json"  # another template was put in its place
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"}))
    with pytest.raises(ValueError, match="names no template that is known here; name one of llama2-chat"):
        chosen_template("", str(tmp_path / "m"), Tokenizer(tmp_path / "m"))


def test_a_tokenizer_that_no_tokenizer_json_can_say_is_left_as_it_is(shared, tmp_path, capsys):
    import sentencepiece

    text = next(shared("text/tinyshakespeare").glob("*.txt"))
    with open(tmp_path / "u.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_writer=file, model_type="unigram", vocab_size=400, byte_fallback=True,
            input_sentence_size=2000, minloglevel=2,
        )  # fmt: skip
    ours = Tokenizer(tmp_path / "u.model")
    save(tiny(ours), tmp_path / "m", ours)
    assert "no tokenizer.json: u.model is cut in a way it cannot say" in capsys.readouterr().err
    assert not (tmp_path / "m" / "tokenizer.json").exists() and (tmp_path / "m" / "tokenizer.model").exists()
