"""Whatever a recipe file contains, it is a recipe or an error that says what is wrong."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsa_fast.methods import METHODS, method_class
from rsa_fast.recipes import Recipe, ViewSpec, build_recipe, dump_yaml, parse_set

quick = settings(
    deadline=None, max_examples=100, suppress_health_check=list(HealthCheck), derandomize=True
)
KEYS = sorted(
    {name for method in METHODS for name in method_class(method).recipe_type.model_fields}
    | {f"views.{name}" for name in ViewSpec.__dataclass_fields__}
    | {"views.", "views", "views.size_px.x", ""}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(METHODS)
)
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(SCALARS, x, max_size=3),
    max_leaves=6,
)
MARKS = "ab:&*![]{}<>-|,'\"\\#%@ \n0.e"
LINES = st.lists(
    st.text(max_size=12) | st.text(MARKS, max_size=12).map("views: ".__add__), max_size=5
)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


def numbers(value) -> list[float]:
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def a_recipe_or_refused(file: Path, content: str | bytes) -> None:
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    file.write_bytes(content)
    try:
        recipe = build_recipe("cifar10", "rsa", file)
    except ValueError as error:
        assert 0 < len(str(error)) < 2_000 + 10 * len(content)
    else:
        assert isinstance(recipe, Recipe) and all(map(math.isfinite, numbers(recipe.model_dump())))


@quick
@given(st.dictionaries(st.sampled_from(KEYS) | SCALARS, VALUES, max_size=4))
def test_any_fields_are_a_recipe_or_refused(file, fields):
    a_recipe_or_refused(file, yaml.safe_dump(fields))


@quick
@given(st.binary(max_size=60) | LINES.map("\n".join))
def test_any_text_is_a_recipe_or_refused(file, content):
    a_recipe_or_refused(file, content)


@quick
@given(method=st.sampled_from(METHODS), key=st.sampled_from(KEYS), value=SCALARS)
def test_a_whole_recipe_with_one_field_changed_is_a_recipe_or_refused(file, method, key, value):
    fields = yaml.safe_load(dump_yaml(build_recipe("cifar10", method)))
    a_recipe_or_refused(file, yaml.safe_dump(fields | {key: value}))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 6)
)
HOSTILE = {
    "aliases": BOMB + "epochs: *a5\n",
    "itself": "epochs: &a [*a]",
    "deep": "epochs: " + "[" * 500,
    "code": "epochs: !!python/object/apply:os.system ['true']",
    "tagged": "epochs: !!bool maybe",
    "tagged int": "epochs: !!int ''",
    "tagged time": "epochs: !!timestamp never",
    "digits": "epochs: " + "9" * 10_000,
    "number as key": "1: 2",
    "list as method": "method: [rsa]",
    "views twice": "views: 3\nviews.blur_p: 0",
    "no numbers": "views.std: [.nan, .nan, .nan]",
    "infinite": "base_lr: .inf",
    "seed": "seed: 18446744073709551616",
    "lone surrogate": '"\\ud800": "\\ud800"',
    "latin-1": b"dataset: \xe9",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_yaml_allows_and_a_recipe_does_not_is_refused(file, kind):
    a_recipe_or_refused(file, HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(ValueError):
        build_recipe("cifar10", "rsa", file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("item", ["epochs=[", "epochs=!!bool maybe", "epochs=&a [*a]"])
def test_a_value_that_is_no_yaml_is_refused(item):
    with pytest.raises(ValueError):
        build_recipe("cifar10", "rsa", overrides=parse_set((item,)))
