"""What documents link to is there. Their tables are compared by tests/benchmarks/test_check_readme.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "document",
    [
        *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/countdown/README.md"),
        *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
    ],
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    places = {target: (ROOT / document).parent / target for target in targets if target}
    assert not [target for target, place in places.items() if not place.exists()]
    pictures = [place for target, place in places.items() if target.endswith(".png")]
    assert not [place for place in pictures if not place.read_bytes().startswith(b"\x89PNG")]
