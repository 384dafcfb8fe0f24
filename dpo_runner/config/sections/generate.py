"""The sections `generate` and `reward`: answers to sample, and how to score them. Imports no torch."""

from dataclasses import dataclass, field


@dataclass
class EndpointConf:
    """An OpenAI-compatible endpoint, such as a server of vLLM, SGLang, llama.cpp or Ollama."""

    base_url: str | None = None
    """URL of the endpoint, such as `http://127.0.0.1:8000/v1`."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key; if it is not set, no key is sent."""
    timeout: float = 60.0
    """Seconds to wait for one reply."""
    concurrency: int = 4
    """Requests at a time."""
    requests_per_minute: float | None = None
    """Limit on the rate of requests, retries included; null: none."""


@dataclass
class GenerateConf:
    """Answers to the prompts of `data`, for `python -m dpo_runner.generate`."""

    models: list[str] = field(default_factory=list)
    """Models that answer each prompt: run directories, or models as in `model.model_name_or_path`; with
    `endpoint.base_url` their names at the endpoint. []: the configuration's `model`."""
    endpoint: EndpointConf = field(default_factory=EndpointConf)
    """The endpoint that answers; without base_url the models answer in this process."""
    num_answers: int = 4
    """Answers of each model to each prompt."""
    temperature: float = 1.0
    """Temperature of sampling; 0: greedy."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to this."""
    max_new_tokens: int = 256
    """Length limit of an answer in tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer; they are not part of it."""
    seed: int = 0
    """Seed of sampling, combined with prompt, model and number of the answer."""
    max_prompt_tokens: int | None = None
    """Leave out longer prompts; null: those that leave no room for an answer in the model's context."""
    batch_size: int = 32
    """Answers sampled at a time in this process. A prompt's answers stay together."""
    on_cut_off: str = field(default="keep", metadata={"choices": ("keep", "drop")})
    """Answers that reach `max_new_tokens`: keep them, or leave them out. Training closes them as if they were whole."""
    max_bad_fraction: float = 0.05
    """Stop if more than this share of the answers is lost: empty, without a score, or to a prompt that cannot be
    answered."""
    dir: str | None = None
    """Folder of the results, in which the same command continues; null: outputs/generated/<timestamp>."""


@dataclass
class RewardTermConf:
    """One term of the reward."""

    weight: float = 0.0
    """Factor of this score in the reward; 0: not used."""


@dataclass
class LengthRewardConf(RewardTermConf):
    """The length of an answer in characters."""

    target: int | None = None
    """Score the distance to this length, as a negative number, instead of the length itself."""


@dataclass
class FunctionRewardConf(RewardTermConf):
    """A function of your own."""

    name: str | None = None
    """`package.module:function`; it takes the prompt's messages and the answer's text, and returns a number."""


@dataclass
class RewardModelConf(RewardTermConf):
    """A sequence-classification model of transformers."""

    model_name_or_path: str | None = None
    """Folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    label: str | None = None
    """The label whose probability is the score, if the model has several."""
    max_length: int | None = None
    """Length limit of prompt and answer in tokens; a longer answer gets no score. null: the model's own."""
    batch_size: int = 16
    """Answers scored at a time."""
    dtype: str = field(default="auto", metadata={"choices": ("auto", "bfloat16", "float16", "float32")})
    """Dtype of the weights; `auto`: as saved."""
    trust_remote_code: bool = False
    """Run model code from the hub."""


@dataclass
class SentimentRewardConf(RewardTermConf):
    """VADER's compound score, from -1 (negative) to 1 (positive), for English; needs the package vaderSentiment."""


@dataclass
class JudgeRewardConf(EndpointConf, RewardTermConf):
    """A judge at an OpenAI-compatible endpoint."""

    model: str | None = None
    """Name of the judge model at that endpoint."""
    mode: str = field(default="score", metadata={"choices": ("score", "pairwise")})
    """`score`: a number from 1 to 10 for each answer; `pairwise`: the share of the other answers to the prompt that it
    beats, each two compared in both orders."""
    prompt: str | None = None
    """Text file with the judge's instruction; null: the project's own."""


@dataclass
class RewardConf:
    """The reward of an answer: the sum of the terms, each times its weight."""

    length: LengthRewardConf = field(default_factory=LengthRewardConf)
    function: FunctionRewardConf = field(default_factory=FunctionRewardConf)
    reward_model: RewardModelConf = field(default_factory=RewardModelConf)
    sentiment: SentimentRewardConf = field(default_factory=SentimentRewardConf)
    judge: JudgeRewardConf = field(default_factory=JudgeRewardConf)
