import re
import shlex
import shutil
from dataclasses import fields, is_dataclass
from typing import get_args, get_origin, get_type_hints

import pytest
import yaml
from dvc.repo import Repo
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipeline.config.errors import UserError
from pipeline.config.inputs import inputs_of
from pipeline.config.load import COLUMNS, READ_BY_DVC, load_params, to_params
from pipeline.config.schema import Params
from pipeline.config.workspace import Workspace
from pipeline.data.responses import GeneratedRow
from tests.tiny import ROOT

CONF = ROOT / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.parent.name not in ("experiment", "hydra")
)
ONE_POINT = ("~sweep.points", "+sweep.points={plain: {weights: {}}}", "sweep.control=plain")
UNSCORED = ("data=own", "data.path=mine.jsonl")
LABELLED = sorted(path.stem for path in (CONF / "data").glob("*.yaml") if path.stem != "everyday")
COMPARED = "data.sampling.responses_per_prompt=2"
NEEDED = {
    **{("data", name): ("objectives=scored",) for name in LABELLED},
    ("data", "own"): ("data.path=mine.jsonl", "objectives=scored"),
    ("objectives", "scored"): (COMPARED,),
    ("objectives", "sentence_and_scorer"): (COMPARED, "sweep=sentence_and_scorer"),
    ("sweep", "simplex3"): ("objectives=three",),
    ("sweep", "weak_to_strong"): ("objectives=positivity",),
    ("objectives", "human_preference"): ("sweep=human_preference", *UNSCORED),
    ("objectives", "pku"): ("sweep=pku", *UNSCORED),
    ("sweep", "human_preference"): ("objectives=human_preference", *UNSCORED),
    ("tune", "human_preference"): ("objectives=human_preference", "sweep=human_preference", *UNSCORED),
    ("sweep", "pku"): ("objectives=pku", *UNSCORED),
    ("sweep", "dial"): ("objectives=sentence",),
    ("sweep", "sentence_and_scorer"): ("objectives=sentence_and_scorer", COMPARED),
    ("sweep", "dials"): ("objectives=[positivity,conciseness,simplicity]",),
    ("tune", "sentence"): ("objectives=[positivity,conciseness,simplicity]",),
    ("objectives", "positivity"): ONE_POINT,
    ("objectives", "conciseness"): ONE_POINT,
    ("objectives", "simplicity"): ONE_POINT,
    ("objectives", "first_person"): ONE_POINT,
}
WRITTEN = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in WRITTEN.items()}


def default():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config"), resolve=True)


def paths_of(entries):
    return [path for entry in entries for path in ([entry] if isinstance(entry, str) else entry)]


def outs_of(stage):
    return [path for kind in ("outs", "metrics", "plots") for path in paths_of(STAGES[stage].get(kind, []))]


def sections_of(stage):
    return {path.split(".")[0] for path in paths_of(STAGES[stage]["params"]) if not path.startswith("$")}


def test_there_are_experiments_and_options_to_test():
    assert {"smoke", "three_objectives"} <= set(EXPERIMENTS)
    sections = {field.name for field in fields(Params)} - {"seed", "base", "fetch"}
    assert {group for group, _ in OPTIONS} == sections | {"methods"}, "methods are chosen inside a comparison"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes(compose_params, name):
    assert compose_params(f"experiment={name}") != compose_params()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(compose_params, group, option):
    lists = {"models": [], "methods": [f"methods@comparison.methods=[{option}]", "comparison=default"]}
    chosen = lists.get(group, [f"{group}={option}"])  # of models all are composed, to choose from by name
    if group == "methods":
        chosen += [f"comparison.against={option}"]
    params = compose_params(*chosen, *NEEDED.get((group, option), ()))
    text = OmegaConf.load(CONF / group / f"{option}.yaml")
    for key in text.keys() - {"defaults", "points", "name"}:
        section = params.comparison.methods if group == "methods" else getattr(params, group)
        assert key in section if isinstance(section, dict) else hasattr(section, key)


