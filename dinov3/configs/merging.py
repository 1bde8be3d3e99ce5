"""From files and `key=value` options to one configuration: default < recipe file < options < output directory.

Notable:
- Every layer is checked for unknown keys before it is merged, so that an error names the file or the option.
- Values are checked after the merge, so that interpolations (`${train.seed}`) are seen with what they stand for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov3.configs.settings import (
    ConfigError,
    is_empty_section,
    key_problem,
    leaves_of,
    structure_problem,
)
from dinov3.configs.training_config import REPLACED_BY_SCHEDULES, RETIRED, SETTINGS, TrainingConfig, default_values
from dinov3.utils.messages import did_you_mean

logger = logging.getLogger("dinov3")

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass
class DinoV3SetupArgs:
    """What a run is configured with.

    Args:
        config_file: recipe merged over the default configuration; empty for only the default.
        pretrained_weights: weights for those who build a model from this.
        shard_unsharded_model: whether they shard a model whose weights come from one file.
        output_dir: sets `train.output_dir`; empty or None leaves it to the file and the options.
        opts: `key=value` options; an OmegaConf list becomes a plain one.
    """

    config_file: str | os.PathLike[str]
    pretrained_weights: str | None = None
    shard_unsharded_model: bool = False
    output_dir: str | os.PathLike[str] | None = ""
    opts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.opts = list(self.opts or [])


@dataclass
class Layer:
    """Settings from one source, without empty sections and retired keys.

    Args:
        origin: how an error names the source.
        config: the settings.
        is_option: they are one `key=value` option.

    Attributes:
        retired: the retired keys that were given.
    """

    origin: str
    config: DictConfig
    is_option: bool = False
    retired: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.config.copy()
        leaves = list(self.leaves())
        self.retired = [key for key, _ in leaves if key in RETIRED]
        for key, value in leaves:
            if key in RETIRED or is_empty_section(TrainingConfig, key, value):
                _remove(self.config, key)

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Yield the dotted keys and unresolved values of this layer."""
        return leaves_of(TrainingConfig, OmegaConf.to_container(self.config))


def get_default_config() -> DictConfig:
    """Return the default configuration, which `ssl_default_config.yaml` shows with comments."""
    cfg = OmegaConf.create()
    for key, value in default_values().items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def get_cfg_from_args(args: Any, multidistillation: bool = False, strict: bool = True) -> DictConfig:
    """Merge the default configuration, a recipe file, `key=value` options and the output directory; later ones win.

    Keys and types are checked; `validate` checks what several keys say together.

    Args:
        args: a `DinoV3SetupArgs`, or anything with its attributes `config_file`, `opts` and `output_dir`.
        multidistillation: leave out the default configuration, as for the file that several students share.
        strict: unknown keys are errors instead of warnings, and the result refuses new keys.

    Returns:
        The configuration, without retired keys.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file does not parse, an option is malformed, a key is unknown or a value of the wrong type.
    """
    base = OmegaConf.create() if multidistillation else get_default_config()
    return merge_layers(base, layers_of(args), strict=strict)


def layers_of(args: Any) -> list[Layer]:
    """Return the recipe file (if any), each option and the output directory of `args`, in rising precedence."""
    layers = []
    if args.config_file:
        path = resolve_config_path(args.config_file)
        layers.append(Layer(str(path), load_yaml(path)))
    layers += parse_options(args.opts or [])
    if args.output_dir:
        # An absolute path, because the run and its later readers may have other working directories.
        output_dir = os.path.realpath(os.path.expanduser(args.output_dir))
        layers.append(Layer("the output directory", OmegaConf.create({"train": {"output_dir": output_dir}})))
    return layers


def merge_layers(base: DictConfig, layers: Sequence[Layer], *, strict: bool = True) -> DictConfig:
    """Merge checked layers over `base`; see `get_cfg_from_args`."""
    unknown = unknown_keys(layers)
    fatal = [
        problem
        for layer in layers
        for key, value in layer.leaves()
        if (problem := unknown.get(key)) and (strict or structure_problem(TrainingConfig, key, value))
    ]
    if fatal:
        raise ConfigError(f"{joined(fatal)}\n`python -m dinov3.configs --help` lists all keys")
    for problem in unknown.values():
        logger.warning("%s", problem)
    try:
        cfg = OmegaConf.merge(base, *(layer.config for layer in layers))
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot merge the settings: {_reason(error)}") from error
    assert isinstance(cfg, DictConfig)
    # A sentence about a value repeats the option, so it needs no origin.
    origins = {key: f"{layer.origin}: " * (not layer.is_option) for layer in layers for key, _ in layer.leaves()}
    if wrong := wrong_values(cfg):
        raise ConfigError(joined([origins.get(key, "") + problem for key, problem in wrong.items()]))
    _warn_without_effect(cfg, layers)
    OmegaConf.set_struct(cfg, strict)
    return cfg


def unknown_keys(layers: Sequence[Layer]) -> dict[str, str]:
    """Return each key that no configuration has, with a sentence that names its origin and the nearest known key."""
    return {
        key: f"{layer.origin}: {problem}"
        for layer in layers
        for key, value in layer.leaves()
        if (problem := key_problem(TrainingConfig, key, value))
    }


