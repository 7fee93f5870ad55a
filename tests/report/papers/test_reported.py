"""The reported figures of papers/tables.yaml against a list that was typed from the papers."""

from pathlib import Path

import pytest
import yaml

TABLES = Path(__file__).parents[3] / "papers" / "tables.yaml"

# T21: error or accuracy in per cent, parameters in millions ("21.80+" as 21.80).
PRINTED = {
    "t21-1": {
        "ResNet-32 (focal)": (13.34, 21.80),
        "ResNet-32 (SGM)": (12.97, 21.80),
        "ResNet-32 (BSGM)": (12.51, 21.80),
        "ResNet-32 (LDAM-DRW)": (11.84, 21.80),
        "smDragon": (12.17, 21.80),
        "VE2 + smDragon": (11.84, 21.80),
        "SSNAS": (18.84, 0.83),
        "ours": (10.91, 0.81),
    },
    "t21-b1": {
        "cross-entropy": (13.21,),
        "cross-entropy + logit adjustment": (13.05,),
        "focal": (11.78,),
        "focal + logit adjustment (ours)": (10.91,),
    },
    # The third figure is the AUC that MedMNIST v2 (Yang et al. 2023) prints.
    "t21-2": {
        "ResNet-18 (28 pixels)": (94.7, 11.68, 0.768),
        "ResNet-18 (224 pixels)": (94.8, 11.68, 0.773),
        "ResNet-50 (28 pixels)": (94.7, 25.56, 0.769),
        "ResNet-50 (224 pixels)": (94.7, 25.56, 0.773),
        "auto-sklearn": (64.7, None, 0.649),
        "AutoKeras": (93.9, None, 0.742),
        "Google AutoML Vision": (94.7, None, 0.778),
        "SSNAS": (94.7, 0.57),
        "ours": (94.8, 0.82),
    },
    "t21-3": {
        "DarkCovidNet (224 pixels)": (98.08, 1.16),
        "SSNAS (224 pixels)": (98.40, 0.57),
        "SSNAS (28 pixels)": (98.08, 0.57),
        "ours (224 pixels)": (98.40, 0.82),
        "ours (28 pixels)": (98.40, 0.82),
    },
    "y24-1": {"DARTS": (78.26,), "FairDARTS": (79.35,), "SSF-NAS": (82.64,)},
    "y24-distributions": {"exponential (μ = 0.1)": (78.26,)},  # Table I, the same system
    "h24-1": {"DARTS": (64,), "DARTS + re-sampling": (61,), "DARTS + BBN": (52,)},
    "h24-2": {
        "DARTS": (64.56,),
        "DARTS + re-sampling": (61.20,),
        "DARTS + BBN": (52.14,),
        "HLS": (65.12,),
        "HLS + reverse sigmoid": (61.85,),
        "HLS + continuous learning": (63.12,),
    },
}


@pytest.mark.parametrize("key", yaml.safe_load(TABLES.read_text(encoding="utf-8")))
def test_reported_figures_are_those_that_the_papers_print(key):
    table = yaml.safe_load(TABLES.read_text(encoding="utf-8"))[key]
    first = table["figures"][0]
    reported = {row["method"]: row["reported"] for row in table["rows"] if row.get("reported")}
    expected = {}
    for method, figures in PRINTED.get(key, {}).items():
        names = (first, "parameters", "macro_auc")
        expected[method] = {
            name: figure for name, figure in zip(names, figures, strict=False) if figure is not None
        }
    assert reported == expected
