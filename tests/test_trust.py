"""The tables of docs/trust.md are those of the results kept, which are good."""

import trust

import property_configs
import training_faults


def test_the_tables_of_the_page_are_those_of_the_results():
    page = trust.PAGE.read_text()
    assert all(f"<!-- trust: {name} -->" in page for name in trust.TABLES)
    assert trust.fill(page) == page


def test_every_row_of_the_faults_was_tried_and_held():
    cases = trust.kept("faults")["cases"]
    assert all(cases.values())
    for row in training_faults.ROWS:
        kinds = ("with", "without") if row.without else ("with",)
        for kind in kinds:
            assert any(case.startswith(f"{kind}: {row.fault}: ") for case in cases), row


def test_five_thousand_examples_of_each_family_agreed():
    rows = trust.kept("properties")["rows"]
    assert [row["family"] for row in rows] == list(property_configs.FAMILIES)
    for row in rows:
        assert row["examples"] >= 5000 and row["failures"] == 0
        assert row["configurations"] == len(property_configs.table(row["family"]))


def test_every_version_restored_the_states_of_all_others():
    rows = trust.kept("versions")["rows"]
    assert len({row["jax"] for row in rows}) >= 3
    for row in rows:
        assert row["states restored"] == row["states of others"] == len(rows) - 1
        assert row.get("failed", 0) == 0


def test_the_fast_suite_covers_the_package():
    covered, of = trust.kept("coverage")["all"]
    assert covered / of >= 0.98


def test_what_is_written_of_a_table_follows_its_results(monkeypatch):
    """A page does not keep an older table."""
    monkeypatch.setattr(trust, "TABLES", {"x": ("x", lambda results: str(results))})
    monkeypatch.setattr(trust, "kept", lambda name: {"a": 1})
    text = "<!-- trust: x -->\nolder\n<!-- end -->\nrest"
    assert trust.fill(text) == "<!-- trust: x -->\n{'a': 1}\n<!-- end -->\nrest"
