"""Preference data: rows from a source, as messages, as token ids, and the account of what became of them."""

from dpo_runner.data.chat_template import apply_chat_template
from dpo_runner.data.preferences import PreferenceData, SamplePrompt, load_preferences

__all__ = ["PreferenceData", "SamplePrompt", "apply_chat_template", "load_preferences"]
