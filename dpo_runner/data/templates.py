"""Chat templates for models whose tokenizer has none (`model.chat_template`)."""

from pathlib import Path

from dpo_runner.errors import ConfigError

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
        "{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}


def resolve_chat_template(name: str) -> str:
    """Return the Jinja text that `model.chat_template` names.

    Raises:
        ConfigError: it is neither the name of a template nor a readable file.
    """
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(CHAT_TEMPLATES)
        raise ConfigError(f"`model.chat_template={name}`: {error.strerror}; use a file, or one of {known}") from None
