"""What the README says is what happens."""

import re
from pathlib import Path

import explaind

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_is_as_short_as_it_says(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "is the example that raised the logit" in capsys.readouterr().out
    assert explaind.open(tmp_path / "runs" / "readme").steps == 20
    assert 18 <= sum(bool(line.strip()) for line in example.splitlines()) <= 22


def test_its_map_names_every_room():
    rooms = {p.parent.name for p in (ROOT / "explaind").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"`explaind/(\w+)/`", README))


def test_every_verb_is_there_and_no_other(capsys):
    from explaind.cli import app

    said = set(re.findall(r"^explaind (\w+)", README, re.MULTILINE))
    assert said == {name for name in app if not name.startswith("-")}


def test_its_two_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert "make demo" in README
    assert "make test" in README
