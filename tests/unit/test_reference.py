"""The pages that are made from the code are up to date."""

import pytest

from cluster import reference


@pytest.mark.parametrize("page", ["configuration", "api"])
def test_page_is_what_the_code_says(page: str):
    made = getattr(reference, page)()
    message = f"docs/{page}.md is out of date: run `python -m cluster.reference`"
    assert (reference.DOCS / f"{page}.md").read_text() == made, message


def test_every_argument_of_the_policy_is_explained():
    assert "| `hold_s` | `60.0` | seconds for which" in reference.configuration()