def test_smoke_uses_a_local_tiny_base_and_no_tracking(compose_params):
    params = compose_params("experiment=smoke")
    assert {params.base, params.arm.base, params.data.sampler, *params.fetch} == {"tiny"}
    tiny = params.models["tiny"]
    assert (tiny.source, tiny.location, params.tracking.mode) == ("path", "scratch/tiny", "disabled")


def test_three_objectives_adds_one_and_leaves_the_default_two_alone(compose_params):
    three, two = compose_params("experiment=three_objectives").objectives, compose_params().objectives
    assert {name: three[name] for name in two} == two
    assert three.keys() - two.keys() == {"first_person"}


def test_params_yaml_is_the_composed_default():
    assert OmegaConf.to_container(OmegaConf.load(ROOT / "params.yaml"), resolve=True) == default()


def test_load_params_reads_what_compose_makes(compose_params, tmp_path):
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(default()), encoding="utf-8")
    assert load_params(tmp_path / "params.yaml") == compose_params()


@pytest.mark.parametrize(
    ("override", "closest"),
    [
        ("+trainer.lrr=0.1", "trainer.lr"),
        ("+objectives.positivity.bta=0.1", "objectives.positivity.beta"),
        ("+sweep.points.base.wieghts={positivity: 1.0}", "sweep.points.base.weights"),
        ("+data.sampling.temprature=1.0", "data.sampling.temperature"),
        ("+traner={lr: 0.1}", "trainer"),
        ("+sweep.contrl=base", "sweep.control"),
        ("+judge.max_calls=3", "judge.card_pairs"),  # which judges of another kind have
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_known_one(compose_params, override, closest):
    unknown = override[1:].split("=")[0]
    with pytest.raises(UserError, match=re.escape(f"unknown key {unknown}: did you mean {closest}?")):
        compose_params(override)


def test_an_unknown_key_is_named_before_the_missing_one_it_stands_for(compose_params):
    with pytest.raises(UserError, match=r"unknown key sweep\.contrl: did you mean sweep\.control\?"):
        compose_params("~sweep.control", "+sweep.contrl=base")


@pytest.mark.parametrize("name", ["scorer", "label", "beta"])
def test_an_unknown_key_below_an_objective_called_like_a_field(name):
    config = default()
    config["objectives"][name] = {"label": "x", "scorer": "positivity", "bta": 0.1}
    with pytest.raises(UserError, match=rf"unknown key objectives\.{name}\.bta: did you mean objectives\.{name}\.beta"):
        to_params(OmegaConf.create(config))


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("trainer.lr=fast", "trainer.lr is 'fast'"),
        ("trainer.epochs=1.5", "trainer.epochs is 1.5"),
        ("trainer.epochs=true", "trainer.epochs is True"),
        ("trainer.epochs='2'", "trainer.epochs is '2'"),
        ("trainer.epochs=0", "trainer.epochs is 0"),
        ("trainer.scheduler=cosin", "trainer.scheduler is 'cosin'"),
        ("seed='0'", "seed is '0'"),
        ("seed=null", "seed is None"),
        ("base=1", "base is 1"),
        ("models.own.source=web", "models.own.source is 'web'"),
        ("objectives.positivity.beta=-0.1", "objectives.positivity.beta is -0.1"),
        ("objectives.positivity.beta=0", "objectives.positivity.beta is 0"),
        ("objectives.positivity.beta=nan", "objectives.positivity.beta is nan"),
        ("objectives.positivity.tie=-1.0", "objectives.positivity.tie is -1.0"),
        ("data.label_noise=0.5", "data.label_noise is 0.5"),
        ("data.sampling.responses_per_prompt=0", "data.sampling.responses_per_prompt is 0"),
        ("objectives=scored", "objectives.positivity compares responses to one prompt"),
        ("decoding.temperature=-0.1", "decoding.temperature is -0.1"),
        ("decoding.top_p=0.0", "decoding.top_p is 0.0"),
        ("decoding.min_p=1.0", "decoding.min_p is 1.0"),
        ("+sweep.points.base.sharpen=much", "sweep.points.base.sharpen is 'much'"),
        ("sweep.points.p100_c000.weights.positivity=-1.0", "sweep.points.p100_c000.weights.positivity is negative"),
        ("judge.confidence=1.0", "judge.confidence is 1.0"),
        ("arm.dropout=1.0", "arm.dropout is 1.0"),
        ("tracking.mode=loud", "tracking.mode is 'loud'"),
        ("seed=-1", "seed is -1"),
        ("seed=4294967296", "seed is 4294967296"),
        ("decoding.device=gpu0", "decoding.device is 'gpu0': use auto, cpu"),
        ("decoding.top_k=1000000000000000000000", "decoding.top_k is 1000000000000000000000"),
        ("decoding.max_new_tokens=3000000000", "decoding.max_new_tokens is 3000000000"),
        ("arm.targets=lm_head", "arm.targets is 'lm_head': name linear layers of the blocks"),
        ("arm.targets='q_proj,model.embed_tokens'", "arm.targets is 'q_proj,model.embed_tokens'"),
        ("arm.targets='q_proj, v_proj'", "arm.targets is 'q_proj, v_proj'"),
        ("objectives.positivity.reference=nan", "objectives.positivity.reference is nan"),
    ],
)
def test_a_wrong_type_or_value_is_refused_where_it_stands(compose_params, override, where):
    with pytest.raises(UserError) as refused:
        compose_params(override)
    assert where in str(refused.value)
    assert str(refused.value).endswith(".")


