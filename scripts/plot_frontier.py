"""Write docs/images/frontier.png: the reward of each run of a sweep against its KL divergence from the reference.

    python scripts/plot_frontier.py outputs/frontier

Also prints the table of docs/generate.md. The runs are those of experiment=sentiment_frontier over training.beta.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from dpo_runner.records.reading import read_run_conf, read_summary
from scripts import ROOT

TARGET = ROOT / "docs" / "images" / "frontier.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, help="the sweep's directory")
    args = parser.parse_args()
    jobs = sorted(path.parent for path in args.sweep.glob("*/summary.json"))
    found = {read_run_conf(job).training.beta: read_summary(job) for job in jobs}
    figure = Figure(figsize=(6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    start = next(iter(found.values()))["before"]
    axes.errorbar(0, start["eval_reward"], start["eval_reward_ci95"], fmt="o", color="#78838f")
    axes.annotate("before", (0, start["eval_reward"]), (6, 6), textcoords="offset points")
    print(f"| before | {start['eval_reward']:.3f} ± {start['eval_reward_ci95']:.3f} | 0 | |")
    for beta, summary in sorted(found.items(), reverse=True):
        after = summary["after"]
        reward, margin, moved = (after[key] for key in ("eval_reward", "eval_reward_ci95", "eval_reward_kl"))
        axes.errorbar(moved, reward, margin, fmt="o", color="#1f5fa8")
        axes.annotate(f"β = {beta:g}", (moved, reward), (6, -12), textcoords="offset points")
        print(f"| {beta:g} | {reward:.3f} ± {margin:.3f} | {moved:.2f} | {after['eval_reward_win_rate']:.2f} |")
    axes.set(xlabel="KL from the reference (nats per answer)", ylabel="reward: VADER's compound score")
    axes.grid(color="#d9dde1")
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
