"""The win rate of a tuned model against its reference, judged by an OpenAI-compatible endpoint, length-controlled."""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpo_runner.config.sections.run import JudgeConf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.evaluate.intervals import Floats, draw_weights, estimate_ratios, to_estimate
from dpo_runner.io.files import JsonLines
from dpo_runner.io.masking import MASK, mask_secrets

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each retry if an endpoint is busy, failing, slow or unreachable."""
_LONGEST_WAIT = 60.0
_LARGEST_REPLY = 2**22
_NEWTON_STEPS = 50
_LARGEST_LOGIT = 40.0
LENGTH_PENALTY = 0.1
"""λ of the ridge penalty on the length coefficient."""

INSTRUCTION = (
    "You compare two answers to the last message of a conversation. Judge which one is better: more helpful, correct "
    "and to the point. Neither the order nor the length of the answers counts. Reply with one letter and nothing "
    "else: A or B."
)


def check_judge(conf: JudgeConf) -> None:
    """Check a `judge` section.

    Raises:
        ConfigError: one line per mistake.
    """
    mistakes = []
    if not re.match(r"https?://[^/]", str(conf.base_url)):
        mistakes.append(f"`judge.base_url={_show_url(conf)}`: must begin with http:// or https://, and end with /v1")
    if not conf.model:
        mistakes.append("`judge.model`: must be set with judge.base_url (`judge.model=NAME`), the judge's name there")
    key = os.environ.get(conf.api_key_env, "")
    if not key.isascii() or not key.isprintable():
        mistakes.append(f"`judge.api_key_env={conf.api_key_env}`: that variable holds no key, but control characters")
    if mistakes:
        raise ConfigError(mistakes)


def name_judge(conf: JudgeConf) -> dict[str, str]:
    """Return the judge's address and model without secrets, for records and results."""
    return {"base_url": _show_url(conf), "model": str(conf.model)}


def _show_url(conf: JudgeConf) -> str:
    return str(mask_secrets(str(conf.base_url)))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Blocks redirects: urllib would forward the API key to their targets."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Judge:
    """Client that asks a judge which of two answers is better.

    Args:
        conf: a section that `check_judge` accepts. The API key is read from the environment at each request and is
            redacted from everything that is returned, raised or written.
    """

    def __init__(self, conf: JudgeConf) -> None:
        self._conf = conf
        self._opener = urllib.request.build_opener(_NoRedirect)

    def compare(self, messages: Sequence[dict[str, Any]], first: str, second: str) -> str:
        """Return the judge's reply about `first` as A and `second` as B.

        Raises:
            RunError: the endpoint refuses, or cannot be reached after several tries.
        """
        conversation = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
        question = f"{conversation}\n\n[Answer A]\n{first}\n\n[Answer B]\n{second}\n\nWhich answer is better, A or B?"
        body = {
            "model": self._conf.model,
            "temperature": 0,
            "messages": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}],
        }
        reply = self._post(json.dumps(body).encode())
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise self._error("its reply has no choices[0].message.content; is it an OpenAI-compatible API?") from None
        return self._redact(content) if isinstance(content, str) else ""

    def _post(self, body: bytes) -> bytes:
        for wait in (*WAITS, None):
            try:
                return self._post_once(body)
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500:
                    raise self._refusal(error) from None
                asked = error.headers.get("Retry-After", "")
                reason, least = f"HTTP {error.code} {error.reason}", float(asked) if asked.isdigit() else 0.0
                error.close()
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                reason, least = self._redact(str(getattr(error, "reason", error)) or type(error).__name__), 0.0
            if wait is not None:
                time.sleep(min(max(wait, least), _LONGEST_WAIT))
        raise self._error(
            f"{reason}, {len(WAITS) + 1} times; the verdicts so far are kept, and the same command goes on from there"
        )

    def _post_once(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        key = self._key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        url = str(self._conf.base_url).rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, body, headers, method="POST")
        with self._opener.open(request, timeout=self._conf.timeout) as response:
            return bytes(response.read(_LARGEST_REPLY))

    def _refusal(self, error: urllib.error.HTTPError) -> RunError:
        with error:
            said = " ".join(error.read(300).decode("utf-8", "replace").split())
        what = f"HTTP {error.code} {error.reason}"
        if error.code in (401, 403):
            state = "holds a key that is not accepted" if self._key() else "is not set"
            return self._error(f"{what}; the environment variable {self._conf.api_key_env} (judge.api_key_env) {state}")
        if error.code == 404:
            return self._error(f"{what}; is the address right (it mostly ends with /v1), and judge.model?")
        return self._error(f"{what}: {self._redact(said)}")

    def _error(self, text: str) -> RunError:
        return RunError(f"`judge.base_url={_show_url(self._conf)}`: {text}")

    def _key(self) -> str:
        return os.environ.get(self._conf.api_key_env, "")

    def _redact(self, text: str) -> str:
        key = self._key()
        return str(mask_secrets(text.replace(key, MASK) if key else text))


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


