"""Process groups of a layout: as few as its sets of ranks, and apart where collectives go on at once."""

from tests.one_rank import ranks_of_one


def test_the_same_ranks_have_one_group_for_all_that_goes_on_in_turns():
    meshes, again = ranks_of_one().meshes, ranks_of_one().meshes
    in_turns = [meshes.ranks["fsdp"].get_group(), meshes.root["fsdp"].get_group(), meshes.data, meshes.everyone]
    assert {group.group_name for group in in_turns} == {meshes.tokens.group_name}
    assert again.tokens is meshes.tokens


def test_what_goes_on_beside_the_gathering_of_weights_has_its_own():
    meshes = ranks_of_one().meshes
    apart = [meshes.tokens, meshes.experts["ep"].get_group(), meshes.ranks["tensor"].get_group(), meshes.beside]
    assert len({group.group_name for group in apart}) == 4
