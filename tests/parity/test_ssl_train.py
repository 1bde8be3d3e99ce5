"""The golden cases of the training loop: the order of events, their settings, four steps of numbers, the calendar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3.configs import apply_scaling_rules_to_cfg
from dinov3.train import step as step_module
from dinov3.train.gram import GramCalendar
from dinov3.train.loop import Trainer
from dinov3.train.train import build_model

from . import arch as builder
from . import golden

CASES = golden.cases("ssl", "train/")


class Recorder:
    """Notes the calls of a step in order, and the numbers that the case stores."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[list[Any]] = []
        self.outputs: dict[str, torch.Tensor] = {}
        self.iteration = -1
        self.student = trainer.model.student
        self.ema = trainer.model.model_ema
        monkeypatch.setattr(step_module, "apply_optim_scheduler", self.spy_schedule(step_module.apply_optim_scheduler))
        monkeypatch.setattr(step_module, "clip_grad_norm_", self.spy_clip(step_module.clip_grad_norm_))
        for owner, name in ((trainer.optimizer, "zero_grad"), (trainer.optimizer, "step")):
            monkeypatch.setattr(owner, name, self.spy_optimizer(name, getattr(owner, name)))
        monkeypatch.setattr(trainer.model, "forward_backward", self.spy_forward(trainer.model.forward_backward))
        monkeypatch.setattr(trainer.model, "update_ema", self.spy_ema(trainer.model.update_ema))
        if trainer.model.gram_teacher is not None:
            self.spy_gram(trainer.model, trainer.model.gram_teacher, monkeypatch)
        monkeypatch.setattr(trainer.metric_logger, "update", self.spy_log(trainer.metric_logger.update))

    def spy_schedule(self, original: Any) -> Any:
        def apply(optimizer: Any, lr: float, wd: float, last_layer_lr: float) -> None:
            self.iteration += 1
            self.events.append(["apply_optim_scheduler", lr, wd, last_layer_lr])
            original(optimizer, lr, wd, last_layer_lr)

        return apply

    def spy_clip(self, original: Any) -> Any:
        def clip(module: torch.nn.Module, max_norm: float) -> torch.Tensor:
            name = next(name for name, part in self.student.items() if part is module)
            self.events.append(["clip_grad_norm_", name, max_norm])
            norm = original(module, max_norm)
            self.outputs[f"it{self.iteration}.grad_norm/{name}"] = norm.double()
            return norm

        return clip

    def spy_optimizer(self, name: str, original: Any) -> Any:
        def call(**kwargs: Any) -> None:
            self.events.append(["optimizer.zero_grad"] if name == "zero_grad" else ["optimizer.step", self.iteration])
            original(**kwargs)

        return call

    def spy_forward(self, original: Any) -> Any:
        def forward_backward(data: Any, *, teacher_temp: float, iteration: int) -> Any:
            self.events.append(["forward_backward", iteration, teacher_temp])
            total, terms = original(data, teacher_temp=teacher_temp, iteration=iteration)
            self.outputs[f"it{self.iteration}.total_loss"] = total.double()
            return total, terms

        return forward_backward

    def spy_log(self, original: Any) -> Any:
        def update(**values: Any) -> None:
            for name, value in values.items():
                logged = self.outputs.setdefault(f"logged/{name}", torch.empty(0, dtype=torch.float64))
                self.outputs[f"logged/{name}"] = torch.cat([logged, torch.tensor([float(value)], dtype=torch.float64)])
            original(**values)

        return update

    def spy_ema(self, original: Any) -> Any:
        def update_ema(momentum: float) -> None:
            self.events.append(["update_ema", self.iteration, momentum])
            original(momentum)
            self.outputs[f"it{self.iteration}.student_param_norms"] = builder.norms(self.student)
            self.outputs[f"it{self.iteration}.ema_param_norms"] = builder.norms(self.ema)

        return update_ema

    def spy_gram(self, model: Any, gram_teacher: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        load, update = model.gram_load_ema_teacher, model.update_gram

        def loads() -> None:
            self.events.append(["gram_load_ema_teacher", self.iteration + 1])
            load()
            self.outputs[f"it{self.iteration + 1}.gram_loaded_param_norms"] = builder.norms(gram_teacher)

        def updates() -> None:
            self.events.append(["update_gram", self.iteration])
            with monkeypatch.context() as inner:  # which is how it is done, but another event
                inner.setattr(model, "gram_load_ema_teacher", load)
                update()
            self.outputs[f"it{self.iteration}.gram_param_norms"] = builder.norms(gram_teacher)

        monkeypatch.setattr(model, "gram_load_ema_teacher", loads)
        monkeypatch.setattr(model, "update_gram", updates)


@pytest.fixture(params=CASES, ids=lambda case: case["id"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


@pytest.fixture
def trainer(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    extra = {
        "train": {"output_dir": str(tmp_path), "tensorboard": False, "print_freq": 1},
        "compute_precision": {"param_dtype": "fp32"},
    }
    cfg = builder.config(case, extra, builder.teacher_files(case, tmp_path))
    apply_scaling_rules_to_cfg(cfg)
    trainer = Trainer(cfg, build_model(cfg))
    init_weights = trainer.model.init_weights

    def init_and_fill() -> None:
        init_weights()
        builder.fill(trainer.model, case["seeds"])

    monkeypatch.setattr(trainer.model, "init_weights", init_and_fill)
    return trainer


def test_training_equals_the_published_method(
    case: dict[str, Any], trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(dict(trainer.model.student.named_parameters())) == case["expected"]["student_parameter_names"]
    recorder = Recorder(trainer, monkeypatch)
    averages = trainer.run(data_loader=(builder.batch(case["data"], seed_offset=i) for i in range(4)))

    expected = case["expected"]["events"]
    assert [[*filter(lambda entry: isinstance(entry, str), event)] for event in recorder.events] == [
        [*filter(lambda entry: isinstance(entry, str), event)] for event in expected
    ]
    for got, want in zip(recorder.events, expected, strict=True):
        assert got == [pytest.approx(entry, rel=1e-12) if isinstance(entry, float) else entry for entry in want]
    for name, network in (("student", trainer.model.student), ("ema", trainer.model.model_ema)):
        recorder.outputs |= builder.slices(f"final.{name}", dict(network.named_parameters()))
    assert builder.compare(case, recorder.outputs) == len(case["outputs"])
    logged = case["expected"]["logged_keys"]
    assert [name for name in averages if name in logged] == logged


@pytest.mark.parametrize("case", golden.cases("ssl", "gram_events/"), ids=lambda case: case["id"])
def test_calendar_of_the_gram_teacher(case: dict[str, Any]) -> None:
    cfg = builder.config(case)
    calendar = GramCalendar.from_config(cfg)
    events: list[list[Any]] = []
    for iteration in range(case["start_iter"], cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH):
        if calendar.loads_before(iteration):
            events.append(["load_ema_before", iteration])
        if calendar.refreshes_after(iteration):
            events.append(["update_gram_after", iteration])
    assert events == case["expected"]["events"]


def test_refreshes_before_a_resumed_run_are_counted() -> None:
    for entry in golden.case("trainer", "gram-update-count")["expect"]:
        calendar = GramCalendar(repeats=True, first=entry["it_first_update"], frequency=entry["update_frequency"])
        assert calendar.n_refreshes(entry["start_iter"]) == entry["updates_done"], entry
