"""What judges say of several sampled replies to a prompt, counted from records: hit@k, corrected rates, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advkit.core.errors import UsageError
from advkit.core.protocols import Record
from advkit.evaluation.counts import REFUSED, SAYS, by_label
from advkit.evaluation.stats_agreement import alpha_entry
from advkit.evaluation.stats_replies import Card, corrected_rate, hit_rate, usual_ks

VERDICTS, LANGUAGE = "verdicts_", "language"
"""Under which a record's scores have what a judge says of every sampled reply, and which replies are language."""
HIT = "_hit_at_"
CORRECTED = "_corrected"
ALPHA = "judges_alpha"


def of_replies(metric: str) -> bool:
    """Whether a metric is one of those of `reply_figures`, by its name."""
    return metric == ALPHA or HIT in metric or metric.endswith(CORRECTED)


def reply_figures(records: Sequence[Record], cards: Sequence[Mapping[str, Any]] = ()) -> dict[str, dict[str, Any]]:
    """hit@k, corrected rates and agreement of the judges, by the metric's name, as the report has them.

    `JUDGE_hit_at_K` counts the prompts that are refused when clean, as every rate of a judge does. So do
    `JUDGE_asr_greedy_corrected` and `JUDGE_hit_at_1_corrected`, for the judges whose card says how often they err in
    what is counted. `judges_alpha` is of all prompts, over the sampled replies that are language: of others the judges
    do not decide.

    records: of one attack; several have no figures here, nor have records without verdicts on replies
    cards:   of the judges, as in the report's protocol
    """
    if len(by_label(records)) != 1:
        return {}
    heard = sorted((record for record in records if LANGUAGE in record.scores), key=lambda record: record.id)
    names = [key.removeprefix(VERDICTS) for key in (heard[0].scores if heard else ()) if key.startswith(VERDICTS)]
    refused = [record for record in heard if record.figures.get(REFUSED)]
    known = {str(card.get("name")): found for card in cards if (found := _card(card)) is not None}
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        verdicts = [record.scores.get(f"{VERDICTS}{name}", ()) for record in refused]
        replies = len(heard[0].scores[LANGUAGE])
        if any(len(each) != replies for each in verdicts) or not verdicts:
            continue
        hits = [int(sum(each)) for each in verdicts]
        figures |= {f"{name}{HIT}{k}": hit_rate(hits, replies, k) for k in usual_ks(replies)}
        if name in known:
            greedy = [float(record.figures[f"{name}{SAYS}"]) for record in refused if f"{name}{SAYS}" in record.figures]
            figures[f"{name}{SAYS}{CORRECTED}"] = corrected_rate(greedy, known[name])
            figures[f"{name}{HIT}1{CORRECTED}"] = corrected_rate([each / replies for each in hits], known[name])
    return figures | _agreement(heard, names)


def _card(card: Mapping[str, Any]) -> Card | None:
    """The errors of what a report counts; None in cards of earlier versions."""
    told = card.get("calibration", {})
    keys = ("answers", "others", "counted_false_negatives", "counted_false_positives")
    numbers = [told.get(key) for key in keys]
    try:
        return Card(*numbers) if all(type(number) is int for number in numbers) else None
    except UsageError:  # a report of strangers
        return None


def _agreement(heard: Sequence[Record], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    if len(names) < 2:
        return {}
    clusters = []
    for record in heard:
        rows = [record.scores.get(f"{VERDICTS}{name}", ()) for name in names]
        language = record.scores[LANGUAGE]
        if any(len(row) != len(language) for row in rows):
            return {}
        clusters.append([told for told, spoken in zip(zip(*rows, strict=True), language, strict=True) if spoken])
    return {ALPHA: alpha_entry(clusters)}
