"""Evaluate a run on held-out images and keep the result in its folder."""

from __future__ import annotations

from typing import Any

from medvdm.data import ImageData
from medvdm.errors import InputError
from medvdm.evaluation import held_out
from medvdm.runs.config import EvaluateConfig, settings
from medvdm.runs.model_card import renew_card
from medvdm.runs.record import version
from medvdm.runs.run import Run, changed, load_data
from medvdm.runs.store import RESULTS, write_json

DEFAULTS = EvaluateConfig()


def evaluate(
    run: Run,
    data: ImageData | None = None,
    config: EvaluateConfig = DEFAULTS,
    *,
    save: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluate a run; see :func:`medvdm.evaluation.held_out.evaluate_weights` for the keys.

    >>> medvdm.evaluate(run, split="val", draws=4)  # doctest: +SKIP

    Args:
        run: from :func:`load`.
        data: the images; the run's own data if None.
        config: the settings.
        save: also write the result into the run's folder and renew its model card.
        changes: settings of :class:`medvdm.runs.config.EvaluateConfig` by name: ``split``, ``null``, ``draws``, ...

    Raises:
        InputError: an unknown setting, or a value that cannot be used.
        RunError: the run's own data have changed.
    """
    config = settings(config, changes)
    own = data is None
    data = load_data(run) if data is None else data
    same = data.fingerprint() == run.record["data"]["fingerprint"]
    if own and not same:
        raise changed(run)
    labelled = run.config.model.classes > 0 and not config.null
    if labelled and data.class_names != run.class_names:
        raise InputError(
            f"{data.name}: classes {', '.join(data.class_names)}; expected {', '.join(run.class_names)}, or --null"
        )
    found = held_out.evaluate_weights(
        run.graph,
        run.params,
        data,
        baselines=run.baselines,
        **vars(config),
    )
    result = {
        "run": run.path.name,
        "version": version(),
        "step": run.step,
        "weights": run.weights,
        "own_data": same,
        **found,
    }
    if save:
        (run.path / RESULTS).mkdir(exist_ok=True)
        name = f"{data.name}-{config.split}-{run.step}-{run.weights}" + ("-null" if config.null else "")
        name += "" if same else f"-{data.fingerprint()}"  # other data may bear the same name
        write_json(run.path / RESULTS / f"{name}.json", result)
        renew_card(run.path)
    return result
