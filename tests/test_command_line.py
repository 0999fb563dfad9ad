"""Laws of the command line: every field is a flag, the line overrides the preset, a mistake is one line and code 2."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_blora import __main__ as command_line
from pyro_blora.__main__ import main
from pyro_blora.config import RunConfig, field_names, run_fields, take_settings
from pyro_blora.config.flags import GROUPS
from pyro_blora.signals import Interrupted

ROOT = Path(__file__).resolve().parents[1]


def fields(*argv):
    """The configuration of a `train` line, without running it."""
    settings, rest = take_settings(["train", *argv])
    return RunConfig(**run_fields(command_line._parser().parse_args(rest), settings))


def refused(capsys, *argv):
    """The one line on stderr of a command that a user's mistake ends."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("pyro-blora: error: ")
    return err.removeprefix("pyro-blora: error: ").rstrip("\n")


def process(*argv, module=("-m", "pyro_blora"), **environment):
    return subprocess.run(
        [sys.executable, *module, *argv],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_flags_the_defaults_hold():
    assert fields() == RunConfig()


@pytest.mark.parametrize("name", [name for name in field_names() if not name.endswith("_settings")])
def test_every_field_is_a_flag_with_its_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    assert f"--{name} " in capsys.readouterr().out
    value = getattr(RunConfig(), name)
    assert getattr(fields(f"--{name}", str(value)), name) == value


def test_every_field_is_in_one_group_of_flags():
    grouped = [name for _, units in GROUPS.values() for name in units]
    assert sorted(grouped) == sorted(name for name in field_names() if not name.endswith("_settings"))


def test_help_shows_groups_units_and_choices(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"\n{title}:\n") for title in GROUPS]
    assert places == sorted(places)
    for flag in (
        "--lr RATE", "--max_length TOKENS", "--scope {adapted,encoder,encoder+head}", "--choose_epoch [{true,false}]",
        "--output_dir FOLDER", "--prior bops --prior.rate 3",
    ):  # fmt: skip
        assert flag in shown
    assert "VALUE  " not in shown  # every flag says of what


def test_a_flag_takes_the_type_of_its_field():
    config = fields(
        "--lr", "5e-4", "--rank=4", "--max_train", "none", "--target_modules", "query,value", "--tracker", "None"
    )
    assert (config.lr, config.rank, config.max_train, config.tracker) == (5e-4, 4, None, None)
    assert fields("--target_modules", "query,value").target_modules == ("query", "value")
    assert fields("--gradient_checkpointing").gradient_checkpointing is True
    assert fields("--gradient_checkpointing", "false").gradient_checkpointing is False


def test_settings_of_prior_and_guide_are_flags_with_a_dot():
    config = fields("--prior.rate", "3", "--prior.low=-1.5", "--prior.tiny", "1e-3", "--guide.a", "b=c", "--guide.x=")
    assert config.prior_settings == {"rate": 3, "low": -1.5, "tiny": 1e-3}
    assert config.guide_settings == {"a": "b=c", "x": None}
    assert fields("--prior.low", "-2").prior_settings == {"low": -2}


def test_a_site_takes_a_prior_of_its_own(tmp_path):
    config = fields("--prior", "bops", "--prior.g", "depth", "--prior.z=nested", "--prior.z.rate", "3")
    assert config.prior_settings == {"g": "depth", "z": "nested", "z.rate": 3}
    preset = tmp_path / "mine.yaml"
    assert fields("--prior.g", "off", "--prior.z=off").prior_settings == {"g": "off", "z": "off"}
    preset.write_text("prior.z: off\n", encoding="utf-8")
    assert fields("--preset", str(preset)).prior_settings == {"z": "off"}
    preset.write_text("prior.g: eva\nprior.g.share: 0.25\n", encoding="utf-8")
    assert fields("--preset", str(preset)).prior_settings == {"g": "eva", "g.share": 0.25}


def test_a_preset_is_overridden_by_the_line():
    assert fields("--preset", "rte").epochs == 50
    assert fields("--preset", "rte", "--epochs", "1", "--max_train=8").epochs == 1


