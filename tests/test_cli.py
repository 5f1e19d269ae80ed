"""The command line: what doctor finds on any installation, and the demo from the recording to the report."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import stablekern
from stablekern import _registry, training
from stablekern.cli import doctor, main

COMMAND = [sys.executable, "-m", "stablekern"]
PIECES = {"mne", "edfio", "typer", "rich", "matplotlib"}
DEMO = ["demo", "--steps", "3", "--compare-every", "2", "--window-seconds", "2", "--batch-size", "2"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, "TRITON_INTERPRET": "", **environment}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, env=settings, cwd="/")


@pytest.fixture
def base_install(tmp_path):
    """PYTHONPATH of an interpreter that cannot import what the extras bring."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {PIECES!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    return os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_runs_on_a_base_installation(base_install):
    found = run("doctor", "--json", PYTHONPATH=base_install)
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)  # fails if anything else is on stdout
    assert facts["usable"] and facts["problems"] == []
    assert facts["versions"]["torch"] == torch.__version__ and facts["native"]["ready"], facts["native"]
    assert {row["op"] for row in facts["ops"]} >= {"focal_loss"}
    assert all(row["backends"][f"{row['op']}_fwd"] for row in facts["ops"] if f"{row['op']}_fwd" in row["backends"])
    keys = re.findall(r"^    - (`.*)", doctor.collect.__doc__, re.MULTILINE)
    documented = {key for line in keys for key in re.findall(r"`(\w+)`", line.partition(":")[0])}
    documented |= set(re.findall(r"`(usable|problems|gpu_reason)`", doctor.collect.__doc__))
    assert set(facts) == documented


def test_other_commands_on_a_base_installation_say_what_to_install(base_install):
    found = run("demo", PYTHONPATH=base_install)
    assert found.returncode == 2 and found.stdout == ""
    wanted = "stablekern demo needs the extras: pip install 'stablekern[cli,eeg]'"
    assert found.stderr.startswith(wanted) and found.stderr.count("\n") == 1


