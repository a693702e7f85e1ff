"""The public contract kit: analytic victims, laws, and one check per kind of part.

`check_attack(attack)`, `check_threat_model(threat)`, `check_defense(defense)`, `check_training(defense)` of a defense
that trains, and `check_scenario(scenario)` raise AssertionError at the first law that is broken, naming it;
ATTACK_LAWS (IMAGE_LAWS, TEXT_LAWS, LABEL_LAWS), THREAT_LAWS (TOKEN_LAWS for slots of tokens), DEFENSE_LAWS and
SCENARIO_LAWS hold the laws one by one.
"""

from __future__ import annotations

from advkit.testing.attack_laws import ATTACK_LAWS, Subject, check_attack, check_law, subjects
from advkit.testing.defense_laws import DEFENSE_LAWS, check_defense, check_training, protect_twice, stripes
from advkit.testing.image_laws import IMAGE_LAWS, check_image_law, on_images
from advkit.testing.label_laws import LABEL_LAWS, check_label_law, on_labels
from advkit.testing.play import BALLS, MINIMA, RADII, Played, accepts, aimed, play, shortened
from advkit.testing.scenario_laws import SCENARIO_LAWS, check_scenario
from advkit.testing.text_laws import TEXT_LAWS, check_text_law, on_text
from advkit.testing.threat_laws import THREAT_LAWS, TOKEN_LAWS, check_threat_law, check_threat_model
from advkit.testing.victims import (
    Leaver,
    Linear,
    Quadratic,
    exhaustive,
    linear,
    nan_off,
    network,
    noisy,
    quantised,
)

__all__ = [
    "ATTACK_LAWS",
    "BALLS",
    "DEFENSE_LAWS",
    "IMAGE_LAWS",
    "LABEL_LAWS",
    "MINIMA",
    "RADII",
    "SCENARIO_LAWS",
    "TEXT_LAWS",
    "THREAT_LAWS",
    "TOKEN_LAWS",
    "Leaver",
    "Linear",
    "Played",
    "Quadratic",
    "Subject",
    "accepts",
    "aimed",
    "check_attack",
    "check_defense",
    "check_image_law",
    "check_label_law",
    "check_law",
    "check_scenario",
    "check_text_law",
    "check_threat_law",
    "check_threat_model",
    "check_training",
    "exhaustive",
    "linear",
    "nan_off",
    "network",
    "noisy",
    "on_images",
    "on_labels",
    "on_text",
    "play",
    "protect_twice",
    "quantised",
    "shortened",
    "stripes",
    "subjects",
]
