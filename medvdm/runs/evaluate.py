"""Evaluate a run on held-out images and keep the result in its folder."""

from __future__ import annotations

from typing import Any

from medvdm.data import ImageData
from medvdm.errors import InputError
from medvdm.evaluation import held_out
from medvdm.runs.model_card import renew_card
from medvdm.runs.record import version
from medvdm.runs.run import Run, changed, load_data
from medvdm.runs.store import RESULTS, write_json


def evaluate(
    run: Run,
    data: ImageData | None = None,
    *,
    split: str = "test",
    null: bool = False,
    draws: int = 8,
    batch_size: int = 32,
    seed: int = 0,
    save: bool = True,
) -> dict[str, Any]:
    """Evaluate a run; see :func:`medvdm.evaluation.held_out.evaluate_weights` for the keys.

    Args:
        run: from :func:`load`.
        data: the images; the run's own data if None.
        split: 'train', 'val', 'test' or 'all'.
        null: evaluate a conditional model without the labels.
        draws, batch_size, seed: as in :func:`medvdm.evaluation.held_out.evaluate_weights`.
        save: also write the result into the run's folder and renew its model card.
    """
    own = data is None
    data = load_data(run) if data is None else data
    same = data.fingerprint() == run.record["data"]["fingerprint"]
    if own and not same:
        raise changed(run)
    labelled = run.config.model.classes > 0 and not null
    if labelled and data.class_names != run.class_names:
        raise InputError(
            f"{data.name}: classes {', '.join(data.class_names)}; expected {', '.join(run.class_names)}, or --null"
        )
    found = held_out.evaluate_weights(
        run.graph,
        run.params,
        data,
        split,
        baselines=run.baselines,
        null=null,
        draws=draws,
        batch_size=batch_size,
        seed=seed,
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
        name = f"{data.name}-{split}-{run.step}-{run.weights}" + ("-null" if null else "")
        name += "" if same else f"-{data.fingerprint()}"  # other data may bear the same name
        write_json(run.path / RESULTS / f"{name}.json", result)
        renew_card(run.path)
    return result