def test_the_base_installation_has_help_and_refuses_the_rest(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["--help"]) == main(["doctor", "--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["doctor", "--jsn"]) == main(["train"]) == main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "usage: stablekern" in shown.err


def test_the_parser_has_help_and_exit_codes(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "doctor" in shown and "demo" in shown
    assert main(["nothing"]) == main(["demo", "--steps", "0"]) == main(["doctor", "--jsn"]) == 2


def test_doctor_as_text_says_the_same(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    facts = doctor.collect()
    for value in (torch.__version__, facts["system"]["cpu"], facts["native"]["simd"], facts["cache"]["path"]):
        assert value in shown
    assert all(row["op"] in shown for row in facts["ops"]) and "This machine can run every op." in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "typer" in shown and "Settings" in shown and "none  no variable of the package is set" in shown


def test_doctor_without_building_builds_nothing(tmp_path):
    found = run("doctor", "--json", "--no-build", STABLEKERN_CACHE_DIR=str(tmp_path / "cache"))
    assert found.returncode == 0, found.stderr
    facts = json.loads(found.stdout)
    assert not facts["native"]["ready"] and facts["native"]["reason"].startswith("not built yet")
    assert facts["usable"] and not list((tmp_path / "cache").glob("native-*"))
    row = next(row for row in facts["ops"] if row["op"] == "focal_loss")
    assert set(row["backends"].values()) == {"torch"} and row["reasons"]["native"].startswith("not built yet")


def test_doctor_without_a_compiler_says_so(tmp_path):
    missing = {"CXX": "no-such-compiler", "STABLEKERN_CACHE_DIR": str(tmp_path / "cache")}
    found = run("doctor", "--json", **missing)
    facts = json.loads(found.stdout)
    assert found.returncode == 0 and facts["usable"] and facts["compiler"]["path"] is None
    assert all("no C++ compiler found" in facts[part]["reason"] for part in ("compiler", "native"))


def test_doctor_reports_settings_and_survives_illegal_ones(monkeypatch, capsys):
    monkeypatch.setenv("SEIZURE_MAMBA_FORCE_FALLBACK", "yes")
    monkeypatch.setenv("BGB_LIMIT_FILES", "12")
    facts = doctor.collect()
    assert facts["usable"] and facts["mamba_fallback"]
    shown = {entry["name"]: entry for entry in facts["settings"]}
    assert shown["BGB_LIMIT_FILES"]["value"] == 12 and "recordings" in shown["BGB_LIMIT_FILES"]["effect"]
    monkeypatch.setenv("STABLEKERN_BACKEND", "fortran")
    monkeypatch.setenv("BGB_SAFE_CLAMP_MIN", "nan")
    assert main(["doctor"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "`STABLEKERN_BACKEND` must be one of native, torch, triton, cuda: got 'fortran'" in text
    assert "`BGB_SAFE_CLAMP_MIN` must be a finite number" in text and "Something has to be put right" in text
    assert len(doctor.collect()["problems"]) == 2


def test_doctor_shows_what_a_forced_backend_cannot_do(monkeypatch):
    monkeypatch.setenv("STABLEKERN_BACKEND", "torch")
    facts = doctor.collect()
    assert facts["usable"] and all(set(row["backends"].values()) == {"torch"} for row in facts["ops"])
    monkeypatch.setenv("STABLEKERN_BACKEND", "cuda")
    facts = doctor.collect()
    assert not facts["usable"]
    assert "focal_loss cannot run on cpu (cuda: the op has no cuda kernel)" in facts["problems"]


def test_doctor_agrees_with_what_runs():
    x = torch.randn(8)
    ran = _registry.backend_for("focal_loss_fwd", x, x, 0.5, 2.0, 1.0)
    assert _registry.explain("focal_loss_fwd", "cpu")[0] == ran


def test_doctor_describes_a_gpu(monkeypatch):
    card = types.SimpleNamespace(name="NVIDIA X", major=8, minor=9, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    facts = doctor.collect()
    assert facts["gpus"] == [{"name": "NVIDIA X", "capability": "8.9", "memory_gib": 24.0}]
    row = next(row for row in facts["ops"] if row["op"] == "focal_loss" and row["device"] == "cuda")
    assert row["backends"]["focal_loss_fwd"] == "triton" and row["reasons"]["cuda"] == "the op has no cuda kernel"
    text = doctor.text(facts)
    assert "NVIDIA X, compute capability 8.9, 24 GiB" in text and "focal_loss (cuda)" in text
    assert ("GPU", "NVIDIA X") in doctor.summary(facts)


def _nvrtc(monkeypatch, version) -> dict:
    module = types.SimpleNamespace(nvrtcVersion=version)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", module)
    return doctor._nvrtc()


def test_doctor_asks_nvrtc_for_its_version(monkeypatch):
    def unloadable():
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    assert _nvrtc(monkeypatch, lambda: (0, 13, 0)) == {"version": "13.0", "reason": None}
    assert "Failed to dlopen" in _nvrtc(monkeypatch, unloadable)["reason"]
    assert _nvrtc(monkeypatch, lambda: (5, 0, 0))["version"] is None
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert "cuda-bindings is not installed" in doctor._nvrtc()["reason"]


# ---- demo ------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Alternative texts and sources of the images, every link, and whether all tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values)
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_report(path: str, images: int) -> str:
    page = _Page(Path(path).read_text())
    assert page.open == [] and len(page.images) == images
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert all(link.startswith("data:") for link in page.links), "the report must stand alone"
    assert "nan" not in page.text.lower().split()
    return page.text


def test_demo_writes_report_metrics_and_a_checkpoint_that_loads_in_a_new_process(tmp_path):
    done = run(*DEMO, "--json", "--out", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert "step 1/3" in done.stderr and "step 3/3" in done.stderr and "interpolated Fp1" in done.stderr
    assert summary["steps"] == 3 and not summary["interrupted"] and summary["eigh"]["batches"] == 2
    assert summary["not_finite"] == dict.fromkeys(("steps", "loss", "gradients", "parameters", "skipped"), 0)
    assert 0 <= summary["auroc"] <= 1 and summary["preset"] == "nano"

    files = {name: Path(path) for name, path in summary["files"].items()}
    assert sorted(p.name for p in files["report"].parent.iterdir()) == ["checkpoint.pt", "metrics.jsonl", "report.html"]
    text = check_report(summary["files"]["report"], images=4)
    assert f"{summary['auroc']:.3f}" in text and "torch.linalg.eigh" in text and "Delorme" in text
    steps = [json.loads(line) for line in files["metrics"].read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3] and all(s["finite"] for s in steps)
    assert steps[0]["loss"] == summary["loss"]["first"] and steps[-1]["loss"] == summary["loss"]["last"]

    code = (
        "import sys, torch; from stablekern import nn; from stablekern.training import load_checkpoint\n"
        f"torch.set_num_threads({torch.get_num_threads()}); torch.manual_seed(0)\n"
        "model, facts = load_checkpoint(sys.argv[1])\n"
        "raw = torch.load(sys.argv[1], weights_only=True)\n"
        "same = nn.SeizureDetector.from_preset(facts['preset']).eval()\n"
        "same.load_state_dict(raw['state_dict'], strict=True)\n"
        "x = torch.randn(2, 19, 512); torch.set_grad_enabled(False)\n"  # torch's products differ in the last bit by it
        "torch.save([x, model(x), same(x)], sys.argv[2])\n"
        "print(facts['step'], facts['seed'])\n"
    )
    out = tmp_path / "logits.pt"
    loaded = subprocess.run(
        [sys.executable, "-c", code, str(files["checkpoint"]), str(out)], capture_output=True, text=True, timeout=300
    )
    assert loaded.returncode == 0 and loaded.stdout.split() == ["3", "0"], loaded.stderr
    x, first, second = torch.load(out)
    here = training.load_checkpoint(files["checkpoint"])[0]
    with torch.no_grad():
        assert torch.equal(first, second) and torch.equal(first, here(x))


def test_ctrl_c_ends_the_demo_with_a_report_of_what_ran(tmp_path):
    arguments = [*DEMO, "--steps", "100000", "--json", "--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*COMMAND, *arguments], **pipes, cwd="/")
    try:
        for line in process.stderr:
            if line.startswith("step 1/100000"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    summary = json.loads(out)
    assert summary["interrupted"] and 1 <= summary["steps"] < 1000 and summary["auroc"] is not None
    assert "Stopped by Ctrl-C" in check_report(summary["files"]["report"], images=4)
    _, facts = training.load_checkpoint(summary["files"]["checkpoint"])
    assert facts["step"] == summary["steps"]


def test_the_second_ctrl_c_ends_at_once():
    from stablekern.cli.interrupt import Interrupt

    # A shell has what runs in its background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), Interrupt().watching() as interrupt:
        assert not interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt() and interrupt.seen
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_bad_file_is_one_line(tmp_path, capfd):
    garbage = tmp_path / "notes.edf"
    garbage.write_text("not a recording " * 100)
    for path, why in ((tmp_path / "absent.edf", "does not exist"), (garbage, "is not an EDF file")):
        assert main(["demo", "--edf", str(path), "--out", str(tmp_path / "runs")]) == 2
        shown = capfd.readouterr()
        assert shown.out == "" and shown.err.count("\n") == 1
        assert shown.err.startswith("stablekern demo: `") and why in shown.err
    assert main(["demo", "--window-seconds", "2.01", "--out", str(tmp_path / "runs")]) == 2
    assert "`--window-seconds` must be a multiple of 0.0625: got 2.01" in capfd.readouterr().err
    assert main(["demo", "--window-seconds", "100", "--out", str(tmp_path / "runs")]) == 2
    assert "must last at least 333 s for windows of 100 s: got 238.0 s" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_on_ones_own_recording_that_is_stopped_before_the_first_step_still_reports(tmp_path, capsys, monkeypatch):
    from stablekern.cli import demo

    monkeypatch.setattr(demo.Interrupt, "__init__", lambda self: setattr(self, "seen", True))
    sample = next((Path(stablekern.__file__).parent / "eeg" / "data").glob("*.edf"))
    own = tmp_path / "own.edf"
    own.write_bytes(sample.read_bytes())
    assert main([*DEMO, "--json", "--edf", str(own), "--out", str(tmp_path / "runs")]) == 130
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 0 and summary["auroc"] is None and summary["eigh"]["batches"] == 0
    text = check_report(summary["files"]["report"], images=0)
    assert "no step was taken" in text and "Your recording own.edf, as background" in text
    events = summary["recording"]["events"]
    assert events and all(event["onset"] > 0.7 * 238 for event in events)


def test_a_directory_that_cannot_be_made_is_one_line_before_any_training(tmp_path, capfd):
    (tmp_path / "runs").write_text("a file")
    assert main([*DEMO, "--out", str(tmp_path / "runs")]) == 2
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and str(tmp_path / "runs") in shown.err


# ---- the comparison with torch.linalg.eigh ---------------------------------------------------------------------------


def _batch_and_model():
    from stablekern.nn import SeizureDetector

    model = SeizureDetector.from_preset("nano", tcn_dropout=0.15, dropout=0.1)
    x = torch.randn(2, 19, 512)
    loss = functools.partial(stablekern.focal_loss, reduction="mean")
    return model, x, (x[:, 0] > 0).float(), loss


def test_the_comparison_changes_nothing_and_agrees_where_gaps_are_healthy():
    from stablekern.cli.demo import TorchLaplacianPE, gradient_with_torch_eigh

    model, x, y, loss = _batch_and_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, encoding = torch.get_rng_state(), model.gnn.pe
    found = gradient_with_torch_eigh(model, x, y, loss, 5)
    assert torch.equal(state, torch.get_rng_state()) and model.gnn.pe is encoding
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gradients = torch.autograd.grad(loss(model(x), y), model.parameters())  # the same dropout: the state was put back
    norm = torch.cat([g.flatten() for g in gradients]).double().norm().item()
    assert found.step == 5 and found.finite and found.grad_norm == pytest.approx(norm, rel=0.02)

    weights = torch.rand(2, 3, 19, 19) + 0.5
    adjacency = weights + weights.mT
    plain = TorchLaplacianPE(4, interval=2)(adjacency)
    degree = adjacency.double().sum(-1)
    laplacian = torch.eye(19) - adjacency.double() / (degree.unsqueeze(-1) * degree.unsqueeze(-2)).sqrt()
    values = torch.linalg.eigvalsh(laplacian)[..., :4]
    for t, graph in enumerate((0, 0, 2)):
        residual = laplacian[:, graph] @ plain[:, t].double() - plain[:, t].double() * values[:, graph, None]
        assert residual.abs().max() < 1e-5
    assert (plain.gather(-2, plain.abs().argmax(-2, keepdim=True)) > 0).all()


def test_the_comparison_counts_gradients_that_are_not_finite():
    """All edge weights equal: eigenvalues repeat, exactly so after torch's own decomposition of some of the graphs."""
    from stablekern.cli.demo import gradient_with_torch_eigh

    model, x, y, loss = _batch_and_model()
    with torch.no_grad():
        model.edge_stream.edge_out_proj.weight.zero_()
    found = gradient_with_torch_eigh(model, x, y, loss)
    assert not found.finite and math.isnan(found.grad_norm)
    gradients = torch.autograd.grad(loss(model(x), y), model.parameters())
    assert all(g.isfinite().all() for g in gradients)