def judge_answers(
    conf: JudgeConf, answers: Sequence[dict[str, Any]], done: JsonLines, progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Judge each pair of answers in both orders, because judges have a position bias.

    Args:
        conf: the judge.
        answers: records with `prompt` (messages), `policy` and `reference` (each with its `text`).
        done: verdicts so far, of this and other judges; one record is appended per pair judged.
        progress: called with the number of pairs newly judged.

    Returns:
        This judge's records, sorted by `answer` (its number): `policy_first` and `reference_first` (the judge's
        replies) and `verdict`: 1 policy, 0 reference, 0.5 if the orders disagree, None if a reply is unparsable.

    Raises:
        RunError: the endpoint refuses or cannot be reached.
    """
    judge, name = Judge(conf), name_judge(conf)
    known = {record["answer"]: record for record in done.records if record["judge"] == name}
    progress(len(known))
    for number, answer in enumerate(answers):
        if number in known:
            continue
        policy, reference = answer["policy"]["text"], answer["reference"]["text"]
        replies = [
            judge.compare(answer["prompt"], policy, reference),
            judge.compare(answer["prompt"], reference, policy),
        ]
        letters = [parse_verdict(reply) for reply in replies]
        verdict = None if None in letters else ((letters[0] == "A") + (letters[1] == "B")) / 2
        known[number] = {
            **{"answer": number, "judge": name, "policy_first": replies[0], "reference_first": replies[1]},
            "verdict": verdict,
        }
        done.append([known[number]])
        progress(1)
    return [known[number] for number in range(len(answers))]


def fit_length_control(verdicts: Floats, lengths: Floats, weights: Floats) -> Floats:
    """Return the win rate at equal length, by a logistic regression on length.

    AlpacaEval 2 (Dubois et al., arXiv 2404.04475, Eq. 2) for a single policy, so without the instruction-difficulty
    term, which takes many models to estimate:

        P(policy wins) = σ(θ + φ z),  z = tanh(Δ / std(Δ)),  Δ = policy's length − reference's

    θ and φ minimize Σ w·CE(y, P) + λ/2·φ², the paper's weak penalty on the length term (λ = LENGTH_PENALTY), by
    Newton steps; a tie is y = 0.5. The result is σ(θ), the rate at Δ = 0.

    Args:
        verdicts: y, shape [answers].
        lengths: Δ in characters, shape [answers].
        weights: w, the weight of each answer, shape [fits, answers].

    Returns:
        Rates in [0, 1], shape [fits].
    """
    spread = lengths.std()
    z = np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(theta[:, None] + phi[:, None] * z, -_LARGEST_LOGIT, _LARGEST_LOGIT)))
        slope, curve = weights * (p - verdicts), weights * p * (1 - p)
        gradient = slope.sum(axis=1), slope @ z + LENGTH_PENALTY * phi
        # 1e-12 keeps the system solvable if all verdicts agree and θ goes to infinity
        h_tt, h_tp = curve.sum(axis=1) + 1e-12, curve @ z
        h_pp = curve @ (z * z) + LENGTH_PENALTY
        determinant = np.maximum(h_tt * h_pp - h_tp**2, 1e-18)
        steps = np.stack([h_pp * gradient[0] - h_tp * gradient[1], h_tt * gradient[1] - h_tp * gradient[0]])
        steps = np.clip(steps / determinant, -1, 1)  # full Newton steps can overshoot far from the optimum
        theta = np.clip(theta - steps[0], -_LARGEST_LOGIT, _LARGEST_LOGIT)
        phi -= steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    rates: Floats = 1 / (1 + np.exp(-theta))
    return rates


def summarize_verdicts(
    records: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Return the win rate and the length-controlled win rate with 95 % intervals, and counts of verdicts.

    Args:
        records: the records from `judge_answers`.
        answers: the judged answers in the same order, one per prompt.
        seed: the seed of the bootstrap.

    Returns:
        `win_rate` and `length_controlled_win_rate` (`mean`, `low`, `high`, or None if it cannot be estimated, with
        the reason in `note`), and the numbers of pairs `judged`, `ties` and `unparsable`.
    """
    both = [(record, answer) for record, answer in zip(records, answers, strict=True) if record["verdict"] is not None]
    summary: dict[str, Any] = {
        "judged": len(both),
        "ties": sum(record["verdict"] == 0.5 for record, _ in both),
        "unparsable": len(records) - len(both),
        "win_rate": None,
        "length_controlled_win_rate": None,
    }
    if not both:
        return {**summary, "note": "no verdict could be read"}
    verdicts = np.array([record["verdict"] for record, _ in both], np.float64)
    pairs = [(len(answer["policy"]["text"]), len(answer["reference"]["text"])) for _, answer in both]
    lengths = np.array([policy - reference for policy, reference in pairs], np.float64)
    groups = [f"{number:09}" for number in range(len(both))]  # sorted, so that the weights below match
    summary |= estimate_ratios({"win_rate": (verdicts.tolist(), [1.0] * len(both))}, groups, seed)
    if lengths.min() > 0 or lengths.max() < 0:
        longer = "policy" if lengths.min() > 0 else "reference"
        note = f"every answer of the {longer} is the longer one, so nothing tells what equal lengths would give"
        return {**summary, "note": note}
    mean = float(fit_length_control(verdicts, lengths, np.ones((1, len(both))))[0])
    several = draw_weights(len(both), seed) if len(both) > 1 else ()
    drawn = [fit_length_control(verdicts, lengths, weights) for weights in several]
    return {**summary, "length_controlled_win_rate": to_estimate(mean, drawn)}
