"""A judge at an OpenAI-compatible endpoint: scores from 1 to 10, or which of two answers is better."""

import re
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from dpo_runner.config.sections.generate import JudgeRewardConf
from dpo_runner.data.layouts.messages import Message
from dpo_runner.errors import ConfigError, RowError
from dpo_runner.io.endpoint import Endpoint, RequestFailed, call_all
from dpo_runner.training.answers.rewards.store import ScoreStore
from dpo_runner.training.answers.rewards.term import Answered, Scores, Watch


def read_instruction(mode: str) -> str:
    """Return the project's own instruction for a judge in the mode `score` or `pairwise`."""
    return Path(__file__).with_name(f"{mode}.txt").read_text(encoding="utf-8").strip()


class Judge:
    """A client that asks a judge about answers.

    Args:
        endpoint: the judge's endpoint.
        model: its name there.
        instruction: the judge's system message.
    """

    def __init__(self, endpoint: Endpoint, model: str, instruction: str) -> None:
        self.endpoint, self._model, self._instruction = endpoint, model, instruction

    def compare(self, messages: Sequence[Message], first: str, second: str) -> str:
        """Return the judge's reply about `first` as A and `second` as B.

        Raises:
            RunError: the endpoint refuses, or cannot be reached after several tries.
        """
        return self._ask(messages, f"[Answer A]\n{first}\n\n[Answer B]\n{second}\n\nWhich answer is better, A or B?")

    def rate(self, messages: Sequence[Message], answer: str) -> str:
        """Return the judge's reply about one answer.

        Raises:
            RunError: as `compare`.
        """
        return self._ask(messages, f"[Answer]\n{answer}\n\nHow good is the answer, from 1 to 10?")

    def _ask(self, messages: Sequence[Message], question: str) -> str:
        conversation = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
        body = {
            "model": self._model,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": self._instruction},
                {"role": "user", "content": f"{conversation}\n\n{question}"},
            ],
        }
        return self.endpoint.chat(body)[0]["message"]["content"] or ""


def parse_verdict(reply: str) -> str | None:
    """Return `A` or `B`; None if the reply is not clearly one of them.

    Accepts `[[A]]` anywhere, or a lone letter, also after a reasoning model's `</think>`. Guessing from prose would
    be wrong too often: "A" is a word.
    """
    text = reply.rpartition("</think>")[2].strip()
    marked = set(re.findall(r"\[\[([AB])\]\]", text))
    if marked:
        return marked.pop() if len(marked) == 1 else None
    match = re.fullmatch(r"\W*(?:(?:the )?(?:better )?(?:answer|verdict)(?: is)?\W+)?([AB])\W*", text, re.IGNORECASE)
    return match[1].upper() if match else None


def parse_rating(reply: str) -> float | None:
    """Return a number from 1 to 10; None if the reply is not clearly one.

    Accepts `[[7]]` anywhere, or a lone number such as `7`, `7.5/10` or `Rating: 7`, also after `</think>`.
    """
    text = reply.rpartition("</think>")[2].strip()
    marked = set(re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text))
    pattern = r"\W*(?:(?:the )?(?:score|rating)(?: is)?\W+)?(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10)?\W*"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    if len(marked) > 1 or not (marked or match):
        return None
    rating = float(marked.pop() if marked else match[1])  # type: ignore[index]  # a match, without marks
    return rating if 1 <= rating <= 10 else None


class JudgeTerm:
    """A judge's scores, each reply kept as soon as it is there.

    Raises:
        ConfigError: the file with the instruction cannot be read.
    """

    def __init__(self, conf: JudgeRewardConf) -> None:
        instruction = read_instruction(conf.mode) if conf.prompt is None else _read_prompt(conf.prompt)
        access = (str(conf.base_url), conf.api_key_env, conf.timeout, conf.requests_per_minute)
        self._judge = Judge(Endpoint("reward.judge", *access), str(conf.model), instruction)
        self._replies = ScoreStore("judge", conf.mode, conf.model, instruction)
        self._pairwise, self._concurrency = conf.mode == "pairwise", conf.concurrency

    def count_steps(self, answered: Sequence[Answered]) -> int:
        return len(self._find_missing(answered))

    def count_calls(self, answered: Sequence[Answered]) -> int:
        return len(self._find_missing(answered))

    def _find_missing(self, answered: Sequence[Answered]) -> list[tuple[int, tuple[str, ...]]]:
        """Return what the judge has not been asked yet: the number of the prompt, and one answer or two."""
        asked = [
            (number, texts)
            for number, one in enumerate(answered)
            for texts in permutations(one.answers, 2 if self._pairwise else 1)
        ]
        return [
            (number, texts) for number, texts in asked if self._replies.find(answered[number].messages, *texts) is None
        ]

    def score(self, answered: Sequence[Answered], watch: Watch) -> list[Scores]:
        """Return ratings, or the share of the other answers that each beats; see `Term`.

        Raises:
            RunError: the endpoint refuses any request, or cannot be reached.
        """
        missing = self._find_missing(answered)
        failed: dict[tuple[int, tuple[str, ...]], RowError] = {}

        def ask(number: int, texts: tuple[str, ...]) -> Callable[[], None]:
            def call() -> None:
                messages = answered[number].messages
                reply = self._judge.compare(messages, *texts) if len(texts) > 1 else self._judge.rate(messages, *texts)
                self._replies.keep(reply, messages, *texts)

            return call

        calls = [ask(number, texts) for number, texts in missing]
        for at, result in call_all(self._judge.endpoint, calls, self._concurrency):
            number, texts = missing[at]
            if isinstance(result, RequestFailed):
                failed[number, texts] = RowError("the judge failed", str(result))
                watch(number, failed[number, texts])
            else:
                found = self._read_reply(answered[number].messages, texts)
                watch(number, found if isinstance(found, RowError) else None)
        return [
            [self._read(number, one, answer, failed) for answer in one.answers] for number, one in enumerate(answered)
        ]

    def _read(self, number: int, one: Answered, answer: str, failed: dict[Any, RowError]) -> float | RowError:
        """Return the score of an answer from the kept replies."""
        size = 2 if self._pairwise else 1
        asked = [texts for texts in permutations(one.answers, size) if answer in texts]
        points: list[float] = []
        for texts in asked:
            if (number, texts) in failed:
                return failed[number, texts]
            point = self._read_reply(one.messages, texts)
            if isinstance(point, RowError):
                return point
            points.append(point if texts[0] == answer else 1 - point)
        return sum(points) / len(points) if points else RowError("no other answer to compare with")

    def _read_reply(self, messages: list[Message], texts: tuple[str, ...]) -> float | RowError:
        """Return the rating in a kept reply, or 1 if it prefers the first of two texts, else 0."""
        reply = self._replies.find(messages, *texts)
        if self._pairwise:
            letter = parse_verdict(reply)
            point = None if letter is None else float(letter == "A")
        else:
            point = parse_rating(reply)
        return RowError("the judge's reply cannot be read", repr(reply)[:80]) if point is None else point


def _read_prompt(path: str) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ConfigError(
            f"`reward.judge.prompt={path}`: cannot be read; {getattr(error, 'strerror', error)}"
        ) from None
    if not text:
        raise ConfigError(f"`reward.judge.prompt={path}`: the file is empty; write the judge's instruction into it")
    return text