def numbers_of(node, path=""):
    if isinstance(node, dict):
        return [found for key, value in node.items() for found in numbers_of(value, f"{path}.{key}".lstrip("."))]
    return [path] if isinstance(node, float) else []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused_at_every_option_that_takes_one(value):
    """A hypervolume above NaN is 0, and training at NaN is long."""
    config = OmegaConf.create(default())
    for path in numbers_of(default()):
        changed = config.copy()
        OmegaConf.update(changed, path, value)
        with pytest.raises(UserError, match=rf"{re.escape(path)} is -?(nan|inf)"):
            to_params(changed)


@pytest.mark.parametrize(
    "name",
    ["a.b", "..", "", "x;touch F", "$(touch F)", "it's", "a b", "a/b", "-x", "nan", "NA", "None", "050", "ü"],
)
@pytest.mark.parametrize("section", ["models", "objectives", "sweep.points", "tune.rivals", "comparison.methods"])
def test_a_name_that_folders_tables_dvc_or_a_shell_read_otherwise_is_refused(section, name):
    entry = {
        "models": {"source": "path", "location": "x"},
        "objectives": {"label": "x", "scorer": "positivity", "beta": 0.1, "pretrained": None},
        "sweep.points": {"weights": {}},
        "tune.rivals": {"weights": {"positivity": 1.0}},
        "comparison.methods": {"kind": "genarm"},
    }[section]
    config = OmegaConf.create(default())
    OmegaConf.select(config, section)[name] = entry
    with pytest.raises(UserError, match=rf"{section} names {re.escape(repr(name))}: a name starts with a letter"):
        to_params(config)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("contrast_conciseness", "positivity and conciseness have one label column, contrast_conciseness"),
        ("prompt", "a column that rows have anyway"),
        ("chosen", "a column that rows have anyway"),
    ],
)
def test_a_label_column_belongs_to_one_objective_and_is_no_other_column(compose_params, label, sentence):
    with pytest.raises(UserError, match=sentence):
        compose_params(f"objectives.positivity.label={label}")


@pytest.mark.parametrize("name", ["judge", "..", "a/b", "weak_to_strong", "comparison"])
@pytest.mark.parametrize("section", ["weak_to_strong", "comparison"])
def test_no_table_is_written_into_another_stage_s_folder(compose_params, section, name):
    if name == section:
        compose_params(f"{section}.name={name}")
        return
    with pytest.raises(UserError, match=rf"{section}\.name"):
        compose_params(f"{section}.name={name}")


