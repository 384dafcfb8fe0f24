"""Write the tables of docs/scale.md: memory, time and disk of large runs on several GPUs, computed from formulas.

    python scripts/make_scale_tables.py

docs/scale.md has the formulas and says which of the constants below were measured.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.make_gpu_table import SHAPES

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

MODELS = {"7B (Mistral)": False, "70B (Llama 3)": True}
"""Models of `make_gpu_table`, and whether they need gradient checkpointing on a card of 80 GB with QLoRA."""
GPUS = (8, 64)
PAIRS = {"1M": 10**6, "10M": 10**7, "100M": 10**8}

# ---- Assumed
PROMPT, ANSWER = 300, 250  # tokens
RANK = 16  # of LoRA, in all linear layers
PER_GPU = 8  # pairs a GPU and step
SPEED = 300e12  # FLOP a second that a GPU reaches
INSIDE, ACROSS = 300e9, 40e9  # bytes a second and GPU: within a node of 8, and between nodes
CORES = 48  # that prepare data
PROMPT_TEXT = 4 * PROMPT  # bytes

# ---- Measured
WAITING = 1.01  # time of the slowest process / mean, pairs dealt by tokens
HOST = 500e-6  # seconds a pair of the whole step, in each process: read, collate, pack
PREPARED = 2651 / 2  # rows a second and core
KEY, LOOK_UP, WRITE = 13e-6, 44e-6, 190e-6  # seconds a pair
STORED = 4690  # bytes a pair of 250 + 250 tokens
KEPT = 112  # bytes a pair in each process: two columns, hashes, lengths, orders

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, scales in 8 bits, and theirs in fp32
_SUMMED_AT_ONCE = 2**25  # gradient values


@dataclass(frozen=True)
class Size:
    """A model's numbers of weights in linear layers, in embeddings and head, and in LoRA; and its shape."""

    linear: int
    embedded: int
    lora: int
    layers: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, name: str) -> "Size":
        """Return the sizes of one of `SHAPES`."""
        _, hidden, inner, layers, heads, kv_heads, vocabulary, _ = SHAPES[name]
        of_keys = hidden * kv_heads // heads
        shapes = [(hidden, hidden), (hidden, of_keys), (hidden, of_keys), (hidden, hidden)]
        shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        linear, lora = sum(one * other for one, other in shapes), sum(RANK * sum(shape) for shape in shapes)
        return cls(layers * linear, 2 * vocabulary * hidden, layers * lora, layers, hidden, vocabulary)

    def attention(self) -> float:
        """Return FLOP of attention in a pair's forward, prompt counted once."""
        seen = (PROMPT + ANSWER) ** 2 / 2 + ANSWER * PROMPT + ANSWER**2 / 2
        return 4 * self.hidden * self.layers * seen

    def train(self, checkpointing: bool) -> float:
        """Return FLOP of a pair's forward and backward pass; frozen weights have no gradients."""
        layers = (6 if checkpointing else 4) * self.linear + 6 * self.lora
        head = 4 * self.vocabulary * self.hidden * 2 * ANSWER
        return layers * (PROMPT + 2 * ANSWER) + head + (4 if checkpointing else 3) * self.attention()

    def refer(self) -> float:
        """Return FLOP of a pair's forward pass under the reference."""
        head = 2 * self.vocabulary * self.hidden * 2 * ANSWER
        return 2 * self.linear * (PROMPT + 2 * ANSWER) + head + self.attention()

    def base(self) -> float:
        """Return bytes of the frozen weights."""
        return _NF4 * self.linear + 2 * self.embedded

    def trained(self) -> float:
        """Return bytes of LoRA, its gradients and Adam's moments in fp32."""
        return 16 * self.lora

    def full(self) -> float:
        """Return bytes of all weights with gradients and moments, in fp32."""
        return 16 * (self.linear + self.embedded)


