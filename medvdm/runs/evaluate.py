"""Evaluate a run on held-out images and keep the result in its folder."""

from __future__ import annotations

from typing import Any

from medvdm.data import ImageData
from medvdm.data.levels import level_use
from medvdm.errors import InputError
from medvdm.evaluation import held_out
from medvdm.runs.config import EvaluateConfig, settings
from medvdm.runs.model_card import renew_card
from medvdm.runs.record import version
from medvdm.runs.run import Run, changed, load_data
from medvdm.runs.store import RESULTS, check_writable, safe_name, write_json
from medvdm.training.devices import first_process

DEFAULTS = EvaluateConfig()


def evaluate(
    run: Run,
    data: ImageData | None = None,
    config: EvaluateConfig = DEFAULTS,
    *,
    save: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluate a run, on all devices of all processes.

    >>> medvdm.evaluate(run, split="val", draws=4)  # doctest: +SKIP

    Args:
        run: from :func:`load`.
        data: the images; the run's own data if None.
        config: the settings.
        save: also write the result into the run's folder and renew its model card.
        changes: settings of :class:`medvdm.runs.config.EvaluateConfig` by name: ``split``, ``null``, ``draws``, ...

    Returns:
        The keys of :func:`medvdm.evaluation.held_out.evaluate_weights`; ``run``, ``version``, ``step`` and ``weights``
        of what was evaluated; ``own_data``, whether the data are those of the training; their ``notes``, for a model of
        gray values with those on the gray levels of the split; ``batch_size`` and ``seed``.

    Raises:
        InputError: an unknown setting, a value that cannot be used, or codecs for a Bernoulli likelihood.
        MissingPackageError: codecs without the package for them.
        RunError: the run's own data have changed, the labels or the null were not trained, or the result cannot be
            written into the run's folder.
    """
    config = settings(config, changes)
    run.require_whole("the baselines")
    if save:
        check_writable(run.path / RESULTS)
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
    run.require_trained(null=config.null, labels=labelled)
    found = held_out.evaluate_weights(
        run.graph,
        run.params,
        data,
        baselines=run.baselines,
        gaussian=run.gaussian,
        **vars(config),
    )
    result = {
        "run": run.name,
        "version": version(),
        "step": run.step,
        "weights": run.weights,
        "own_data": same,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "notes": [*data.notes, *(_level_notes(data, config.split) if run.eight_bit else ())],
        **found,
    }
    if save and first_process():
        (run.path / RESULTS).mkdir(exist_ok=True)
        write_json(run.path / RESULTS / f"{_name(run, data, config, same)}.json", result)
        renew_card(run.path)
    return result


def _level_notes(data: ImageData, split: str) -> tuple[str, ...]:
    """What makes the bits per dimension of these images lower or higher for another reason than the model."""
    why = () if data.reading is None else data.reading.rounded_from
    return level_use(data.reader, data.indices(split), why).notes


def _name(run: Run, data: ImageData, config: EvaluateConfig, same: bool) -> str:
    """A name for the result: the same for the same evaluation, and another for any other."""
    parts = [safe_name(data.name), config.split, str(run.step), run.weights, *(["null"] if config.null else [])]
    parts += [f"draws{config.draws}", f"batch{config.batch_size}", f"seed{config.seed}"]
    parts += ["codecs"] if config.codecs else []
    return "-".join(parts if same else [*parts, data.fingerprint()])  # other data may bear the same name