def test_no_objective_is_called_like_a_column_that_its_score_would_overwrite(compose_params):
    assert {one.name for one in fields(GeneratedRow)} - {"scores"} == set(COLUMNS)
    for name in ("kl", "prompt", "base"):
        with pytest.raises(UserError, match=f"an objective cannot be called {name}"):
            compose_params(f"+objectives.{name}={{label: x, scorer: positivity, beta: 0.1, pretrained: null}}")


@pytest.mark.parametrize("path", READ_BY_DVC)
def test_what_dvc_reads_by_itself_must_be_written(path):
    config = OmegaConf.create(default())
    place, _, key = path.replace("*", "positivity").rpartition(".")
    del OmegaConf.select(config, place)[key]
    with pytest.raises(UserError, match=rf"{re.escape(place)}\.{key} is missing"):
        to_params(config)


def test_all_that_dvc_reads_is_known():
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    computed = ("item", "key", "inputs")  # which is checked as a whole
    read = {path for path in re.findall(r"\$\{([^}]+)\}", text) if not path.startswith(computed)}
    for stage in STAGES.values():
        read |= {re.sub(r"\$\{[^}]+\}", "*", path) for path in paths_of(stage["params"])}
    for name, training in default()["inputs"]["train"].items():
        read |= {training[option].replace(name, "*") for option in ("beta", "origin")}
    assert {path for path in read if "." in path and not path.endswith("*")} == set(READ_BY_DVC)


def test_no_name_reaches_a_shell_but_quoted(tmp_path, monkeypatch):
    config = default()
    hostile = "x';touch F;$(touch F)"
    config["objectives"][hostile] = config["objectives"]["positivity"]
    config["models"][hostile] = config["models"]["own"]
    config["fetch"] = [hostile]
    config["tune"] = {"bases": [hostile], "rivals": {hostile: {"weights": {"positivity": 1.0}}}}
    config["data"]["download"] = [{"repository": hostile, "revision": hostile, "folder": hostile}]
    config["inputs"] = inputs_of(config)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    with Repo.init(no_scm=True) as repo:
        commands = [shlex.split(stage.cmd) for stage in repo.index.stages]
    words = {command[3]: command[4:] for command in commands if command[5:] != ["positivity"]}
    assert words["fetch"] == ["--model", hostile]
    assert words["tune"] == ["--base", hostile, "--rival", hostile]
    assert ["--objective", hostile] in [command[4:] for command in commands]
    assert words["download"] == ["--dataset", "dataset0"]
    assert all(word == hostile or "touch" not in word for command in commands for word in command)


def hidden(value, kind, path=""):
    """Paths of the options that a composed section has no key for."""
    if value is None or isinstance(value, list):  # what is listed is written by who lists it
        return
    if get_origin(kind) is dict:
        for name, entry in value.items():
            yield from hidden(entry, get_args(kind)[1], f"{path}.{name}")
        return
    kinds = [one for one in (kind, *get_args(kind)) if is_dataclass(one)]
    if len(kinds) > 1:  # of several kinds the one that it says it is
        kinds = [one for one in kinds if value["kind"] in get_args(get_type_hints(one)["kind"])]
    for name, of in get_type_hints(kinds[0]).items() if kinds else ():
        if name not in value:
            yield f"{path}.{name}"
        elif path + name != ".sweeppoints":  # which people write themselves
            yield from hidden(value[name], of, f"{path}.{name}")


GROUPS = [(group, option) for group, option in OPTIONS if group not in ("models", "methods")]


@pytest.mark.parametrize(("group", "option"), [*GROUPS, ("seed", "0")])
def test_every_option_can_be_set_by_its_name(group, option):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        rloo = (
            ["comparison=default", "methods@comparison.methods=[genarm,rloo]"]
            if (group, option) == ("tune", "rloo")
            else []
        )
        composed = compose("config", overrides=[f"{group}={option}", *NEEDED.get((group, option), ()), *rloo])
    lora = {f".arm.{name}" for name in ("rank", "lora_alpha", "dropout", "targets", "quantisation")}
    paths = set(hidden(OmegaConf.to_container(composed), Params))
    assert paths == (lora if (group, option) == ("arm", "full") else set())


