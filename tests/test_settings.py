"""What settings.py promises: a TOML file means exactly what its dataclass says, and a mistake is one line."""

from dataclasses import dataclass, field

import processes
import pytest
from conftest import ROOT

import tasks
from support import settings
from support.settings import UserError

VQGAN, LLAMA = (str(ROOT / "configs" / f"tiny_{kind}.toml") for kind in ("vqgan", "llama"))


def refused(config, *overrides):
    """What the user is told when these settings are read."""
    with pytest.raises(UserError) as error:
        tasks.read_run(config, overrides)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{config}: ")


# ---- what is read --------------------------------------------------------------------------------


def test_the_annotation_of_a_field_decides_the_type():
    """TOML's 0.8, 1 and [1, 1] become what the dataclass names; what the file leaves out, the defaults."""
    s, given = tasks.read_run(VQGAN)
    assert (s.model.channel_mult, s.loss.gan, s.optim.warmup_steps) == ((1, 1), 0.8, 2)
    assert s.data.sources[0].path == "emoji"
    assert s.optim.beta1 == settings.OptimSettings().beta1
    assert "fold" in given and "commitment_cost" not in given


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("optim.lr=1", "optim", "lr", 1.0),  # a whole number will do where a number is asked for
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("train.compile=true", "train", "compile", True),
        ("run.dir=out/my run", "run", "dir", "out/my run"),
        ('run.dir="out/my run"', "run", "dir", "out/my run"),
        ("run.dir=7", "run", "dir", "7"),  # text stays text, whatever it looks like
        ("run.dir=a=b", "run", "dir", "a=b"),
        ("model.channel_mult=[1, 2, 2]", "model", "channel_mult", (1, 2, 2)),
        ('data.rows=["a.jsonl", "b.jsonl"]', "data", "rows", ("a.jsonl", "b.jsonl")),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(override, section, key, value):
    found = getattr(getattr(tasks.read_run(VQGAN, [override])[0], section), key)
    assert found == value and type(found) is type(value)


def test_an_override_can_bring_a_section_or_a_table_in_a_list(tmp_path):
    s, _ = tasks.read_run(VQGAN, ['data.sources=[{path = "a b", kind = "paired"}, {path = "emoji"}]'])
    assert [(source.path, source.kind) for source in s.data.sources] == [("a b", "paired"), ("emoji", "image")]
    file = tmp_path / "short.toml"
    file.write_text('[run]\ndir = "x"\n[model]\nkind = "llama"\n[train]\nsteps = 1\nbatch_size = 1\n[data]\n')
    assert tasks.read_run(file, ["model.rope_scaling.factor=4"])[0].model.rope_scaling.factor == 4.0


def test_written_keys_win_over_those_of_a_named_size():
    s, given = tasks.read_run(LLAMA, ["model.size=lvm_7b"])
    assert s.model.dim == 32 and s.model.norm_eps == 1e-6 and given >= {"size", "dim"}


