"""The command that every evaluation is: read its settings, load the model, evaluate, write and print the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from omegaconf import OmegaConf

from dinov3 import distributed
from dinov3.configs import write_config
from dinov3.configs.settings import format_keys
from dinov3.eval.command.config import parse_arguments
from dinov3.eval.command.model import FrozenBackbone, load_model
from dinov3.eval.command.results import EvaluationResult, provenance, write_results
from dinov3.run.init import job_context

CONFIG_FILENAME = "eval_config.yaml"


class EvaluationConfig(Protocol):
    """What `run_command` needs of the configuration dataclass of an evaluation."""

    @property
    def model(self) -> Any:
        """A `ModelConfig`; None or another section if the evaluation loads its model by itself."""

    @property
    def output_dir(self) -> str | None:
        """Where the files go. Default: the current directory."""

    def check(self) -> None:
        """Raise a ValueError or FileNotFoundError if the settings cannot work, before anything is loaded."""


Config = TypeVar("Config", bound=EvaluationConfig)


def run_command(
    argv: Sequence[str] | None,
    *,
    doc: str | None,
    config_class: type[Config],
    evaluate: Callable[[Any, Config], EvaluationResult],
    results_file: str,
    config_file: str = CONFIG_FILENAME,
    loads_model: bool = True,
) -> int:
    """Run an evaluation from its command line; the whole `main` of an evaluation is one call of this.

        def main(argv: Sequence[str] | None = None) -> int:
            return run_command(argv, doc=__doc__, config_class=KnnEvalConfig, evaluate=evaluate_knn, results_file=...)

    Settings come from the defaults, then the file given by `config=` (or `config_file=`), then the other arguments.
    They are parsed and checked once, before the output directory is made or anything is loaded. A class whose settings
    depend on each other fills them in `__post_init__`: nothing is changed after that, and what is written is what ran.

    Args:
        argv: `key=value` tokens after the program's name. Default: those of the command line.
        doc: the module's docstring, shown by `--help` above the list of keys.
        config_class: the dataclass of the settings, with `model`, `output_dir` and `check()`.
        evaluate: called with the loaded model and the settings in every process; it writes its own files except for
            `results_file`, prints nothing, and returns its figures and what is to be reported.
        results_file: name of the CSV file with the figures; the JSON file beside it adds where they come from.
        config_file: name of the file with the resolved settings, which can be given again as `config=`.
        loads_model: load `config.model` for `evaluate`. If false, it gets None and loads what it needs by itself, for
            example after it has checked its datasets, which takes less time.

    Returns:
        0.

    Raises:
        ConfigError, ValueError: the settings are wrong; names the key.
        FileNotFoundError: a file that the settings name does not exist.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"}.intersection(argv):
        print(f"{doc}\nKeys, their defaults and meanings:\n{format_keys(config_class)}")
        return 0
    config = parse_arguments(argv, config_class)
    config.check()
    with job_context(output_dir=config.output_dir):
        run_evaluation(
            config, evaluate=evaluate, results_file=results_file, config_file=config_file, loads_model=loads_model
        )
    return 0


def run_evaluation(
    config: Config,
    *,
    evaluate: Callable[[Any, Config], EvaluationResult],
    results_file: str,
    config_file: str = CONFIG_FILENAME,
    loads_model: bool = True,
) -> dict[str, Any]:
    """Run an evaluation inside a job that is already set up (`run.init.job_context`), from settings already checked.

    Args:
        config: the settings.
        evaluate, results_file, config_file, loads_model: as for `run_command`.

    Returns:
        The figures, as in the results file.
    """
    started = time.perf_counter()
    output_dir = Path(config.output_dir or ".")
    write_config(OmegaConf.structured(config), output_dir, config_file)
    backbone: FrozenBackbone | None = None
    if loads_model:
        assert config.model is not None  # config.check() refuses it
        backbone = load_model(config.model)
    result = evaluate(backbone, config)
    origin = provenance(config, result, time.perf_counter() - started)
    write_results(result.metrics, output_dir, results_file, {**result.details, **origin})
    if distributed.is_main_process():
        print(result.report)
        print("written to " + ", ".join(str(path) for path in (output_dir / results_file, *result.files)))
    return result.metrics
