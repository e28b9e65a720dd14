"""The id layout is checked against hand-written ids; labels against the spellings that real obs columns hold."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbgene.data_utils.labels import Vocabulary, is_missing, label_text, token_text
from perturbgene.errors import InputError

LABEL = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12).filter(
    lambda text: token_text(text) != "[]"
)


@pytest.fixture
def vocabulary() -> Vocabulary:
    return Vocabulary({"sex": ["male", "female"], "cell_type": ["T cell", "B cell", "unknown"], "donor": ["unknown"]})


def test_labels_follow_the_special_tokens_by_sorted_category_in_the_given_label_order(vocabulary: Vocabulary) -> None:
    assert vocabulary.categories == ("cell_type", "donor", "sex")
    ids = [vocabulary.label_id("cell_type", label) for label in ("T cell", "B cell", "unknown")]
    assert ids == [4, 5, 6]
    assert vocabulary.label_id("donor", "unknown") == 7
    assert [vocabulary.label_id("sex", label) for label in ("male", "female")] == [8, 9]
    assert vocabulary.first_bin_id == 10


def test_token_types_number_the_sorted_categories_from_one(vocabulary: Vocabulary) -> None:
    assert [vocabulary.token_type(category) for category in ("cell_type", "donor", "sex")] == [1, 2, 3]


def test_id_ranges_touch_and_do_not_overlap(vocabulary: Vocabulary) -> None:
    assert [vocabulary.id_range(category) for category in vocabulary.categories] == [(4, 7), (7, 8), (8, 10)]


def test_the_same_text_in_two_categories_is_two_ids_that_lead_back_to_their_category(vocabulary: Vocabulary) -> None:
    assert vocabulary.label_of(6) == ("cell_type", "unknown")
    assert vocabulary.label_of(7) == ("donor", "unknown")


@pytest.mark.parametrize("id_", [3, 10, -1])
def test_an_id_outside_the_labels_has_no_label(vocabulary: Vocabulary, id_: int) -> None:
    with pytest.raises(InputError, match=f"input id {id_} is not a phenotype label"):
        vocabulary.label_of(id_)


def test_labels_as_tokens_and_raw_labels_are_the_same_vocabulary() -> None:
    as_tokens = Vocabulary({"cell_type": ["[B_cell]", "[T_cell]"]})
    assert as_tokens.label_id("cell_type", "B cell") == 4
    assert as_tokens.label_id("cell_type", " T cell ") == 5


def test_composed_and_decomposed_unicode_are_one_label() -> None:
    vocabulary = Vocabulary({"donor": ["Zoë"]})
    assert vocabulary.label_id("donor", unicodedata.normalize("NFD", "Zoë")) == 4


def test_a_non_breaking_space_is_a_space() -> None:
    assert token_text("T\u00a0cell") == token_text("T cell") == "[T_cell]"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param(["B", "B"], "'B' and 'B'", id="the same label twice"),
        pytest.param(["T cell", "T_cell"], "'T cell' and 'T_cell'", id="space against underscore"),
        pytest.param(["T cell", "T cell "], "same token", id="trailing blank"),
        pytest.param(["[B]", "B"], "same token", id="token against raw"),
        pytest.param(["é", "e\u0301"], "same token", id="composed against decomposed"),
        pytest.param(["B", "  "], "lists an empty label", id="blank label"),
        pytest.param(["B", "[]"], "lists an empty label", id="brackets around nothing"),
        pytest.param(["B", float("nan")], "lists an empty label", id="NaN label"),
        pytest.param(["a\x00b"], "control character", id="null byte"),
        pytest.param(["a\nb"], "control character", id="newline"),
        pytest.param(["a\ud800"], "control character", id="lone surrogate, which UTF-8 cannot write"),
        pytest.param([], "has no labels", id="no label"),
    ],
)
def test_labels_that_cannot_be_told_apart_or_written_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Vocabulary({"cell_type": labels})


def test_an_unknown_category_names_the_known_ones(vocabulary: Vocabulary) -> None:
    with pytest.raises(
        InputError, match="'tissue' is not in the vocabulary. Choose one of: 'cell_type', 'donor', 'sex'"
    ):
        vocabulary.token_type("tissue")


@settings(max_examples=60, deadline=None)
@given(st.lists(LABEL, min_size=1, max_size=5, unique_by=token_text))
def test_any_label_keeps_its_id_when_a_vocabulary_is_written_and_read(labels: list[str]) -> None:
    vocabulary = Vocabulary({"cell_type": labels})
    again = Vocabulary(json.loads(json.dumps(vocabulary.phenotypes)))
    assert [again.label_id("cell_type", label) for label in labels] == list(range(4, 4 + len(labels)))


@settings(max_examples=60, deadline=None)
@given(LABEL)
def test_the_token_of_a_token_is_itself(label: str) -> None:
    assert token_text(token_text(label)) == token_text(label)


@pytest.mark.parametrize(
    ("column", "labels", "expected"),
    [
        pytest.param(pd.Series(["B", None, "T"], dtype="category"), ["B", "T"], [4, -1, 5], id="categorical with NaN"),
        pytest.param(
            pd.Series(pd.Categorical([2, 1, np.nan, 2])), ["1", "2"], [5, 4, -1, 5], id="categorical integers"
        ),
        pytest.param(pd.Series([1, pd.NA, 3], dtype="Int64"), ["1", "3"], [4, -1, 5], id="nullable integers"),
        pytest.param(
            pd.Series([True, pd.NA, False], dtype="boolean"), ["False", "True"], [5, -1, 4], id="nullable booleans"
        ),
        pytest.param(pd.Series([True, False]), ["False", "True"], [5, 4], id="booleans"),
        pytest.param(
            pd.Series([1.0, np.nan, 2.5]), ["1", "2.5"], [4, -1, 5], id="floats, whole ones without the point"
        ),
        pytest.param(pd.Series(["1", 1, 2.0], dtype=object), ["1", "2"], [4, 4, 5], id="mixed text and numbers"),
        pytest.param(pd.Series([b"B", b"T"], dtype=object), ["B", "T"], [4, 5], id="bytes, as old files keep text"),
    ],
)
def test_a_column_of_any_dtype_becomes_ids(column: pd.Series, labels: list[str], expected: list[int]) -> None:
    ids_n, unknown = Vocabulary({"cell_type": labels}).encode("cell_type", column)
    assert (ids_n.tolist(), unknown) == (expected, {})


@pytest.mark.parametrize("spelling", ["", "nan", "Unknown", "<NA>"])
def test_spellings_of_not_known_are_missing_and_not_unknown(spelling: str) -> None:
    assert is_missing(label_text(spelling))
    ids_n, unknown = Vocabulary({"sex": ["male"]}).encode("sex", [spelling, "male"])
    assert (ids_n.tolist(), unknown) == ([-1, 4], {})


@pytest.mark.parametrize("label", ["none", "NA", "n/a", "None", "null"])
def test_none_and_its_like_are_labels_unless_they_are_named_as_missing(label: str) -> None:
    assert not is_missing(label) and is_missing(label, [label.upper()])
    treatment = Vocabulary({"treatment": ["IFNb", label]})
    assert treatment.encode("treatment", [label, "IFNb"])[0].tolist() == [5, 4]
    ids_n, unknown = treatment.encode("treatment", [label, "IFNb"], missing_labels=[label.lower()])
    assert (ids_n.tolist(), unknown) == ([-1, 4], {})
    assert Vocabulary({"treatment": ["IFNb"]}).encode("treatment", [label])[1] == {label: 1}


def test_unknown_is_a_label_where_the_vocabulary_lists_it(vocabulary: Vocabulary) -> None:
    ids_n, _ = vocabulary.encode("donor", ["unknown"])
    assert ids_n.tolist() == [7]


def test_unknown_labels_are_counted_over_all_their_spellings() -> None:
    _, unknown = Vocabulary({"sex": ["male"]}).encode("sex", ["X", " X", "X ", "Y", "male"])
    assert unknown == {"X": 3, "Y": 1}


def test_a_vocabulary_file_may_hold_raw_labels_tokens_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_text('{"sex": ["[male]"], "age": [1, 2]}', encoding="utf-8")
    assert Vocabulary.from_file(path) == Vocabulary({"age": ["1", "2"], "sex": ["male"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "cannot be read as JSON", id="broken JSON"),
        pytest.param('["B"]', "must map each phenotype to a list", id="a list"),
        pytest.param('{"sex": "male"}', "must map each phenotype to a list", id="a label without a list"),
        pytest.param('{"sex": [["male"]]}', "must map each phenotype to a list", id="a list of lists"),
    ],
)
def test_a_vocabulary_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Vocabulary.from_file(path)


def test_a_missing_vocabulary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.json cannot be read"):
        Vocabulary.from_file(tmp_path / "none.json")
