"""The training and the evaluation files of a local path, by the splits that it names."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows.cards import Config, read_card
from dpo_runner.data.rows.folders import (
    FORMATS,
    File,
    expand,
    find_splits,
    is_held_out,
    is_saved,
    list_files,
    read_metadata,
    stem_of,
    walk,
)
from dpo_runner.errors import DataError, suggest

BUNDLED_PREFIX = "bundled:"
_USERS = {
    "subset": "hub datasets and folders whose README.md has configurations",
    "revision": "hub datasets",
    "split": "hub datasets and folders that name their splits",
    "eval_split": "hub datasets and folders that name their splits",
}


@dataclass
class Found:
    """The files of a source, at least one of them for training.

    Attributes:
        train, evaluation: files of the training and evaluation rows.
        skipped: files of a known format that hold no rows of the source, by their display names.
    """

    train: list[File]
    evaluation: list[File] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def list_local(conf: SourceFields, key: str, setting: str) -> Found:
    """Return the training files, and the evaluation files that the source itself contains.

    Raises:
        DataError: there are none, a setting does not apply, or several splits or configurations leave a choice.
        OSError: a folder cannot be read.
    """
    assert conf.path is not None
    place = _Place(conf, key, setting)
    if (place.root / "blobs").is_dir() and (place.root / "snapshots").is_dir():  # the hub's cache
        place.enter_snapshot()
    root = place.root
    if (root / "dataset_dict.json").is_file():
        place.refuse("subset", "revision")
        splits = read_metadata(root / "dataset_dict.json", "splits", setting)
        for name in ("split", "eval_split"):
            place.check(name, splits)
        train = list_files(f"{place.text}/{conf.split}", setting)
        return Found(train, list_files(f"{place.text}/{conf.eval_split}", setting) if conf.eval_split else [])
    is_bundled = conf.path.startswith(BUNDLED_PREFIX)
    if is_bundled or not root.is_dir() or is_saved(root):
        place.refuse("subset", "revision", "split", "eval_split")
        return _list_bundled(conf.path, setting) if is_bundled else Found(list_files(place.text, setting))
    configs = read_card(root / "README.md", setting)
    if configs:
        place.refuse("revision")
        return place.read_config(configs)
    place.refuse("subset", "revision")
    return place.find()


def _list_bundled(path: str, setting: str) -> Found:
    folders = {folder.parent.name: folder.parent for folder in Path(__file__).parents[1].glob("*/train.jsonl")}
    name = path.removeprefix(BUNDLED_PREFIX)
    if name not in folders:
        raise DataError(f"`{setting}`: no such bundled data{suggest(name, folders)}")
    train, evaluation = ([(f"{path}/{file}", folders[name] / file)] for file in ("train.jsonl", "eval.jsonl"))
    return Found(train, evaluation)


class _Place:
    """A local path, with the settings that choose among its splits."""

    def __init__(self, conf: SourceFields, key: str, setting: str) -> None:
        assert conf.path is not None
        self.conf, self.key, self.setting = conf, key, setting
        self.root, self.text = expand(conf.path), conf.path.rstrip("/") or "/"

    def enter_snapshot(self) -> None:
        """Go on with the folder's only snapshot."""
        names = sorted(path.name for path in (self.root / "snapshots").iterdir())
        if len(names) != 1:
            choice = list_choices(f"{self.key}.path", [f"{self.text}/snapshots/{name}" for name in names])
            raise DataError(
                f"`{self.setting}`: holds {len(names)} snapshots of a hub dataset; choose {choice or 'another'}"
            )
        self.root, self.text = self.root / "snapshots" / names[0], f"{self.text}/snapshots/{names[0]}"

    def refuse(self, *names: str) -> None:
        """Refuse these settings: the path has no use for them."""
        for name in names:
            value = getattr(self.conf, name)
            if value is not None and (name, value) != ("split", "train"):
                cure = f"set {self.key}.eval_path instead" if name == "eval_split" else "leave it out"
                raise DataError(
                    f"`{self.key}.{name}={value}`: is for {_USERS[name]}, not for {self.key}.path={self.conf.path}; "
                    f"{cure}"
                )

    def check(self, name: str, splits: Iterable[str]) -> None:
        value = getattr(self.conf, name)
        if value is not None and value not in splits:
            raise DataError(f"`{self.key}.{name}={value}`: no such split in {self.conf.path}{suggest(value, splits)}")

    def read_config(self, configs: dict[str, Config]) -> Found:
        """Return the files of one of the README's configurations: `data.subset`, or the default."""
        defaults = [name for name, config in configs.items() if config.default or len(configs) == 1]
        name = self.conf.subset or next(iter(defaults), None)
        if name is None:
            raise DataError(
                f"`{self.setting}`: its README.md has several configurations and no default; choose one with "
                f"{list_choices(f'{self.key}.subset', configs)}"
            )
        if name not in configs:
            raise DataError(
                f"`{self.key}.subset={name}`: no such configuration in {self.conf.path}/README.md"
                f"{suggest(name, configs)}"
            )
        config = configs[name]
        if config.splits is None:
            return self.find(config.data_dir)
        train, evaluation = self._choose([*config.splits], [split for split in config.splits if is_held_out(split)])
        return Found(self._match(config, train), self._match(config, evaluation))

    def _match(self, config: Config, splits: list[str]) -> list[File]:
        assert config.splits is not None
        names: dict[str, None] = {}
        for split, pattern in [(name, pattern) for name in splits for pattern in config.splits[name]]:
            root = self.root / config.data_dir
            matches = sorted(glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207 (Path.glob includes hidden files)
            found = [name for name in matches if (root / name).is_file()]
            if not found:
                raise DataError(
                    f"`{self.setting}`: README.md gives split {split} the files {pattern}, and there are none; "
                    f"correct it, or name the files: '{self.key}.path={self.text}/*'"
                )
            names |= dict.fromkeys(found)
        return self._name(names, config.data_dir)

    def _name(self, names: Iterable[str], folder: str) -> list[File]:
        return [(str(Path(self.text, folder, name)), self.root / folder / name) for name in names]

    def find(self, folder: str = "") -> Found:
        """Return the files in a subfolder: by the splits that all their names carry, else by the words in them."""
        root = self.root / folder
        names, skipped = walk(root)
        if not names:
            left = f" besides {shorten(skipped)}" if skipped else ""
            raise DataError(f"`{self.setting}`: the folder holds no file of a known format{left}; use {FORMATS}")
        held_out = {name for name in names if is_held_out(name)}
        splits, stems = find_splits(names, root), {name: stem_of(name) for name in names}
        if not splits and ({self.conf.split, self.conf.eval_split} - {"train", None}) & {*stems.values()}:
            splits = stems  # the settings name files
        sides = {split: {name in held_out for name in names if splits[name] == split} for split in splits.values()}
        if not splits or any(len(side) > 1 for side in sides.values()):  # as train/0-… and test/0-…: the folders decide
            self.refuse("split", "eval_split")
            train = [name for name in names if name not in held_out]
            evaluation = [name for name in names if name in held_out]
        else:
            chosen = self._choose([*sides], [split for split, side in sides.items() if True in side])
            train, evaluation = ([name for name in names if splits[name] in side] for side in chosen)
        left_out = [name for name, _ in self._name(skipped, folder)]
        return Found(self._name(train, folder), self._name(evaluation, folder), left_out)

    def _choose(self, splits: list[str], held_out: list[str]) -> tuple[list[str], list[str]]:
        """Return the names of the splits to train on and to evaluate on, given those that are for evaluation."""
        training = [split for split in splits if split not in held_out]
        self.check("eval_split", splits)
        if self.conf.split != "train":
            self.check("split", splits)
        if self.conf.split in splits:
            train = [self.conf.split]
        elif len(training) == 1:
            train = training
        else:
            kind = "several training splits" if training else "evaluation splits only"
            choice = list_choices(f"{self.key}.split", training or splits)
            choice += f", and {list_choices(f'{self.key}.eval_split', held_out)}" if training and held_out else ""
            raise DataError(f"`{self.setting}`: the folder has {kind}; choose {choice}")
        if self.conf.eval_split is not None:
            return train, [self.conf.eval_split]
        return train, held_out if train == training else []


def shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def list_choices(key: str, values: Iterable[str]) -> str:
    return " or ".join(shlex.quote(f"{key}={value}") for value in [*values][:20])