def test_settings_survive_being_written_and_read(tmp_path):
    """dumps → read → build gives an equal object, with tables in lists and awkward text."""
    text = 'quote " backslash \\ tab \t line \n × é'
    overrides = ['data.sources=[{path = "a", modalities = ["grey", "edges"]}, {path = "b", weight = 1e-7}]']
    s, _ = tasks.read_run(LLAMA, [*overrides, "model.rope_scaling.factor=4", "optim.lr=1e16"])
    s = settings.dataclasses.replace(s, run=settings.RunSettings(text))
    (tmp_path / "again.toml").write_text(settings.dumps(s))
    assert tasks.read_run(tmp_path / "again.toml")[0] == s


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("train.stpes=1", "train.steps"),
        ("model.hiden_channels=64", "model.hidden_channels"),
        ('data.sources=[{path = "emoji", knd = "image"}]', "data.sources[0].kind"),
        ("optim.batch_size=4", "train.batch_size"),  # a good key under the wrong section
        ("optim.steps=4", "train.steps"),
        ("train.lr=1e-3", "optim.lr"),
        ("trian.steps=4", "train"),  # a misspelt section
    ],
)
def test_an_unknown_key_is_told_the_nearest(override, near):
    message = refused(VQGAN, override)
    assert message.startswith("unknown key") and message.endswith(f"did you mean {near}?")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=1.5", "train.steps: expected a whole number, got 1.5"),
        ("train.steps=many", "train.steps: expected a whole number, got 'many'"),
        ("train.steps=true", "train.steps: expected a whole number, got True"),
        ("optim.lr=fast", "optim.lr: expected a number, got 'fast'"),
        ("train.compile=1", "train.compile: expected true or false, got 1"),
        ("model.channel_mult=2", "model.channel_mult: expected a list, got 2"),
        ("model.channel_mult=[1, 2.5]", "model.channel_mult[1]: expected a whole number, got 2.5"),
        ("data.sources=[3]", "data.sources[0]: expected a section, got 3"),
        ("train=3", "'train=3': an override is written section.key=value, as in train.steps=100"),
        ("train.steps", "'train.steps': an override is written section.key=value, as in train.steps=100"),
        ("run.dir.x=1", f"run.dir.x: dir is not a section of {VQGAN}"),
        ("model.kind=vqgam", f'model.kind is "vqgam", must be one of {", ".join(tasks.RUNS)}'),
    ],
)
def test_a_wrong_value_is_named_with_its_key(override, expected):
    assert refused(VQGAN, override) == expected


def test_text_is_not_taken_for_a_list_in_the_file(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text('[run]\ndir = 7\n[model]\nkind = "llama"\n')
    assert refused(file) == "run.dir: expected a text in quotes, got 7"


def test_a_missing_key_or_section_is_named(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text('[model]\nkind = "llama"\n')
    assert refused(file) == "run.dir is missing"
    assert refused(file, "run.dir=x", "train.batch_size=1") == "train.steps is missing"


@pytest.mark.parametrize(
    ("config", "override", "expected"),
    [
        (LLAMA, "model.n_heads=5", "[model] n_heads 5 does not divide dim 32"),
        (VQGAN, "model.hidden_channels=48", "[model] hidden_channels 48 must be a multiple of 32 (GroupNorm)"),
        (VQGAN, "optim.min_lr=1", "[optim] min_lr 1.0 must be at most lr 0.001"),
        (VQGAN, "train.ema=1", "[train] ema 1.0 must lie in [0, 1)"),
        (VQGAN, "train.accumulate=0", "[train] accumulate 0 must be at least 1"),
        (VQGAN, "loss.perceptual=1", "[loss] perceptual > 0 needs the paths of two weight files, vgg and lpips"),
    ],
)
def test_what_no_field_alone_can_say_is_told_with_the_section(config, override, expected):
    assert refused(config, override) == expected


def test_a_missing_file_is_told_the_nearest():
    assert refused(ROOT / "configs" / "tiny_vqgn.toml").endswith(f"did you mean {VQGAN}?")


def test_a_file_that_is_no_toml_says_where(tmp_path):
    (tmp_path / "x.toml").write_text("[run]\ndir = \n")
    assert "line 2" in refused(tmp_path / "x.toml")


def test_a_field_of_the_users_own_dataclass_needs_no_registration():
    """Add a field to a dataclass and it is a key: nothing else knows the keys."""

    @dataclass(frozen=True)
    class Section:
        width: int = 1
        names: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Whole:
        section: Section = field(default_factory=Section)

    assert settings.build(Whole, {"section": {"names": ["a"]}}) == Whole(Section(names=("a",)))
    assert settings.known_keys(Whole) == ["section.width", "section.names"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", VQGAN, "train.stpes=1"], f"error: {VQGAN}: unknown key train.stpes; did you mean train.steps?"),
        (["--config", "absent.toml"], "error: absent.toml: no such file"),
        (["--confg", VQGAN], "error: the following arguments are required: --config"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, expected):
    """As the user sees it: a real process, nothing on stdout, no traceback."""
    done = processes.run("train.py", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1
