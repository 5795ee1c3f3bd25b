"""Chat templates in Jinja, as a model's folder has them for other programs."""

import json
import re

from lib.chat_formats import INPUT
from lib.errors import BadInput
from lib.records import parse_json
from lib.template_forms import TEMPLATES, Template, form_of
from lib.tokenizer import Tokenizer

CONFIG = "tokenizer_config.json"
OWN = "plainllama_template"  # in tokenizer_config.json: which of this project's it is


def literal(text: str) -> str:
    """A text as an expression of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def expression(text: str, **values: str) -> str:
    """A text of a template as an expression of Jinja, values being those for its {system} etc."""
    literals_and_names = re.split(f"{{({'|'.join(values)})}}", text)
    words = []
    for place, part in enumerate(literals_and_names):
        if place % 2:
            words.append(values[part])
        elif part:
            words.append(literal(part))
    return " ~ ".join(words)


def to_jinja(form: Template) -> str:
    """The template that gives the text whose tokens `render` gives: of messages of a system,
    perhaps, then of user and assistant in turns. Blanks around a message are left off."""
    text = "message['content'] | trim"
    default = literal(form.default)
    if form.with_input:
        default = f"({literal(form.with_input)} if {literal(INPUT)} in ({text}) else {default})"
    first = f"(({expression(form.system, system='system')}) if system else '')"
    before = f"({first} if loop.first else {literal(form.later)})"
    question = expression(form.question, system=before, question=f"({text})")
    answer = expression(form.answer, answer=f"({text})")
    begin = "true" if form.every_bos else "loop.first" if form.bos else "false"
    end = literal(form.end) if form.end else "eos_token"
    lines = (
        "{%- set given = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}",
        "{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}",
        "{%- for message in turns %}",
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}",
        "{{- raise_exception('after a system message, user and assistant take turns') }}",
        "{%- endif %}",
        "{%- if message['role'] == 'user' %}",
        f"{{%- set system = given if given else {default} %}}",
        f"{{%- if {begin} %}}{{{{- bos_token }}}}{{%- endif %}}",
        f"{{{{- {question} }}}}",
        "{%- else %}",
        f"{{{{- {answer} ~ {end} }}}}",
        "{%- endif %}",
        "{%- endfor %}",
    )
    return "\n".join(lines)


def rendered(source: str, messages: list[dict], bos: str, eos: str) -> str:
    """What a Jinja template makes of messages, as transformers renders it. Raises ValueError.

    The template comes with a model and is code, but of a sandbox: it can reach only what is here.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(text: str):
        raise TemplateError(text)

    inside = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    inside.globals["raise_exception"] = raise_exception
    try:
        template = inside.from_string(source)
        return template.render(
            messages=messages, bos_token=bos, eos_token=eos, add_generation_prompt=True
        )
    except Exception as error:  # a template may fail in any way
        raise BadInput(f"its chat template cannot be rendered ({error})") from None


TALKS = (  # which templates that are the same render alike
    [{"role": "user", "content": "Hi, you!"}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Ho?"},
    ],
)


def known_template(tokenizer: Tokenizer) -> str:
    """The template, as lib/template_forms.py writes it, of a model's folder that says in Jinja how
    it chats; empty where it says nothing, or none of ours is the same."""
    config = {}
    if data := tokenizer.beside.get(CONFIG):
        config = parse_json(data, CONFIG)
    source = config.get("chat_template", "")
    if isinstance(source, list):  # several, for several uses
        source = next((one["template"] for one in source if one.get("name") == "default"), "")
    if data := tokenizer.beside.get("chat_template.jinja"):
        source = data.decode()
    own = config.get(OWN, "")
    if own and to_jinja(form_of(own)) == source:
        return own
    if not source:
        return ""
    ends = ("<the BOS>", "<the EOS>")
    try:
        theirs = [rendered(source, talk, *ends) for talk in TALKS]
    except BadInput:  # it wants other messages, such as none of a system
        return ""
    for name, form in TEMPLATES.items():
        if theirs == [rendered(to_jinja(form), talk, *ends) for talk in TALKS]:
            return name
    return ""
