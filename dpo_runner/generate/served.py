"""Answers of models behind an OpenAI-compatible endpoint."""

from collections.abc import Callable, Sequence
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.prompts import Prompt
from dpo_runner.errors import RowError
from dpo_runner.generate.ledger import Answer, Ledger, LeftOut, Work
from dpo_runner.io.endpoint import Endpoint, RequestFailed, call_all
from dpo_runner.training.answers.sampling import derive_seed


class ServedSampler:
    """Samples answers from `generate.models` at `generate.endpoint`, each reply on disk as soon as it is there.

    Args:
        conf: the configuration.
    """

    def __init__(self, conf: RunConf) -> None:
        self._conf, at = conf, conf.generate.endpoint
        access = (str(at.base_url), at.api_key_env, at.timeout, at.requests_per_minute)
        self._endpoint = Endpoint("generate.endpoint", *access)
        self.models = list(conf.generate.models)
        self._missing: list[tuple[Prompt, str]] = []

    def describe(self) -> dict[str, Any]:
        """Return what the answers depend on beside the settings of `generate`."""
        return {"data.system_prompt": self._conf.data.system_prompt}

    def plan(self, prompts: Sequence[Prompt], ledger: Ledger, left_out: LeftOut) -> Work:
        """Return the work that is left: a request for each prompt and model, if the server knows `n`."""
        missing = self._missing = self._find_missing(prompts, ledger)
        answers = sum(self._conf.generate.num_answers - len(ledger.find(*each)) for each in missing)
        return Work(answers, answers * self._conf.generate.max_new_tokens, None, len(missing))

    def _find_missing(self, prompts: Sequence[Prompt], ledger: Ledger) -> list[tuple[Prompt, str]]:
        wanted = self._conf.generate.num_answers
        both = [(prompt, model) for model in self.models for prompt in prompts]
        return [each for each in both if len(ledger.find(*each)) < wanted]

    def sample(self, ledger: Ledger, left_out: LeftOut, progress: Callable[[int], None]) -> None:
        """Sample what is missing, after `plan`.

        Raises:
            RunError: the endpoint refuses any request or cannot be reached, or too many requests fail.
        """
        missing = self._missing

        def ask(prompt: Prompt, model: str) -> Callable[[], int]:
            return lambda: self._answer(prompt, model, ledger)

        calls = [ask(*each) for each in missing]
        for at, result in call_all(self._endpoint, calls, self._conf.generate.endpoint.concurrency):
            if isinstance(result, RequestFailed):
                prompt, model = missing[at]
                lost = self._conf.generate.num_answers - len(ledger.find(prompt, model))
                left_out.add(prompt, RowError("the endpoint failed", str(result)), lost)
            else:
                progress(result)

    def _answer(self, prompt: Prompt, model: str, ledger: Ledger) -> int:
        """Ask until a prompt has all its answers; servers that do not know `n` give one at a time."""
        wanted, before = self._conf.generate.num_answers, len(ledger.find(prompt, model))
        while (have := len(ledger.find(prompt, model))) < wanted:
            choices = self._endpoint.chat(self._build_request(prompt, model, have))
            answers = [_read_choice(choice) for choice in choices[: wanted - have]]
            ledger.append(model, [(prompt, answers)])
        return wanted - before

    def _build_request(self, prompt: Prompt, model: str, have: int) -> dict[str, Any]:
        generate, messages = self._conf.generate, list(prompt.messages)
        system = self._conf.data.system_prompt
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        tools = prompt.variables.get("tools")
        variables = {name: value for name, value in prompt.variables.items() if name != "tools"}
        return {
            "model": model,
            "messages": messages,
            "n": generate.num_answers - have,
            "temperature": generate.temperature,
            "top_p": generate.top_p,
            "max_tokens": generate.max_new_tokens,
            "seed": derive_seed(generate.seed, prompt.key, model, have) % 2**31,
            **({"stop": generate.stop} if generate.stop else {}),
            **({"tools": tools} if tools else {}),
            **({"chat_template_kwargs": variables} if variables else {}),
        }


def _read_choice(choice: dict[str, Any]) -> Answer:
    return Answer(choice["message"]["content"], choice.get("finish_reason") != "length").stripped()
