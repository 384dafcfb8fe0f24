"""The folders of a configuration's YAML files, and the check of those that a command selects. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpo_runner.config import CONF_DIR, CONFIG_NAME
from dpo_runner.config_checks import suggest
from dpo_runner.config_yaml import check_file
from dpo_runner.removed_keys import REMOVED_OPTIONS


@dataclass(frozen=True)
class ConfigFiles:
    """The folders in which config groups are looked up, the project's before the user's, as Hydra has it.

    Attributes:
        folders: each holds a folder per config group; what is in the first hides what is in the next.
    """

    folders: tuple[Path, ...]

    @classmethod
    def over(cls, config_dir: str | None) -> "ConfigFiles":
        return cls((CONF_DIR, Path(config_dir)) if config_dir else (CONF_DIR,))

    def groups(self) -> list[str]:
        return sorted({path.name for folder in self.folders for path in folder.iterdir() if path.is_dir()})

    def find_hidden_files(self) -> list[str]:
        """Return the user's files that Hydra would never read, or that are for Hydra itself and could run code."""
        mistakes = []
        patterns = ("*.yaml", "*/*.yaml", "hydra/*/*.yaml")  # as deep as groups are: it may be anyone's whole disk
        files = {path for folder in self.folders[1:] for pattern in patterns for path in folder.glob(pattern)}
        for path in sorted(files):
            name = path.relative_to(self.folders[1])
            if (CONF_DIR / name).exists():
                mistakes.append(f"{name}: hidden by the project's own file of this name; choose another name")
            elif name.parts[0] == "hydra":
                mistakes.append(f"{name}: not allowed, Hydra's own configuration can run code")
        return mistakes

    def options(self, group: str) -> list[str]:
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def find(self, group: str, option: str) -> Path | None:
        paths = [folder / group / f"{option}.yaml" for folder in self.folders]
        try:
            return next((path for path in paths if path.is_file()), None)
        except OSError:  # a name that no file can have
            return None

    def find_option_mistakes(self, group: str, option: Any) -> list[str]:
        """Return what is wrong with choosing `option` in `group`."""
        if isinstance(option, str) and self.find(group, option):
            return []
        if option is None and group in ("experiment", "sweep"):
            return []
        if (advice := REMOVED_OPTIONS.get(f"{group}={option}")) is not None:
            return [f"`{group}={option}`: was removed; {advice}"]
        if not self.options(group):
            return [f"`{group}={option}`: no such group; an absolute name begins with a slash (/training)"]
        return [f"`{group}={option}`: no such option; {suggest(option, self.options(group))}"]

    def load_sweep_axes(self, option: str) -> list[str]:
        """Return the overrides that a sweep file spans, such as `training.beta=0.05,0.1`; [] where it has none."""
        path = self.find("sweep", option)
        if path is None or check_file(path, "sweep")[0]:
            return []  # find_file_mistakes names the line
        axes = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params", default={})
        return [f"{key}={value}" for key, value in axes.items()]

    def find_file_mistakes(self, choices: dict[str, list[str]]) -> list[str]:
        """Check every YAML file that a command selects, the ones that those select included.

        Args:
            choices: the options that the command line selects in each group; an experiment's choice for
                such a group gives way, as it does in Hydra.
        """
        mistakes, defaults = check_file(CONF_DIR / f"{CONFIG_NAME}.yaml", "")
        selected = {**{group: [option] for group, option in defaults if option is not None}, **choices}
        queue: list[tuple[str, Any, list[str]]] = [
            (group, option, []) for group, options in selected.items() for option in options
        ]
        seen = set()
        while queue:
            group, option, through = queue.pop(0)
            name = f"{group}/{option}".removeprefix("/")
            if name in through:
                mistakes.append(f"`defaults`: lead back to where they began; {' > '.join([*through, name])}")
            if (group, option) in seen:
                continue
            seen.add((group, option))
            path = self.find(group, option) if isinstance(option, str) else None
            if path is None:
                mistakes += self.find_option_mistakes(group, option)
                continue
            own = name.rpartition("/")[0]  # `option` may be sub/name
            lines, nested = check_file(path, own)
            mistakes += lines
            queue += [
                (inner, option, [*through, name])
                for inner, option in nested
                if option is not None and (inner == own or inner not in choices)
            ]
        return list(dict.fromkeys(mistakes))