def test_entries_that_groups_show_without_a_value_are_as_good_as_absent(compose_params):
    assert compose_params().data.limits == compose_params().data.columns == {}
    data = compose_params("data.limits.test=3", "data.columns.prompt=question", "data.files.train=a*").data
    assert (data.limits, data.columns, data.files) == ({"test": 3}, {"prompt": "question"}, {"train": "a*"})


def test_a_whole_number_will_do_for_a_float(compose_params):
    assert compose_params("decoding.temperature=2").decoding.temperature == 2.0


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("data=own",), "data.path"),
        (("seed=???",), "seed"),
    ],
)
def test_a_value_left_open_is_asked_for(compose_params, overrides, key):
    with pytest.raises(UserError, match=re.escape(f"{key} has no value: give it one, as in {key}=value.")):
        compose_params(*overrides)


@pytest.mark.parametrize("key", ["seed", "judge", "models.own.source", "sweep.points"])
def test_a_key_left_out_is_named(compose_params, key):
    with pytest.raises(UserError, match=re.escape(f"{key} is missing")):
        compose_params(f"~{key}")


@pytest.mark.parametrize(
    "overrides", [("~sweep.points", "+sweep.points={}"), ("~objectives.positivity", "~objectives.conciseness")]
)
def test_no_points_or_no_objectives_is_refused(compose_params, overrides):
    with pytest.raises(UserError, match=r"(sweep\.points|objectives) is {}"):
        compose_params(*overrides)


def test_weights_of_an_unknown_objective_are_refused(compose_params):
    with pytest.raises(UserError, match=r"sweep\.points\.base\.weights names positivty.*did you mean positivity\?"):
        compose_params("+sweep.points.base.weights.positivty=1.0")


def test_a_control_that_is_no_point_is_refused(compose_params):
    with pytest.raises(UserError, match=r"sweep\.control sharp is no point: name one of base, sharpened"):
        compose_params("sweep.control=sharp")


def test_sampling_needs_a_scorer_for_every_objective(compose_params):
    with pytest.raises(UserError, match=r"objectives\.conciseness has no scorer"):
        compose_params("objectives=scored", COMPARED, "objectives.conciseness.scorer=null")


def test_own_preference_rows_need_no_scorer(compose_params):
    params = compose_params(*UNSCORED, "objectives=scored", "objectives.conciseness.scorer=null")
    assert params.data.sampling is None
    assert params.objectives["conciseness"].scorer is None


def test_drafts_are_refused_inside_vllm(compose_params):
    assert compose_params("decoding.engine=vllm").decoding.num_speculative_tokens is None
    assert compose_params("decoding.num_speculative_tokens=3").decoding.num_speculative_tokens == 3
    with pytest.raises(UserError, match="num_speculative_tokens is 3, and guided requests are not drafted inside vLLM"):
        compose_params("decoding.engine=vllm", "decoding.num_speculative_tokens=3")


@pytest.mark.parametrize("loss", ["arm", "hinge", "simpo", "dpo"])
@pytest.mark.parametrize("arm", ["lora", "full", "qlora"])
@pytest.mark.parametrize("trainer", ["default", "ddp", "fsdp"])
def test_every_loss_arm_and_trainer_composes(compose_params, loss, arm, trainer):
    if (arm, trainer) == ("qlora", "fsdp"):
        with pytest.raises(UserError, match="a quantised base cannot be sharded"):
            compose_params(f"loss={loss}", f"arm={arm}", f"trainer={trainer}")
        return
    params = compose_params(f"loss={loss}", f"arm={arm}", f"trainer={trainer}")
    assert params.loss.kind == loss
    assert (params.arm.tuning, params.arm.quantisation) == (
        "full" if arm == "full" else "lora", "nf4" if arm == "qlora" else None,
    )  # fmt: skip
    assert params.trainer.strategy == ("auto" if trainer == "default" else trainer)


