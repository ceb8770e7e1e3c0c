r"""Training that can tell little of any one patient: whose images a step sees, and what of their gradients it uses.

The unit is the patient, with all of his or her images. Each step (Abadi et al., 2016)

1. draws m of the n training patients without replacement, whatever it drew before, and one image of each
   (:func:`medvdm.training.batches.private_batches`);
2. takes the gradient :math:`g_i` of each image's loss on its own: time, noise, crop and augmentation of one image know
   nothing of another;
3. clips each to the norm C and adds Gaussian noise of z times that to the sum,

.. math:: \bar g = \frac1m \left[ \sum_i g_i \min(1, C / \|g_i\|) + z C \xi \right], \qquad \xi \sim N(0, I) .

AdamW, the learning rate and the average of the weights see :math:`\bar g` and nothing else of the images, so what they
do costs no more privacy. :mod:`medvdm.training.privacy_accounting` says how little :math:`\bar g` can tell.

Not covered by that promise: whatever else a run writes from its training images without noise (``metrics.jsonl``,
``baselines.npz``, ``gaussian.npz``, ``results``, ``audits``, counts of images, classes and gray levels in
``config.json`` and the model card), settings that were chosen by looking at other runs on the same images, and
validation images, which looks on the way and ``keep_best`` use.

The draws and the noise must be unknown to whoever should learn nothing: known noise can be taken away again. So they
come from a secret of 64 bits that :func:`medvdm.fit` draws from the system, keeps in ``noise.key`` of the run's folder
while the run is unfinished, for an exact resume, and deletes after the last step. The setting ``seed`` only gives the
initial weights. Two things are as in all such libraries: the generators (JAX's and NumPy's) are not made for
cryptography, and noise is rounded to float32, which theory does not know (Mironov, 2012).

The gradients of a batch lie in memory together: m times the size of the model.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import optax
from jaxtyping import PRNGKeyArray


def new_secret() -> int:
    """64 bits from the system's source of randomness."""
    return secrets.randbits(64)


def key_data(secret: int) -> np.ndarray:
    """The secret as the two words of a key of JAX's Threefry generator."""
    return np.array([secret >> 32, secret & 0xFFFFFFFF], np.uint32)


def noisy_mean(gradients: Any, *, clip: float, noise: float, key: PRNGKeyArray) -> Any:
    r"""The mean of clipped gradients with noise on it, :math:`\bar g` of the module's docstring.

    Args:
        gradients: a pytree whose leaves have a first axis of m images.
        clip: C, the largest norm over all leaves that a gradient keeps.
        noise: z, the deviation of the noise on the sum over C.
        key: of the noise.
    """
    aggregate = optax.contrib.differentially_private_aggregate(clip, noise, key=key)
    return aggregate.update(gradients, aggregate.init(None))[0]