def test_settings_on_the_line_join_those_of_the_preset(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("prior: nested\nprior.rate: 3\nprior.other: 1\nguide.x: 2\n", encoding="utf-8")
    config = fields("--preset", str(preset), "--prior.rate", "4")
    assert config.prior_settings == {"rate": 4, "other": 1} and config.guide_settings == {"x": 2}


def test_settings_of_a_replaced_prior_go_with_it(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("prior: nested\nprior.rate: 3\nguide.x: 2\n", encoding="utf-8")
    config = fields("--preset", str(preset), "--prior", "fixed", "--prior.bits", "8")
    assert config.prior_settings == {"bits": 8} and config.guide_settings == {"x": 2}
    assert fields("--preset", str(preset), "--prior", "nested").prior_settings == {"rate": 3}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "--ranks", "4"], "unknown argument '--ranks': did you mean '--rank'?"),
        (["train", "--epoch=4"], "unknown argument '--epoch=4': did you mean '--epochs'?"),
        (["train", "--priors.rate", "4"], "unknown argument '--priors.rate'"),
        (["train", "--rank"], "argument --rank: expected one argument"),
        (["train", "--rank", "0"], "rank must be from 1 to 65,536, got 0"),
        (["train", "--precision", "fp16"], "use bf16"),
        (["train", "--prior.rate"], "--prior.rate needs a value"),
        (["train", "--prior.rate", "--rank", "3"], "--prior.rate needs a value"),
        (["train", "--prior.rate", "1", "--prior.rate=2"], "--prior.rate is given twice"),
        (["train", "--prior.rate", "[1"], "--prior.rate must be a number, a word or a YAML list, got '[1'"),
        (["train", "--preset", "dmo"], "unknown preset 'dmo': did you mean 'demo'?"),
        (["train", "--if_finished", "delete"], "argument --if_finished: invalid choice: 'delete'"),
        (["show"], "the following arguments are required: run"),
        (["train", "--learning-rate", "1"], "unknown argument '--learning-rate': it is --lr here"),
        (["train", "demo"], "unknown argument 'demo': a preset is chosen by --preset demo"),
        (["train", "--device", "cuda"], "unknown argument '--device': a GPU is used where torch finds one"),
        (["train", "--lr", "0,01"], "lr must be a number or none, got '0,01': write 0.01"),
        (["show", "nowhere"], "there is no folder nowhere: "),
        (["priors", "--all"], "unknown argument '--all'"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_the_command_alone_shows_its_help(capsys):
    assert main([]) == 2 and "usage: pyro-blora" in capsys.readouterr().err


def test_an_error_in_a_users_function_names_its_line(capsys, tmp_path, monkeypatch):
    file, output = tmp_path / "mine.py", tmp_path / "runs"
    file.write_text(
        "def late(layout):\n    return inverse(0)\n\n\ndef inverse(x):\n    return 1 / x\n", encoding="utf-8"
    )
    said = refused(
        capsys, "train", "--quiet", "--max_train", "16", "--prior", f"{file}:late", "--output_dir", str(output)
    )
    assert f"{file}, line 6: ZeroDivisionError: division by zero" in said and not output.exists()
    monkeypatch.setenv("PYRO_BLORA_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["train", "--max_train", "16", "--prior", f"{file}:late", "--output_dir", str(output)])


def test_what_stands_where_a_run_should_go_is_named(capsys, tmp_path):
    file = tmp_path / "runs"
    file.touch()
    assert "is a file: give a folder" in refused(capsys, "train", "--quiet", "--output_dir", str(file))
    there = RunConfig(output_dir=str(tmp_path / "other"))
    there.folder.mkdir(parents=True)
    assert "is there, but is no finished run" in refused(capsys, "train", "--quiet", "--output_dir", there.output_dir)


def test_a_message_of_many_lines_becomes_one(capsys, tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("task: [rte\nrank: 4\n", encoding="utf-8")
    assert "mine.yaml is not YAML" in refused(capsys, "train", "--preset", str(preset))


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    monkeypatch.setenv("PYRO_BLORA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rank must be from 1 to 65,536"):
        main(["train", "--rank", "0"])


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_run_says_how_to_resume(capsys, monkeypatch, signum, code):
    def interrupted(argv):
        raise Interrupted(signum, "the same command resumes it")

    monkeypatch.setattr(command_line, "_command", interrupted)  # the real signal would end the tests too
    assert main(["train"]) == code
    assert "interrupted; the same command resumes" in capsys.readouterr().err


def test_no_checkpoint_is_promised_where_there_is_none(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_command", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "pyro-blora: interrupted\n"


@pytest.mark.parametrize("module", [("-m", "pyro_blora"), ("experiments/train.py",)], ids=["pyro-blora", "train.py"])
def test_a_process_ends_with_one_line_and_exit_code_2(module):
    command = [] if module[0].endswith("train.py") else ["train"]
    done = process(*command, "--rank", "0", module=module)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pyro-blora: error: rank must be from 1 to 65,536") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "pyro_blora", "methods"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(timeout=120) == 128 + signal.SIGPIPE


def test_help_and_mistakes_need_no_torch():
    code = (
        "import sys; from pyro_blora.__main__ import main; print(main(['train', '--rank=0']), 'torch' in sys.modules)"
    )
    assert process(module=("-c", code)).stdout.split() == ["2", "False"]


@pytest.mark.parametrize(("command", "name"), [("priors", "bops"), ("guides", "mean_field")])
def test_the_registered_laws_are_listed_with_their_settings(command, name, capsys):
    assert main([command]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == name and len(line.split()) > 1 for line in lines)
    assert all(line.startswith(f"{'':14s}   --{command[:-1]}.") or not line.startswith(" ") for line in lines)


def test_the_default_prior_and_guide_are_registered():
    from pyro_blora.guides import GUIDES
    from pyro_blora.priors import PRIORS

    assert RunConfig().prior in PRIORS.names() and RunConfig().guide in GUIDES.names()


def test_a_folder_that_is_no_run_is_refused_by_show(capsys, tmp_path):
    assert str(tmp_path) in refused(capsys, "show", str(tmp_path))


def test_the_flags_that_stay_are_there():
    stay = "task backbone glue_dir prior guide estimator adapter rank alpha target_modules scope max_train epochs"
    stay += " batch_size lr seed draws output_dir"
    assert set(stay.split()) <= set(field_names())


def test_help_lists_all_that_can_be_chosen_by_name_without_importing_it(capsys):
    from pyro_blora.config import METHODS
    from pyro_blora.guides import GUIDES
    from pyro_blora.priors import PRIORS

    done = process("-X", "importtime", "-m", "pyro_blora", "train", "--help", module=())
    assert done.returncode == 0 and "pyro_blora.config" in done.stderr and "torch" not in done.stderr
    sections = dict(section.partition(":\n")[::2] for section in done.stdout.split("\n\n"))
    listed = {key.partition(",")[0]: {line.split()[0] for line in rows.splitlines() if line.strip()}
              for key, rows in sections.items()}  # fmt: skip
    own = {registry.kind: {n for n in registry.names() if registry.resolve(n).__module__.startswith("pyro_blora.")}
           for registry in (PRIORS, GUIDES)}  # fmt: skip
    assert (listed["methods"], listed["priors"], listed["guides"]) == (set(METHODS), own["prior"], own["guide"])
    assert "As `bops`, with the rate adapted" in done.stdout and "(bops=0.1, denominator='adapted'" in done.stdout


def test_methods_are_listed_with_the_flags_that_they_set(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "sets --prior fixed --prior.bits 32 --adapter none" in out and "proposes --lr 5e-05" in out


def test_a_method_replaces_what_the_preset_says_of_it_and_the_line_overrides_what_it_proposes(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("prior: bops\nprior.rate: 3\nlr: 1.0e-4\nrank: 4\n", encoding="utf-8")
    config = fields("--preset", str(preset), "--method", "full")
    assert (config.prior, config.prior_settings, config.lr, config.rank) == ("fixed", {"bits": 32}, 5e-5, 4)
    assert fields("--preset", str(preset), "--method", "full", "--lr", "2e-5").lr == 2e-5
    assert fields("--method", "qat_lora", "--prior.bits", "4").prior_settings == {"bits": 4}
    preset.write_text("method: lora\nlr: 0.5\n", encoding="utf-8")
    assert (fields("--preset", str(preset)).prior, fields("--preset", str(preset)).lr) == ("fixed", 0.5)


def test_a_method_that_is_contradicted_is_refused(capsys):
    assert "--prior nested contradicts --method lora" in refused(
        capsys, "train", "--method", "lora", "--prior", "nested"
    )


def test_a_command_that_trained_leaves_the_group_of_its_processes(monkeypatch, capsys, tmp_path):
    """Exiting within it aborts now and then, which no test can wait for."""
    import torch.distributed as dist

    from pyro_blora import run

    within = []
    monkeypatch.setattr(run, "train_run", lambda config, **_: within.append(dist.is_initialized()) or tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert main(["train", "--preset", "demo", "--output_dir", str(tmp_path)]) == 0
    assert within == [True] and not dist.is_initialized() and capsys.readouterr().out == f"{tmp_path}\n"


def spin_count(module, **environment):
    """The GOMP_SPINCOUNT that libgomp has read when a process has imported torch, from its own words."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, *module], cwd=ROOT, env={**kept, "OMP_DISPLAY_ENV": "verbose", **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = {line.partition("=")[2].strip().strip("'") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}
    if not found:
        pytest.skip("this torch does not use libgomp")
    assert len(found) == 1, done.stderr
    return found.pop()


def test_threads_spin_briefly():
    tasks = ("-m", "pyro_blora", "tasks")  # imports torch
    assert spin_count(tasks) == "1000"
    assert spin_count(("experiments/grid.py", "nothing.yaml")) == "1000"


def test_a_chosen_wait_policy_stays(monkeypatch):
    from pyro_blora.machine import spin_briefly

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "77"


@pytest.mark.parametrize("script", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.name)
def test_every_script_asks_for_it_before_it_imports_torch(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    early = ("import torch", "from pyro_blora", "from experiments", "import pyro", "import datasets", "import sklearn")
    first = next((line for line in lines if line.startswith(early)), "")
    if first not in ("", "from pyro_blora.__main__ import main"):  # no torch in its process; main asks for it
        assert first == "from pyro_blora.machine import spin_briefly"
        assert lines[lines.index(first) + 2].startswith("spin_briefly()")
