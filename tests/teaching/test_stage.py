from dataclasses import replace
from types import SimpleNamespace

from csm_nb.cards import write_card
from csm_nb.recipe import Recipe
from csm_nb.teaching import stage


def test_what_an_adapter_keeps_of_its_own_is_said_where_the_recipe_says_otherwise(tmp_path):
    own = SimpleNamespace(r=32, lora_alpha=64, lora_dropout=0.05)
    model, recipe = SimpleNamespace(peft_config={"a": own}, active_adapter="a"), Recipe(rank=32, alpha=64)
    assert stage._say_kept(model, recipe, tmp_path) == "" == stage._say_kept(model, replace(recipe, rank=8), None)
    assert stage._say_kept(model, replace(recipe, rank=8), tmp_path).startswith(", which keeps its rank 32, not 8: the recipe's")


def test_what_goes_on_from_data_that_is_not_for_commercial_use_is_marked_as_well(tmp_path):
    assert stage.describe_before(None) == {} and stage.describe_before(tmp_path) == {"goes on from": tmp_path}
    write_card(tmp_path, tmp_path, {"licence": "of the data: CC BY-NC 4.0", "commercial use": "none"}, "", True, "0", ("a", "b"))
    assert stage.describe_before(tmp_path) == {"goes on from": tmp_path, "commercial use": "none"}
