"""A budgeted search over ratios by kind of module: a tree-structured Parzen estimator, from optuna.

The sweep's own points are where it starts from: one ratio for all kinds is a place in the same
space. A suggestion is a function of the points before it and of the seed, so that a search that was
cut short goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.sweep.config import SearchConfig
from cpt_merge.evaluation.sweep.points import EVERYTHING
from cpt_merge.evaluation.sweep.recommend import RatedPoint


def check_installed() -> None:
    """Raise `UserError` without optuna."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(
            "sweep.search needs optuna, which is not installed; pip install -c constraints.txt -e '.[search]' "
            "or set sweep.search.trials to 0."
        ) from None


def suggest(
    config: SearchConfig, kinds: Sequence[str], before: Sequence[RatedPoint], number: int
) -> dict[str, float]:
    """The ratios that trial `number` (from 0) should try, by kind."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {
        kind: optuna.distributions.FloatDistribution(config.low, config.high, step=config.step)
        for kind in kinds
    }
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed + number)
    )
    for rated in before:
        params = _by_kind(rated.point.ratios, kinds)
        if all(_is_in(config, ratio) for ratio in params.values()):
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=dict(spaces), value=rated.score
                )
            )
    asked = study.ask(dict(spaces))
    return {kind: round(float(asked.params[kind]), 6) for kind in kinds}


def _is_in(config: SearchConfig, ratio: float) -> bool:
    steps = (ratio - config.low) / config.step
    return config.low <= ratio <= config.high and abs(steps - round(steps)) < 1e-6


def _by_kind(ratios: Mapping[str, float], kinds: Sequence[str]) -> dict[str, float]:
    return dict.fromkeys(kinds, ratios[EVERYTHING]) if EVERYTHING in ratios else dict(ratios)
