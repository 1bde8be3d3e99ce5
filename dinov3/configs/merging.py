"""From files and `key=value` options to one configuration: default < recipe file < options < output directory.

Notable:
- Every layer is checked for unknown keys before it is merged, so that an error names the file or the option.
- Values are checked after the merge, so that interpolations (`${train.seed}`) are seen with what they stand for.
- Keys that never did anything (`schema.RETIRED`) are dropped with one warning.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov3.configs import schema
from dinov3.configs.schema import ConfigError

logger = logging.getLogger("dinov3")

PACKAGE = Path(__file__).resolve().parents[1]

#: Settings that a `schedules` section replaces.
REPLACED_BY_SCHEDULES = (
    "optim.lr",
    "optim.min_lr",
    "optim.warmup_epochs",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.schedule_trunc_extra",
    "optim.freeze_last_layer_epochs",
    "teacher.momentum_teacher",
    "teacher.final_momentum_teacher",
    "teacher.warmup_teacher_temp",
    "teacher.teacher_temp",
    "teacher.warmup_teacher_temp_epochs",
)


@dataclass
class DinoV3SetupArgs:
    """What a run is configured with.

    Args:
        config_file: recipe merged over the default configuration; empty for the default alone.
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
    """Settings from one source, and how an error names that source."""

    origin: str
    config: DictConfig
    is_option: bool = False

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """The dotted keys and unresolved values of this layer."""
        yield from schema.flatten(OmegaConf.to_container(self.config))


def get_default_config() -> DictConfig:
    """A fresh copy of the default configuration, `ssl_default_config.yaml`."""
    return load_yaml(schema.DEFAULT_CONFIG_PATH)


def get_cfg_from_args(args: Any, multidistillation: bool = False, strict: bool = True) -> DictConfig:
    """Merge the default configuration, a recipe file, `key=value` options and the output directory; later ones win.

    Keys and types are checked; what follows from several keys together is `validate`'s part.

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
    """The recipe file (if any), each option, and the output directory of `args`, in rising precedence."""
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
    fatal = [problem for key, problem in unknown.items() if strict or schema.breaks_structure(key)]
    if fatal:
        raise ConfigError(joined(fatal))
    for problem in unknown.values():
        logger.warning("%s", problem)
    try:
        cfg = OmegaConf.merge(base, *(_without_empty_sections(layer) for layer in layers))
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot merge the settings: {_reason(error)}") from error
    assert isinstance(cfg, DictConfig)
    wrong = wrong_values(cfg, _origins(layers))
    if wrong:
        raise ConfigError(joined(wrong))
    _warn_without_effect(cfg, layers)
    _drop_retired(cfg)
    OmegaConf.set_struct(cfg, strict)
    return cfg


def unknown_keys(layers: Sequence[Layer]) -> dict[str, str]:
    """Each key that no configuration has, with a sentence that names its origin and the nearest known key."""
    return {
        key: f"{layer.origin}: {problem}"
        for layer in layers
        for key, value in layer.leaves()
        if (problem := schema.key_problem(key, value))
    }


def wrong_values(cfg: DictConfig, origins: dict[str, str] | None = None) -> list[str]:
    """One sentence for each value of a wrong type or outside of its closed set; unknown keys are left alone."""
    problems = []
    for key, value in schema.flatten(plain(cfg)):
        if schema.key_problem(key, value) is None and (problem := schema.value_problem(key, value)):
            origin = (origins or {}).get(key)
            problems.append(f"{origin}: {problem}" if origin else problem)
    return problems


def plain(cfg: Any) -> dict[str, Any]:
    """The configuration as nested dictionaries, interpolations resolved.

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
    """One layer for each `key=value` token; values are YAML (`1e-3`, `[512,768]`, `null`, `true`, `'text'`).

    Raises:
        ConfigError: a token without `=`, without a key, or whose value is no YAML.
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
    recipes = sorted((PACKAGE / "configs").rglob("*.yaml"))
    by_name = {recipe.name: recipe for recipe in recipes}
    nearest = difflib.get_close_matches(given.name, by_name, n=1)
    hint = f"; did you mean {by_name[nearest[0]].relative_to(PACKAGE.parent)}?" if nearest else ""
    looked = "" if given.is_absolute() else f" in {', '.join(dict.fromkeys(str(place) for place in places))}"
    raise FileNotFoundError(f"no configuration file {os.fspath(path)!r}{looked}{hint}")


def joined(problems: Sequence[str]) -> str:
    """One problem as it is, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration:" + "".join(f"\n  - {problem}" for problem in problems)


def _parse_option(token: Any) -> DictConfig:
    key, equals, _ = str(token).partition("=")
    if not equals:
        raise ConfigError(f"option {token!r}: expected key=value, for instance optim.epochs=10")
    if not key or key != key.strip() or key.startswith("-") or not all(key.split(".")):
        raise ConfigError(f"option {token!r}: {key!r} is no key; expected key=value, for instance optim.epochs=10")
    try:
        return OmegaConf.from_dotlist([token])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"option {token!r}: the value is not valid YAML ({_reason(error)})") from error


def _without_empty_sections(layer: Layer) -> DictConfig:
    cfg = layer.config.copy()
    for key, value in layer.leaves():
        if schema.is_empty_section(key, value):
            parent, _, name = key.rpartition(".")
            (OmegaConf.select(cfg, parent) if parent else cfg).pop(name)
    return cfg


def _origins(layers: Sequence[Layer]) -> dict[str, str]:
    # A sentence about a value repeats the option, so it needs no origin.
    return {key: "" if layer.is_option else layer.origin for layer in layers for key, _ in layer.leaves()}


def _drop_retired(cfg: DictConfig) -> None:
    for key in schema.RETIRED:
        section = OmegaConf.select(cfg, key.rpartition(".")[0])
        if section is not None:
            section.pop(key.rpartition(".")[2], None)
    if cfg.get("coding_rate_loss") == {}:
        cfg.pop("coding_rate_loss")


def _warn_without_effect(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    given = {key: value for layer in layers for key, value in layer.leaves()}
    defaults = schema.default_values()
    ignored = [key for key in given if key in schema.RETIRED]
    ignored += [key for key in given if key in schema.WITHOUT_EFFECT and given[key] != defaults[key]]
    if ignored:
        logger.warning("these settings have no effect and are ignored: %s", ", ".join(sorted(ignored)))
    if OmegaConf.select(cfg, "schedules") is not None:
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
