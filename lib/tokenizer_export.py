"""What other programs ask a model's folder of its tokenizer and its chats."""

import contextlib
import json
import sys
from pathlib import Path

from lib.disk import writing
from lib.jinja_template import CONFIG, OWN, to_jinja
from lib.records import parse_json
from lib.template_forms import form_of
from lib.templates import end_ids
from lib.tokenizer import Tokenizer
from lib.tokenizer_json import same_ids, to_json


def write_tokenizer(tokenizer: Tokenizer, template: str, folder: Path):
    """Write all that other programs ask a model's folder of its tokenizer and its chats.

    template is that of the model, as lib/template_forms.py writes it, or empty. What the base
    model's folder had is kept, but for what the template changes.
    """
    tokenizer.save(folder)
    files = {name: parse_json(data, name) for name, data in tokenizer.beside.items()
             if name.endswith(".json")}
    if not (folder / "tokenizer.json").exists():
        made = to_json(tokenizer)
        if same_ids(tokenizer, made):
            files["tokenizer.json"] = made
        else:
            print(f"no tokenizer.json: {tokenizer.name} is cut in a way it cannot say", file=sys.stderr)
    texts = tokenizer.control_texts()
    bos, eos = texts[tokenizer.bos_id], texts[tokenizer.eos_id]
    names = {"bos_token": bos, "eos_token": eos}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names}
    config |= {"clean_up_tokenization_spaces": False}
    config["add_prefix_space"] = tokenizer.codec.lead != ""
    config = files.setdefault(CONFIG, config)
    files.setdefault("special_tokens_map.json", names)
    stops = end_ids(template, tokenizer)
    if template:
        config["chat_template"], config[OWN] = to_jinja(form_of(template)), template
        with contextlib.suppress(FileNotFoundError):  # the base's, which would count
            (folder / "chat_template.jinja").unlink()
    generation = files.setdefault("generation_config.json", {})
    known = generation.get("eos_token_id", [])
    known = known if isinstance(known, list) else [known]
    generation["bos_token_id"] = tokenizer.bos_id
    generation["eos_token_id"] = list(dict.fromkeys([*known, *stops]))
    for name, values in files.items():
        with writing(folder / name):
            (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False))
