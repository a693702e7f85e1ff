"""Published transfer attacks by name: compositions with their settings.

Two families. PubDef's (arXiv 2310.17645) start anywhere in the ball and walk 2.5 eps: 10 steps are eps / 4 long as for
its training sets, 100 steps eps / 40 as in its tests. The others start at the origin and walk 1 eps, as is usual in
transfer benchmarks, and accumulate gradients with momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from advkit.attacks.gradient.pgd import Start
from advkit.attacks.transfer.engine import Composed


@dataclass(frozen=True, kw_only=True)
class PubDefWalk(Composed):
    """What PubDef's attacks share: a random start and a path of 2.5 eps (arXiv 2310.17645)."""

    start: Start = "random"
    path: float = 2.5


@dataclass(frozen=True, kw_only=True)
class BIM(Composed):
    """Iterate small steps of the sign of the gradient (arXiv 1607.02533)."""

    parts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MI(Composed):
    """Steps along gradients accumulated with momentum, to the end (MI-FGSM, arXiv 1710.06081).

    The same steps as `mifgsm`, which is for victims: that one keeps the best point and leaves rows that fell.
    """

    parts: tuple[str, ...] = ("mi",)


@dataclass(frozen=True, kw_only=True)
class NI(Composed):
    """Momentum that looks ahead along itself (NI-FGSM, arXiv 1908.06281)."""

    parts: tuple[str, ...] = ("ni",)


@dataclass(frozen=True, kw_only=True)
class EMI(Composed):
    """Momentum of gradients averaged along the last one (EMI-FGSM, arXiv 2103.10609)."""

    parts: tuple[str, ...] = ("emi",)


@dataclass(frozen=True, kw_only=True)
class VMI(Composed):
    """Momentum with the variance of the neighbourhood taken in (VMI-FGSM, arXiv 2103.15571)."""

    parts: tuple[str, ...] = ("vmi",)


@dataclass(frozen=True, kw_only=True)
class VNI(Composed):
    """Nesterov look-ahead with the variance of the neighbourhood taken in (VNI-FGSM, arXiv 2103.15571)."""

    parts: tuple[str, ...] = ("ni", "vmi")


@dataclass(frozen=True, kw_only=True)
class PI(Composed):
    """Amplified steps whose overflow goes to the neighbouring pixels (PI-FGSM, arXiv 2007.06765)."""

    parts: tuple[str, ...] = ("pi",)


@dataclass(frozen=True, kw_only=True)
class GI(Composed):
    """Momentum gathered in long steps before the walk (GI-FGSM, arXiv 2211.11236)."""

    parts: tuple[str, ...] = ("mi", "gi")


@dataclass(frozen=True, kw_only=True)
class DIM(Composed):
    """Momentum over randomly shrunk and padded inputs (DI2-FGSM with momentum, arXiv 1803.06978)."""

    parts: tuple[str, ...] = ("mi", "di")


@dataclass(frozen=True, kw_only=True)
class TIM(Composed):
    """Momentum of gradients smoothed by a Gaussian (TI-FGSM with momentum, arXiv 1904.02884)."""

    parts: tuple[str, ...] = ("mi", "ti")


@dataclass(frozen=True, kw_only=True)
class SIM(Composed):
    """Momentum over copies of the input at several scales (SI-FGSM with momentum, arXiv 1908.06281)."""

    parts: tuple[str, ...] = ("mi", "si")


@dataclass(frozen=True, kw_only=True)
class SSA(Composed):
    """Momentum over inputs with random spectra (arXiv 2207.05382)."""

    parts: tuple[str, ...] = ("mi", "ssa")


@dataclass(frozen=True, kw_only=True)
class SIA(Composed):
    """Momentum over inputs whose blocks are transformed at random (arXiv 2309.14700)."""

    parts: tuple[str, ...] = ("mi", "sia")


@dataclass(frozen=True, kw_only=True)
class BSR(Composed):
    """Momentum over inputs with shuffled, rotated blocks (arXiv 2308.10299)."""

    parts: tuple[str, ...] = ("mi", "bsr")


@dataclass(frozen=True, kw_only=True)
class GRA(Composed):
    """Momentum of gradients weighed against their neighbourhood's (Zhu et al., ICCV 2023)."""

    parts: tuple[str, ...] = ("gra",)


@dataclass(frozen=True, kw_only=True)
class PGN(Composed):
    """Momentum of gradients that prefer flat regions (arXiv 2306.05225)."""

    parts: tuple[str, ...] = ("pgn",)


@dataclass(frozen=True, kw_only=True)
class MEF(Composed):
    """Momentum of gradients that prefer flat and high regions; twice the usual steps (MEF: Qiu et al., TIFS 2024)."""

    parts: tuple[str, ...] = ("mef",)
    steps: int = 20


@dataclass(frozen=True, kw_only=True)
class MIG(Composed):
    """Momentum of integrated gradients (Ma et al., ICCV 2023)."""

    parts: tuple[str, ...] = ("mig",)


@dataclass(frozen=True, kw_only=True)
class FIA(Composed):
    """Take away the features that matter whichever pixels are dropped (arXiv 2107.14185)."""

    parts: tuple[str, ...] = ("mi", "fia")


