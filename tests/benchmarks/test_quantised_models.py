"""The walk over formats knows every method of transformers' loader, and its results are those of all formats."""

import json
import sys
from pathlib import Path

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

sys.path.insert(0, str(BENCHMARKS))


def test_every_method_of_the_loader_is_tried():
    from quantised_models import METHODS

    assert AUTO_QUANTIZATION_CONFIG_MAPPING.keys() <= METHODS.keys()


def test_results_are_those_of_all_formats():
    from formats import FORMATS

    outcomes = json.loads((BENCHMARKS / "results" / "formats.json").read_text(encoding="utf-8"))["outcomes"]
    assert [outcome["name"] for outcome in outcomes] == list(FORMATS)
    assert {outcome["status"] for outcome in outcomes} <= {"equal", "refused", "no reference"}
