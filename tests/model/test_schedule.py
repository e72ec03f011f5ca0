import pytest

from model.config import TrainingConfig
from model.schedule import learning_rate, peak_rate


def training(**choices: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"warmup": 400, "updates": 4000, **choices})


@pytest.mark.parametrize("d_model", [16, 512])
@pytest.mark.parametrize("warmup", [1, 10, 400])
def test_the_default_is_the_formula_of_the_paper(d_model: int, warmup: int) -> None:
    config = training(warmup=warmup)
    for step in (1, 2, 9, 10, 11, 399, 400, 401, 3999, 4000):
        expected = d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert learning_rate(config, d_model, step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["inverse-sqrt", "cosine"])
@pytest.mark.parametrize(("rate", "peak"), [(0.002, 0.002), (None, (64 * 400) ** -0.5)])
def test_the_rate_rises_linearly_to_its_peak_and_falls(schedule: str, rate: float | None, peak: float) -> None:
    config = training(schedule=schedule, learning_rate=rate)
    rates = [learning_rate(config, 64, step) for step in range(1, 4001)]
    assert peak_rate(config, 64) == pytest.approx(peak)
    assert max(rates) == pytest.approx(peak)
    assert rates[:400] == pytest.approx([peak * step / 400 for step in range(1, 401)])
    assert rates[399:] == sorted(rates[399:], reverse=True)
    assert min(rates) > 0


def test_the_cosine_ends_after_the_last_update() -> None:
    config = training(schedule="cosine", learning_rate=1.0)
    assert learning_rate(config, 64, 4001) == pytest.approx(0, abs=1e-12)
    assert learning_rate(config, 64, 4000) == pytest.approx(0, abs=1e-6)
    assert learning_rate(config, 64, 400 + 3601 // 3) == pytest.approx(0.75, abs=1e-3)
    assert learning_rate(config, 64, 400 + 3601 // 2) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("schedule", ["inverse-sqrt", "cosine"])
def test_a_training_may_be_all_warmup(schedule: str) -> None:
    config = training(schedule=schedule, warmup=5, updates=5, learning_rate=1.0)
    assert [learning_rate(config, 64, step) for step in range(1, 6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
