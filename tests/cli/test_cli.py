"""The command line: quick listings, one clear line for an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from checkpoint_cases import RUN, run_record, trained

import tinker_jax
from tinker_jax.checkpoints.export import export_peft
from tinker_jax.checkpoints.store import Store
from tinker_jax.cli.main import main


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("TINKER_JAX_HOME", str(tmp_path / "home"))
    made = Store()
    made.create_run(run_record())
    made.create_run(run_record("sess-2:train:0", datetime(2026, 2, 1, tzinfo=UTC)))
    for name in ("one", "two"):
        made.write(RUN, "weights", name, lambda d: (d / "x").write_text("x" * 1500), has_optimizer=True)
    return made


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def test_checkpoints_are_listed_newest_first(store, capsys):
    status, out, err = run(capsys, "checkpoint", "list")
    head, *rows = out.splitlines()
    assert (status, err) == (0, "")
    assert head.split() == ["path", "base_model", "rank", "size", "time", "expires"]
    assert [row.split()[0] for row in rows] == [f"tinker://{RUN}/weights/two", f"tinker://{RUN}/weights/one"]
    assert "tinker-jax/nano" in rows[0] and "1.5 kB" in rows[0] and rows[0].endswith("never")


@pytest.mark.parametrize("argv", [("-f", "json", "checkpoint", "list"), ("checkpoint", "list", "-f", "json")])
def test_json_can_be_asked_for_before_and_after_the_command(store, capsys, argv):
    _, out, _ = run(capsys, *argv)
    first = json.loads(out)[0]
    assert first["path"] == f"tinker://{RUN}/weights/two" and first["size_bytes"] == 1500
    assert datetime.fromisoformat(first["time"]).tzinfo is not None and first["expires_at"] is None


def test_listing_can_be_limited_to_a_run_and_another_home(store, capsys, tmp_path):
    assert json.loads(run(capsys, "-f", "json", "checkpoint", "list", "--run-id", "sess-2:train:0")[1]) == []
    status, out, _ = run(capsys, "checkpoint", "list", "--home", str(tmp_path / "empty"))
    assert (status, out) == (0, f"no checkpoints in {tmp_path / 'empty'}\n")
    status, _, err = run(capsys, "checkpoint", "list", "--run-id", "sess-9")
    assert status == 2 and err.startswith("tinker-jax: run 'sess-9' does not exist in ")


def test_runs_are_listed(store, capsys):
    _, out, _ = run(capsys, "run", "list")
    assert [row.split()[0] for row in out.splitlines()] == ["run", "sess-2:train:0", RUN]
    assert [r["run_id"] for r in json.loads(run(capsys, "run", "list", "-f", "json")[1])] == ["sess-2:train:0", RUN]


def test_info_shows_every_field(store, capsys):
    path = f"tinker://{RUN}/weights/one"
    shown = dict(line.split(maxsplit=1) for line in run(capsys, "checkpoint", "info", path)[1].splitlines())
    assert shown["path"] == path and shown["size_bytes"] == "1500 (1.5 kB)" and shown["has_optimizer"] == "True"
    assert json.loads(run(capsys, "-f", "json", "checkpoint", "info", path)[1])["lora_rank"] == 8


def test_set_ttl_sets_and_removes(store, capsys):
    path = f"tinker://{RUN}/weights/one"
    assert run(capsys, "checkpoint", "set-ttl", path, "--ttl", "7200")[0] == 0
    expires = store.get(path).expires_at
    assert expires is not None and timedelta(minutes=119) < expires - datetime.now(UTC) <= timedelta(hours=2)
    assert run(capsys, "checkpoint", "set-ttl", path, "--remove")[0] == 0
    assert store.get(path).expires_at is None
    status, _, err = run(capsys, "checkpoint", "set-ttl", path, "--ttl", "5")
    assert status == 2 and "ttl_seconds=5 is not allowed" in err


def test_delete_asks_first(store, capsys, monkeypatch):
    path = f"tinker://{RUN}/weights/one"
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    assert run(capsys, "checkpoint", "delete", path)[0] == 2
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    assert run(capsys, "checkpoint", "delete", path)[0] == 0
    assert [r.name for r in store.list_checkpoints()] == ["two"]


def test_delete_removes_all_or_none(store, capsys):
    paths = [f"tinker://{RUN}/weights/{name}" for name in ("one", "two", "three")]
    status, _, err = run(capsys, "checkpoint", "delete", "-y", *paths)
    assert status == 2 and "weights/three' does not exist" in err and len(store.list_checkpoints()) == 2
    assert run(capsys, "checkpoint", "delete", "-y", *paths[:2])[0] == 0
    assert store.list_checkpoints() == []


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("checkpoint", "info", "nonsense"), "tinker-jax: 'nonsense' is not a checkpoint path; expected tinker://"),
        (("--home", "ftp://x", "run", "list"), "tinker-jax: storage 'ftp://x': scheme 'ftp' is not supported"),
        (("export", "peft", "tinker://a/weights/b", "out"), "tinker-jax: checkpoint 'tinker://a/weights/b' does not exist"),
        (("export", "merged", "x", "out", "--max-shard-size", "big"), "tinker-jax: max_shard_size='big' is not a size"),
        (("import", "peft", os.sep), f"tinker-jax: {os.sep} has no adapter_config.json, so it is no PEFT adapter."),
    ],
)
def test_an_error_is_one_line_and_status_2(store, capsys, argv, text):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith(text) and err.count("\n") == 1


@pytest.mark.parametrize("argv", [(), ("checkpoint",), ("nonsense",), ("checkpoint", "set-ttl", "x")])
def test_wrong_usage_is_status_2(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: tinker-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "file"),
    [("peft", "adapter_config.json"), ("merged", "model.safetensors.index.json"), ("tinker", "adapter_model.safetensors")],
)
def test_export_writes_each_layout(tmp_path, checkpoint, capsys, layout, file):
    path = trained(tmp_path / "home", checkpoint("qwen3"))
    capsys.readouterr()
    more = ("--max-shard-size", "30KB") if layout == "merged" else ()
    status, out, err = run(capsys, "export", layout, path, str(tmp_path / "out"), "--home", str(tmp_path / "home"), *more)
    assert (status, out, err) == (0, f"{tmp_path / 'out'}\n", "")
    assert (tmp_path / "out" / file).exists()


def test_import_tells_the_path_of_the_checkpoint_that_it_made(tmp_path, checkpoint, capsys):
    base, home = str(checkpoint("qwen3")), str(tmp_path / "home")
    adapter = export_peft(trained(tmp_path / "home", Path(base)), tmp_path / "adapter", home=home)
    capsys.readouterr()
    status, out, err = run(capsys, "import", "peft", str(adapter), "--base-model", base, "--home", home)
    assert (status, err) == (0, "") and Store(home).get(out.strip()).base_model == base


def test_version_is_the_packages(capsys):
    assert run(capsys, "version")[:2] == (0, f"{tinker_jax.__version__}\n")


@pytest.mark.parametrize("argv", [("--version",), ("--home", "x", "--version")])
def test_version_can_be_asked_for_as_an_option(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0 and capsys.readouterr().out == f"{tinker_jax.__version__}\n"


def test_info_names_a_damaged_record_and_the_list_shows_the_others(store, capsys, caplog):
    damaged = Path(store.home) / "runs" / RUN / "weights" / "one.json"
    damaged.write_bytes(b"\xff")
    status, out, err = run(capsys, "checkpoint", "info", f"tinker://{RUN}/weights/one")
    assert (status, out) == (2, "")
    assert err == f"tinker-jax: {damaged} is damaged: not UTF-8 (byte 0). Remove it to go on without it.\n"
    status, out, _ = run(capsys, "checkpoint", "list")
    assert status == 0 and [row.split()[0] for row in out.splitlines()[1:]] == [f"tinker://{RUN}/weights/two"]
    assert str(damaged) in caplog.text


def test_what_the_terminal_cannot_show_is_shown_in_escapes(store):
    store.create_run(replace(run_record("sess-3:train:0"), base_model="mod\u00e8le\udcff"))
    script = "import sys; from tinker_jax.cli.main import main; sys.exit(main(['run', 'list']))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "mod\\xe8le\\udcff" in done.stdout, done.stderr


def test_listing_loads_no_jax_and_closing_the_pipe_is_no_error(store):
    script = (
        "import sys; from tinker_jax.cli.main import main; status = main(['checkpoint', 'list']);"
        "sys.exit(status or any(m in sys.modules for m in ('jax', 'orbax', 'torch', 'transformers')))"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False).returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tinker_jax.cli.main", "run", "list"]
    closed = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, b"")
