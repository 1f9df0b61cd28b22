"""A search over ratios by kind of module: optuna's tree-structured Parzen estimator.

It starts from the sweep's own points: one ratio for all kinds is a place in the same space. A
suggestion depends on the earlier points and the seed alone, so an interrupted search continues as
if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.sweep.config import SearchConfig
from cpt_merge.evaluation.sweep.points import EVERYTHING
from cpt_merge.evaluation.sweep.recommend import RatedPoint


def check_installed() -> None:
    """Raise `UserError` if optuna is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "sweep.search needs optuna, which is not installed; run pip install -c constraints.txt "
            "-e '.[search]', or set sweep.search.trials to 0."
        ) from None


def suggest(
    config: SearchConfig, kinds: Sequence[str], before: Sequence[RatedPoint], number: int
) -> dict[str, float]:
    """The ratios of trial `number` (from 0), by kind."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distribution = optuna.distributions.FloatDistribution(config.low, config.high, step=config.step)
    spaces = dict.fromkeys(kinds, distribution)
    sampler = optuna.samplers.TPESampler(seed=config.seed + number)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for rated in before:
        ratios = rated.point.ratios
        if EVERYTHING in ratios:
            ratios = dict.fromkeys(kinds, ratios[EVERYTHING])
        steps = [(ratio - config.low) / config.step for ratio in ratios.values()]
        on_grid = all(abs(step - round(step)) < 1e-6 for step in steps)
        if on_grid and all(config.low <= ratio <= config.high for ratio in ratios.values()):
            trial = optuna.trial.create_trial(
                params=ratios, distributions=dict(spaces), value=rated.score
            )
            study.add_trial(trial)
    asked = study.ask(dict(spaces))
    return {kind: round(float(asked.params[kind]), 6) for kind in kinds}
