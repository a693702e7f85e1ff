"""Defenses by name. Adding one is one file below this package and one line here."""

from __future__ import annotations

from advkit.core.protocols import Defense
from advkit.core.registry import Registry

DEFENSES: Registry[Defense] = Registry(
    "defense",
    {
        "none": "advkit.defenses.none:NoDefense",
        "pgd_at": "advkit.defenses.adversarial.pgd_at:PGDAT",
        "trades": "advkit.defenses.adversarial.trades:TRADES",
        "mart": "advkit.defenses.adversarial.mart:MART",
        "awp": "advkit.defenses.adversarial.awp:AWP",
        "doubly_robust": "advkit.defenses.adversarial.doubly_robust:DoublyRobust",
        "conadv": "advkit.defenses.adversarial.conadv:ConAdv",
        "fgsm_at": "advkit.defenses.adversarial.single_step:FGSMAT",
        "fgsm_rs": "advkit.defenses.adversarial.single_step:FGSMRS",
        "n_fgsm": "advkit.defenses.adversarial.single_step:NFGSM",
        "grad_align": "advkit.defenses.adversarial.grad_align:GradAlign",
        "free_at": "advkit.defenses.adversarial.free_at:FreeAT",
        "aaer": "advkit.defenses.adversarial.aaer:AAER",
        "pubdef": "advkit.defenses.adversarial.pubdef:PubDef",
        "smoothing": "advkit.defenses.smoothing.gaussian:GaussianSmoothing",
        "denoised_smoothing": "advkit.defenses.smoothing.denoised:DenoisedSmoothing",
        "zo_ae_ds": "advkit.defenses.smoothing.denoised:ZOAEDS",
        "zo_ds": "advkit.defenses.smoothing.denoised:ZODS",
        "fo_ae_ds": "advkit.defenses.smoothing.denoised:FirstOrderAEDS",
        "fo_ds": "advkit.defenses.smoothing.denoised:FirstOrderDS",
        "bit-depth": "advkit.defenses.inputs.bit_depth:BitDepth",
        "blur": "advkit.defenses.inputs.blur:Blur",
        "jpeg": "advkit.defenses.inputs.jpeg:JPEG",
        "tv": "advkit.defenses.inputs.tv:TotalVariation",
        "raw_isp": "advkit.defenses.inputs.raw_isp:RawISP",
        "ppl_filter": "advkit.defenses.inputs.ppl_filter:PPLFilter",
        "random-resize": "advkit.defenses.inputs.random_resize:RandomResize",
        "eigenshield": "advkit.defenses.representations.eigenshield:EigenShield",
    },
    group="advkit.defenses",
    contract=Defense,
    objects=True,
    familiar="advkit.defenses.familiar:FAMILIAR",
)
