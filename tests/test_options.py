"""Every option once: what is made of the fields, and what a wrong one is told."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
import yaml

import dk2pnet
from dk2pnet import InputError, cli
from dk2pnet.decompose import moments
from dk2pnet.options import CRITERIA, REQUIRED, VERBS, CompressOptions, TrainOptions, flag_of, read_recipe, recipe_of
from dk2pnet.plan import Budget

ROOT = Path(__file__).parent.parent
COMMANDS = typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_knows_the_options_and_no_others(verb):
    parameters = {parameter.name: parameter for parameter in COMMANDS[verb].params}
    options = {each.name: each for each in fields(VERBS[verb].options) if each.metadata["kind"]}
    arguments = {each.name: each for each in VERBS[verb].arguments}
    assert parameters.keys() - {"recipe"} == options.keys() | arguments.keys()
    for name, each in options.items():
        assert parameters[name].opts == [flag_of(each)]
        assert parameters[name].help == each.metadata["help"]
        assert parameters[name].default in (each.default, None)
    for name, each in arguments.items():
        assert parameters[name].required == (each.default is REQUIRED)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_said_and_its_default_is_good(verb):
    options = VERBS[verb].options()
    assert options == VERBS[verb].options.of(None, {})
    assert not options.changed()
    flags = [flag_of(each) for each in fields(options)]
    assert len(set(flags)) == len(flags)
    for each in fields(options):
        text = each.metadata["help"]
        assert text.endswith(".")
        assert len(text) < 260, each.name


def test_the_page_of_options_is_made_of_them(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("options", None)
    from options import page

    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tunes": 5}, "no option 'tunes'; did you mean tune"),
        ({"calibration_image": 5}, "did you mean calibration_images"),
        ({"xyzzy": 1}, "no option 'xyzzy'; expected some of augment, batch_size"),
        ({"memory": "much"}, "memory is 'much'; expected more than 0"),
        ({"calibration_images": 2.5}, r"calibration images is 2\.5; expected 2 or more"),
        ({"seed": "one"}, "seed is 'one'; expected a whole number"),
        ({"criterion": "weights"}, "criterion is 'weights'; expected one of weight, response, loss"),
        ({"options": TrainOptions()}, "options is a TrainOptions; expected CompressOptions"),
    ],
)
def test_a_wrong_option_is_told_what_would_be_right(given, words):
    with pytest.raises(InputError, match=words):
        dk2pnet.compress("lenet", None, "macs=0.5", **given)


def test_a_wrong_budget_is_told_the_near_one():
    with pytest.raises(InputError, match=r"budget is 'mac=0\.4'; did you mean macs=0\.4\?"):
        Budget.parse("mac=0.4")
    with pytest.raises(InputError, match="which is a budget; give compress"):
        dk2pnet.compress("lenet", "macs=0.4")


def test_the_criteria_are_those_of_the_moments():
    assert tuple(moments.CRITERIA) == CRITERIA


def test_what_was_given_may_be_anything_and_is_not_compared():
    class Silent:
        def __ne__(self, other):
            raise AssertionError

    options = CompressOptions(test_data=Silent(), example_input=torch.zeros(1, 3, 8, 8), holdout=[torch.zeros(2, 2)])
    assert [each.name for each in options.changed()] == ["holdout", "test_data", "example_input"]


def test_options_may_be_an_object_flat_or_both():
    both = CompressOptions.of(CompressOptions(seed=3, tune=5), {"tune": 7})
    assert (both.seed, both.tune) == (3, 7)
    assert CompressOptions(keep="layer1").keep == ("layer1",)
    assert CompressOptions(hints=["a=b"]) == CompressOptions(hints=("a=b",))


def test_what_a_recipe_says_is_what_is_read(tmp_path):
    options = CompressOptions(keep=["a", "b"], tune="2m", memory=1.5, rebuild=False, holdout=[1, 2], test_data=[3])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of({"model": "lenet", "budget": Budget("macs", 0.3)}, options)))
    found = read_recipe(path, "compress")
    assert (found.pop("model"), found.pop("budget")) == ("lenet", "macs=0.3")
    again = CompressOptions(**found)
    assert again.keep == ("a", "b")
    assert (again.tune, again.memory, again.rebuild) == ("2m", 1.5, False)
    assert again.holdout == [1, 2]
    assert again.test_data is None
    with pytest.raises(InputError, match="has the option 'augment', which evaluate does not know"):
        read_recipe(path, "evaluate")


@pytest.mark.parametrize(("name", "value"), [("epochs", 2), ("pt2", True), ("weights", "x.pth"), ("method", "kd")])
def test_what_does_not_go_with_a_graph_is_named_with_the_reason(name, value):
    with pytest.raises(InputError, match=f"--{name} does not go with an .onnx model, wh.*; leave it away"):
        CompressOptions(**{name: value}).check_for_onnx()
    CompressOptions(tune=3, int8=True, holdout="folder", calibration_data="cifar10").check_for_onnx()
