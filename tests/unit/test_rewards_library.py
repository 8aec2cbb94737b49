"""The table of docs/rewards.md: where our rules and math-verify alone differ."""

from pathlib import Path

import pytest

from tools.compare_graders import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rewards.md"


@pytest.mark.slow
def test_the_guide_has_the_table_that_the_cases_give():
    shown = PAGE.read_text().split("<!-- table of tools/compare_graders.py -->\n")[1]
    assert shown.split("<!-- end of table -->")[0] == main()
