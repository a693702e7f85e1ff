"""Published transfer attacks by name: compositions with their settings.

Two families. PubDef's (arXiv 2310.17645) start anywhere in the ball and take a path of 2.5 eps: 10 steps are eps / 4
long as for its training sets, 100 steps eps / 40 as in its tests. The others start at the clean row and take a path of
1 eps, as is usual in transfer benchmarks, and accumulate gradients with momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from advkit.attacks.gradient.pgd import Start
from advkit.attacks.transfer.engine import Composed
from advkit.core.protocols import MadeForGoal


@dataclass(frozen=True, kw_only=True)
class PubDefAttack(Composed):
    """What PubDef's attacks share: a random start and a path of 2.5 eps (arXiv 2310.17645)."""

    start: Start = "random"
    path: float = 2.5


@dataclass(frozen=True, kw_only=True)
class BIM(Composed):
    """BIM, the basic iterative method (I-FGSM): small steps along the sign of the gradient (arXiv 1607.02533)."""

    parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MI(Composed):
    """MI-FGSM for transfer: steps along gradients accumulated with momentum, to the end (arXiv 1710.06081).

    The same steps as `mifgsm`, which is for victims: that one keeps the best point and drops rows that are broken.
    """

    parts: tuple[str, ...] = ("mi",)


@dataclass(frozen=True, kw_only=True)
class NI(Composed):
    """NI-FGSM: Nesterov momentum, gradients one momentum step ahead (arXiv 1908.06281)."""

    parts: tuple[str, ...] = ("ni",)


@dataclass(frozen=True, kw_only=True)
class EMI(Composed):
    """EMI-FGSM: momentum of gradients averaged along the last gradient (arXiv 2103.10609)."""

    parts: tuple[str, ...] = ("emi",)


@dataclass(frozen=True, kw_only=True)
class VMI(Composed):
    """VMI-FGSM: momentum, gradients tuned by their variance in a neighbourhood (arXiv 2103.15571)."""

    parts: tuple[str, ...] = ("vmi",)


@dataclass(frozen=True, kw_only=True)
class VNI(Composed):
    """VNI-FGSM: Nesterov momentum, gradients tuned by their variance in a neighbourhood (arXiv 2103.15571)."""

    parts: tuple[str, ...] = ("ni", "vmi")


@dataclass(frozen=True, kw_only=True)
class PI(Composed):
    """PI-FGSM, patch-wise: amplified steps whose overflow goes to the neighbouring pixels (arXiv 2007.06765)."""

    parts: tuple[str, ...] = ("pi",)


@dataclass(frozen=True, kw_only=True)
class GI(Composed):
    """GI-FGSM: momentum initialised by longer steps before the run (arXiv 2211.11236)."""

    parts: tuple[str, ...] = ("mi", "gi")


@dataclass(frozen=True, kw_only=True)
class DIM(Composed):
    """DIM (DI-FGSM with momentum): gradients at randomly resized and padded inputs (arXiv 1803.06978)."""

    parts: tuple[str, ...] = ("mi", "di")


@dataclass(frozen=True, kw_only=True)
class TIM(Composed):
    """TIM (TI-FGSM with momentum): gradients smoothed by a Gaussian kernel (arXiv 1904.02884)."""

    parts: tuple[str, ...] = ("mi", "ti")


@dataclass(frozen=True, kw_only=True)
class SIM(Composed):
    """SIM (SI-FGSM with momentum): gradients averaged over copies of the input at several scales (arXiv 1908.06281)."""

    parts: tuple[str, ...] = ("mi", "si")


@dataclass(frozen=True, kw_only=True)
class SSA(Composed):
    """SSA, spectrum simulation attack: momentum, gradients at inputs with random spectra (arXiv 2207.05382)."""

    parts: tuple[str, ...] = ("mi", "ssa")


@dataclass(frozen=True, kw_only=True)
class SIA(Composed):
    """SIA, structure invariant attack: momentum, gradients at inputs with transformed blocks (arXiv 2309.14700)."""

    parts: tuple[str, ...] = ("mi", "sia")


@dataclass(frozen=True, kw_only=True)
class BSR(Composed):
    """BSR, block shuffle and rotation: momentum, gradients at inputs with moved blocks (arXiv 2308.10299)."""

    parts: tuple[str, ...] = ("mi", "bsr")


@dataclass(frozen=True, kw_only=True)
class GRA(Composed):
    """GRA, gradient relevance attack: momentum, gradients weighted by their neighbours' (Zhu et al., ICCV 2023)."""

    parts: tuple[str, ...] = ("gra",)


@dataclass(frozen=True, kw_only=True)
class PGN(Composed):
    """PGN, penalizing gradient norm: momentum of gradients that prefer flat maxima of the loss (arXiv 2306.05225)."""

    parts: tuple[str, ...] = ("pgn",)


@dataclass(frozen=True, kw_only=True)
class MEF(Composed):
    """MEF, maximizing expected flatness: momentum of gradients that prefer flat regions (Qiu et al., TIFS 2024).

    Twice the usual steps.
    """

    parts: tuple[str, ...] = ("mef",)
    steps: int = 20


@dataclass(frozen=True, kw_only=True)
class MIG(Composed):
    """MIG: momentum of integrated gradients (Ma et al., ICCV 2023)."""

    parts: tuple[str, ...] = ("mig",)


@dataclass(frozen=True, kw_only=True)
class FIA(Composed):
    """FIA, feature importance-aware attack: suppresses features that matter under random masks (arXiv 2107.14185)."""

    parts: tuple[str, ...] = ("mi", "fia")