def memory_rows() -> Iterator[str]:
    """Yield the rows of GB a GPU, without activations."""
    sizes = [Size.of(name) for name in MODELS]

    def row(label: str, *values: float) -> str:
        return f"| {label} | {' | '.join(f'{value / 1e9:,.1f}' for value in values)} |"

    summed = [4 * min(size.lora, _SUMMED_AT_ONCE) for size in sizes]
    yield row("base: layers in nf4, embeddings and head in bf16", *(size.base() for size in sizes))
    yield row("LoRA, its gradients and Adam's moments, fp32", *(size.trained() for size in sizes))
    yield row("gradients on their way", *summed)
    whole = [size.base() + size.trained() + more for size, more in zip(sizes, summed, strict=True)]
    yield row("QLoRA, `distributed=ddp`, any number of GPUs", *whole)
    for count in GPUS:
        divided = [(size.base() + size.trained()) / count + _NF4 * size.linear / size.layers for size in sizes]
        yield row(f"QLoRA, `distributed=fsdp2`, {count} GPUs", *divided)
    for count in GPUS:
        divided = [size.full() / count + 4 * size.linear / size.layers for size in sizes]
        yield row(f"full, fp32, `distributed=fsdp2`, {count} GPUs", *divided)
    sent = [2 * size.base() * (GPUS[-1] - 1) / GPUS[-1] for size in sizes]
    yield row(f"received in each micro-batch, QLoRA, `distributed=fsdp2`, {GPUS[-1]} GPUs", *sent)


def time_rows() -> Iterator[str]:
    """Yield the rows of times: QLoRA with `distributed=ddp`."""
    for name, checkpointing in MODELS.items():
        size = Size.of(name)
        for count in GPUS:
            compute = PER_GPU * size.train(checkpointing) / SPEED * WAITING
            sent = 2 * (count - 1) / count * 4 * size.lora
            reduce = sent / (INSIDE if count <= GPUS[0] else ACROSS)
            host = PER_GPU * count * HOST
            step = compute + reduce + host
            parts = [f"{step:.2f} s", f"{compute:.2f} s", f"{sent / 1e9:.2f} GB, {_time(reduce)}", _time(host)]
            speed = PER_GPU * count / step
            epochs = [_time(PAIRS[pairs] / speed) for pairs in ("1M", "100M")]
            passes = [_time(PAIRS[pairs] * _refer(size, count)) for pairs in ("1M", "100M")]
            yield f"| {name} | {count} | {' | '.join(parts)} | {speed:,.0f} | {' | '.join([*epochs, *passes])} |"


def _refer(size: Size, count: int) -> float:
    """Return seconds a pair of the reference pass: scoring in all processes, then writing in the first."""
    return size.refer() / SPEED / count + WRITE


def data_rows() -> Iterator[str]:
    """Yield the rows of what data and store take, by pairs."""
    cached = 4 * (PROMPT + 2 * ANSWER) + PROMPT_TEXT + 45

    def row(label: str, *cells: str) -> str:
        return f"| {label} | {' | '.join(cells)} |"

    counts = list(PAIRS.values())
    yield row(f"preparation once, {CORES} cores", *(_time(pairs / PREPARED / CORES) for pairs in counts))
    yield row("token ids on disk", *(_bytes(pairs * cached) for pairs in counts))
    yield row("reference store on disk", *(_bytes(pairs * STORED) for pairs in counts))
    yield row("memory of each process", *(_bytes(pairs * KEPT) for pairs in counts))
    for count in (1, *GPUS):
        label = f"keys, {count} process{'es' if count > 1 else ''}"
        yield row(label, *(_time(pairs * KEY / count) for pairs in counts))
    yield row("look-ups, the first process", *(_time(pairs * LOOK_UP) for pairs in counts))


TABLES = {"memory": memory_rows, "time": time_rows, "data": data_rows}


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= (2 if unit == "days" else 1) * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count < 1e12 else f"{count / 1e12:.1f} TB"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in TABLES.items():
        made = "".join(f"{row}\n" for row in rows())
        before, head, rest = re.split(rf"(<!-- table: {name} -->\n(?:\|.*\n){{2}})", text)  # the page has one
        text = before + head + made + re.sub(r"\A(?:\|.*\n)*", "", rest)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
