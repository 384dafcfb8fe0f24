"""Greedy search for a peer's fastest settings on few pairs, with every try in the record.

First gradient checkpointing and the precomputed reference, at the default micro-batch size; then other micro-batch
sizes with the best of these.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.measuring.process import CommandFailed
from scripts.bench.peers.sides import BATCHES, Job, Measured, Variant, name_split
from scripts.bench.session import Bench

_MEMORY = 0.7
"""Largest share of the machine's memory for a try: out of memory, other processes die too."""

Run = Callable[[str, Job, Variant, Path], Measured]


def tune(bench: Bench, name: str, job: Job, variants: Mapping[str, Variant], run: Run) -> None:
    """Try a peer's settings once each, in the order of the greedy search.

    Args:
        bench: its record stores the tries.
        name: name of the shape.
        job: a job on few pairs.
        variants: the peer's settings.
        run: runs the job with one of the settings, in a folder.
    """
    tried = bench.record.part("tune", name)

    def attempt(variant: str) -> None:
        if variant in tried:
            return
        work = partial(run, variant, variants[variant].split(job), variants[variant])
        try:
            bench.measure(("tune", name, variant), 0, work)
        except (CommandFailed, ValueError) as error:
            note_failure(bench, tried, variant, ("tune", name), error)

    bases = [variant for variant, settings in variants.items() if settings.batch == BATCHES[0]]
    for variant in bases:
        attempt(variant)
    for number, base in enumerate(best_variants(tried, bases)):
        found = {variants[variant].batch for variant in best_variants(tried, variants)}
        for batch in BATCHES if number == 0 else sorted(found):
            peak = tried[base][0]["peak_gb"] * batch / BATCHES[0]
            limit = _MEMORY * bench.record.data["machine"]["memory_gb"]
            if batch > BATCHES[0] and peak > limit:
                tried[name_split(base, batch)] = {"failed": f"not tried: it might take {peak:.0f} GB"}
                bench.record.save()
            else:
                attempt(name_split(base, batch))


def best_variants(tried: Mapping[str, Any], among: Any) -> list[str]:
    """Return the settings with the fastest training and with the shortest total time, deduplicated.

    Args:
        tried: runs by settings, or a dict with the reason of a failure. The result is empty if none ran.
        among: the settings to choose from.
    """
    ran = {variant: tried[variant][0] for variant in among if isinstance(tried.get(variant), list) and tried[variant]}
    keys = ("train_seconds", "total_seconds") if ran else ()
    return list(dict.fromkeys(min(ran, key=lambda variant: float(ran[variant][key])) for key in keys))


def note_failure(bench: Bench, tried: dict[str, Any], variant: str, keys: tuple[str, ...], error: Exception) -> None:
    """Record and print why settings did not run."""
    tried[variant] = {"failed": str(error).splitlines()[-1]}
    bench.record.save()
    bench.say(f"{' / '.join(keys)} / {variant}: {tried[variant]['failed']}")