@pytest.mark.parametrize("data", ["full_hh_rlhf", "hh_rlhf", "pku_saferlhf_10k", "ultrafeedback_binarized"])
def test_a_folder_of_ones_own_never_becomes_one_that_dvc_empties_and_fills(compose_params, data):
    published = compose_params(f"data={data}", "objectives=scored").data
    assert [one.folder for one in published.download] == [published.path] == [f"datasets/{data}"]
    with pytest.raises(UserError, match=r"data\.path is my/folder, but .* set data\.download=\[\] to read"):
        compose_params(f"data={data}", "objectives=scored", "data.path=my/folder")
    own = compose_params(f"data={data}", "objectives=scored", "data.path=my/folder", "data.download=[]")
    assert own.data.path == "my/folder"
    assert compose_params(f"data={data}", "objectives=scored", f"data.path=datasets/{data}/part")


def test_options_that_contradict_each_other_are_refused(compose_params):
    with pytest.raises(UserError, match="hinge loss knows no label smoothing"):
        compose_params("loss=hinge", "loss.label_smoothing=0.1")
    with pytest.raises(UserError, match="a quantised base cannot be trained whole"):
        compose_params("arm=full", "+arm.quantisation=nf4")


def test_held_out_fractions_must_leave_something_to_train_on(compose_params):
    with pytest.raises(UserError, match="leave nothing to train on"):
        compose_params("data.validation_fraction=0.5", "data.test_fraction=0.5")


