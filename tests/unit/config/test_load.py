"""From recipes to a RunConfig: bases, overrides, where a value came from, and what is said about mistakes."""

from pathlib import Path

import pytest

from palestra.config import RunConfig, load, read_resolved
from palestra.config.load import flatten, load_tree
from palestra.config.schema import Lora
from palestra.core.errors import UserError

BASE = """
[log]
name = "base"
[model]
path = "org/name"
[train]
steps = 10
lr = 1e-5
[engine.args]
seed = 1
[[env.mix]]
id = "a"
weight = 2.0
[[env.mix]]
id = "b"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    path = tmp_path / "recipe.toml"
    path.write_text('base = "base.toml"\n[log]\nname = "mine"\n[train]\nsteps = 20\n[engine.args]\nx = 2\n')
    return path


def test_a_recipe_goes_over_its_base_and_overrides_over_both(recipe: Path):
    loaded = load(recipe, ["train.steps=30", "train.schedule=cosine"])
    config = loaded.config
    assert (config.log.name, config.train.steps, config.train.lr) == ("mine", 30, 1e-5)
    assert config.train.schedule == "cosine"  # a bare word is a string
    assert config.engine.args == {"seed": 1, "x": 2}
    assert loaded.source("train.steps") == "override train.steps=30"
    assert loaded.source("log.name") == str(recipe)
    assert loaded.source("train.lr") == str(recipe.parent / "base.toml")
    assert loaded.source("train.weight_decay") == "default"
    assert loaded.source("engine.args.x") == str(recipe)


def test_an_entry_of_a_list_can_be_overridden(recipe: Path):
    config = load(recipe, ["env.mix.0.weight=5", "env.mix.1.args.length=7"]).config
    assert [source.weight for source in config.env.mix] == [5.0, 1.0]
    assert config.env.mix[1].args == {"length": 7}


def test_a_list_replaces_a_list(recipe: Path):
    recipe.write_text(recipe.read_text() + '[[env.mix]]\nid = "c"\n')
    assert [source.id for source in load(recipe).config.env.mix] == ["c"]


def test_override_values_are_toml(recipe: Path):
    config = load(recipe, ["train.betas=[0.8, 0.9]", 'engine.args={flag = true, words = ["x"]}']).config
    assert config.train.betas == (0.8, 0.9)
    assert config.engine.args == {"flag": True, "words": ["x"]}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=3", "train.stpes=3 (from override train.stpes=3): no such key; did you mean 'steps'?"),
        ("env.mix.0.wieght=3", "did you mean 'weight'?"),
        ("model.build.zzz=3", "no such key"),
        ("zzz=3", "zzz=3 (from override zzz=3): no such key; known keys: algo, data"),
        ("train.steps=many", "train.steps='many' (from override train.steps=many): input should be a valid integer"),
        ("train.steps=0", "train.steps=0 (from override train.steps=0): input should be greater than 0"),
        ("train.lr=inf", "finite number"),
        ("algo.loss=mse", "algo.loss='mse'"),
        ("log.name=a/b", "log.name='a/b'"),
        ("train.steps", "override 'train.steps' is not section.field=value, e.g. train.steps=20"),
        ("=3", "is not section.field=value"),
        ("env.mix.7.weight=3", "'7' is not an index of a list of 2"),
        ("train.steps.x=3", "override of train.steps.x: steps is the value 20, not a table"),
        ("sampling.top_p=0.9", "train with top_p=1 and top_k=0"),
        ("sampling.max_tokens=5000", "raise engine.max_model_len or lower max_tokens"),
        ("train.max_pack_tokens=100", "raise train.max_pack_tokens"),
        ("algo.group_size=1", "use at least 2"),
        ("train.seed=-1", "train.seed"),
        ("train.schedule=wsd", "train.schedule=wsd needs train.lr_decay_steps >= 1"),
        ("data.warmup.schedule=wsd", "data.warmup.schedule"),  # it has no length of a decay
        ("sync.probe_tokens=1", "sync.probe_tokens"),
        ("sync.full_every=1", "sync.full_every"),
        ("sync={kind='nccl_m2n', local='/tmp/x'}", "sync.kind=nccl_m2n writes no files"),
        ("sync={kind='nccl', local='/tmp/x'}", "sync.kind=nccl writes no files"),
        ("sync={kind='ipc', difference=true}", "leave sync.difference and sync.local out"),
        ("model.lora.dropout=0.1", "two different policies; set it to 0"),
        ("model.lora.rank=513", "model.lora.rank"),
        ("model.lora.targets=[]", "model.lora.targets is empty"),
        ("env.mix.1.id=a", "env.mix has 2 entries called 'a'"),
        ("data.warmup.steps=5", "needs data.sources"),
        ("model.build={architecture='X', alphabet='a'}", "exactly one of model.path"),
    ],
)
def test_a_mistake_is_named_with_field_value_and_fix(recipe: Path, override: str, words: str):
    with pytest.raises(UserError) as raised:
        load(recipe, [override])
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.shard=2", "not for train ranks=2; use sync.kind=files"),
        ("engine={replicas=2, tensor_parallel=4}", "not for engine.replicas=2, engine.tensor_parallel=4"),
        ("engine.device=cpu", "not for engine.device=cpu"),
    ],
)
def test_weights_stay_on_a_gpu_only_where_there_is_one(recipe: Path, override: str, words: str):
    assert load(recipe, ["sync.kind=ipc"]).config.sync.kind == "ipc"
    with pytest.raises(UserError) as raised:
        load(recipe, ["sync.kind=ipc", override])
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.shard=2"], "set train.shard x train.replicate x train.context_parallel to 1"),
        (["engine.replicas=2", "sync.every=2", "algo.max_age=4"], "set engine.replicas, sync.every to 1"),
        (["engine.tensor_parallel=2"], "set engine.tensor_parallel to 1"),
        (["algo.reference={path='org/other', weight=0.1}"], "no turn for the engine of algo.reference"),
    ],
)
def test_turns_are_for_one_of_each(recipe: Path, overrides: list[str], said: str):
    assert load(recipe, overrides)
    with pytest.raises(UserError, match=said):
        load(recipe, [*overrides, "launch.turns=true"])
    assert load(recipe, ["launch.turns=true"]).config.takes_turns
    assert load(recipe, ["launch.turns=true", "sync.kind=ipc"]).config.takes_turns
    supervised = load(recipe, ["launch.turns=true", "env.mix=[]", "data.sources=[{path='rows.jsonl'}]"]).config
    assert not supervised.takes_turns, "there is no engine to take turns with"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.device=cpu"], "needs engines on GPUs: .* set engine.device=cuda, or train.router_replay=false"),
        (["train.compile=true"], "not there for train.compile=true; set one of them back"),
        (["env.mix=[]", "data.sources=[{path='rows.jsonl'}]"], "without env.mix there are none"),
    ],
)
def test_routers_are_replayed_where_engines_say_what_they_chose(recipe: Path, overrides: list[str], said: str):
    assert load(recipe, overrides)
    assert load(recipe, ["train.router_replay=true"]).config.replays_routers
    with pytest.raises(UserError, match=said):
        load(recipe, [*overrides, "train.router_replay=true"])


@pytest.mark.parametrize("kind", ["nccl", "nccl_m2n", "sparse_nccl"])
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.device=cpu", "sends between GPUs, not to engine.device=cpu; use files"),
        ("log.keep_weights=true", "needs staged versions, sync.kind={kind} has none"),
        ("launch.turns=true", "trainer and engine would be at work at once; use ipc, or files"),
        ("model.lora.rank=8", r"model\.lora publishes adapters"),
        ("sync.difference=true", r"sync\.kind={kind} writes no files: leave sync.difference and sync.local out"),
    ],
)
def test_versions_are_sent_between_gpus_only(recipe: Path, kind: str, override: str, said: str):
    assert load(recipe, [f"sync.kind={kind}", "train.shard=2"]).config.sync.is_sent
    with pytest.raises(UserError, match=said.format(kind=kind)):
        load(recipe, [f"sync.kind={kind}", override])


def test_shards_are_sent_to_one_engine(recipe: Path):
    sent = ["sync.kind=nccl_m2n", "engine.tensor_parallel=4", "train.expert_parallel=2", "train.shard=32"]
    assert load(recipe, sent).config.sync.is_sent
    with pytest.raises(UserError, match=r"workers of one engine, but engine\.replicas=2: .*; use nccl, or one engine"):
        load(recipe, [*sent, "engine.replicas=2"])
    assert load(recipe, ["sync.kind=nccl", "engine.replicas=2"]).config.sync.is_sent


def test_changes_are_not_sent_into_weights_that_engines_quantize(recipe: Path):
    quantized = "engine.args={quantization='fp8'}"
    assert load(recipe, ["sync.kind=nccl", quantized]).config.engine.is_quantized
    with pytest.raises(UserError, match=r"not into those that engine\.args\.quantization makes of them; use nccl"):
        load(recipe, ["sync.kind=sparse_nccl", quantized])


@pytest.mark.parametrize("override", ["sync.kind=ipc", "sync.difference=true", "sync.local=/tmp/x"])
def test_adapters_go_by_files(recipe: Path, override: str):
    assert load(recipe, ["model.lora.rank=8"]).config.model.lora == Lora(rank=8)
    with pytest.raises(UserError, match=r"model\.lora publishes adapters"):
        load(recipe, ["model.lora.rank=8", override])


def test_biases_of_routers_are_no_part_of_an_adapter(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"train.balance.bias_rate=0.1 changes what is no part of an adapter"):
        load(recipe, ["model.lora.rank=8", "train.balance.bias_rate=0.1"])


def test_a_schedule_with_a_decay_at_the_end_has_one(recipe: Path):
    assert load(recipe, ["train.schedule=wsd", "train.lr_decay_steps=1"]).config.train.lr_decay_steps == 1


def test_every_mistake_is_named_at_once(recipe: Path):
    with pytest.raises(UserError, match="the config has 2 errors") as raised:
        load(recipe, ["train.steps=0", "trian.lr=1"])
    assert "train.steps=0" in str(raised.value)
    assert "trian" in str(raised.value)


def test_a_mistake_in_the_base_names_the_base(recipe: Path):
    base = recipe.parent / "base.toml"
    base.write_text(BASE.replace("lr = 1e-5", "lr = -1"))
    with pytest.raises(UserError, match=f"train.lr=-1 .from {base}."):
        load(recipe)


def test_a_missing_section_says_how_to_give_it(tmp_path: Path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    with pytest.raises(UserError, match=r"log: missing; add it to the recipe or give log=VALUE"):
        load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[log\n", "is not valid TOML"), ('base = "recipe.toml"', "is its own base"), ('base = "no.toml"', "no.toml")],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, words: str):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load(path)


def test_the_resolved_config_reads_back_equal(recipe: Path, tmp_path: Path):
    config = load(recipe).config
    stored = tmp_path / "config.json"
    stored.write_text(config.model_dump_json())
    assert read_resolved(stored) == config


def test_a_resolved_config_that_is_gone_or_of_another_version(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        read_resolved(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"log": {"name": "x", "colour": "red"}}')
    with pytest.raises(UserError, match="not a config of this version"):
        read_resolved(tmp_path / "config.json")


def test_a_tree_without_a_file():
    assert load_tree({"log": {"name": "x"}, "model": {"path": "y"}}, ["train.steps=3"]).config.train.steps == 3


def test_flatten_names_every_leaf_once(recipe: Path):
    keys = [key for key, _ in flatten(load(recipe).config)]
    assert len(keys) == len(set(keys))
    assert {"log.name", "env.mix.0.weight", "env.mix.1.id", "data.warmup.steps", "model.build"} <= set(keys)


def test_a_config_cannot_be_changed():
    config = RunConfig.model_validate({"log": {"name": "x"}, "model": {"path": "y"}})
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]
