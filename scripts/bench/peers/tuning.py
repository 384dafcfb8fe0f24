"""Which settings a peer is fastest with: a greedy search on few pairs, every try kept in the record.

First what the peer does (gradient checkpointing, the reference computed beforehand), with the default's rows at once;
then other numbers of rows at once, with the best of these.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.measuring.process import CommandFailed
from scripts.bench.peers.sides import BATCHES, Job, Measured, Variant, name_split
from scripts.bench.session import Bench

_MEMORY = 0.7
"""Of the machine's, at most: a try that takes it all would end more than itself."""

Run = Callable[[str, Job, Variant, Path], Measured]


def tune(bench: Bench, name: str, job: Job, variants: Mapping[str, Variant], run: Run) -> None:
    """Try a peer's settings once each, as far as the search goes.

    Args:
        bench: with the record that gets the tries.
        name: of the shape.
        job: on few pairs.
        variants: the peer's settings.
        run: does the job with one of them, in a folder.
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
    """Return which settings among some trained fastest and which ended soonest, which may be one; none where none ran.

    Args:
        tried: runs by settings, or a dict of why there is none.
        among: the settings that count.
    """
    ran = {variant: tried[variant][0] for variant in among if isinstance(tried.get(variant), list) and tried[variant]}
    keys = ("train_seconds", "total_seconds") if ran else ()
    return list(dict.fromkeys(min(ran, key=lambda variant: float(ran[variant][key])) for key in keys))


def note_failure(bench: Bench, tried: dict[str, Any], variant: str, keys: tuple[str, ...], error: Exception) -> None:
    """Keep why settings did not run, and say it."""
    tried[variant] = {"failed": str(error).splitlines()[-1]}
    bench.record.save()
    bench.say(f"{' / '.join(keys)} / {variant}: {tried[variant]['failed']}")
