"""Attacks composed of parts, for models that are never asked. A part is one class below and one line here.

Parts of the user's own are objects, or `python:MODULE:NAME`: subclasses of the roles in `engine`.
"""

from __future__ import annotations

from typing import Any

from advkit.core.registry import Registry

PARTS: Registry[Any] = Registry(
    "transfer part",
    {
        "mi": "advkit.attacks.transfer.gradients:MI",
        "ni": "advkit.attacks.transfer.gradients:NI",
        "emi1": "advkit.attacks.transfer.gradients:EMI1",
        "emi": "advkit.attacks.transfer.gradients:EMI",
        "vmi": "advkit.attacks.transfer.gradients:VMI",
        "gra": "advkit.attacks.transfer.gradients:GRA",
        "pgn": "advkit.attacks.transfer.gradients:PGN",
        "mef": "advkit.attacks.transfer.gradients:MEF",
        "mig": "advkit.attacks.transfer.gradients:MIG",
        "gi": "advkit.attacks.transfer.gradients:GI",
        "pi": "advkit.attacks.transfer.gradients:PI",
        "ti": "advkit.attacks.transfer.gradients:TI",
        "logit": "advkit.attacks.transfer.gradients:Logit",
        "di": "advkit.attacks.transfer.transforms:DI",
        "si": "advkit.attacks.transfer.transforms:SI",
        "admix": "advkit.attacks.transfer.transforms:Admix",
        "ssa": "advkit.attacks.transfer.transforms:SSA",
        "sia": "advkit.attacks.transfer.transforms:SIA",
        "bsr": "advkit.attacks.transfer.transforms:BSR",
        "naa": "advkit.attacks.transfer.features:NAA",
        "fia": "advkit.attacks.transfer.features:FIA",
        "bfa": "advkit.attacks.transfer.features:BFA",
        "ila": "advkit.attacks.transfer.features:ILA",
        "ilpd": "advkit.attacks.transfer.features:ILPD",
        "sgm": "advkit.attacks.transfer.backward:SGM",
        "linbp": "advkit.attacks.transfer.backward:LinBP",
        "bpa": "advkit.attacks.transfer.backward:BPA",
        "ens": "advkit.attacks.transfer.ensembles:Ens",
        "svre": "advkit.attacks.transfer.ensembles:SVRE",
        "cwa": "advkit.attacks.transfer.ensembles:CWA",
        "lgv": "advkit.attacks.transfer.ensembles:LGV",
    },
    contract="advkit.attacks.transfer.engine:Part",
    objects=True,
)

# The attacks of PubDef (arXiv 2310.17645) by its names, with the settings of its training sets.
PUBDEF: dict[str, str] = {
    "pgd": "pgd:steps=10,step_size=0.25,keep=last,stop=false",
    "mpgd": "mpgd",
    "pregradient": "pregradient",
    "di": "di",
    "ti": "ti",
    "admix": "admix",
    "naa": "naa",
    "ni-si-ti-dim": "ni-si-ti-dim",
    "ni-admix-ti-dim": "ni-admix-ti-dim",
    "auto-pgd-ce": "apgd-ce:stop=false",
    "auto-pgd-dlr": "apgd-dlr:stop=false",
}
