r"""The membership game where it is solved: a Gaussian in d dimensions is fitted to n points, and an attacker is to say
whether x was one of them.

Let x have the law :math:`N(\mu, \Sigma)`. A *member* is one of the n points that a model was fitted to, any *other*
point is a fresh draw. The attacker says "member" where a statistic D is small. By a threshold, a share FPR of the
others and a share TPR of the members is below it. Three attacks, by what is fitted and what the attacker knows:

**The mean is fitted**, :math:`\Sigma = I` is known. :math:`D = \|x - \bar x\|^2`. A member pulls the mean towards
itself: :math:`x_i - \bar x` has the covariance :math:`(1 - 1/n) I`, and :math:`x - \bar x` of another point
:math:`(1 + 1/n) I`. So

.. math::
    D_{member} \sim (1 - \tfrac1n)\, \chi^2_d, \qquad D_{other} \sim (1 + \tfrac1n)\, \chi^2_d, \qquad
    AUC = F_{d, d}\!\left(\frac{n + 1}{n - 1}\right) \approx \Phi\!\left(\frac{\sqrt d}{n}\right),

with :math:`F_{d, d}` the distribution function of the ratio of two :math:`\chi^2_d`. The two densities cross at
:math:`t = d \log(b / a) / (1/a - 1/b)` with :math:`a = 1 - 1/n, b = 1 + 1/n`, where TPR - FPR is largest.

**Mean and covariance are fitted**, S with the divisor n - 1. :math:`D = (x - \bar x)^T S^{-1} (x - \bar x)`, and

.. math::
    D_{member} \sim \frac{(n - 1)^2}{n}\, \mathrm{Beta}\!\left(\frac d2, \frac{n - d - 1}{2}\right), \qquad
    D_{other} \sim \frac{d\,(n^2 - 1)}{n\,(n - d)}\, F_{d,\, n - d} .

The second is Hotelling's T^2 of one point against n. The first holds since the n points, whitened by their own mean
and S, are rows of a random projection. No member can be farther than :math:`(n - 1)^2 / n`, others can by any amount.
The members' D add up to d (n - 1), always, which presses them together from both sides: others are also *nearer* than
any member more often. So the ROC of this attack is not concave, and where n and d are few its TPR at a low FPR is
below that FPR.

**The attacker knows the law**, and the fitted mean. By Neyman and Pearson no attack is better than the ratio of the
likelihoods of x: :math:`N(\bar x, (1 - 1/n) I)` as a member, :math:`N(\mu, I)` as another. Up to a constant,

.. math:: D = \frac{n}{n - 1} \|x - \bar x\|^2 - \|x - \mu\|^2 .

It is the distance *less the difficulty of the point itself*. With :math:`v = (x - \mu, \bar x - \mu)` it is a quadratic
form in each dimension, so :math:`D \sim p A - q B` with independent :math:`A, B \sim \chi^2_d`; p and -q are the
eigenvalues of the form times the covariance of v. For large n, :math:`AUC \approx \Phi(\sqrt{d / (2 n)})`: the leak
lasts until n is about d, where the plain distance is blind from :math:`n \approx \sqrt d` on. This is why attacks
compare with models that were trained without the image (Carlini et al., 2022).

In the first two games D of a member is independent of D of another point in the *same* fit: the members' D depend on
the points up to a shift (or an affine map) only, the fit is complete and sufficient, so they are independent of the fit
(Basu). So the AUC of one fit has this value on average.

Sources: Homer et al. (2008) and Sankararaman et al. (2009), membership by means; Gnanadesikan and Kettenring (1972),
the Beta law; Hotelling (1931); Yeom et al. (2018), the advantage TPR - FPR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medvdm.errors import InputError

_GRID = 2001  #: thresholds that the advantage is sought on, and quantiles that an AUC is summed over
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class Game:
    """An attack that says "member" where a statistic D is at most a threshold, by the laws of D.

    Attributes:
        member: distribution function of a member's D, vectorised.
        other: that of another point's D.
        other_quantile: the inverse of ``other``.
    """

    member: Callable[[Any], Any]
    other: Callable[[Any], Any]
    other_quantile: Callable[[Any], Any]

    def tpr(self, fpr: np.ndarray | float) -> np.ndarray:
        """The ROC curve: the share of members found where a share ``fpr`` in [0, 1] of others is called a member."""
        return np.asarray(self.member(self.other_quantile(np.asarray(fpr, np.float64))))

    def auc(self) -> float:
        """Area under the ROC curve: how often a member has a smaller D than another point. 1/2 is chance."""
        # The nodes in FPR are dense at both ends, where the curve can be steep: fpr = sin^2(a).
        angle = (_NODES + 1) * np.pi / 4
        return min(1.0, float(np.sum(_WEIGHTS * self.tpr(np.sin(angle) ** 2) * np.sin(2 * angle)) * np.pi / 4))

    def advantage(self) -> float:
        """The largest TPR - FPR over all thresholds, from 0 to 1."""
        fpr = np.sin(np.linspace(0, np.pi / 2, _GRID)) ** 2
        return float(np.max(self.tpr(fpr) - fpr))


def mean_fitted(n: int, d: int) -> Game:
    """The mean of n points is fitted, their covariance is known; D is the squared distance from the mean.

    Raises:
        InputError: n below 2 or d below 1.
    """
    from scipy.stats import chi2

    _check(n, d, least=2)
    return _of_laws(chi2(d, scale=1 - 1 / n), chi2(d, scale=1 + 1 / n))


def covariance_fitted(n: int, d: int) -> Game:
    """Mean and covariance of n points are fitted; D is the squared Mahalanobis distance.

    Raises:
        InputError: n below d + 2, where S has no inverse or all members are as far, or d below 1.
    """
    from scipy.stats import beta, f

    _check(n, d, least=d + 2)
    member = beta(d / 2, (n - d - 1) / 2, scale=(n - 1) ** 2 / n)
    return _of_laws(member, f(d, n - d, scale=d * (n**2 - 1) / (n * (n - d))))


def law_known(n: int, d: int) -> Game:
    """The mean of n points is fitted and the attacker knows the law of the points: the best attack that there is.

    Raises:
        InputError: n below 2 or d below 1.
    """
    _check(n, d, least=2)
    c = n / (n - 1)
    form = np.array([[c - 1, -c], [-c, c]])  # D of v = (x - mu, mean - mu) in one dimension
    member, other = (_quadratic(form @ np.array([[1, shared], [shared, 1 / n]]), d) for shared in (1 / n, 0.0))
    # The quantiles by interpolation between thresholds on either side of the mean, 40 deviations away at most.
    product = form @ np.diag([1, 1 / n])
    mean, deviation = d * np.trace(product), np.sqrt(2 * d * np.trace(product @ product))
    at = mean + deviation * np.sinh(np.linspace(-np.arcsinh(40), np.arcsinh(40), _GRID))
    share, first = np.unique(np.clip(other(at), 0, 1), return_index=True)
    return Game(member, other, lambda p: np.interp(p, share, at[first]))


def _of_laws(member: Any, other: Any) -> Game:
    return Game(member.cdf, other.cdf, other.ppf)


def _quadratic(product: np.ndarray, d: int) -> Callable[[Any], Any]:
    r"""Distribution function of :math:`p A - q B`, where p > 0 and -q < 0 are the eigenvalues of a form times a
    covariance: the mean over B of that of A, by quadrature in the root of B, whose density is smooth."""
    from scipy.stats import chi, chi2

    low, high = np.sort(np.linalg.eigvals(product).real)
    least, most = chi(d).ppf(1e-16), chi(d).isf(1e-16)

    def cdf(t: np.ndarray | float) -> Any:
        t = np.asarray(t, np.float64)[..., None]
        start = np.clip(np.sqrt(np.maximum(t / low, 0)), least, most)  # below this root no A is small enough
        u = (_NODES + 1) / 2
        root = start + (most - start) * u**2  # u^2, as for d = 1 the law of A rises like a root
        law = chi2(d).cdf((t - low * root**2) / high) * chi(d).pdf(root)
        return np.sum(_WEIGHTS * u * (most - start) * law, axis=-1)

    return cdf


def _check(n: int, d: int, *, least: int) -> None:
    if d < 1:
        raise InputError(f"d: {d}; expected at least 1 dimension")
    if n < least:
        raise InputError(f"n: {n}; expected at least {least} points in {d} dimensions")