@dataclass(frozen=True, kw_only=True)
class BFA(Composed):
    """BFA, black-box feature attack: suppresses the features that matter on a path across the boundary."""

    parts: tuple[str, ...] = ("mi", "bfa")


@dataclass(frozen=True, kw_only=True)
class ILA(Composed):
    """ILA, intermediate level attack: goes further along what MI-FGSM did to the features (arXiv 1907.10823)."""

    parts: tuple[str, ...] = ("mi", "ila")


@dataclass(frozen=True, kw_only=True)
class ILPD(Composed):
    """ILPD, intermediate-level perturbation decay: features pulled towards the clean ones (arXiv 2304.13410).

    As published, 100 steps of eps / 16.
    """

    parts: tuple[str, ...] = ("mi", "ilpd")
    steps: int = 100
    path: float = 6.25


@dataclass(frozen=True, kw_only=True)
class SGM(Composed):
    """SGM, skip gradient method: momentum of gradients that prefer skip connections (arXiv 2002.05990)."""

    parts: tuple[str, ...] = ("mi", "sgm")


@dataclass(frozen=True, kw_only=True)
class LinBP(Composed):
    """LinBP, linear backpropagation: momentum, gradients pass ReLUs as if they were linear (arXiv 2012.03528)."""

    parts: tuple[str, ...] = ("mi", "linbp")


@dataclass(frozen=True, kw_only=True)
class BPA(Composed):
    """BPA, backward propagation attack: momentum of gradients through SiLU and soft pooling (arXiv 2306.12685)."""

    parts: tuple[str, ...] = ("mi", "bpa")


@dataclass(frozen=True, kw_only=True)
class Ens(Composed):
    """Ens, ensemble attack: momentum on the mean of several surrogates' logits (arXiv 1710.06081)."""

    parts: tuple[str, ...] = ("mi", "ens")


@dataclass(frozen=True, kw_only=True)
class SVRE(Composed):
    """SVRE, variance-reduced ensemble attack: inner steps on one surrogate at a time (arXiv 2111.10752)."""

    parts: tuple[str, ...] = ("svre",)


@dataclass(frozen=True, kw_only=True)
class CWA(Composed):
    """CWA, common weakness attack: towards points where several surrogates are weak alike (arXiv 2303.09105).

    On a path of 2 eps.
    """

    parts: tuple[str, ...] = ("cwa",)
    path: float = 2.0


@dataclass(frozen=True, kw_only=True)
class LGV(Composed):
    """LGV, large geometric vicinity: another weight snapshot of the surrogate at every step (arXiv 2207.13129)."""

    parts: tuple[str, ...] = ("lgv",)


@dataclass(frozen=True, kw_only=True)
class Logit(Composed, MadeForGoal):
    """Logit attack, for targeted transfer: raises the target's logit over 300 steps (arXiv 2012.11207).

    Over random inputs, in steps of eps / 8.
    """

    default_goal: ClassVar[str] = "targeted"
    parts: tuple[str, ...] = ("mi:normalise=false", "logit", "di:mode=enlarge", "ti")
    steps: int = 300
    path: float = 37.5


@dataclass(frozen=True, kw_only=True)
class MPGD(PubDefAttack):
    """MPGD as in PubDef: PGD with momentum from a random start (arXiv 1710.06081)."""

    parts: tuple[str, ...] = ("mi",)


@dataclass(frozen=True, kw_only=True)
class PreGradient(PubDefAttack):
    """Pre-gradient FGSM as in PubDef: momentum, gradients ahead along the last gradient (arXiv 2103.10609)."""

    parts: tuple[str, ...] = ("emi1",)


@dataclass(frozen=True, kw_only=True)
class DI(PubDefAttack):
    """DI-FGSM as in PubDef: five randomly resized and padded copies, without momentum (arXiv 1803.06978).

    Independent copies, transformed with probability 0.7; its release shares one transform and applies it with 0.3.
    """

    parts: tuple[str, ...] = ("di:copies=5",)


@dataclass(frozen=True, kw_only=True)
class TI(PubDefAttack):
    """TI-FGSM as in PubDef: gradients smoothed by a Gaussian kernel, without momentum (arXiv 1904.02884)."""

    parts: tuple[str, ...] = ("ti",)


@dataclass(frozen=True, kw_only=True)
class Admix(PubDefAttack):
    """Admix as in PubDef: images of other classes mixed in, at several scales, without momentum (arXiv 2102.00436).

    Partners are always of another class, where its release confuses two indices.
    """

    parts: tuple[str, ...] = ("admix",)


@dataclass(frozen=True, kw_only=True)
class NAA(PubDefAttack):
    """NAA, neuron attribution attack, as in PubDef: suppresses features that the class rests on (arXiv 2204.00008).

    Descends the attribution, where its release ascends it.
    """

    parts: tuple[str, ...] = ("naa",)


@dataclass(frozen=True, kw_only=True)
class NISITIDIM(PubDefAttack):
    """NI-SI-TI-DIM as in PubDef: Nesterov momentum, scales, smoothing and diverse inputs (arXiv 1908.06281)."""

    parts: tuple[str, ...] = ("ni", "si", "ti", "di")


@dataclass(frozen=True, kw_only=True)
class NIAdmixTIDIM(PubDefAttack):
    """NI-Admix-TI-DIM as in PubDef: Nesterov momentum, Admix, smoothing and diverse inputs (arXiv 2102.00436)."""

    parts: tuple[str, ...] = ("ni", "admix", "ti", "di")