def test_a_missing_params_file_says_how_to_write_it(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml is missing: write it with `make params`"):
        load_params(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", [b"seed: [1", b"seed: \xff\xfe", b"a: b: c", b"seed: 1\nseed: 2\n"])
def test_broken_yaml_is_reported_with_the_file(tmp_path, content):
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"params\.yaml is not readable YAML"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "", "{}"])
def test_yaml_that_is_no_configuration_is_refused(tmp_path, content):
    (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"params\.yaml"):
        load_params(tmp_path / "params.yaml")


def test_an_interpolation_that_leads_nowhere_is_a_user_error(compose_params):
    with pytest.raises(UserError, match="nowhere"):
        compose_params("base=${nowhere}")


def test_params_are_frozen(compose_params):
    with pytest.raises(AttributeError):
        compose_params().seed = 1


def test_dvc_names_the_folders_of_the_workspace():
    space = Workspace()
    facts = str(space.results / "models" / "${key}.json")
    assert outs_of("fetch") == outs_of("distil") == [str(space.model("${key}")), facts]
    assert outs_of("prepare") == [str(space.results / "prepare"), str(space.classifiers)]
    trained = {key: item["folder"] for key, item in default()["inputs"]["train"].items()}
    assert trained == {name: str(space.arm(name)) for name in ("positivity", "conciseness")}
    assert set(outs_of("train")) == {
        "${item.folder}",
        str(space.results / "train" / "${key}" / "curve.csv"),
        str(space.results / "train" / "${key}" / "metrics.json"),
    }
    where = space.results / "tune" / "${item.base}" / "${item.rival}"
    rival = space.rival("${item.base}", "${item.rival}")
    assert set(outs_of("tune")) == {str(rival), str(where / "curve.csv"), str(where / "metrics.json")}
    assert {path.rpartition("/")[0] for path in outs_of("weak_to_strong")} == {
        str(space.results / "${weak_to_strong.name}")
    }
    assert {path.rpartition("/")[0] for path in outs_of("comparison")} == {str(space.results / "${comparison.name}")}
    assert outs_of("generate") == [str(space.results / "generate" / "rows.jsonl")]
    assert outs_of("judge") == [str(space.results / "judge")]
    assert {path.rpartition("/")[0] for path in outs_of("pareto")} == {
        str(space.results / "pareto"),
        str(space.results / "report"),
    }


def test_no_dvc_output_is_scratch():
    outs = [path for stage in STAGES for path in outs_of(stage)]
    assert outs
    assert not [path for path in outs if path.startswith(str(Workspace().scratch))]


def test_every_dvc_dependency_is_a_file_of_the_project_or_an_earlier_output():
    made = set()
    for stage, said in STAGES.items():
        for dep in said["deps"]:
            written = any(dep == out or dep.startswith(f"{out}/") or out.startswith(f"{dep}/") for out in made)
            # Fetch makes all models, and what `inputs` and `data` name the user has.
            named = dep.startswith(("${data.", "${item.", "${inputs.", "models/${"))
            assert written or named or (ROOT / dep).is_file() or (ROOT / dep).is_dir(), f"{stage}: {dep}"
        made |= set(outs_of(stage)) | ({str(Workspace().arms)} if stage == "train" else set())


def test_dvc_stages_list_only_known_sections_and_never_tracking():
    known = {field.name for field in fields(Params)}
    assert set.union(*(sections_of(stage) for stage in STAGES)) == known - {"tracking", "fetch"}, (
        "fetch is what the stage of that name runs over"
    )


def test_dvc_watches_what_lies_outside_the_project(compose_params):
    """A folder that follows from several options is worked out where conf/ is composed, by Hydra and by DVC alike."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        own = ["base=own", "models.own.location=/models/mine", "experiment=smoke_weak_to_strong", "arm.base=tiny-1l"]
        pretrained = "objectives.positivity.pretrained={source: path, location: /arms/warm}"
        judge = ["judge=reward_model", "judge.models.positivity.location=/rewards/warm"]
        inputs = compose("config", overrides=[*own, "fetch=[own,tiny,tiny-1l]", pretrained, *judge]).inputs
        local = compose("config", overrides=["judge=local_llm", "judge.model=smollm2-360m"]).inputs
    assert inputs.fetch.own.source == "/models/mine" and inputs.distil["tiny-1l"].parent == "tiny"
    assert inputs.distil["tiny-1l"].prompts == "pipeline/data/prompts/everyday.jsonl"
    assert inputs.train.positivity.pretrained == "/arms/warm"
    assert inputs.identify == {
        "judge-positivity": {
            "arguments": {"role": "judge", "objective": "positivity"},
            "folder": "/rewards/warm",
            "option": "judge.models.positivity.location",
        }
    }
    assert (local.judge.model, local.judge.options) == ("models/smollm2-360m", "models.smollm2-360m")


def test_a_new_rival_reruns_only_what_asks_it():
    rivals = str(Workspace().rival("base", "name").parents[1])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = compose("config", overrides=["tune=comparison", "comparison=default"]).inputs
        policies = compose("config", overrides=["experiment=weak_to_strong"]).inputs
    for stage in ("generate", "explain", "weak_to_strong"):
        assert plain[stage].rivals == f"pipeline/stages/{stage}.py" and policies[stage].rivals == rivals
    assert (plain.comparison.rivals, plain.comparison.tuned) == (rivals, "results/tune")
    of_others = [dep for stage in STAGES for dep in STAGES[stage]["deps"] if dep.startswith(rivals)]
    assert not of_others, "through `inputs` alone"


def test_inputs_that_belong_to_other_models_are_refused():
    config = default()
    config["models"]["smollm2-135m"] |= {"source": "path", "location": "/models/mine"}  # by hand, in params.yaml
    with pytest.raises(UserError, match=r"inputs does not follow from the other sections: .* `make params`"):
        to_params(OmegaConf.create(config))


JUDGES = sorted(path.stem for path in (CONF / "judge").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_every_judge(compose_params, experiment):
    for judge in JUDGES:
        params = compose_params(f"experiment={experiment}", f"judge={judge}")
        assert getattr(params.judge, "rubrics", params.objectives).keys() >= params.objectives.keys(), judge