@dataclass(frozen=True, kw_only=True)
class BFA(Composed):
    """Take away the features that matter on a path across the boundary (black-box feature attack)."""

    parts: tuple[str, ...] = ("mi", "bfa")


@dataclass(frozen=True, kw_only=True)
class ILA(Composed):
    """Go further along what momentum did to the features (arXiv 1907.10823)."""

    parts: tuple[str, ...] = ("mi", "ila")


@dataclass(frozen=True, kw_only=True)
class ILPD(Composed):
    """Ask with features drawn back to the origin's; 100 steps of eps / 16 (arXiv 2304.13410)."""

    parts: tuple[str, ...] = ("mi", "ilpd")
    steps: int = 100
    path: float = 6.25


@dataclass(frozen=True, kw_only=True)
class SGM(Composed):
    """Momentum of gradients that prefer skip connections (arXiv 2002.05990)."""

    parts: tuple[str, ...] = ("mi", "sgm")


@dataclass(frozen=True, kw_only=True)
class LinBP(Composed):
    """Momentum of gradients that pass through ReLUs as if they were linear (arXiv 2012.03528)."""

    parts: tuple[str, ...] = ("mi", "linbp")


@dataclass(frozen=True, kw_only=True)
class BPA(Composed):
    """Momentum of gradients through SiLU and soft pooling (arXiv 2306.12685)."""

    parts: tuple[str, ...] = ("mi", "bpa")


@dataclass(frozen=True, kw_only=True)
class Ens(Composed):
    """Momentum on the mean of several sources' logits (arXiv 1710.06081)."""

    parts: tuple[str, ...] = ("mi", "ens")


@dataclass(frozen=True, kw_only=True)
class SVRE(Composed):
    """Inner walks over several sources, their variance taken out (arXiv 2111.10752)."""

    parts: tuple[str, ...] = ("svre",)


@dataclass(frozen=True, kw_only=True)
class CWA(Composed):
    """Towards points where several sources are weak alike; a path of 2 eps (arXiv 2303.09105)."""

    parts: tuple[str, ...] = ("cwa",)
    path: float = 2.0


@dataclass(frozen=True, kw_only=True)
class LGV(Composed):
    """Another snapshot of the source at every step (arXiv 2207.13129)."""

    parts: tuple[str, ...] = ("lgv",)


@dataclass(frozen=True, kw_only=True)
class Logit(Composed):
    """The target's logit over random inputs, 300 steps of eps / 8; made for targeted goals (arXiv 2012.11207)."""

    default_goal: ClassVar[str] = "targeted"
    parts: tuple[str, ...] = ("mi:normalise=false", "logit", "di:mode=enlarge", "ti")
    steps: int = 300
    path: float = 37.5


@dataclass(frozen=True, kw_only=True)
class MPGD(PubDefWalk):
    """PubDef's MPGD: momentum from a random start (arXiv 1710.06081)."""

    parts: tuple[str, ...] = ("mi",)


@dataclass(frozen=True, kw_only=True)
class PreGradient(PubDefWalk):
    """PubDef's pregradient: momentum that looks ahead along the last gradient (arXiv 2103.10609)."""

    parts: tuple[str, ...] = ("emi1",)


@dataclass(frozen=True, kw_only=True)
class DI(PubDefWalk):
    """PubDef's DI: five randomly shrunk and padded copies, without momentum (arXiv 1803.06978).

    Independent copies, transformed with probability 0.7; its release shares one transform and applies it with 0.3.
    """

    parts: tuple[str, ...] = ("di:copies=5",)


@dataclass(frozen=True, kw_only=True)
class TI(PubDefWalk):
    """PubDef's TI: gradients smoothed by a Gaussian, without momentum (arXiv 1904.02884)."""

    parts: tuple[str, ...] = ("ti",)


@dataclass(frozen=True, kw_only=True)
class Admix(PubDefWalk):
    """PubDef's Admix: images of other classes mixed in, at several scales, without momentum (arXiv 2102.00436).

    Partners are always of another class, where its release confuses two indices.
    """

    parts: tuple[str, ...] = ("admix",)


@dataclass(frozen=True, kw_only=True)
class NAA(PubDefWalk):
    """PubDef's NAA: take away the features that the class rests on (arXiv 2204.00008).

    Walks the attribution down, where its release walks it up.
    """

    parts: tuple[str, ...] = ("naa",)


@dataclass(frozen=True, kw_only=True)
class NISITIDIM(PubDefWalk):
    """PubDef's NI-SI-TI-DIM: look-ahead, scales, smoothing and diverse inputs (arXiv 1908.06281)."""

    parts: tuple[str, ...] = ("ni", "si", "ti", "di")


@dataclass(frozen=True, kw_only=True)
class NIAdmixTIDIM(PubDefWalk):
    """PubDef's NI-Admix-TI-DIM: look-ahead, admix, smoothing and diverse inputs (arXiv 2102.00436)."""

    parts: tuple[str, ...] = ("ni", "admix", "ti", "di")