def wrong_values(cfg: DictConfig) -> dict[str, str]:
    """Return one sentence for each value of a wrong type or outside its choices; unknown keys are passed over."""
    return {
        key: problem
        for key, value in leaves_of(TrainingConfig, plain(cfg))
        if key in SETTINGS and (problem := SETTINGS[key].value_problem(value))
    }


def plain(cfg: Any) -> dict[str, Any]:
    """Return the configuration as nested dictionaries, interpolations resolved.

    Raises:
        ConfigError: an interpolation leads nowhere, or a value is missing (`???`).
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve the settings: {_reason(error)}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def parse_options(tokens: Sequence[str]) -> list[Layer]:
    """Return one layer for each `key=value` token; values are YAML (`1e-3`, `[512,768]`, `null`, `true`, `'text'`).

    Raises:
        ConfigError: a token without `=`, without a key, or whose value is not YAML.
    """
    if isinstance(tokens, str):
        raise ConfigError(f"options must be a list of 'key=value', not the text {tokens!r}")
    return [Layer(f"option {token!r}", _parse_option(token), is_option=True) for token in tokens]


def load_yaml(path: str | os.PathLike[str]) -> DictConfig:
    """Read a YAML file of settings.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be read or parsed (with the line), or holds something other than keys and values.
    """
    try:
        cfg = OmegaConf.load(Path(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{os.fspath(path)}{where}: not valid YAML: {_reason(error)}") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"no configuration file {os.fspath(path)!r}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{os.fspath(path)}: cannot be read as a configuration: {_reason(error)}") from error
    if not isinstance(cfg, DictConfig):
        found = "a list" if isinstance(cfg, ListConfig) else "a single value"
        raise ConfigError(f"{os.fspath(path)}: expected keys and values such as `train:`, found {found}")
    return cfg


def resolve_config_path(path: str | os.PathLike[str]) -> Path:
    """Find a configuration file: as given, then in the repository, then among the package's own configurations.

    Raises:
        FileNotFoundError: it is in none of them; names the places and the nearest recipe.
    """
    given = Path(os.path.expanduser(path))
    places = [Path.cwd(), PACKAGE.parent, PACKAGE / "configs"]
    for place in places:
        if (place / given).is_file():
            return (place / given).resolve()
    recipes = {recipe.name: recipe for recipe in sorted((PACKAGE / "configs").rglob("*.yaml"))}
    hint = did_you_mean(given.name, recipes)
    for name, recipe in recipes.items():
        hint = hint.replace(f"'{name}'", str(recipe.relative_to(PACKAGE.parent)))
    looked = "" if given.is_absolute() else f" in {', '.join(dict.fromkeys(str(place) for place in places))}"
    raise FileNotFoundError(f"no configuration file {os.fspath(path)!r}{looked}{hint}")


def load_teacher_config(path: str) -> DictConfig:
    """Return the configuration of a teacher's training, over the defaults; unknown keys are warned of.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it does not parse or holds wrong values.
    """
    found = resolve_config_path(path)
    return merge_layers(get_default_config(), [Layer(str(found), load_yaml(found))], strict=False)


def is_placeholder(value: Any) -> bool:
    """Return whether a path is one of those that recipes leave to their user, such as `<PATH/TO/TEACHER>`."""
    return isinstance(value, str) and value.startswith("<") and value.endswith(">")


def joined(problems: Sequence[str]) -> str:
    """Return one problem as it is, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:" + "".join(f"\n  - {problem}" for problem in problems)


def _parse_option(token: Any) -> DictConfig:
    key, equals, _ = str(token).partition("=")
    if not equals:
        raise ConfigError(f"option {token!r}: expected key=value, for instance optim.epochs=10")
    if not key or key != key.strip() or key.startswith("-") or not all(key.split(".")):
        raise ConfigError(f"option {token!r}: {key!r} is not a key; expected key=value, for instance optim.epochs=10")
    try:
        return OmegaConf.from_dotlist([token])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"option {token!r}: the value is not valid YAML ({_reason(error)})") from error


def _remove(cfg: DictConfig, key: str) -> None:
    parent, _, name = key.rpartition(".")
    section = OmegaConf.select(cfg, parent) if parent else cfg
    section.pop(name)
    if parent and not section:
        _remove(cfg, parent)


def _warn_without_effect(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    given = {key: value for layer in layers for key, value in layer.leaves()}
    ignored = {key for layer in layers for key in layer.retired}
    ignored |= {
        key
        for key, value in given.items()
        if key in SETTINGS and SETTINGS[key].unused and value != SETTINGS[key].default
    }
    if ignored:
        logger.warning("these settings have no effect and are ignored: %s", ", ".join(sorted(ignored)))
    if cfg.get("schedules") is not None:
        options = {key for layer in layers if layer.is_option for key, _ in layer.leaves()}
        if replaced := sorted(options.intersection(REPLACED_BY_SCHEDULES)):
            logger.warning(
                "%s: no effect, because the configuration has a section `schedules`, which replaces it; "
                "set schedules.* or start from a recipe without that section",
                ", ".join(replaced),
            )


def _reason(error: BaseException) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        return str(error.problem)
    return (str(error).strip() or type(error).__name__).splitlines()[0]
