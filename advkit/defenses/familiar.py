"""What users of other packages write for a defense, and what it is called here."""

from __future__ import annotations

from typing import Final

from torch import nn

from advkit.core.errors import UsageError
from advkit.core.registry.contract import lacking_in
from advkit.core.registry.familiar import Familiar, Setting, settings

_NONE_YET: Final = "is not in advkit; one of your own is python:MODULE:NAME (CONTRIBUTING.md has its members)"
_TRAINS: Final = "adversarial training with PGD is pgd_at here"

NAMES: Final[dict[str, str]] = {
    **dict.fromkeys(("at", "madry", "adversarialtraining", "adversarialtrainingpgd", "advtrain"), _TRAINS),
    **dict.fromkeys(("standard", "natural", "nat", "undefended", "clean"), "an undefended model is none here"),
    **dict.fromkeys(
        ("featuresqueezing", "bitdepthreduction", "quantization", "quantize", "squeezing"), "did you mean 'bit-depth'?"
    ),
    **dict.fromkeys(("randomresizing", "randomresizingpadding", "randomization"), "did you mean 'random-resize'?"),
    **dict.fromkeys(("perplexity", "perplexityfilter", "ppl"), "did you mean 'ppl_filter'?"),
    **dict.fromkeys(("randomizedsmoothing", "cohen", "gaussiansmoothing"), "did you mean 'smoothing'?"),
    **dict.fromkeys(("ds", "denoisedsmoothing", "denoiser"), "did you mean 'denoised_smoothing'?"),
    **dict.fromkeys(("zoaeds", "zo", "blackboxdefense"), "did you mean 'zo_ae_ds' or 'zo_ds'?"),
    **dict.fromkeys(
        ("labelsanitization", "labelsanitisation", "sanitization", "knnrelabelling"), "did you mean 'ls_svm'?"
    ),
    **dict.fromkeys(("confidentlearning", "cleanlearning"), "did you mean 'cleanlab'?"),
    **dict.fromkeys(("jpegcompression", "jpg", "compression"), "did you mean 'jpeg'?"),
    **dict.fromkeys(("totalvariation", "tvm", "totvarmin", "totalvarmin", "tvdenoising"), "did you mean 'tv'?"),
    **dict.fromkeys(("gaussianblur", "boxblur", "spatialsmoothing", "averageblur"), "did you mean 'blur'?"),
    **dict.fromkeys(("raw", "rawisp", "allyouneedisraw", "isp"), "did you mean 'raw_isp'?"),
    **dict.fromkeys(("fastat", "fast"), "did you mean 'fgsm_rs' or 'free_at'?"),
    "distillation": f"defensive distillation {_NONE_YET}",
}

SETTINGS: Final = settings(
    ("epsilon epsilons radius", Setting(here=("eps",))),
    ("lambda_ lam lmbda trades_beta", Setting(here=("beta",))),
    (
        "epochs lr learning_rate batch_size",
        Setting(here=("recipe",), words="It is a group, such as recipe=[epochs=10]"),
    ),
    ("depth bit_depth nbits", Setting(here=("bits",))),
    ("scale noise_sd std noise_sigma", Setting(here=("sigma",))),
)

_LINES: Final = {
    "needs_data": "needs_data = False (True where protect takes training data)",
    "claims": 'claims = "" (or the spec of the threat model it is made against)',
}


def _other(part: object) -> None:
    """Say what an object lacks to be a defense."""
    from advkit.core.protocols import Defense

    if part is None:
        raise UsageError("the defense is None; no defense is the spec none")
    if isinstance(part, (list, tuple)):
        raise UsageError(f"{len(part)} defenses at once; an evaluation has one: call evaluate for each of them")
    if isinstance(part, nn.Module):
        raise UsageError(
            f"the defense is a {type(part).__name__}, a torch module; a model that was trained to be robust, or a "
            "network with a defense around it, is the model: model=..., defense='none'"
        )
    missing = lacking_in(part, Defense)
    name = type(part).__name__
    if "protect" not in missing:
        lines = "; ".join(_LINES[each] for each in missing)
        raise UsageError(f"the defense {name} lacks {' and '.join(missing)}: add to its class {lines}")
    if callable(part):
        raise UsageError(
            f"the defense is a {name}; expected an object with protect(model, data, rng) that returns the protected "
            f"model, and with {' and '.join(_LINES.values())}. A transformation of the inputs is a subclass of "
            "advkit.defenses.inputs.base.InputDefense"
        )


FAMILIAR: Final = Familiar(names=NAMES, settings=SETTINGS, other=_other)
