"""How predictions are scored: one file a metric, with its score, columns, paired comparison and display.

    wer        error_rates.py   transcripts
    bleu       translation.py   translations
    accuracy   accuracy.py      closed questions
    tempo      tempo.py         beats per minute
    answer     answers.py       free answers
    chain      answers.py       "Transcription: ... Answer: ..."

A new one is a file that `--plugins` names (docs/extending.md).
"""

from evaluation.metrics.accuracy import Accuracy
from evaluation.metrics.answers import Answers, Chain
from evaluation.metrics.base import METRICS, Metric, metric_of, register_metric
from evaluation.metrics.error_rates import ErrorRates
from evaluation.metrics.tempo import Tempo
from evaluation.metrics.translation import Translation

__all__ = [
    "METRICS",
    "Accuracy",
    "Answers",
    "Chain",
    "ErrorRates",
    "Metric",
    "Tempo",
    "Translation",
    "metric_of",
    "register_metric",
]
