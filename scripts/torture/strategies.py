"""Hypothesis strategies of odd rows, and damaged files, as input of the data preparation."""

import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
from hypothesis import strategies as st

_COLUMNS = (
    *("prompt", "chosen", "rejected", "conversations", "instruction", "input", "output", "history", "question"),
    *("system", "tools", "chat_template_kwargs", "responses", "scores", "response", "helpfulness", "score"),
    *("context", "response1", "response2", "overall_preference", "score_chosen", "score_rejected", "messages"),
)
_TURN = ("role", "from", "content", "value", "tool_calls", "name")

_WORDS = st.sampled_from(
    ["", " ", "\n", "Why?", "So.", "No.", "<|im_end|>", "\ud800", "\0", "\u2028", "\n\nHuman: a\n\nAssistant: b", "nan"]
)
_TEXTS = st.one_of(_WORDS, st.text(max_size=8))
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "narrator", "", "USER"])
_NUMBERS = st.one_of(st.integers(-3, 3), st.just(10**400), st.floats(), st.booleans(), st.none())
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(_TEXTS, _NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_TEXTS, inner, max_size=3)),
    max_leaves=6,
)
_MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": _ROLES, "content": _TEXTS}),
    st.fixed_dictionaries({"from": _ROLES, "value": _TEXTS}),
    st.dictionaries(st.sampled_from(_TURN), st.one_of(_ROLES, _VALUES), max_size=3),
)
_CELLS = st.one_of(_TEXTS, st.lists(_MESSAGES, max_size=4), st.lists(_TEXTS, max_size=3), _NUMBERS, _VALUES)
_ANSWERS = {"prompt": _CELLS, "chosen": _CELLS, "rejected": _CELLS}
_OBJECTS = st.one_of(
    st.fixed_dictionaries(_ANSWERS, optional=dict.fromkeys(_COLUMNS[3:], _CELLS)),
    st.fixed_dictionaries({"prompt": _CELLS, "responses": st.lists(_TEXTS, max_size=4), "scores": st.lists(_NUMBERS)}),
    st.dictionaries(st.sampled_from(_COLUMNS), _CELLS, max_size=6),
    st.dictionaries(_TEXTS, _VALUES, max_size=3),
)
ROWS = st.one_of(_OBJECTS, _OBJECTS, _OBJECTS, _VALUES)
"""JSON values, mostly objects with the columns of preference data."""

SOUND_ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "preference": lambda n: {"prompt": f"q{n}", "chosen": f"so {n}", "rejected": "no"},
    "hh": lambda n: {"chosen": f"\n\nHuman: q{n}\n\nAssistant: so", "rejected": f"\n\nHuman: q{n}\n\nAssistant: no"},
    "sharegpt": lambda n: {"conversations": [{"from": "human", "value": f"q{n}"}], "chosen": "so", "rejected": "no"},
    "swift": lambda n: {
        "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "so"}],
        "rejected_response": "no",
    },
    "alpaca": lambda n: {"instruction": f"q{n}", "chosen": "so", "rejected": "no"},
    "orca": lambda n: {"question": f"q{n}", "chosen": "so", "rejected": "no"},
    "scored": lambda n: {"prompt": f"q{n}", "responses": ["so", "no"], "scores": [2, 1]},
    "helpsteer": lambda n: {"context": f"q{n}", "response1": "a", "response2": "b", "overall_preference": -1},
    "kto": lambda n: {"prompt": f"q{n // 2}", "completion": f"a{n}", "label": n % 2 == 0},
}


def near_rows(layout: str) -> st.SearchStrategy[Any]:
    """Return a strategy of sound rows of a layout in which one or two columns hold something else."""
    sound = SOUND_ROWS.get(layout, SOUND_ROWS["preference"])(0)
    columns = st.sampled_from([*sound, *sound, *_COLUMNS])
    changes = st.dictionaries(columns, _CELLS, min_size=1, max_size=2)
    return changes.map(lambda change: {**sound, **change})


def draw(strategy: st.SearchStrategy[Any], count: int, seed: int) -> list[Any]:
    """Return `count` values, the same for the same seed."""
    found: list[Any] = []
    while len(found) < count:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count - len(found),
            database=None,
            deadline=None,
            derandomize=False,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def collect(value: Any) -> None:
            found.append(value)

        collect()
        seed += 1
    return found[:count]


def damage(count: int, seed: int) -> Iterator[bytes]:
    """Yield sound files of all formats with bytes changed, removed and inserted."""
    import pyarrow as pa
    from pyarrow import parquet

    make = SOUND_ROWS["preference"]
    sound = [make(number) for number in range(12)]
    table = pa.Table.from_pylist(sound)
    parquet.write_table(table, packed := io.BytesIO(), write_page_checksum=True)
    with pa.ipc.new_file(arrow := io.BytesIO(), table.schema) as writer:
        writer.write_table(table)
    lines = "".join(json.dumps(row) + "\n" for row in sound).encode()
    cells = "".join(",".join(row.values()) + "\n" for row in [dict(zip(sound[0], sound[0], strict=True)), *sound])
    kinds = [json.dumps(sound).encode(), lines, cells.encode(), cells.replace(",", "\t").encode(), packed.getvalue()]
    kinds += [arrow.getvalue(), gzip.compress(json.dumps(sound).encode()), gzip.compress(lines)]
    kinds.append(pa.compress(lines, codec="zstd", asbytes=True))
    chance = random.Random(seed)
    for number in range(count):
        content = bytearray(kinds[number % len(kinds)])
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(content))
            change = chance.choice(["set", "flip", "cut", "insert"])
            if change == "set":
                content[at] = chance.randrange(256)
            elif change == "flip":
                content[at] ^= 1 << chance.randrange(8)
            elif change == "cut":
                del content[at : at + chance.randint(1, 20)]
            else:
                content[at:at] = chance.randbytes(chance.randint(1, 4))
            content = content or bytearray(b"\0")
        yield bytes(content)
